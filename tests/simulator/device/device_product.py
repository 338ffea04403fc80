"""The product's own MPS back end on the device: values, state, sampling, precision, and the clock."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt_mac import simulator

simulator.install()

from nanogpt_mac.backends import kinds  # noqa: E402
from nanogpt_mac.backends.base import Backend, Tokens  # noqa: E402
from nanogpt_mac.backends.generate import generate  # noqa: E402
from nanogpt_mac.config import Config, backend_options  # noqa: E402
from nanogpt_mac.gpt.spec import GPTSpec  # noqa: E402
from nanogpt_mac.train.clock import Clock  # noqa: E402

SPEC = GPTSpec(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65)
_walk = np.cumsum(np.random.default_rng(7).integers(0, 3, 4000)) % 65
TOKENS = Tokens({"train": _walk[:3600].astype(np.uint16), "val": _walk[3600:].astype(np.uint16)}, 16)


def make(name: str, **given: Any) -> Backend:
    backend = kinds.create(SPEC, replace(backend_options(Config(), name), **given), TOKENS)
    backend.load(SPEC.init_weights(1337))
    return backend


def starts(iteration: int) -> np.ndarray:
    return np.random.default_rng(iteration).integers(0, 3500, (1, 4))


def losses(backend: Backend, first: int, last: int) -> list[tuple[float, float]]:
    return [backend.wait(backend.step(starts(i), 1e-3)) for i in range(first, last)]


def test_a_hundred_iterations_are_the_cpus() -> None:
    """Bit for bit when the CPU takes attention's math path, as MPS does; by rounding when it has its own kernel."""
    simulator.reset_counts()
    mps = losses(make("mps"), 0, 100)
    assert simulator.operators("fallback") == simulator.operators("refused") == {}
    with sdpa_kernel(SDPBackend.MATH):
        assert mps == losses(make("cpu"), 0, 100)
    fused = losses(make("cpu"), 0, 100)
    assert max(abs(a[0] - b[0]) for a, b in zip(mps, fused, strict=True)) < 5e-5
    assert mps[-1][0] < mps[0][0] - 0.5


@pytest.mark.filterwarnings("ignore")  # torch.compile has warnings of its own
def test_compiled_follows_eager_and_runs_every_kernel() -> None:
    eager = losses(make("mps"), 0, 20)
    simulator.clear_launches()
    simulator.reset_counts()
    compiled = losses(make("mps", compile=True), 0, 20)
    assert max(abs(a[0] - b[0]) for a, b in zip(eager, compiled, strict=True)) < 1e-4
    counts = simulator.launch_counts()
    assert len(counts) > 20
    assert all(n and n % 20 == 0 for n in counts.values()), counts
    assert simulator.operators("fallback") == simulator.operators("refused") == {}


def test_its_state_goes_on_elsewhere() -> None:
    whole = losses(make("mps"), 0, 20)
    half = make("mps")
    losses(half, 0, 10)
    tolerance = {"mps": 0.0, "cpu": 1e-5, "mlx": 2e-3}
    for name, allowed in tolerance.items():
        if name == "mlx" and not importlib.util.find_spec("mlx"):
            continue
        resumed = make(name)
        resumed.restore(half.state())
        difference = [abs(a[0] - b[0]) for a, b in zip(losses(resumed, 10, 20), whole[10:], strict=True)]
        assert max(difference) <= allowed, (name, difference)


def test_logits_gradients_evaluation_and_sampling() -> None:
    mps, cpu = make("mps"), make("cpu")
    window = TOKENS.windows("train", np.array([5, 77]))
    np.testing.assert_allclose(mps.logits(window[:, :-1]), cpu.logits(window[:, :-1]), atol=1e-5)
    (loss, gradients), (expected_loss, expected) = (b.gradients(window[:, :-1], window[:, 1:]) for b in (mps, cpu))
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5)
    batch = starts(1)
    assert mps.evaluate("val", batch % 300) == pytest.approx(cpu.evaluate("val", batch % 300), abs=1e-6)
    simulator.reset_counts()
    texts = [list(generate(b, SPEC, [1, 2, 3], 12, 0.8, 20, 3)) for b in (mps, cpu)]
    assert texts[0] == texts[1]
    assert simulator.operators()["aten::_scaled_dot_product_attention_math_for_mps"] > 0  # no gradient: MPS's kernel


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(dtype: str) -> None:
    backend = make("mps", dtype=dtype)
    mps, exact = losses(backend, 0, 20), losses(make("mps"), 0, 20)
    assert mps != exact
    resumed = make("mps", dtype=dtype)
    resumed.restore(backend.state())  # the loss scale of float16 too
    assert losses(resumed, 20, 25) == losses(backend, 20, 25)
    assert max(abs(a[0] - b[0]) for a, b in zip(mps, exact, strict=True)) < 0.05


def test_memory() -> None:
    backend = make("mps")
    weights = sum(array.nbytes for array in SPEC.init_weights(1337).values())
    assert backend.memory()["current"] > 3 * weights  # and both moments
    backend.reset_peak_memory()
    backend.step(starts(0), 1e-3)
    backend.synchronize()
    assert backend.memory()["peak"] >= backend.memory()["current"]


@pytest.mark.parametrize(("policy", "planned"), [("completion", 50), ("interval", 50), ("iteration", 100)])
def test_the_clock_reports_the_planned_time(policy: str, planned: float) -> None:
    """Enqueued in a fraction of the planned milliseconds, and reported within 2 % of them.

    Waiting for each iteration lays bare the host's time before its first kernel, which is truly part of the interval
    then: at most all of its enqueueing, however slow the machine.
    """
    backend = make("mps")
    losses(backend, 0, 3)
    simulator.reset_counts()
    backend.step(starts(0), 1e-3)
    kernels = simulator.counts().kernels
    torch.mps.synchronize()
    medians: list[float] = []
    with simulator.plan(us_per_kernel=planned * 1e3 / kernels):
        for _ in range(8):  # the machine is shared
            clock = Clock(backend.wait, policy, interval=4)
            done = [c for i in range(9) for c in clock.submit(i, lambda i=i: backend.step(starts(i), 1e-3))]
            counted = [c for c in [*done, *clock.drain()] if c.left_out is None]
            assert len(counted) >= 6
            medians.append(float(np.median([c.iter_ms for c in counted])))
            dispatched = float(np.median([c.dispatch_ms for c in counted]))
            longest = 1.02 * planned + (dispatched if policy == "iteration" else 0.0)
            if 0.98 * planned <= medians[-1] <= longest:
                break
    torch.mps.synchronize()
    print(policy, kernels, "kernels:", medians, "ms, enqueued in", dispatched)
    assert 0.98 * planned <= medians[-1] <= longest
    assert dispatched < 0.8 * planned


@pytest.mark.parametrize(("dtype", "most"), [("float32", 175), ("bfloat16", 265), ("float16", 275)])
def test_an_iteration_takes_few_kernels_and_one_wait(dtype: str, most: int) -> None:
    """Of four layers with dropout; one kernel a tensor would be twice as many."""
    spec = replace(SPEC, n_layer=4, dropout=0.2)
    backend = kinds.create(spec, replace(backend_options(Config(), "mps"), dtype=dtype), TOKENS)
    backend.load(spec.init_weights(1337))
    clock = Clock(backend.wait)
    for i in range(3):
        clock.submit(i, lambda i=i: backend.step(starts(i), 1e-3))
    simulator.reset_counts()
    for i in range(3, 7):
        clock.submit(i, lambda i=i: backend.step(starts(i), 1e-3))
    counts = simulator.counts()
    assert counts.kernels / 4 <= most
    assert counts.waits / 4 == 1  # the event behind the iteration before
