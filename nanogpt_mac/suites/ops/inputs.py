"""The numbers that a row is computed with: drawn once in numpy from the seed, the same for every framework."""

from __future__ import annotations

import math
import zlib
from collections import deque
from functools import cached_property

import numpy as np

from nanogpt_mac.suites.ops.checked import blocks, side_by_side
from nanogpt_mac.suites.ops.rows import WITH_GRADIENT, Row

GROWN = (1.75, 1.25, 1.5)  # how much larger a copy is than the first: other than its neighbours, and never as large

MOST_DRAWN, STEP = 1 << 23, 1_299_709  # a prime


class Drawn:
    """The inputs of `row` in as many copies as are asked for, no two of which have the same result.

    Copy 0 is drawn. Copy k rolls it along the last axis and makes it larger; indices go on by k instead, so that what
    is distinct or belongs together stays so.
    """

    def __init__(self, row: Row, seed: int, other: Drawn | None = None) -> None:
        """`other`: of another row; where its first copy would be the same it is taken over."""
        self.row, self.seed, self.key = row, seed, row.name.removesuffix(WITH_GRADIENT)
        self.kept: tuple[int, list[np.ndarray]] | None = None
        if other is not None and (other.key, other.seed) == (self.key, seed) and "first" in vars(other):
            self.first = other.first

    @cached_property
    def first(self) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for number, given in enumerate(self.row.inputs):
            rng = self._rng(number)
            kind, _, axis = given.kind.partition(" ")
            array: np.ndarray
            if given.kind == "distinct index":
                array = rng.permutation(given.below)[: given.size].astype(np.int32)
            elif given.kind == "by index":
                table = rng.standard_normal((self.row.inputs[1].below, *given.shape[1:]), dtype=np.float32)
                array = table[found[1]]
            elif kind == "distinct":
                array = _distinct(rng, given.shape, int(axis))
            elif kind == "index":
                array = rng.integers(0, given.below, given.shape, dtype=np.int32)
            elif kind == "binary":
                array = rng.integers(0, 2, given.shape).astype(np.float32)
            else:
                array = _drawn(rng, kind, given.shape)
            found.append(array)
        return found

    def copy(self, k: int) -> list[np.ndarray]:
        if self.kept is None or self.kept[0] != k:
            pairs = zip(self.first, self.row.inputs, strict=True)
            self.kept = k, [self._changed(array, given.kind, given.below, k) for array, given in pairs]
        return self.kept[1]

    @staticmethod
    def _changed(array: np.ndarray, kind: str, below: int, k: int) -> np.ndarray:
        if k == 0 or kind == "binary":
            return array
        if kind.endswith("index") and kind != "by index":
            return ((array + k) % below).astype(np.int32)
        grown = GROWN[k % len(GROWN)]
        factor = np.float32(1 / grown if kind == "probability" else grown)
        changed, cut = np.empty(array.shape, array.dtype), -17 * k % array.shape[-1]
        lines, rolled = (a.reshape(-1, a.shape[-1]) for a in (array, changed))

        def roll(rows: slice) -> None:
            np.multiply(lines[rows, cut:], factor, out=rolled[rows, : lines.shape[1] - cut])
            np.multiply(lines[rows, :cut], factor, out=rolled[rows, lines.shape[1] - cut :])

        deque(side_by_side(roll, blocks(*lines.shape)), maxlen=0)
        return changed

    @cached_property
    def cotangent(self) -> np.ndarray:
        """What the gradients are taken against: of the output's shape, around 1, the same for all copies."""
        return _drawn(self._rng(len(self.row.inputs)), "positive", self.row.output)

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.key.encode()), number])


def _drawn(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of many numbers only the first MOST_DRAWN are drawn; the rest are those again, rolled on for each time."""
    size = math.prod(shape)
    some = min(size, MOST_DRAWN)
    if kind == "normal":
        base = rng.standard_normal(some, dtype=np.float32)
    else:
        low, width = (0.05, 0.9) if kind == "probability" else (0.5, 1.0)
        base = rng.random(some, dtype=np.float32) * np.float32(width) + np.float32(low)
    if size == some:
        return base.reshape(shape)
    made = np.empty(size, np.float32)
    for number, start in enumerate(range(0, size, some)):
        cut = number * STEP % some
        part = made[start : start + some]
        first = min(some - cut, len(part))
        part[:first] = base[cut : cut + first]
        part[first:] = base[: len(part) - first]
    return made.reshape(shape)


def _distinct(rng: np.random.Generator, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Around 0, no two equal along `axis`: what is largest, and in which order they come, has one answer."""
    size = shape[axis]
    places = [1] * len(shape)
    places[axis] = size
    values = ((np.arange(size) - size / 2) * (4 / size)).astype(np.float32).reshape(places)
    return rng.permuted(np.broadcast_to(values, shape), axis=axis)
