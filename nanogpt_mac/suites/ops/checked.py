"""A result held against what it must be, in float64 and piece by piece: a large one needs no second of its size.

A tolerance is relative to the sum of |terms| that a number is made of, and grows with the root of how many there are:
what float32 loses where they are summed with care, or with either sign. One after the other, terms of one sign may lose
as much as there are terms: up to LOST that is no fault, but it is said. Copies, maxima and indices must be exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

EPSILON = 2.0**-23
PIECE = 1 << 22  # elements that are held in float64 at once
ROWS = 64  # of a large product that are computed in full
LOST = 0.05  # of a sum of terms of one sign
FULL = 5e8  # multiplications of a product that is

Array = np.ndarray
Piece = tuple[Any, Array, Array | float]  # where in the output, what must stand there, the sum of its |terms|


def tolerance(depth: float) -> float:
    return EPSILON * (16 + 4 * math.sqrt(depth))


class Off(NamedTuple):
    """The largest deviation of a result, in units of what float32 may lose: above 1 it is wrong."""

    share: float
    words: str = ""  # what stands there
    careless: bool = False  # right, but more was lost than had to be


class Expected(Protocol):
    """One output."""

    def off(self, got: Array) -> Off: ...


@dataclass(frozen=True)
class Pieces:
    """An output that is computed piece by piece; `depth` terms are summed in each number. A scale of 0 is exact."""

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Piece]]
    depth: float = 1
    one_sign: bool = False  # the terms of each number

    def off(self, got: Array) -> Off:
        if got.shape != self.shape:
            return _another_shape(got, self.shape)
        careful = tolerance(self.depth)
        allowed = max(careful, min(LOST, EPSILON / 2 * self.depth)) if self.one_sign else careful
        worst = max((_off(got[at], value, allowed * scale) for at, value, scale in self.pieces()), default=Off(0.0))
        return worst._replace(careless=careful < worst.share * allowed <= allowed)


@dataclass(frozen=True)
class Product:
    """`a @ b + plus`, (..., M, K) by (..., K, N): all of it by random signs (Freivalds), at the cost of one column, and
    as many rows in full as can be afforded."""

    a: Array
    b: Array
    plus: Array | float = 0.0

    def off(self, got: Array) -> Off:
        if got.shape != (shape := (*self.a.shape[:-1], self.b.shape[-1])):
            return _another_shape(got, shape)
        m, n = (math.prod(got.shape[:-1]) if self.b.ndim == 2 else got.shape[-2]), got.shape[-1]
        a, b, got = (
            self.a.reshape(-1, m, self.a.shape[-1]),
            self.b.reshape(-1, *self.b.shape[-2:]),
            got.reshape(-1, m, n),
        )
        k = a.shape[-1]
        rng = np.random.default_rng(0)
        signs = rng.choice([-1.0, 1.0], n)
        few = ROWS if len(a) * m * k * n > FULL else len(a) * m
        chosen = np.sort(rng.choice(len(a) * m, min(few, len(a) * m), replace=False))
        plus = np.broadcast_to(np.asarray(self.plus, np.float64), n)
        worst, allowed = Off(0.0), tolerance(k)
        for batch, (one, other) in enumerate(zip(a, b, strict=True)):
            norms = np.sqrt(np.einsum("kn,kn->n", other, other, dtype=np.float64))
            signed = _product(other, signs)
            for rows in blocks(m, max(k, n)):
                left = one[rows].astype(np.float64)
                sizes = np.sqrt((left**2).sum(-1))
                scale = sizes * math.sqrt(float((norms**2).sum())) + np.abs(plus).sum()
                worst = max(worst, _off(got[batch, rows] @ signs, left @ signed + plus @ signs, allowed * scale))
            here = chosen[(chosen >= batch * m) & (chosen < (batch + 1) * m)] - batch * m
            for some in np.array_split(here, max(1, len(here) * max(k, n) // PIECE)):
                left = one[some].astype(np.float64)
                scale = np.sqrt((left**2).sum(-1))[:, None] * norms + np.abs(plus)
                worst = max(worst, _off(got[batch, some], _product(left, other) + plus, allowed * scale))
        return worst


def _product(a: Array, b: Array) -> Array:
    """In float64, without a copy of more than a piece of what is not."""
    if a.dtype == b.dtype == np.float64 or a.size + b.size <= PIECE:
        return a.astype(np.float64, copy=False) @ b.astype(np.float64, copy=False)
    if a.size >= b.size:
        return np.concatenate([a[rows].astype(np.float64) @ b for rows in blocks(len(a), a.shape[1])])
    total = np.zeros((*a.shape[:-1], b.shape[1]))
    for k in blocks(len(b), b.shape[1]):
        total += a[..., k].astype(np.float64) @ b[k].astype(np.float64)
    return total


def _off(got: Array, value: Array, allowed: Array | float) -> Off:
    if isinstance(allowed, float) and not allowed and np.array_equal(got, value):
        return Off(0.0)
    shares = np.asarray(got - value.astype(np.float64, copy=False))
    np.abs(shares, out=shares)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(shares, allowed, out=shares, where=shares != 0)
    if not shares.size:
        return Off(0.0)
    at = np.unravel_index(int(shares.argmax()), shares.shape)  # of a NaN where there is one
    share, wanted = float(shares[at]), np.broadcast_to(value, shares.shape)[at]
    return Off(math.inf if math.isnan(share) else share, f"{got[at]:.8g} in place of {wanted:.8g}")


def _another_shape(got: Array, shape: tuple[int, ...]) -> Off:
    return Off(math.inf, f"its shape is {got.shape}, not {shape}")


def blocks(length: int, width: int) -> Iterator[slice]:
    step = max(1, PIECE // max(width, 1))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


# -- the pieces -------------------------------------------------------------------------------------------------------


def whole(value: Array, scale: Array | float = 0.0, depth: float = 1) -> Pieces:
    value = np.asarray(value)
    return Pieces(value.shape, lambda: iter([(..., value, scale)]), depth)


def total(value: Array, depth: float) -> Pieces:
    """Sums of so many terms of one sign."""
    value = np.asarray(value)
    return Pieces(value.shape, lambda: iter([(..., value, np.abs(value))]), depth, one_sign=True)


def by_first(
    shape: tuple[int, ...], function: Callable[..., tuple[Array, Array | float]], *arrays: Array, depth: float = 1
) -> Pieces:
    """`function` of the same stretch of the first axis of every array, in float64: value and scale."""

    def pieces() -> Iterator[Piece]:
        for rows in blocks(shape[0], math.prod(shape[1:])):
            yield rows, *function(*(a[rows].astype(np.float64) for a in arrays))

    return Pieces(shape, pieces, depth)


def exactly(shape: tuple[int, ...], function: Callable[[slice], Array]) -> Pieces:
    """A stretch of the first axis at a time, which must be there bit for bit."""
    return Pieces(shape, lambda: ((r, function(r), 0.0) for r in blocks(shape[0], math.prod(shape[1:]))))
