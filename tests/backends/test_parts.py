"""The parts of an iteration make up the iteration: their chain is the model, and nothing of it is left out or twice."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from fakes.numpy_backend import NumPyBackend
from fakes.support import VARIANTS, WITH_PARTS

from nanogpt_mac.backends import base
from nanogpt_mac.backends.parts import NAMES

# Neither torch compiled nor tinygrad without its replay: minutes. tinygrad's own tests look at one layer; JAX compiles
# each part.
EAGER_AND_MLX = [
    pytest.param(*v, marks=pytest.mark.slow) if v[0] in ("tinygrad", "jax") else v
    for v in VARIANTS
    if v[0] in WITH_PARTS and v not in (("cpu", True), ("tinygrad", False))
]
frameworks = pytest.mark.parametrize("name", [name for name in WITH_PARTS if name != "tinygrad"])  # it has its own


def cross_entropy(logits, targets):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(logs, targets[..., None], -1).mean()


@pytest.mark.parametrize(("name", "compiled"), EAGER_AND_MLX)
@pytest.mark.parametrize("given", [{}, {"dtype": "bfloat16"}, {"checkpointing": True}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_chain_of_all_parts_is_the_model(make, spec, tokens, starts, name, compiled, given, bias):
    if name == "tinygrad" and "checkpointing" in given:
        pytest.skip("tinygrad has no checkpointing")
    spec = dataclasses.replace(spec, bias=bias)
    backend = make(name, spec=spec, compile=compiled, **given)
    at = starts(0)
    parts = backend.parts(at)
    window = tokens.windows("train", at[0])
    expected = cross_entropy(backend.logits(window[:, :-1]), window[:, 1:])
    assert float(parts.loss().item()) == pytest.approx(expected, rel=2e-3 if given.get("dtype") else 1e-5)


@frameworks
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_dropout_the_chain_is_the_models_own_training(make, spec, starts, name, checkpointing):
    """Given the draws that the parts have, the model itself has the same loss, and another one without them."""
    spec = dataclasses.replace(spec, dropout=0.2, n_layer=1)
    backend = make(name, spec=spec, checkpointing=checkpointing)
    parts = backend.parts(starts(0))
    values, model = parts.values, backend.model
    torch.manual_seed(3)
    found = float(parts.loss())
    torch.manual_seed(3)
    keep = () if name == "cpu" else (parts._masks(values["key"]),)
    given = values["tokens"], values["targets"]
    if name == "mlx":
        backend._evaluated().train()
    if name == "jax":  # whose twin has no weights of its own
        given = parts.weights, *given
    assert found == pytest.approx(float(model.loss(*given, *keep).item()), rel=1e-5)
    if name != "jax":
        model.eval()
    assert found != pytest.approx(float(model.loss(*given).item()), rel=1e-3)


@pytest.mark.parametrize(("name", "compiled"), EAGER_AND_MLX)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_parameter_is_of_one_part(make, spec, starts, name, compiled, dropout):
    spec = dataclasses.replace(spec, dropout=dropout, n_layer=3)
    parts = make(name, spec=spec, compile=compiled).parts(starts(0, 2)).parts
    owned = [parameter for part in parts.values() for parameter in part.parameters]
    assert sorted(owned) == sorted(spec.shapes())
    masks = {"dropout masks": 2} if dropout else {}
    gradients = 1 if (name, compiled) == ("jax", False) else 2  # where it keeps the first and adds the second to it
    assert {part.name: part.times for part in parts.values()} == {
        "batch": 1, **masks, "embedding": 2, "layer norms": 14, "attention": 6, "residual sums": 12, "MLP": 6,
        "head and loss": 2, "gradients": gradients, "clip": 1, "optimizer": 1,
    }  # fmt: skip
    assert set(parts) <= set(NAMES)


@pytest.mark.parametrize(("name", "compiled"), EAGER_AND_MLX)
@pytest.mark.parametrize("dtype", base.DTYPES)
def test_parts_give_gradients_of_what_they_own_and_leave_the_weights(make, spec, starts, name, compiled, dtype):
    if name == "cpu" and dtype == "float16":
        pytest.skip("torch has no float16 training on a CPU")
    spec = dataclasses.replace(spec, dropout=0.2)
    backend = make(name, spec=spec, compile=compiled, dtype=dtype)
    before = backend.state().weights
    parts = backend.parts(starts(0, 2))
    moving = {"embedding": 0, "layer norms": 1, "attention": 1, "MLP": 1, "residual sums": 2, "head and loss": 2}
    for part in parts.parts.values():
        for number in range(3):
            outputs = [part.forward(number), *([part.both(number)] if part.both else [])]
            parts.wait([array for each in outputs for array in each])
            assert all(np.isfinite(parts.peek(each[0])) for each in outputs)
        if part.both:
            places = 1 if part.name == "embedding" else part.times // 2
            gradients = len(part.parameters) // places + moving[part.name]
            made = 0 if name == "cpu" else 1  # the others give the output beside them
            assert len(part.both(0)) == gradients + made
    assert all((backend.state().weights[n] == w).all() for n, w in before.items())
    loss, norm = backend.wait(backend.step(starts(1, 2), 1e-3))  # and it can still be trained
    assert np.isfinite([loss, norm]).all()


def test_a_back_end_may_give_none(spec, tokens, starts):
    backend = object.__new__(NumPyBackend)
    assert backend.parts(starts(0)) is None


class Slow(torch.autograd.Function):
    """The identity, with a pause on either way."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.04)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.15)
        return gradient


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("part", "thing", "method"), [("MLP", "mlp", "forward"), ("attention", "attn", "forward")])
def test_the_profiler_finds_a_pause_in_its_part(make, starts, checkpointing, part, thing, method):
    backend = make("cpu", checkpointing=checkpointing)
    at = starts(0)

    def step():
        backend.wait(backend.step(at, 0.0))

    for block in backend.model.transformer["h"]:
        module = getattr(block, thing)
        module.forward = lambda *given, own=module.forward: Slow.apply(own(*given))
    found = backend.parts(at).inside(step)
    forward, backward = found.parts[part]
    # What a block computes anew ends before its last pause, behind which nothing is kept for the backward pass.
    layers, anew = 2, 2 * 40 if checkpointing and part == "attention" else 0
    assert layers * 40 <= forward < layers * 100  # a busy machine adds to it
    assert layers * 150 + anew <= backward < layers * 250 + anew
    assert max(ms for name, both in found.parts.items() if name != part for ms in both) < layers * 40
    assert 0.8 * found.iteration_ms < sum(map(sum, found.parts.values())) <= found.iteration_ms
    compiled = make("cpu", compile=True).parts(at)
    assert compiled.inside(step).why_not


@pytest.mark.skipif("mlx" not in WITH_PARTS, reason="needs MLX")
def test_kernels_of_an_mlx_graph_are_counted_without_its_views():
    import mlx.core as mx

    from nanogpt_mac.backends.mlx_parts import kernels

    x, w = mx.ones((4, 8)), mx.ones((8, 3))
    mx.eval(x, w)
    assert kernels([mx.exp((x @ w).T[None] + 1.0)]) == 3  # the product, the sum, the exponential
    assert kernels(mx.compile(lambda a, b: [mx.exp((a @ b).T[None] + 1.0)])(x, w)) == 2  # fused
