"""gemm.py: against rates that are known, against numpy's own, and within its budget even where matmuls are slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from fakes.support import AVAILABLE

from nanogpt_mac.errors import InputError
from nanogpt_mac.machine import gemm

torch = pytest.importorskip("torch")  # imported here, so that no budget pays for it
mx = pytest.importorskip("mlx.core")


class Device:
    """A machine of known speed: `rate` FLOP/s, and `launch` seconds to wait for a queue to be done."""

    def __init__(self, rate: float, launch: float = 0.0, memory: float = 1e12) -> None:
        self.rate, self.launch, self.memory = rate, launch, memory
        self.tried: list[gemm.Shape] = []

    def matmul(self, shape, dtype):
        self.tried.append(shape)
        m, k, n = shape
        return lambda queued: time.sleep(self.launch + queued * 2 * m * k * n / self.rate)

    def free_memory(self):
        return self.memory

    def release_memory(self):
        pass


def search(device: Device, budget_s: float, *shapes: gemm.Shape) -> tuple[gemm.GemmPeak, float]:
    start = time.perf_counter()
    peak = gemm._search(device, "float32", shapes, budget_s)
    return peak, time.perf_counter() - start


def soon(check: Callable[[], bool]) -> bool:
    """Whether one of three tries succeeds: they are wall-clock times on a machine that others may use too."""
    return any(check() for _ in range(3))


@pytest.mark.parametrize("rate", [2e9, 2e10, 2e12])
def test_a_known_rate_is_found_within_the_budget(rate):
    def found() -> bool:
        peak, seconds = search(Device(rate), 0.3)
        return peak.flops_per_s == pytest.approx(rate, rel=0.1) and seconds < 1.5 * 0.3

    assert soon(found)


def test_waiting_for_the_queue_does_not_count():
    assert soon(lambda: search(Device(1e11, launch=0.001), 0.5)[0].flops_per_s == pytest.approx(1e11, rel=0.1))


def test_what_compiles_each_shape_is_tried_at_large_ones_too():
    class Compiling(Device):
        def matmul(self, shape, dtype):
            known, run = shape in self.tried, super().matmul(shape, dtype)

            def matmuls(queued):
                nonlocal known
                time.sleep(0 if known else 0.15)
                known = True
                run(queued)

            return matmuls

    assert soon(lambda: search(Compiling(5e13), 0.2)[0].trials[-1][0] >= (4096, 4096, 4096))
    assert search(Compiling(5e13), 0.01)[1] < 1.5  # and has its end


def test_a_fast_device_gets_large_matmuls_and_a_slow_one_is_spared_them():
    fast, slow = Device(5e14), Device(5e9)
    assert search(fast, 0.5)[0].trials[-1][0] == (16384, 16384, 16384)
    assert search(slow, 0.5, (16384, 384, 1536))[0].trials[-1][0][0] <= 512
    assert max(slow.tried) <= (512, 512, 512)


def test_model_shapes_are_tried_and_every_trial_is_told():
    shape = (768, 128, 512)
    peak, _ = search(Device(1e12), 0.3, shape)
    trials = dict(peak.trials)
    assert shape in trials
    assert peak.flops_per_s == max(trials.values()) == trials[peak.shape]


def test_memory_is_respected():
    device = Device(1e13, memory=4 * 3 * 4 * 1024**2)  # four times what a square of 1024 takes
    peak, _ = search(device, 0.3)
    assert peak.trials[-1][0] == (1024, 1024, 1024)


@pytest.fixture
def one_thread():
    """Two threads wait for each other whenever another program takes a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NUMPY_RATE = """
import time
import numpy as np
a, b = np.random.default_rng(0).standard_normal((2, 512, 512), dtype=np.float32)
best = float("inf")
for _ in range(20):
    start = time.perf_counter()
    a @ b
    best = min(best, time.perf_counter() - start)
print(2 * 512**3 / best)
"""


def numpy_rate() -> float:
    """numpy's float32 rate on one thread, which its BLAS only learns before it is loaded."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
    command = [sys.executable, "-c", NUMPY_RATE]
    return float(subprocess.run(command, env=os.environ | one, capture_output=True, check=True).stdout)


def test_torch_on_the_cpu_is_about_as_fast_as_numpy(make, one_thread):
    """Both hand float32 products to an optimised BLAS."""
    backend = make("cpu")

    def near() -> bool:
        return 0.3 < gemm.measure(backend, "float32", [], 0.3).flops_per_s / numpy_rate() < 3

    assert soon(near)


def test_mlx_is_as_fast_as_a_matmul_timed_alone(make):
    backend, a = make("mlx"), mx.random.normal((128, 128), key=mx.random.key(1))
    if backend.runs_ahead:
        pytest.skip("a GPU takes one small product as long as many")

    def alone() -> float:
        start = time.perf_counter()
        mx.eval(mx.matmul(a, a))
        return 2 * 128**3 / (time.perf_counter() - start)

    def near() -> bool:
        measured = gemm.measure(backend, "float32", [], 0.2).flops_per_s
        return 0.5 < measured / max(alone() for _ in range(20)) < 3

    assert soon(near)


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_budget_is_kept_on_a_real_device(make, name, dtype, one_thread):
    budget, backend = 0.3, make(name)
    rows = 64 if name == "tinygrad" else 16384  # whose kernels are not optimized here

    def kept() -> bool:
        start = time.perf_counter()
        peak = gemm.measure(backend, dtype, [(rows, 384, 1536), (12, 64, 128)], budget)
        seconds = time.perf_counter() - start
        assert peak.dtype == dtype
        assert peak.flops_per_s == max(rate for _, rate in peak.trials)
        return seconds < 1.5 * budget + 0.1  # the first matmul comes before the clock

    assert soon(kept)


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_training_run_is_left_alone(make, starts, name):
    """Between two iterations: dropout's random numbers and the precision are what they were."""
    plain, measured = make(name), make(name)
    for backend in (plain, measured):
        backend.wait(backend.step(starts(0), 1e-3))
    before = torch.get_rng_state(), mx.array(mx.random.state[0]), torch.get_float32_matmul_precision()
    gemm.measure(measured, "float32", [], 0.05)
    assert torch.equal(before[0], torch.get_rng_state())
    assert mx.array_equal(before[1], mx.random.state[0]).item()
    assert torch.get_float32_matmul_precision() == before[2]
    steps = [backend.wait(backend.step(starts(1), 1e-3)) for backend in (plain, measured)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float64", []), "dtype=float64: .* use float32, bfloat16, float16"),
        (("float32", [(1, 2, 0)]), r"shapes=\(1, 2, 0\): use three positive sizes"),
        (("float32", [(1, 2)]), r"shapes=\(1, 2\): use three"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        gemm.measure(Device(1e9), *arguments)
