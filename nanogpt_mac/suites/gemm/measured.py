"""The child's side of suite=gemm: one product on one way, checked before it is timed and after its last timed call."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nanogpt_mac.backends.arrays import Arrays
from nanogpt_mac.backends.base import loaded
from nanogpt_mac.machine.gemm import DTYPES
from nanogpt_mac.records.bench import GemmReading, State, Task
from nanogpt_mac.report.words import rate, seconds
from nanogpt_mac.suites import suite, ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.gemm import by_hand, check
from nanogpt_mac.suites.gemm.suite import Work
from nanogpt_mac.suites.suite import RefusedError

ABOVE_PEAK = 1.1  # of the highest published peak: a chip may have a faster clock, but not this much
LONGEST = 2.0  # times what a row may take that one product may: then three are made, and one is timed
SIMULATED_FLOPS = 4e8  # of a product that is worth the wait on a simulated device

Product = Callable[[Any, Any], Any]


def of_way(task: Task, work: Work) -> tuple[Arrays, Product, str]:
    """What computes on this way, its product of two native matrices, and whose it is, where that is not asked of it."""
    way, step = task.way, work.steps[task.way.name]
    if not way.backend:
        made = by_hand.ByHand(None, way.name, False)
        return made, by_hand.PRODUCTS[way.name], by_hand.blas() if way.name == "numpy" else "none"
    arrays = ways.arrays(way, BenchConfig(), step.settings)
    if step.threads:
        arrays.limit_threads(step.threads)
    if step.product:
        product: Product = loaded(step.product)
        return arrays, product, "ours"
    op = arrays.op("matmul")
    if op is None:
        raise RefusedError(State.ABSENT, f"not written for {way.label}")
    return arrays, arrays.ready(op.function), ""


class Measuring(suite.Measuring):
    """Measures rows on one way, those of a dtype from few operations to many."""

    reading = GemmReading

    def __init__(self, task: Task, work: Work) -> None:
        arrays, self.product, self.library = of_way(task, work)
        super().__init__(task, arrays)
        self.work = work
        self.best: dict[str, float] = {}  # FLOP/s so far, by dtype

    def figures(self, row: str) -> dict[str, Any]:
        (dtype, m, k, n), flops = self.work.sizes[row], self.work.flops(row)
        self._must_fit(dtype, m, k, n, flops)
        a, b = _drawn(m, k, n, dtype, self.work.seed, row)
        both = (a, np.ascontiguousarray(a[::-1]))  # the second's rows come the other way round: no two calls are alike
        natives = [self.arrays.put(one, dtype) for one in both]
        native_b = self.arrays.put(b, dtype)
        first = self._once(natives[0], native_b)
        known = {"library": self.library or self.arrays.library(dtype)}
        if self.task.way.simulated:
            self.arrays.counted()
            self._once(natives[0], native_b)
            counts = self.arrays.counted()
            return known | self._checked(a, b, first, dtype) | {"counts": dict(counts or {})}
        self._checked(a, b, first, dtype)
        del first
        # Both are checked: a result that stays the same cannot be right for two calls that differ.
        measured = self.timed(
            lambda number: (self.product(natives[number % 2], native_b),), copies=2, made=m * n * DTYPES[dtype]
        )
        if measured.fault:
            raise RefusedError(State.WRONG, measured.fault)
        figures = self._checked(both[measured.number % 2], b, measured.last[0], dtype, " of the last timed call")
        if measured.before is not None:
            self._checked(
                both[(measured.number - 1) % 2], b, measured.before[0], dtype, " of the last timed call but one"
            )
        fastest = flops / (1e-3 * (measured.throughput.min or 0.0))
        peak = self.work.peak(self.task.way, dtype)
        if peak is not None and fastest > ABOVE_PEAK * peak.most:
            told = f"{rate(fastest, 'FLOP/s')}, where {rate(peak.most, 'FLOP/s')} is the peak ({peak.source})"
            raise RefusedError(State.WRONG, f"faster than the unit: {told}")
        self.best[dtype] = flops / (1e-3 * (measured.throughput.median or 0.0))
        times = {"throughput": measured.throughput, "latency": measured.latency, "queued": measured.queued}
        return known | times | figures | {"copies": 2}

    def _once(self, a: Any, b: Any) -> Any:
        made = self.product(a, b)
        self.arrays.start((made,))
        self.arrays.wait((made,))
        return made

    def _must_fit(self, dtype: str, m: int, k: int, n: int, flops: int) -> None:
        """Refused: what this way does not have, or what takes too long or too much memory here."""
        way = self.task.way
        if not way.backend and dtype != "float32":
            raise RefusedError(State.ABSENT, "numpy has no BLAS for 16 bits, and Python no such numbers")
        if way.simulated and flops > SIMULATED_FLOPS:
            raise RefusedError(State.SKIPPED, "a simulated device is not timed; smaller ones show that it is right")
        known = self.best.get(dtype)
        if known and flops / known > LONGEST * self.task.row_s:
            limit, had = seconds(LONGEST * self.task.row_s), rate(known, "FLOP/s")
            raise RefusedError(State.SKIPPED, f"one takes more than {limit} at the {had} of the largest measured")
        numbers, each = 2 * m * k + k * n + 3 * m * n, DTYPES[dtype]
        self.must_fit(each * numbers, (4 if way.accelerator else 4 + each) * numbers)

    def _checked(self, a: np.ndarray, b: np.ndarray, got: Any, dtype: str, when: str = "") -> dict[str, Any]:
        """How far a product is off. Refused: it is not one, or less precise than its dtype says."""
        if (found := self.arrays.dtype(got)) != dtype:
            raise RefusedError(State.WRONG, f"wrong result{when}: it is {found}, not {dtype}")
        array = self.arrays.get(got)
        off = check.deviation(a, b, array, dtype)
        if off.single > 1:
            through = check.through(a, b, array) if array.shape == (len(a), b.shape[1]) else ""
            if through and through != dtype:
                raise RefusedError(State.WRONG, f"wrong result{when}: less precise than {dtype}: computed in {through}")
            if off.coarse > 1 or dtype == "float32":
                raise RefusedError(State.WRONG, f"wrong result{when}: {_diagnosis(a, b, array, dtype, off.single)}")
        return {"error": off.single, "coarse": off.single > 1}


def _drawn(m: int, k: int, n: int, dtype: str, seed: int, row: str) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers that `dtype` has exactly."""
    rng = np.random.default_rng([seed, zlib.crc32(row.encode())])
    a, b = (check.rounded(rng.standard_normal(shape, dtype=np.float32), dtype) for shape in ((m, k), (k, n)))
    return a, b


def _diagnosis(a: np.ndarray, b: np.ndarray, got: np.ndarray, dtype: str, off: float) -> str:
    """What is wrong with a product, as well as can be told."""
    m, n = len(a), b.shape[1]
    if got.shape != (m, n):
        return f"its shape is {got.shape}, not {(m, n)}"
    if not np.isfinite(got).all():
        return "it is not finite"
    if not got.any():
        return "nothing was computed, or it was thrown away: it is all zeros"
    if check.deviation(a[::-1], b, got, dtype).single <= 1:
        return "cached: it belongs to the inputs of an earlier call"
    turned = ((a.T, b, "first"), (a, b.T, "second"))
    for left, right, which in turned:
        if left.shape == a.shape and right.shape == b.shape and check.deviation(left, right, got, dtype).coarse <= 1:
            return f"the {which} operand is transposed"
    return f"off by {off:.3g} times what sums in float32 may lose"
