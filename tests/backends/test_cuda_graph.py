"""A CUDA graph of an iteration against the same iteration sent kernel by kernel. Needs an NVIDIA GPU."""

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanogpt_mac.backends.torch_world import TorchWorld

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CLOSE = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 5e-3}  # cuBLAS may compute otherwise for another stream


@pytest.fixture
def pair(make, spec):
    """The same back end with a graph and without, both with our kernels: they draw other masks than torch's."""

    def pair(dropout=0.2, **options):
        own = dataclasses.replace(spec, dropout=dropout)
        return [make("cuda", spec=own, cuda_graph=graph, own_kernels=True, **options) for graph in (True, False)]

    return pair


def losses(backend, starts, first, last, accumulation=1):
    rates = [1e-3 * (1 + i % 3) for i in range(first, last)]
    steps = [
        backend.wait(backend.step(starts(i, accumulation), lr)) for i, lr in zip(range(first, last), rates, strict=True)
    ]
    return np.array(steps)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ten_iterations_are_the_same(pair, starts, dtype, accumulation):
    graph, plain = pair(dtype=dtype)
    assert (graph.details["cuda_graph"], plain.details["cuda_graph"]) == (True, False)
    one, other = (losses(b, starts, 0, 10, accumulation) for b in (graph, plain))
    assert graph.train_windows.recorded.graph is not None
    np.testing.assert_allclose(one, other, rtol=CLOSE[dtype])


def test_activations_computed_anew_are_recorded_too(make, spec, starts):
    own = dataclasses.replace(spec, dropout=0.2)
    one, other = (losses(make("cuda", spec=own, compile=True, checkpointing=c), starts, 0, 8) for c in (False, True))
    np.testing.assert_allclose(one, other, rtol=CLOSE["float32"])


def test_a_seed_decides_the_masks_of_a_replay(pair, starts):
    graph, _ = pair()
    losses(graph, starts, 0, 5)
    state = graph.state()
    first = losses(graph, starts, 5, 8)
    graph.restore(state)
    np.testing.assert_array_equal(losses(graph, starts, 5, 8), first)
    same_batch = [graph.wait(graph.step(starts(0), 0.0))[0] for _ in range(3)]
    assert len(set(same_batch)) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_goes_on_as_the_whole(pair, starts, dtype):
    """Bit for bit: no sum is of additions that come in any order."""
    pair = functools.partial(pair, dtype=dtype)
    whole, _ = pair()
    part, _ = pair()
    resumed, _ = pair()
    expected = losses(whole, starts, 0, 12)
    losses(part, starts, 0, 7)
    resumed.restore(part.state())
    np.testing.assert_array_equal(losses(resumed, starts, 7, 12), expected[7:])
    states = whole.state().weights, resumed.state().weights
    assert all((states[1][name] == array).all() for name, array in states[0].items())


def test_an_overflow_is_left_out_and_halves_the_scale(pair, starts):
    graph, _ = pair(dtype="float16")
    losses(graph, starts, 0, 5)
    state = graph.state()
    state.loss_scale = 2.0**40
    graph.restore(state)
    graph.wait(graph.step(starts(5), 1e-3))
    after = graph.state()
    assert all((after.weights[n] == w).all() for n, w in state.weights.items())
    assert (after.loss_scale, after.optimizer_steps) == (2.0**39, state.optimizer_steps)


def test_evaluation_and_decoding_are_the_same(pair, starts, tokens):
    graph, plain = pair()
    val = np.arange(24).reshape(6, 4)
    assert graph.evaluate("val", val) == pytest.approx(plain.evaluate("val", val), rel=1e-6)
    assert graph.evaluate("val", val[:, :2]) == pytest.approx(plain.evaluate("val", val[:, :2]), rel=1e-6)
    many = np.arange(92).reshape(23, 4) % 50  # two graphs of ten at once and one of one
    assert graph._together(4) == 10
    assert graph.evaluate("val", many) == pytest.approx(plain.evaluate("val", many), rel=1e-6)
    text = tokens.splits["val"][:12].astype(np.int32)
    decoders = [b.decode() for b in (graph, plain)]
    for part in (text[:5], *text[5:].reshape(-1, 1)):
        one, other = (decode(part) for decode in decoders)
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo only hides it
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_over_ranks_are_part_of_the_graph(make, starts, compiled):
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    world = TorchWorld(0, 2, "nccl", bucket=20_000)  # the mean over NCCL's one rank is what that rank has
    try:
        ranked, alone = (make("cuda", compile=compiled, cuda_graph=True) for _ in range(2))
        ranked.world = world
        one, other = (losses(backend, starts, 0, 40, 2) for backend in (ranked, alone))
        assert ranked.train_windows.recorded.graph is not None
        np.testing.assert_allclose(one[:10], other[:10], rtol=CLOSE["float32"])
        assert len(world.waited_ms) == 40  # by the GPU's clock, in every replay
        assert all(0 < ms < 1e4 for ms in world.waited_ms)
        assert len(set(world.waited_ms[-35:])) > 1
        ranked.close()
    finally:
        world.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo only hides it
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own graphs, of a part without a kernel
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_iterations_with_accumulation_are_the_eager_ones(make, starts, mode):
    """torch's own graphs once failed here: each forward pass overwrote the loss and gradients of the one before."""
    compiled, eager = make("cuda", compile=True, compile_mode=mode), make("cuda")
    assert compiled.details["cuda_graph"] == (mode == "default")
    one, other = (losses(b, starts, 0, 7, 3) for b in (compiled, eager))
    np.testing.assert_allclose(one, other, rtol=1e-4)


FRESH = """
import numpy as np
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import BackendOptions, Tokens
from nanogpt_mac.gpt.spec import GPTSpec
spec = GPTSpec(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65)
options = BackendOptions("cuda", True, "bfloat16", "high", 1, 0.1, 0.9, 0.99, 1.0)
backend = kinds.create(spec, options, Tokens({}, 16))
backend.load(spec.init_weights(1))
decode = backend.decode()
print(all(np.isfinite(decode(np.array([token]))).all() for token in (1, 2, 3, 4)))
"""


def test_one_token_can_be_the_first_that_a_process_computes():
    """What libraries prepare at their first use cannot be recorded."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_own_kernels_compute_what_torchs_do(make, spec, starts, dtype):
    plain = dataclasses.replace(spec, dropout=0.0)
    one, other = (make("cuda", spec=plain, dtype=dtype, compile=False, own_kernels=own) for own in (True, False))
    assert (one.details["own_kernels"], other.details["own_kernels"]) == (True, False)
    np.testing.assert_allclose(losses(one, starts, 0, 10), losses(other, starts, 0, 10), rtol=CLOSE[dtype])


@pytest.mark.parametrize("own", [False, True])
def test_parts_are_recorded_where_the_step_is(make, spec, starts, own):
    plain = dataclasses.replace(spec, dropout=0.0)
    pair = [make("cuda", spec=plain, cuda_graph=graph, own_kernels=own) for graph in (True, False)]
    recorded, sent = (backend.parts(starts(0)[:, :1]).parts for backend in pair)
    assert list(recorded) == list(sent)
    for one, other in zip(recorded.values(), sent.values(), strict=True):
        torch.manual_seed(1)
        expected = other.forward(0)
        for number in range(6):  # warm-up, recording and replays
            torch.manual_seed(1)
            found = one.forward(number)
        if one.name not in ("gradients", "clip", "optimizer"):  # which change what they are given
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if one.both is not None:
            torch.manual_seed(2)
            assert all(torch.isfinite(g).all() for _ in range(6) for g in one.both(0))
