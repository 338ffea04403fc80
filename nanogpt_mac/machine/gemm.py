"""The best matmul rate that a back end reaches here: the denominator of `mfu_measured`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanogpt_mac.errors import InputError

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes an element
SQUARES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = 4  # timings of one shape; the first also warms up
BATCH_S = 0.02  # matmuls are queued until a timing takes about this long, so that launching them does not count
MAX_QUEUED = 200
COMPILING = 10  # budgets that compiling all shapes may take beside: JAX and tinygrad compile each

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class GemmPeak:
    """`flops_per_s`: the best rate, at `shape` = (M, K, N) of (M x K) @ (K x N). `trials`: every shape's best rate."""

    flops_per_s: float
    shape: Shape
    dtype: str
    trials: tuple[tuple[Shape, float], ...]


class Device(Protocol):
    """What is asked of a back end: backends.base.Backend has it."""

    def matmul(self, shape: Shape, dtype: str) -> Callable[[int], None]: ...

    def free_memory(self) -> int: ...

    def release_memory(self) -> None: ...


def measure(device: Device, dtype: str, shapes: Sequence[Shape], budget_s: float = 1.0) -> GemmPeak:
    """Tries squares of growing size and the given shapes (M, K, N), as far as `budget_s` seconds allow.

    Completion is timed; each shape's rate is the best of a few timings, each of several matmuls in a row. Shapes too
    large for the budget or for a quarter of the free memory are not tried. What a shape's first matmul takes beyond
    what was expected is compiling, and no part of the budget up to COMPILING times as much. Memory is given back, but
    the framework's marks of peak memory have moved: the caller resets them.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: no matmul peak is measured for it; use {', '.join(DTYPES)}")
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(f"shapes={shape}: use three positive sizes (M, K, N)")
    try:
        return _search(device, dtype, shapes, budget_s)
    finally:
        device.release_memory()


def _flops(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _search(device: Device, dtype: str, shapes: Sequence[Shape], budget_s: float) -> GemmPeak:
    first, *squares = [(n, n, n) for n in SQUARES]
    device.matmul(first, dtype)(1)
    deadline, grace = time.perf_counter() + budget_s, COMPILING * budget_s
    trials: dict[Shape, float] = {first: _best_rate(device.matmul(first, dtype), _flops(first), deadline)}
    for shape in sorted({*squares, *shapes} - {first}, key=_flops):
        m, k, n = shape
        # From the best rate so far one matmul's time follows. Three must fit, and drawing the numbers; a shape that
        # turns out three times slower still ends soon after the deadline.
        began = time.perf_counter()
        expected = _flops(shape) / max(trials.values())
        affordable = expected < 0.3 * (deadline - began)
        if affordable and (m * k + k * n + m * n) * DTYPES[dtype] <= device.free_memory() / 4:
            matmuls = device.matmul(shape, dtype)
            matmuls(1)
            compiling = min(max(time.perf_counter() - began - 2 * expected, 0.0), grace)
            deadline, grace = deadline + compiling, grace - compiling
            trials[shape] = _best_rate(matmuls, _flops(shape), deadline)
    best = max(trials, key=trials.__getitem__)
    return GemmPeak(trials[best], best, dtype, tuple(trials.items()))


def _best_rate(matmuls: Callable[[int], None], flops: int, deadline: float) -> float:
    best = math.inf
    queued = 1
    for _ in range(BATCHES):
        start = time.perf_counter()
        matmuls(queued)
        now = time.perf_counter()
        best = min(best, (now - start) / queued)
        queued = min(max(round(BATCH_S / best), 1), MAX_QUEUED)
        if now + queued * best > deadline:
            break
    return flops / best
