"""The child's side of suite=ops: one row on one way, computed, checked, timed, and checked again.

A row is refused, by name, whose result is wrong before or after it was timed, or whose time cannot be. What a result
must be is computed once in a run: where another round or another way has given the same bits, their verdict stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac.backends.arrays import Arrays, Op
from nanogpt_mac.files import write_json
from nanogpt_mac.machine import bandwidth
from nanogpt_mac.measure import calls
from nanogpt_mac.records.base import Record
from nanogpt_mac.records.bench import OpReading, State, Task
from nanogpt_mac.report.words import ms, size
from nanogpt_mac.suites import suite
from nanogpt_mac.suites.ops import reference
from nanogpt_mac.suites.ops.checked import Expected, Off, blocks, side_by_side
from nanogpt_mac.suites.ops.inputs import Drawn
from nanogpt_mac.suites.ops.reference import ADAMW
from nanogpt_mac.suites.ops.rows import Row
from nanogpt_mac.suites.suite import RefusedError

LAST_CACHE = 128 << 20  # bytes; the largest of today: 96 MB of an M Ultra, 60 MB of an H200
MOST_COPIES, FEW_COPIES = 64, 8  # a row that needs more to get past the cache is warm; the latter at small sizes
TOLD_APART = 64 << 20  # bytes of results whose bits are compared
CITED, MEASURED = 0.9, 1 / 3  # of a floor that a time may lie at, by where the bandwidth comes from
NEW, NEW_MS = 3.0, 0.05  # how much longer a call with new inputs may take, and what it may take in any case, ms
LOOKS, TRIES, LONG_S = 2, 4, 0.05  # of such calls, unless they are long
WARM_UP_S = 0.5
NEW_BYTES = 8 << 20  # of inputs: above, the floor shows what was not computed

Natives = Sequence[Any]


class Work(Record):
    """What the children of suite=ops must know."""

    sizes: dict[str, int | float | bool | str]  # of the model, as GPTSpec has them
    batch: int
    scale: float
    seed: int
    cache: str
    backend: dict[str, Any]  # its settings
    bandwidth: float  # bytes/s of this machine's memory from its CPU, measured


class Measuring(suite.Measuring):
    """Measures rows on one way. `of_memory`: the device's bandwidth, bytes/s; a time may lie at `trust` of a floor."""

    reading = OpReading

    def __init__(
        self, task: Task, arrays: Arrays, rows: dict[str, Row], work: Work, of_memory: float, trust: float
    ) -> None:
        super().__init__(task, arrays)
        self.rows, self.work = rows, work
        self.bandwidth, self.trust = of_memory, trust
        self.drawn: Drawn | None = None  # of the row before, whose numbers may be this one's
        if task.way.accelerator:
            self._warm_up()

    def _warm_up(self) -> None:
        """A GPU's clock takes a while to rise."""
        op, a = self.arrays.op("matmul"), self.arrays.put(np.ones((2048, 2048), np.float32))
        until = time.monotonic() + WARM_UP_S
        while op is not None and time.monotonic() < until:
            self.arrays.wait((op.function(a, a),))

    @contextmanager
    def _for(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.monotonic() - began

    def figures(self, name: str) -> dict[str, Any]:
        row = self.rows[name]
        op = self.arrays.op(row.op)
        if op is None:
            raise RefusedError(State.ABSENT, f"not written for {self.task.way.label}")
        copies, cold = self._copies(row)
        self.drawn = Drawn(row, self.work.seed, self.drawn)
        with self._for("inputs"):
            one = _One(self.arrays, row, op, self.drawn)
        with self._for("first calls"):
            outputs = one.outputs(0)
        self._check(one, outputs, 0)
        with self._for("checks"):
            deterministic = one.same_bits() if row.output_bytes + row.gradient_bytes <= TOLD_APART else None
        del outputs
        one.first = None
        if self.task.way.simulated:
            return {"deterministic": deterministic, "counts": one.counted(1), "copies": 1}
        with self._for("inputs"):
            known = [one.natives(1 + k) for k in range(copies)]
        with self._for("measuring"):
            made = row.output_bytes + row.gradient_bytes
            measured = self.timed(lambda number: one.call(known[number % copies]), copies, made)
        worst = self._check(one, measured.last, 1 + measured.number % copies, " of the last timed call")
        if measured.before is not None:
            worst = max(
                worst, self._check(one, measured.before, 1 + (measured.number - 1) % copies, " of a timed call")
            )
        if measured.fault:  # only now: reading what a no-op gives may take longer than it does
            raise RefusedError(State.WRONG, measured.fault)
        with self._for("checks"):
            one.hold_to_its_inputs(known[measured.number % copies], 1 + measured.number % copies)
        fastest = min(measured.throughput.median or 0.0, measured.latency.median or 0.0)
        beyond_caches = copies * (row.input_bytes + row.output_bytes) >= LAST_CACHE
        if beyond_caches and self.trust == MEASURED and fastest < self.trust * self._floor(row):
            self.bandwidth = max(self.bandwidth, bandwidth.of_cpu())  # the machine was busy when it was measured
        floor = self._floor(row)
        if beyond_caches and fastest < self.trust * floor:
            moved = f"{ms(fastest)} ms, where moving its {size(row.least_bytes)} takes {ms(floor)}"
            raise RefusedError(State.WRONG, f"faster than the memory: {moved}")
        if row.input_bytes <= NEW_BYTES:
            with self._for("checks"):
                self._hold_against_new(one, known)
        return {
            "throughput": measured.throughput,
            "latency": measured.latency,
            "cold": cold,
            "copies": copies,
            "queued": measured.queued,
            "error": worst,
            "deterministic": deterministic,
            "floor_ms": floor,
            "careless": one.careless,
        }

    def _floor(self, row: Row) -> float:
        """Milliseconds that moving its bytes takes, at least."""
        return 1e3 * row.least_bytes / self.bandwidth

    def _copies(self, row: Row) -> tuple[int, bool]:
        """How many copies of the inputs are rotated, and whether that gets past the last cache. Refused: too large."""
        moved = row.input_bytes + row.output_bytes
        most = 1 if self.work.cache == "warm" else MOST_COPIES if self.work.scale == 1 else FEW_COPIES
        copies = min(math.ceil(LAST_CACHE / max(moved, 1)), most)
        results = row.output_bytes * (1 + row.backward) + row.gradient_bytes
        needed = (copies + 4) * row.input_bytes + (copies + 1) * results
        if row.op.startswith("conv"):  # a CPU may unfold what every kernel sees
            needed += row.input_bytes * math.prod(row.inputs[1].shape[1:-1])
        self.must_fit(needed, needed)
        return copies, copies * moved >= LAST_CACHE

    def _check(self, one: _One, outputs: Natives, k: int, when: str = "") -> float:
        """The worst deviation of the results for copy `k`. Refused: wrong, named as well as can be told."""
        with self._for("checks"):
            got = one.got(outputs)
            for array in got:
                if array.dtype.kind == "f" and array.dtype != np.float32:
                    raise RefusedError(State.WRONG, f"wrong result{when}: it is {array.dtype}, not float32")
            found = self._offs(one, got, k)
        worst = max(found)
        if worst.share <= 1:
            one.careless = next((off.words for off in found if off.careless), one.careless)
            return worst.share
        which = found.index(worst)
        names = ["", *(f", output {i + 1}" for i in range(1, 1 + one.row.further_outputs))]
        names += [f", gradient by input {i + 1}" for i in one.row.of]
        why = _diagnosis(one, got, which, k, worst)
        raise RefusedError(State.WRONG, f"wrong result{when}{names[which]}: {why}")

    def _offs(self, one: _One, got: Sequence[np.ndarray], k: int) -> list[Off]:
        """Of each of these results for copy `k`, from the run's folder where they are known there."""
        places = [Path(self.task.folder) / _name(one.row, k, number, g) for number, g in enumerate(got)]
        if all(place.exists() for place in places):
            return [Off(*json.loads(place.read_text())) for place in places]
        found = [e.off(g) for e, g in zip(one.expected(k), got, strict=True)]
        for place, off in zip(places, found, strict=True):
            if off.share <= 1:
                write_json(place, list(off))
        return found

    def _hold_against_new(self, one: _One, known: Sequence[Natives]) -> None:
        """Refused: calls with inputs that have not been seen take far longer than those that were timed. Not where
        LOOKS further looks say otherwise: in one of hundreds another program had the core."""
        if (words := self._look(one, known, 0)) and any(self._look(one, known, 1 + more) for more in range(LOOKS)):
            raise RefusedError(State.WRONG, f"a cached result: {words}")

    def _look(self, one: _One, known: Sequence[Natives], number: int) -> str:
        """By what calls with new inputs are too long; "" if they are not."""
        took: list[tuple[float, float]] = []
        for k in range(TRIES):
            new = one.natives(len(known) + 1 + number * TRIES + k)
            before, after = (calls.once(lambda i=i: one.call(i), self.arrays) for i in (known[0], new))  # type: ignore[misc]
            took.append((before, after))
            if before > LONG_S and after < NEW * before:  # long enough for one to tell
                return ""
        before, after = statistics.median(pair[0] for pair in took), min(pair[1] for pair in took)
        if 1e3 * after <= max(NEW * 1e3 * before, NEW_MS):
            return ""
        return f"a call takes {ms(1e3 * after)} ms with new inputs, {ms(1e3 * before)} with known ones"


def _name(row: Row, k: int, number: int, got: np.ndarray) -> str:
    """Of a result's verdict: by the bits of the result, and by what it is a result of."""
    lines = np.ascontiguousarray(got).reshape(-1).view(np.uint8)
    whole = hashlib.blake2b(f"{row} {k} {number} {got.dtype} {got.shape}".encode(), digest_size=20)
    for part in side_by_side(lambda at: hashlib.sha256(lines[at].data).digest(), blocks(len(lines), 1)):
        whole.update(part)
    return f"{whole.hexdigest()}.json"


class _One:
    """One row in the hands of one framework."""

    def __init__(self, arrays: Arrays, row: Row, op: Op, drawn: Drawn) -> None:
        self.arrays, self.row, self.op, self.drawn = arrays, row, op, drawn
        self.careless = ""  # of results that are right
        settings = ADAMW if row.op == "adamw" else dict(row.settings)

        def function(*inputs: Any) -> Any:
            return op.function(*inputs, **settings)

        if row.backward:
            self.against = op.inward(arrays.put(self.drawn.cotangent))
            with_gradient = arrays.ready_with_gradient(function, row.of)
            self.ready: Callable[..., Any] = lambda *inputs: with_gradient(self.against, *inputs)
        else:
            self.ready = arrays.ready(function)
        self.first: Natives | None = self.natives(0)

    def natives(self, k: int) -> Natives:
        found = [self.op.inward(self.arrays.put(array)) for array in self.drawn.copy(k)]
        self.arrays.wait(found)
        return found

    def call(self, inputs: Natives) -> Natives:
        made = self.ready(*inputs)
        return made if isinstance(made, tuple | list) else (made,)

    def outputs(self, k: int) -> Natives:
        """Complete."""
        inputs = self.first if k == 0 and self.first is not None else self.natives(k)
        made = self.call(inputs)
        self.arrays.start(made)
        self.arrays.wait(made)
        return made

    def got(self, outputs: Natives) -> list[np.ndarray]:
        return [self.arrays.get(self.op.outward(output)) for output in outputs]

    def hold_to_its_inputs(self, inputs: Natives, k: int) -> None:
        """Refused: the calls have written into copy `k` of their inputs."""
        for number, (now, drawn) in enumerate(zip(self.got(inputs), self.drawn.copy(k), strict=True)):
            if not np.array_equal(now, drawn):
                raise RefusedError(State.WRONG, f"it writes into its input {number + 1}")

    def expected(self, k: int) -> list[Expected]:
        return reference.expected(self.row, self.drawn.copy(k), self.drawn.cotangent if self.row.backward else None)

    def same_bits(self) -> bool:
        once, again = (self.got(self.outputs(0)) for _ in range(2))
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(once, again, strict=True))

    def counted(self, k: int) -> dict[str, int] | None:
        inputs = self.natives(k)
        self.arrays.counted()
        self.arrays.wait(self.call(inputs))
        found = self.arrays.counted()
        return None if found is None else dict(found)


def _diagnosis(one: _One, got: Sequence[np.ndarray], which: int, k: int, worst: Off) -> str:
    result = got[which]
    copies = range(MOST_COPIES + 1 if one.row.input_bytes <= NEW_BYTES // 8 else 1)
    for other in copies if k else range(0):
        if other != k and all(e.off(g).share <= 1 for e, g in zip(one.expected(other), got, strict=True)):
            return "cached: it belongs to the inputs of an earlier call"
    if worst.words.startswith("its shape"):
        return worst.words + (": axis ignored?" if "axis" in one.row.settings else "")
    if not np.isfinite(result).all():
        return "it is not finite"
    if result.size > 1 and not result.any():
        return "nothing was computed, or it was thrown away: it is all zeros"
    for number, array in enumerate(one.drawn.copy(k)):
        if array.shape == result.shape and np.array_equal(array, result):
            return f"nothing was computed, or it was thrown away: it is input {number + 1} as it was"
    if not one.row.backward and one.row.op in ("sort", "sort_with_indices") and result.shape == one.row.inputs[0].shape:
        x = one.drawn.copy(k)[0]
        along = next((a for a in range(x.ndim) if np.array_equal(np.sort(x, a), result)), None)
        if along is not None:
            return f"axis ignored: it is that of axis {along}"
    return f"{worst.words}, {worst.share:.3g} times what float32 may lose"
