"""Our own matrix product on MPS: product.metal, compiled by torch.mps.compile_shader."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("product.metal")
TILE, SIDE = 64, 16  # as in the source


@cache
def _library() -> Any:
    return torch.mps.compile_shader(SOURCE.read_text(encoding="utf-8"))


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of contiguous (M, K) and (K, N) in float32, float16 or bfloat16, enqueued; the sums are float32."""
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    kernel = getattr(_library(), f"product_{str(a.dtype).removeprefix('torch.')}")
    threads = [SIDE * -(-n // TILE), SIDE * -(-m // TILE)]
    kernel(a, b, c, m, n, k, threads=threads, group_size=[SIDE, SIDE])
    return c
