"""Our own tiled product in Metal, executed by the shim, against numpy in float64; sizes on both sides of every tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanogpt_mac import simulator
from nanogpt_mac.backends import product_metal
from nanogpt_mac.suites.gemm import check

simulator.install()

SIZES = [(1, 1, 1), (1, 33, 65), (63, 16, 64), (64, 64, 64), (65, 17, 129), (200, 100, 90)]


def off(product, m, k, n, dtype):
    rng = np.random.default_rng(m + k + n)
    a, b = (check.rounded(rng.standard_normal(s, dtype=np.float32), dtype) for s in ((m, k), (k, n)))
    on_device = [torch.from_numpy(x).to(getattr(torch, dtype)).to("mps") for x in (a, b)]
    got = product(*on_device)
    assert got.dtype == getattr(torch, dtype)
    return check.deviation(a, b, got.cpu().float().numpy(), dtype).single


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_the_product_is_right_and_sums_in_float32(m, k, n, dtype):
    assert off(product_metal.product, m, k, n, dtype) < 1


# What each line of the kernel is for: without it, or with another, the product is wrong at sizes that need it.
FAULTS = {
    "the last partial tile": ("if (row < m && column < n)", "if (row < m / TILE * TILE && column < n)"),
    "the last slab": ("slab < k;", "slab + DEPTH <= k;"),
    "the barrier before use": ("threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (int d", "for (int d"),
    "the second operand as it lies": ("b[deep * n + column]", "b[column * k + deep]"),
    "sums in float32": ("float sums[OWN][OWN]", "half sums[OWN][OWN]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_found(fault, monkeypatch, tmp_path):
    source, (line, other) = product_metal.SOURCE.read_text(encoding="utf-8"), FAULTS[fault]
    assert source.count(line) == 1
    (tmp_path / "wrong.metal").write_text(source.replace(line, other))
    monkeypatch.setattr(product_metal, "SOURCE", tmp_path / "wrong.metal")
    product_metal._library.cache_clear()
    try:
        assert off(product_metal.product, 100, 90, 90, "float32") > 1
    finally:
        product_metal._library.cache_clear()
