"""The same kernels in Triton, for an NVIDIA GPU: v1's naive ones, and the tiled ones of v2 and v3.

Names, parameters and order of the sums are those of the .metal files, but that a tile's slab is 64 deep and not 16.
TRITON_INTERPRET=1 computes them on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nanogpt_mac.backends.by_hand.launches import SIDE, Launch

DEPTH = 64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EACH = 4096 if INTERPRETED else 256  # numbers that a program of a naive kernel owns; on a GPU a thread then owns one
WARPS = 8


# -- naive: a thread owns one number of the result, or a row -----------------------------------------------------------


@triton.jit
def _product(a, b, c, M, N, K, am, ak, bk, bn, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = at < M * N
    left, right = a + at // N * am, b + at % N * bn
    sums = tl.zeros((EACH,), tl.float32)
    for k in range(0, K):
        sums += tl.load(left + k * ak, mask=inside, other=0.0) * tl.load(right + k * bk, mask=inside, other=0.0)
    tl.store(c + at, sums, mask=inside)


@triton.jit
def _add_bias(y, b, M, N, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = at < M * N
    tl.store(y + at, tl.load(y + at, mask=inside) + tl.load(b + at % N, mask=inside), mask=inside)


@triton.jit
def _relu(y, M, N, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    tl.store(y + at, tl.maximum(tl.load(y + at, mask=at < M * N), 0.0), mask=at < M * N)


@triton.jit
def _relu_backward(d, x, M, N, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = at < M * N
    opened = tl.load(x + at, mask=inside, other=0.0) > 0.0
    tl.store(d + at, tl.where(opened, tl.load(d + at, mask=inside), 0.0), mask=inside)


@triton.jit
def _softmax(logits, shares, M, N, EACH: tl.constexpr):
    row = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = row < M
    largest = tl.load(logits + row * N, mask=inside, other=0.0)
    for i in range(1, N):
        largest = tl.maximum(largest, tl.load(logits + row * N + i, mask=inside, other=0.0))
    total = tl.zeros((EACH,), tl.float32)
    for i in range(0, N):
        total += tl.exp(tl.load(logits + row * N + i, mask=inside, other=0.0) - largest)
    for i in range(0, N):
        share = tl.exp(tl.load(logits + row * N + i, mask=inside, other=0.0) - largest) / total
        tl.store(shares + row * N + i, share, mask=inside)


@triton.jit
def _cross_entropy(shares, classes, loss, M, N, EACH: tl.constexpr):
    row = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = row < M
    right = tl.load(classes + row, mask=inside, other=0)
    tl.store(loss + row, -tl.log(tl.load(shares + row * N + right, mask=inside, other=1.0)) / M, mask=inside)


@triton.jit
def _softmax_cross_entropy_backward(shares, classes, d, M, N, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = at < M * N
    right = at % N == tl.load(classes + at // N, mask=inside, other=0)
    tl.store(d + at, (tl.load(shares + at, mask=inside) - tl.where(right, 1.0, 0.0)) / M, mask=inside)


@triton.jit
def _column_sum(d, sums, M, N, EACH: tl.constexpr):
    column = tl.program_id(0) * EACH + tl.arange(0, EACH)
    total = tl.zeros((EACH,), tl.float32)
    for row in range(0, M):
        total += tl.load(d + row * N + column, mask=column < N, other=0.0)
    tl.store(sums + column, total, mask=column < N)


@triton.jit
def _sgd(w, g, M, N, rate, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = at < M * N
    tl.store(w + at, tl.load(w + at, mask=inside) - rate * tl.load(g + at, mask=inside), mask=inside)


@triton.jit
def _advance(behind, M):
    tl.store(behind, tl.load(behind) + M)


@triton.jit
def _gather_batch(images, classes, order, behind, x, y, M, N, BEHIND: tl.constexpr, EACH: tl.constexpr):
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    inside = at < M * N
    begin = tl.load(behind) if BEHIND else 0
    row = tl.load(order + begin + at // N, mask=inside, other=0)
    tl.store(x + at, tl.load(images + row * N + at % N, mask=inside), mask=inside)
    tl.store(y + at // N, tl.load(classes + row, mask=inside), mask=inside & (at % N == 0))


# -- tiled: a program owns a tile of the result, or a row --------------------------------------------------------------


@triton.jit
def _tile(left, right, rows, columns, M, N, K, lm, lk, rk, rn, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    """The tile of left times right, and the sums of left's rows."""
    deep = tl.arange(0, DEPTH)
    sums, of_rows = tl.zeros((SIDE, SIDE), tl.float32), tl.zeros((SIDE,), tl.float32)
    for slab in range(0, K, DEPTH):  # what lies beyond an edge counts as zero
        k = slab + deep
        l_in, r_in = (rows[:, None] < M) & (k[None, :] < K), (k[:, None] < K) & (columns[None, :] < N)
        a = tl.load(left + rows[:, None] * lm + k[None, :] * lk, mask=l_in, other=0.0)
        b = tl.load(right + k[:, None] * rk + columns[None, :] * rn, mask=r_in, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        of_rows += tl.sum(a, 1)
    return sums, of_rows


@triton.jit
def _linear(x, w, b, y, M, N, K, RELU: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    rows, columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    sums, _ = _tile(x, w, rows, columns, M, N, K, K, 1, 1, K, SIDE, DEPTH)
    sums += tl.load(b + columns, mask=columns < N, other=0.0)[None, :]
    if RELU:
        sums = tl.maximum(sums, 0.0)
    tl.store(y + rows[:, None] * N + columns[None, :], sums, mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def _linear_backward_input(dy, w, x, dx, M, N, K, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    rows, columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    sums, _ = _tile(dy, w, rows, columns, M, N, K, K, 1, N, 1, SIDE, DEPTH)
    at, inside = rows[:, None] * N + columns[None, :], (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(dx + at, tl.where(tl.load(x + at, mask=inside, other=0.0) > 0.0, sums, 0.0), mask=inside)


@triton.jit
def _linear_backward_weight(dy, x, w, b, M, N, K, rate, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    rows, columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    sums, of_rows = _tile(dy, x, rows, columns, M, N, K, 1, M, N, 1, SIDE, DEPTH)
    at, inside = rows[:, None] * N + columns[None, :], (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(w + at, tl.load(w + at, mask=inside) - rate * sums, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(b + rows, tl.load(b + rows, mask=rows < M) - rate * of_rows, mask=rows < M)


@triton.jit
def _cross_entropy_grad(logits, classes, d, loss, behind, M, N, EPOCH: tl.constexpr, ROW: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, ROW)
    v = tl.load(logits + row * N + column, mask=column < N, other=float("-inf"))
    largest = tl.max(v, 0)
    e = tl.exp(v - largest)
    total = tl.sum(e, 0)
    right = tl.load(classes + row)
    tl.store(d + row * N + column, (e / total - tl.where(column == right, 1.0, 0.0)) / M, mask=column < N)
    found = (tl.log(total) + largest - tl.load(logits + row * N + right)) / M
    if EPOCH:
        found += tl.load(loss + row)
        if row == 0:
            tl.store(behind, tl.load(behind) + M)
    tl.store(loss + row, found)


# -- launching ---------------------------------------------------------------------------------------------------------


def _naive(kernel: Any, numbers: int, *given: Any) -> None:
    kernel[(triton.cdiv(numbers, EACH),)](*given, EACH=EACH, num_warps=WARPS)


def _tiled(kernel: Any, m: int, n: int, *given: Any, **more: Any) -> None:
    kernel[(triton.cdiv(n, SIDE), triton.cdiv(m, SIDE))](*given, SIDE=SIDE, DEPTH=DEPTH, **more)


BY_ROW: dict[str, Any] = {"softmax": _softmax, "cross_entropy": _cross_entropy}
BY_NUMBER: dict[str, Any] = {
    "add_bias": _add_bias,
    "relu": _relu,
    "relu_backward": _relu_backward,
    "softmax_cross_entropy_backward": _softmax_cross_entropy_backward,
}
OTHERS: dict[str, Callable[..., None]] = {
    "column_sum": lambda arrays, m, n, k, rate: _naive(_column_sum, n, *arrays, m, n),
    "sgd": lambda arrays, m, n, k, rate: _naive(_sgd, m * n, *arrays, m, n, rate),
    "advance": lambda arrays, m, n, k, rate: _advance[(1,)](*arrays, m),
    "linear": lambda arrays, m, n, k, rate: _tiled(_linear, m, n, *arrays, m, n, k, RELU=False),
    "linear_relu": lambda arrays, m, n, k, rate: _tiled(_linear, m, n, *arrays, m, n, k, RELU=True),
    "linear_backward_input": lambda arrays, m, n, k, rate: _tiled(_linear_backward_input, m, n, *arrays, m, n, k),
    "linear_backward_weight": lambda arrays, m, n, k, rate: _tiled(
        _linear_backward_weight, m, n, *arrays, m, n, k, rate
    ),
}


def run(launch: Launch, arrays: Sequence[Tensor]) -> None:
    """Enqueue one launch on the present stream."""
    kernel, (m, n, k) = launch.kernel, launch.size
    if kernel.startswith("matmul"):
        strides = {"matmul_nt": (k, 1, 1, k), "matmul_tn": (1, m, n, 1), "matmul_nn": (k, 1, n, 1)}
        _naive(_product, m * n, *arrays, m, n, k, *strides[kernel])
    elif kernel == "gather_batch":
        images, classes, order, *behind, x, y = arrays
        _naive(_gather_batch, m * n, images, classes, order, (behind or [order])[0], x, y, m, n, bool(behind))
    elif kernel == "cross_entropy_grad":
        logits, classes, d, loss, *behind = arrays
        row = triton.next_power_of_2(n)
        given = (logits, classes, d, loss, (behind or [classes])[0], m, n, bool(behind), row)
        _cross_entropy_grad[(m,)](*given, num_warps=1)
    elif kernel in BY_ROW:
        _naive(BY_ROW[kernel], m, *arrays, m, n)
    elif kernel in BY_NUMBER:
        _naive(BY_NUMBER[kernel], m * n, *arrays, m, n)
    else:
        OTHERS[kernel](arrays, m, n, k, launch.rate)
