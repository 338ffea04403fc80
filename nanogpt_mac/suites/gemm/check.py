"""Whether a matrix product is one, and as precise as its dtype says: held against float64.

A limit for the largest deviation would let TF32 pass for float32 where many terms are summed: rounding inputs errs by
the root of how many, a bound by as many. So the root mean square is held against what float32 sums lose, and the
largest deviation against a multiple of it, which finds a single wrong number. Large products are multiplied by random
signs: `C s` against `A (B s)` costs one column (Freivalds). Some of their rows are computed in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # a rounding errs by so much at most
CUT = {"bfloat16": 16, "tf32": 13}  # of float32's bits, those that they leave out
SUMS = 4  # roundings of float32, of |a| |b|: summing one after the other errs by 0.4 of one, TF32 by thousands
STORED = 1.5  # roundings of what is stored: one errs by 0.4, inputs and result through a coarser dtype by 2.4
LARGEST = 8  # times the root mean square; of millions of normal numbers none is beyond 6
FULL = 2**27  # multiplications of a product that is computed in full
ROWS = 16  # of a larger one that are
PIECE = 1 << 22  # numbers that are held in float64 at once


@dataclass(frozen=True)
class Deviation:
    """1 is all that may be lost: `single` by sums in float32, `coarse` by sums in the dtype itself."""

    single: float
    coarse: float


def rounded(array: Array, dtype: str) -> Array:
    """Float32 numbers that `dtype` (or "tf32") has exactly: by rounding to nearest, ties to even."""
    if dtype in CUT:
        bits, cut = np.ascontiguousarray(array, np.float32).view(np.uint32), CUT[dtype]
        kept: Array = (bits + (2 ** (cut - 1) - 1) + ((bits >> cut) & 1)) & np.uint32(2**32 - 2**cut)
        return kept.view(np.float32)
    return array.astype(np.float16).astype(np.float32) if dtype == "float16" else array


@np.errstate(invalid="ignore", over="ignore")
def deviation(a: Array, b: Array, got: Array, dtype: str) -> Deviation:
    """Of `got` from `a @ b`, whose numbers `dtype` has exactly."""
    m, n = len(a), b.shape[1]
    if got.shape != (m, n):
        return Deviation(math.inf, math.inf)
    left, right = _norms(a), _norms(b.T)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], n)
    off = _times(got, signs) - _times(a, _times(b, signs))
    parts = [(off, left * math.sqrt(float(right @ right)), _norms(got))]
    whole = m * b.size <= FULL
    some = np.arange(m) if whole else np.sort(rng.choice(m, min(ROWS, m), replace=False))
    for rows in np.array_split(some, math.ceil(len(some) * n / PIECE)):
        value = a[rows].astype(np.float64) @ b.astype(np.float64) if whole else _by_depth(a[rows], b)
        parts.append((got[rows] - value, np.outer(left[rows], right), np.abs(value)))
    unit, single = UNIT[dtype], UNIT["float32"]
    stored = 0.0 if dtype == "float32" else STORED * unit
    return Deviation(*(max(_share(*part, sums, stored) for part in parts) for sums in (SUMS * single, SUMS * unit)))


@np.errstate(invalid="ignore", over="ignore")
def through(a: Array, b: Array, got: Array) -> str:
    """The coarser dtype that inputs of `got` were rounded to, told by how it deviates; "" where by neither."""
    rows = slice(0, ROWS)
    value = _by_depth(a[rows], b)
    off = (got[rows] - value).ravel()
    for dtype in CUT:
        known = (_by_depth(rounded(a[rows], dtype), rounded(b, dtype)) - value).ravel()
        if known @ off > 0.5 * math.sqrt(float(known @ known) * float(off @ off)) > 0:
            return dtype
    return ""


def _share(off: Array, scale: Array, value: Array, sums: float, stored: float) -> float:
    if not np.isfinite(off).all():
        return math.inf
    # Parts of a sum may be stored, too, and then cancel: they are of the usual size even where the result is 0.
    allowed = (sums * scale) ** 2 + stored**2 * (value**2 + (value**2).mean()) / 2
    if not allowed.any():
        return math.inf if off.any() else 0.0
    largest = np.sqrt((off**2 / np.where(allowed > 0, allowed, allowed.max())).max()) / LARGEST
    return float(max(np.sqrt((off**2).mean() / allowed.mean()), largest))


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, PIECE // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _times(x: Array, vector: Array) -> Array:
    return np.concatenate([x[rows].astype(np.float64) @ vector for rows in _blocks(*x.shape)])


def _norms(x: Array) -> Array:
    return np.concatenate([np.sqrt((x[rows].astype(np.float64) ** 2).sum(1)) for rows in _blocks(*x.shape)])


def _by_depth(a: Array, b: Array) -> Array:
    total = np.zeros((len(a), b.shape[1]))
    for deep in _blocks(*b.shape):
        total += a[:, deep].astype(np.float64) @ b[deep].astype(np.float64)
    return total
