"""The child's side of the dtype matrix: one operation in one dtype, computed, and held against float64."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.arrays import Arrays, Op
from nanogpt_mac.child import shortened
from nanogpt_mac.records.bench import DtypeReading, Outcome, State, Task
from nanogpt_mac.suites.gemm.check import rounded
from nanogpt_mac.suites.ops import reference
from nanogpt_mac.suites.ops.checked import Expected, Pieces, Product
from nanogpt_mac.suites.ops.inputs import Drawn
from nanogpt_mac.suites.ops.rows import Input, Row

FLOATS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
INTEGERS = ("int8", "int16", "int32", "int64")
DTYPES = (*FLOATS, *INTEGERS, "bool")
FINER = 1 + 2.0**-30  # makes of float32 a number that only float64 has
STATES = {Outcome.WRONG: State.WRONG, Outcome.ERROR: State.FAILED, Outcome.MEMORY: State.SKIPPED}

# How frameworks say that they do not have something: what is refused for its dtype is no error.
REFUSALS = re.compile(
    r"NotImplementedError|(?i:not (currently )?(implemented|supported)|unsupported|invalid (type|dtype)"
    r"|only [^.]*types? are supported"
    r"|(does not|doesn't|only|cannot|can't|don't) (support|be|cast|convert)|expected [^.]*(type|float|integ)"
    r"|(type|float|integ|bool)[^.]* (is|are) (required|not|expected)|must (be|have|promote)[^.]*(type|float|integ))"
)


class Probing:
    """Probes cells on one way; a cell is called "softmax float16"."""

    def __init__(self, task: Task, arrays: Arrays, rows: dict[str, Row], seed: int) -> None:
        self.task, self.arrays, self.rows, self.seed = task, arrays, rows, seed

    def __call__(self, cell: str) -> DtypeReading:
        name, dtype = cell.rsplit(" ", 1)
        known: dict[str, Any] = {"row": cell, "way": self.task.way.name, "round": self.task.round}
        if self.arrays.op(self.rows[name].op) is None:
            why = f"not written for {self.task.way.label}"
            return DtypeReading(**known, state=State.ABSENT, outcome=Outcome.REFUSED, reason=why)
        try:
            outcome, became, why = self._found(self.rows[name], dtype)
        except Exception as error:
            outcome, became, why = *_named(error), shortened(f"{type(error).__name__}: {error}")
        finally:
            self.arrays.release()
        state = STATES.get(outcome, State.OK)
        return DtypeReading(**known, state=state, outcome=outcome, became=became, reason=why)

    def _found(self, row: Row, dtype: str) -> tuple[Outcome, str, str]:
        op = self.arrays.op(row.op)
        assert op is not None
        given = list(zip(numbers(row, dtype, self.seed), row.inputs, strict=True))
        native = [self._put(op, array, None if _index(i) else dtype) for array, i in given]
        ready = self.arrays.ready(lambda *given: op.function(*given, **row.settings))
        made, fallbacks = self.arrays.watched(lambda: ready(*native))
        outputs = made if isinstance(made, tuple | list) else (made,)
        got = [self.arrays.get(op.outward(output)) for output in outputs]
        became = self.arrays.dtype(outputs[0])
        with np.errstate(all="ignore"):
            exact = [array if _index(i) else array.astype(np.float64) for array, i in given]
            expected = reference.expected(row, exact)
            faults = [
                _at_index(row, exact[0], g) if _is_index(row, number) else fault(e, g, self.arrays.dtype(o))
                for number, (e, g, o) in enumerate(zip(expected, got, outputs, strict=True))
            ]
        if why := next(filter(None, faults), ""):
            inside = became == "float64" and all(e.off(g).share <= 1 for e, g in zip(expected, got, strict=True))
            return Outcome.COARSER if inside else Outcome.WRONG, became, why
        if fallbacks:
            return Outcome.ON_CPU, became, f"{fallbacks} of its operations ran on the CPU"
        return (Outcome.OK if became == dtype or _is_index(row, 0) else Outcome.PROMOTES), became, ""

    def _put(self, op: Op, array: np.ndarray, dtype: str | None) -> Any:
        """As `op` takes it; what it does to indices is not for numbers that happen to be int32."""
        made = self.arrays.put(array, dtype)
        moved = op.inward(made)
        return moved if dtype is None or self.arrays.dtype(moved) == dtype else made


def _named(error: Exception) -> tuple[Outcome, str]:
    words = f"{type(error).__name__}: {error}"
    signs = kinds.signs()
    if isinstance(error, MemoryError) or ("oom" in signs and signs["oom"].search(words)):
        return Outcome.MEMORY, ""
    missing = "missing_op" in signs and signs["missing_op"].search(words)
    return (Outcome.REFUSED if missing or REFUSALS.search(words) else Outcome.ERROR), ""


def _index(given: Input) -> bool:
    return given.below > 0 and given.kind != "by index"


def numbers(row: Row, dtype: str, seed: int) -> list[np.ndarray]:
    """The inputs of `row` as numbers that `dtype` has exactly; small ones, so that sums of integers fit into int8.

    bfloat16's come as float32; indices stay what they are.
    """
    drawn = Drawn(row, seed).first
    found = []
    for array, given, after in zip(drawn, row.inputs, [*drawn[1:], None], strict=True):
        kind, _, axis = given.kind.partition(" ")
        if _index(given):
            found.append(array)
            continue
        if dtype in FLOATS:
            finer = dtype == "float64" and kind != "binary"
            found.append(array.astype(np.float64) * FINER if finer else rounded(array, dtype))
            continue
        if kind == "probability" and after is not None:
            array = after  # of integers none is between 0 and 1: the target's own, whose loss is 0
        elif kind == "distinct":
            array = array * (given.shape[int(axis)] / 4)
        whole = np.ceil(array) if kind == "positive" else np.rint(array)
        whole = np.clip(whole, -1, 1) if kind == "normal" else whole
        found.append(whole > 0 if dtype == "bool" else whole.astype(dtype))
    return found


def _is_index(row: Row, output: int) -> bool:
    return row.op == "argmax" or (row.op == "sort_with_indices" and output == 1)


def _at_index(row: Row, x: np.ndarray, index: np.ndarray) -> str:
    """As `fault`: where numbers are equal, as of bool most are, any index of theirs is right."""
    axis = row.settings["axis"]
    if row.op == "argmax":
        index = np.expand_dims(index, axis)
    elif not np.array_equal(np.sort(index, axis), np.sort(x.argsort(axis), axis)):
        return "not every index is there once"
    wanted = x.max(axis, keepdims=True) if row.op == "argmax" else np.sort(x, axis)
    return "" if np.array_equal(np.take_along_axis(x, index.astype(np.int64), axis), wanted) else "wrong indices"


def fault(expected: Expected, got: np.ndarray, became: str) -> str:
    """What is wrong with a result of dtype `became`; "" where nothing is."""
    if became in FLOATS:
        worst = expected.off(got).share * FLOATS["float32"] / FLOATS[became]
        return "" if worst <= 1 else f"off by {worst:.3g} times what {became} may lose"
    value = values(expected)
    if value.shape != got.shape:
        return f"its shape is {got.shape}, not {value.shape}"
    if became == "bool":
        return "" if np.array_equal(value != 0, got) else "not what is true of the numbers"
    if np.array_equal(value, got):
        return ""
    return f"the result is no integer, but comes as {became}" if (value != np.rint(value)).any() else "wrong integers"


def values(expected: Expected) -> np.ndarray:
    """All of an output, float64."""
    if isinstance(expected, Product):
        return np.asarray(expected.a.astype(np.float64) @ expected.b.astype(np.float64) + expected.plus)
    assert isinstance(expected, Pieces)
    whole = np.zeros(expected.shape)
    for where, terms in expected.pieces:
        whole[where] = terms()[0]
    return whole


def cells(rows: Sequence[str]) -> list[tuple[str, ...]]:
    """All in one process: what ends it costs its cell."""
    return [tuple(f"{row} {dtype}" for row in rows for dtype in DTYPES)]
