"""MLX's step: how many kernels it takes, how parameters share buffers, what checkpointing changes (nothing)."""

import collections
import dataclasses
import io
import re

import mlx.core as mx
import numpy as np
import pytest
from fakes.support import options
from mlx.utils import tree_flatten

from nanogpt_mac.backends import kinds, mlx_backend, mlx_parts
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt import mlx_gpt
from nanogpt_mac.gpt.spec import GPTSpec

# What changes how an array is seen and computes nothing.
VIEWS = {
    *("Reshape", "Transpose", "Broadcast", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Split", "Slice"),
    *("AsStrided", "StopGradient", "BroadcastAxes", "View", "CustomTransforms"),
}
QUICK = GPTSpec(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65)


@pytest.fixture
def shared(monkeypatch):
    """Parameters in two buffers, as on a GPU."""
    of = mlx_backend._Layout.of
    monkeypatch.setattr(mlx_backend._Layout, "of", lambda spec, one_buffer: of(spec, True))


def primitives(results):
    dot = io.StringIO()
    mx.export_to_dot(dot, *(array for _, array in tree_flatten(results)))
    found = re.findall(r'label ?= ?"([^"]+)", shape ?= ?rectangle', dot.getvalue())
    return collections.Counter(label.split()[0] for label in found)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_iteration_takes_at_most_350_primitives(shared, dropout):
    """The compiled quick recipe as a GPU takes it, but for layer norm and attention, which a CPU takes apart."""
    tokens = Tokens({"train": np.zeros(1000, np.uint16)}, 64)
    backend = kinds.create(dataclasses.replace(QUICK, dropout=dropout), options("mlx", compile=True), tokens)
    batch = backend._batch("train", np.arange(12))
    results = backend._step(batch, mx.array(1e-3), mx.random.key(0), mx.array(0.0))
    counts = primitives([*results, backend.trained])
    assert counts["Matmul"] + counts["AddMM"] == 75  # of the whole graph: 25 products, and two more each for gradients
    assert counts["RandomBits"] == (dropout > 0)
    assert sum(number for name, number in counts.items() if name not in VIEWS) <= 350


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_shared_buffers_change_nothing_and_names_stay(make, spec, starts, monkeypatch, dtype, accumulation):
    spec = dataclasses.replace(spec, dropout=0.2, bias=True)
    alone = make("mlx", spec=spec, dtype=dtype)
    of = mlx_backend._Layout.of
    monkeypatch.setattr(mlx_backend._Layout, "of", lambda spec, one_buffer: of(spec, True))
    together, resumed = (make("mlx", spec=spec, dtype=dtype) for _ in range(2))
    assert (len(alone.trained["weights"]), len(together.trained["weights"])) == (len(spec.shapes()), 2)
    losses = [[b.wait(b.step(starts(i, accumulation), 1e-3)) for i in range(3)] for b in (alone, together)]
    np.testing.assert_allclose(*losses, rtol=1e-5 if dtype == "float32" else 1e-3)
    resumed.restore(together.state())
    a, b, c = (backend.state() for backend in (alone, together, resumed))
    assert {n: w.shape for n, w in b.weights.items()} == spec.shapes()
    for tree in ("weights", "exp_avg", "exp_avg_sq"):
        for name, array in getattr(a, tree).items():
            np.testing.assert_allclose(getattr(b, tree)[name], array, atol=1e-5 if dtype == "float32" else 1e-3)
            np.testing.assert_array_equal(getattr(c, tree)[name], getattr(b, tree)[name])


@pytest.mark.parametrize(("name", "compiled"), [("cpu", False), ("mlx", False), ("mlx", True)])
def test_checkpointing_changes_neither_loss_nor_update(make, spec, starts, name, compiled):
    """With dropout: what is computed anew must drop the same."""
    spec = dataclasses.replace(spec, dropout=0.3, n_layer=1)
    kept, again = (make(name, spec=spec, compile=compiled, checkpointing=on) for on in (False, True))
    for i in range(2):
        assert again.wait(again.step(starts(i), 1e-2)) == pytest.approx(kept.wait(kept.step(starts(i), 1e-2)), rel=1e-6)
    for n, weights in kept.state().exp_avg.items():
        np.testing.assert_allclose(again.state().exp_avg[n], weights, atol=1e-7)
    idx, targets = np.arange(16)[None] % 65, np.arange(1, 17)[None] % 65
    (a, grads), (b, others) = kept.gradients(idx, targets), again.gradients(idx, targets)
    assert a == pytest.approx(b, rel=1e-6)
    for n, gradient in grads.items():
        np.testing.assert_allclose(others[n], gradient, atol=1e-6)


def test_checkpointing_takes_less_memory():
    spec = GPTSpec(n_layer=16, n_head=2, n_embd=32, block_size=32, vocab_size=65)
    tokens, peaks = Tokens({"train": np.zeros(4000, np.uint16)}, 32), []
    for on in (False, True):
        backend = kinds.create(spec, options("mlx", checkpointing=on), tokens)
        mx.synchronize()
        mx.reset_peak_memory()
        backend.wait(backend.step(np.arange(16)[None], 1e-3))
        peaks.append(backend.iteration_bytes())
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_accumulation_takes_one_batchs_memory(compiled):
    """The forward pass of a batch begins when the one before has come back."""
    tokens, peaks = Tokens({"train": np.zeros(4000, np.uint16)}, 32), []
    spec = GPTSpec(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=65)
    for count in (2, 8):
        backend = kinds.create(spec, options("mlx", compile=compiled), tokens)
        mx.synchronize()
        mx.reset_peak_memory()
        backend.wait(backend.step(np.zeros((count, 8), int), 1e-3))
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.2 * peaks[0]


def test_the_host_waits_at_the_memory_limit():
    before = mx.set_memory_limit(2**40)
    try:
        tokens = Tokens({"train": np.zeros(4000, np.uint16)}, 64)
        backend = kinds.create(QUICK, options("mlx", memory_limit_gb=1.5), tokens)
        assert backend.details["memory_limit"] == mx.set_memory_limit(2**40) == 1_500_000_000
        with pytest.raises(InputError, match=r"^backend\.memory_limit_gb=-1: use 0 or more$"):
            kinds.create(QUICK, options("mlx", memory_limit_gb=-1.0), tokens)
    finally:
        mx.set_memory_limit(before)


def test_what_mlx_holds_already_counts_to_the_limit(monkeypatch):
    """Else a second model of a process would wait for every operation of its own."""
    monkeypatch.setattr(mlx_backend.MLXBackend, "device_of", classmethod(lambda cls, kind: "cuda"))
    monkeypatch.setattr(mlx_backend.MLXBackend, "free_memory", lambda self: 10**9)
    before, held = mx.set_memory_limit(2**40), mx.zeros(3 * 10**7)
    try:
        mx.eval(held)
        backend = kinds.create(QUICK, options("mlx"), Tokens({"train": np.zeros(4000, np.uint16)}, 64))
        assert backend.details["memory_limit"] == mx.set_memory_limit(2**40) >= held.nbytes + 8 * 10**8
    finally:
        mx.set_memory_limit(before)


def test_a_token_is_traced_once_whatever_the_length(make, spec, monkeypatch):
    """Of a whole text Python goes through a block twice: of the prompt and of a token."""
    calls, before = [], mlx_gpt.Block.before
    monkeypatch.setattr(mlx_gpt.Block, "before", lambda self, x: calls.append(x.shape[:2]) or before(self, x))
    backend = make("mlx", compile=True)
    decoder = backend.decode()
    first = [decoder(np.array([3, 5]))] + [decoder(np.array([t])) for t in range(8)]
    other = backend.decode()
    second = [other(np.array([3, 5]))] + [other(np.array([t])) for t in range(8)]
    assert calls == [(1, 2)] * spec.n_layer + [(1, 1)] * spec.n_layer
    np.testing.assert_array_equal(first, second)


def test_one_token_has_no_mask(make, monkeypatch):
    """With one, MLX's CUDA build takes its attention apart."""
    masks, attention = [], mlx_gpt.scaled_dot_product_attention
    monkeypatch.setattr(
        mlx_gpt, "scaled_dot_product_attention", lambda *a: masks.append((a[1].shape[2], a[3])) or attention(*a)
    )
    decoder = make("mlx").decode()
    for tokens in ([3, 5], [1], [2]):
        decoder(np.array(tokens))
    assert list(dict.fromkeys(masks)) == [(2, "causal"), (3, None), (4, None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_casts_weights_once_and_leaves_training_alone(make, starts, dtype):
    """Tokens are by the weights of a decoder's beginning; the next iteration is that of a run that never decoded."""
    one, other = (make("mlx", dtype=dtype) for _ in range(2))
    for backend in (one, other):
        backend.wait(backend.step(starts(0), 1e-2))
    prompt = np.arange(5) % 7
    decoder = one.decode()
    decoder(prompt[:3])
    decoder(prompt[3:4])
    block = one.decoding.transformer["h"][0]
    assert block.attn.c_attn.weight.dtype == block.mlp.c_proj.weight.dtype == getattr(mx, dtype)
    assert one.decoding.transformer["wte"].weight.dtype == block.ln_1.weight.dtype == mx.float32
    close = {"rtol": 0, "atol": 1e-5 if dtype == "float32" else 3e-2}
    np.testing.assert_allclose(decoder(prompt[4:]), one.logits(prompt[None])[0, -1], **close)
    assert one.wait(one.step(starts(1), 1e-2)) == other.wait(other.step(starts(1), 1e-2))
    np.testing.assert_allclose(one.decode()(prompt), other.logits(prompt[None])[0, -1], **close)


def test_what_gives_a_function_its_gradient_is_no_kernel():
    x, weight, up = mx.ones((4, 8)), mx.ones((3, 8)), mx.ones((4, 3))
    mx.eval(x, weight, up)
    assert mlx_parts.kernels([mlx_gpt.product(x, weight)]) == 1
    assert mlx_parts.kernels(mx.vjp(mlx_gpt.product, [x, weight], [up])[1]) == 2
