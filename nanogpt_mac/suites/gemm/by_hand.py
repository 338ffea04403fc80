"""The lowest rungs: products without a framework, in pure Python, numpy by blocks, and numpy's BLAS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanogpt_mac.backends.arrays import AbsentError, Arrays, Function, Op
from nanogpt_mac.backends.base import Kind

BLOCK = 64  # rows and columns: three blocks of float32 fit into a first-level cache of 48 KB

Lists = list[list[float]]


def in_python(a: Lists, b: Lists) -> Lists:
    """Three loops, the innermost over a row of `a` and a column of `b`; Python's numbers are float64."""
    columns = list(zip(*b, strict=True))
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in a]


def in_blocks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Block by block, each by numpy's own loops: einsum calls no BLAS unless it is asked to optimise."""
    (m, k), n = a.shape, b.shape[1]
    c = np.zeros((m, n), a.dtype)
    for i in range(0, m, BLOCK):
        for p in range(0, k, BLOCK):
            left = a[i : i + BLOCK, p : p + BLOCK]
            for j in range(0, n, BLOCK):
                c[i : i + BLOCK, j : j + BLOCK] += np.einsum("ik,kj->ij", left, b[p : p + BLOCK, j : j + BLOCK])
    return c


def blas() -> str:
    """Whose BLAS this numpy calls: "accelerate" on a Mac, "scipy-openblas 0.3.31"."""
    found: Any = np.show_config(mode="dicts")
    known = found.get("Build Dependencies", {}).get("blas", {}) if isinstance(found, dict) else {}
    return f"{known.get('name', 'unknown')} {known.get('version', '')}".removesuffix(" unknown").strip()


class ByHand(Arrays):
    """Arrays of the host: lists of lists for pure Python, numpy's otherwise. Complete as soon as they are made."""

    def __init__(self, kind: Kind | None, device: str, compiled: bool) -> None:
        self.lists = device == "python"

    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        made = array.astype(dtype or array.dtype)
        return made.tolist() if self.lists else made

    def get(self, array: Any) -> np.ndarray:
        return np.array(array)

    def dtype(self, array: Any) -> str:
        return "float32" if self.lists else str(array.dtype)  # and more than that

    def start(self, outputs: Sequence[Any]) -> None: ...

    def wait(self, outputs: Sequence[Any]) -> None: ...

    def peek(self, array: Any) -> float:
        return float(array[0][0])

    def op(self, name: str) -> Op | None:
        return None

    def ready(self, function: Function) -> Function:
        return function

    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        raise AbsentError("the ladder multiplies; it has no gradients")


PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {"python": in_python, "numpy-blocks": in_blocks, "numpy": np.matmul}
