"""The numbers that a row is computed with: drawn once in numpy from the seed, the same for every framework."""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np

from nanogpt_mac.suites.ops.rows import WITH_GRADIENT, Row

GROWN = (1.75, 1.25, 1.5)  # how much larger a copy is than the first: other than its neighbours, and never as large


class Drawn:
    """The inputs of `row` in as many copies as are asked for, no two of which have the same result.

    Copy 0 is drawn. Copy k rolls it along the last axis and makes it larger; indices go on by k instead, so that what
    is distinct or belongs together stays so.
    """

    def __init__(self, row: Row, seed: int, other: Drawn | None = None) -> None:
        """`other`: of another row; where its first copy would be the same it is taken over."""
        self.row, self.seed, self.key = row, seed, row.name.removesuffix(WITH_GRADIENT)
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
            elif kind == "positive":
                array = rng.random(given.shape, dtype=np.float32) + np.float32(0.5)
            elif kind == "probability":
                array = rng.random(given.shape, dtype=np.float32) * np.float32(0.9) + np.float32(0.05)
            elif kind == "binary":
                array = rng.integers(0, 2, given.shape).astype(np.float32)
            else:
                array = rng.standard_normal(given.shape, dtype=np.float32)
            found.append(array)
        return found

    def copy(self, k: int) -> list[np.ndarray]:
        return [
            self._changed(array, given.kind, given.below, k)
            for array, given in zip(self.first, self.row.inputs, strict=True)
        ]

    @staticmethod
    def _changed(array: np.ndarray, kind: str, below: int, k: int) -> np.ndarray:
        if k == 0 or kind == "binary":
            return array
        if kind.endswith("index") and kind != "by index":
            return ((array + k) % below).astype(np.int32)
        factor = GROWN[k % len(GROWN)]
        rolled = np.roll(array, 17 * k, axis=-1) if array.ndim else array
        return rolled * np.float32(1 / factor if kind == "probability" else factor)

    def cotangent(self) -> np.ndarray:
        """What the gradients are taken against: of the output's shape, around 1, the same for all copies."""
        drawn = self._rng(len(self.row.inputs)).random(self.row.output, dtype=np.float32)
        return np.asarray(drawn + np.float32(0.5))

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.key.encode()), number])


def _distinct(rng: np.random.Generator, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Around 0, no two equal along `axis`: what is largest, and in which order they come, has one answer."""
    size = shape[axis]
    places = [1] * len(shape)
    places[axis] = size
    values = ((np.arange(size) - size / 2) * (4 / size)).astype(np.float32).reshape(places)
    return rng.permuted(np.broadcast_to(values, shape), axis=axis)
