"""A result held against what it must be in float64, piece by piece: a large one needs no second of its size.

A tolerance is relative to the sum of |terms| that a number is made of, and grows with the root of how many there are:
what float32 loses where they are summed with care, or with either sign. One after the other, terms of one sign may lose
as much as there are terms: up to LOST that is no fault, but it is said. Copies, maxima and indices must be exact.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from nanogpt_mac.machine.cores import usable

EPSILON = 2.0**-23
PIECE = 1 << 17  # elements of a piece: in float64 some of them fit into a core's cache
ROWS = 64  # of a large product that are computed in full
LOST = 0.05  # of a sum of terms of one sign
FULL = 5e8  # multiplications of a product that is

Array = np.ndarray
Terms = tuple[Array, Array | float]  # what must stand somewhere, and the sum of its |terms|
Piece = tuple[Any, Callable[[], Terms]]  # where in the output, and what must stand there
T = TypeVar("T")
R = TypeVar("R")
_worker = threading.local()


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on all cores, for numpy's loops, which let other threads run; a worker's own is done by itself."""
    known = list(items)
    if len(known) < 2 or usable() < 2 or getattr(_worker, "busy", False):
        yield from map(function, known)
        return
    with _blas_alone(), ThreadPoolExecutor(usable(), initializer=partial(setattr, _worker, "busy", True)) as pool:
        yield from pool.map(function, known)


@contextmanager
def _blas_alone() -> Iterator[None]:
    """Where numpy brings OpenBLAS: one thread a product; those of several callers would wait for each other."""
    libraries = [ctypes.CDLL(str(p)) for p in Path(np.__file__).parents[1].glob("numpy.libs/libscipy_openblas64*")]
    before = [library.scipy_openblas_get_num_threads64_() for library in libraries]
    for library in libraries:
        library.scipy_openblas_set_num_threads64_(1)
    try:
        yield
    finally:
        for library, threads in zip(libraries, before, strict=True):
            library.scipy_openblas_set_num_threads64_(threads)


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
    pieces: Sequence[Piece]
    depth: float = 1
    one_sign: bool = False  # the terms of each number

    def off(self, got: Array) -> Off:
        if got.shape != self.shape:
            return _another_shape(got, self.shape)
        careful = tolerance(self.depth)
        allowed = max(careful, min(LOST, EPSILON / 2 * self.depth)) if self.one_sign else careful

        def one(piece: Piece) -> Off:
            at, terms = piece
            value, scale = terms()
            return _off(got[at], value, allowed * scale)

        worst = max(side_by_side(one, self.pieces), default=Off(0.0))
        return worst._replace(careless=bool(careful < worst.share * allowed <= allowed))


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
        rng = np.random.default_rng(0)
        signs = rng.choice([-1.0, 1.0], n)
        few = ROWS if len(a) * m * a.shape[-1] * n > FULL else len(a) * m
        chosen = np.sort(rng.choice(len(a) * m, min(few, len(a) * m), replace=False))
        plus = np.broadcast_to(np.asarray(self.plus, np.float64), n)

        def one(batch: int) -> Off:
            here = chosen[(chosen >= batch * m) & (chosen < (batch + 1) * m)] - batch * m
            return _product_off(a[batch], b[batch], got[batch], here, signs, plus)

        return max(side_by_side(one, range(len(a))))


def _product_off(a: Array, b: Array, got: Array, some: Array, signs: Array, plus: Array) -> Off:
    """Of one matrix from `a @ b + plus`: of all by `signs`, and of the rows `some`."""
    (m, k), n = a.shape, b.shape[1]
    left = a[some].astype(np.float64)

    def deep(at: slice) -> tuple[Array, Array, Array]:
        right = b[at].astype(np.float64)
        return (right**2).sum(0), right @ signs, left[:, at] @ right

    squares, rows_of = np.zeros(n), np.tile(plus, (len(some), 1))
    signed = np.empty(k)
    deeps = list(blocks(k, n))
    for at, (square, signs_of, part) in zip(deeps, side_by_side(deep, deeps), strict=True):
        squares += square
        signed[at] = signs_of
        rows_of += part
    norms, whole_norm = np.sqrt(squares), math.sqrt(squares.sum())
    allowed = tolerance(k)

    def by_signs(rows: slice) -> Off:
        these = a[rows].astype(np.float64)
        scale = np.sqrt((these**2).sum(-1)) * whole_norm + np.abs(plus).sum()
        return _off(got[rows] @ signs, these @ signed + plus @ signs, allowed * scale)

    scale = np.sqrt((left**2).sum(-1))[:, None] * norms + np.abs(plus)
    worst = _off(got[some], rows_of, allowed * scale)
    return max(worst, *side_by_side(by_signs, blocks(m, max(k, n))))


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


def added(function: Callable[[slice], Array], length: int, width: int) -> Array:
    """The sum of what `function` gives for all blocks."""
    return np.asarray(sum(side_by_side(function, blocks(length, width))))


# -- the pieces -------------------------------------------------------------------------------------------------------


def _first(shape: tuple[int, ...], function: Callable[[slice], Terms]) -> list[Piece]:
    return [(rows, partial(function, rows)) for rows in blocks(shape[0], math.prod(shape[1:]))]


def whole(value: Array, scale: Array | float = 0.0, depth: float = 1, one_sign: bool = False) -> Pieces:
    value = np.asarray(value)
    if not value.ndim:
        return Pieces((), [(..., lambda: (value, scale))], depth, one_sign)
    given = scale if isinstance(scale, np.ndarray) else None
    pieces = _first(value.shape, lambda rows: (value[rows], scale if given is None else given[rows]))
    return Pieces(value.shape, pieces, depth, one_sign)


def total(value: Array, depth: float) -> Pieces:
    """Sums of so many terms of one sign."""
    value = np.asarray(value)
    return whole(value, np.abs(value), depth, one_sign=True)


def by_first(shape: tuple[int, ...], function: Callable[..., Terms], *arrays: Array, depth: float = 1) -> Pieces:
    """`function` of the same stretch of the first axis of every array, in float64: value and scale."""
    return Pieces(shape, _first(shape, lambda rows: function(*(a[rows].astype(np.float64) for a in arrays))), depth)


def exactly(shape: tuple[int, ...], function: Callable[[slice], Array]) -> Pieces:
    """A stretch of the first axis at a time, which must be there bit for bit."""
    return Pieces(shape, _first(shape, lambda rows: (function(rows), 0.0)))
