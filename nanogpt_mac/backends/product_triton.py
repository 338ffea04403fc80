"""Our own matrix product on CUDA: tiles in Triton. TRITON_INTERPRET=1 computes it on a CPU, number by number."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows, columns and depth of a tile, warps, slabs under way. Float32 without TF32 has no tensor cores, so its tiles are
# bounded by registers; of 16 bits tensor cores want large ones.
SINGLE = {"BM": 128, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 3}
HALF = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}
TOGETHER = 8  # rows of tiles that are worked on side by side, so that they find B's columns in the cache


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    tiles_down, tiles_across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    number = tl.program_id(0)
    band = number // (TOGETHER * tiles_across)
    height = min(tiles_down - band * TOGETHER, TOGETHER)
    within = number % (TOGETHER * tiles_across)
    rows = (band * TOGETHER + within % height) * BM + tl.arange(0, BM)
    columns = (within // height) * BN + tl.arange(0, BN)
    deep = tl.arange(0, BK)
    left = a + rows[:, None].to(tl.int64) * K + deep[None, :]
    right = b + deep[:, None].to(tl.int64) * N + columns[None, :]
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    for slab in range(0, K, BK):  # what lies beyond an edge counts as zero
        x = tl.load(left, mask=(rows[:, None] < M) & (deep[None, :] + slab < K), other=0.0)
        y = tl.load(right, mask=(deep[:, None] + slab < K) & (columns[None, :] < N), other=0.0)
        sums = tl.dot(x, y, sums, input_precision="ieee")
        left += BK
        right += BK * N
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None].to(tl.int64) * N + columns[None, :], sums.to(c.dtype.element_ty), mask=inside)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of contiguous (M, K) and (K, N) in float32 (no TF32), float16 or bfloat16; the sums are float32."""
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    tile: dict[str, Any] = SINGLE if a.dtype == torch.float32 else HALF
    grid = (triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"]),)
    _kernel[grid](a, b, c, m, n, k, TOGETHER=TOGETHER, **tile)
    return c
