"""A product is told from what is not one, and its precision from a lower one, at every size."""

import numpy as np
import pytest

from nanogpt_mac.suites.gemm import by_hand, check

SIZES = [(5, 3, 4), (64, 64, 64), (100, 70, 90), (300, 4096, 40), (700, 600, 500)]  # the last is not done in full


def drawn(m, k, n, dtype="float32"):
    rng = np.random.default_rng(m * k * n)
    return [check.rounded(rng.standard_normal(s, dtype=np.float32), dtype) for s in ((m, k), (k, n))]


def one_after_the_other(a, b, dtype="float32"):
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for i in range(a.shape[1]):
        total = check.rounded(total + np.outer(a[:, i], b[i]), dtype)
    return total


@pytest.mark.parametrize("size", SIZES)
def test_a_product_in_float32_passes_in_any_order(size):
    a, b = drawn(*size)
    for got in (a @ b, one_after_the_other(a, b), (a[:, ::-1] @ b[::-1]), (a.astype(np.float64) @ b)):
        assert check.deviation(a, b, got, "float32").single < 0.3


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("lower", ["tf32", "bfloat16"])
def test_lower_precision_than_float32_is_told_and_named(size, lower):
    a, b = drawn(*size)
    got = check.rounded(a, lower) @ check.rounded(b, lower)
    assert check.deviation(a, b, got, "float32").single > 10
    assert check.through(a, b, got) == lower
    assert check.through(a, b, a @ b) == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", SIZES[1:])
def test_16_bits_pass_and_what_sums_in_them_is_told(size, dtype):
    a, b = drawn(*size, dtype)
    half = a.shape[1] // 2
    parts = [check.rounded(a[:, cut] @ b[cut], dtype) for cut in (slice(half), slice(half, None))]
    for got in (check.rounded(a @ b, dtype), check.rounded(sum(parts), dtype)):
        assert check.deviation(a, b, got, dtype).single < 1
    coarse = check.deviation(a, b, one_after_the_other(a, b, dtype), dtype)
    assert coarse.single > 1 > coarse.coarse


def test_float16_computed_in_bfloat16_is_named():
    a, b = drawn(64, 512, 64, "float16")
    got = check.rounded(check.rounded(a, "bfloat16") @ check.rounded(b, "bfloat16"), "float16")
    assert check.deviation(a, b, got, "float16").single > 2
    assert check.through(a, b, got) == "bfloat16"


def planted(a, b):
    right = a @ b
    last_rows, last_columns, one, nan = (right.copy() for _ in range(4))
    last_rows[(len(a) - 1) // 64 * 64 :] = 0
    last_columns[:, -1] = 0
    one[-1, -1] += 1
    nan[0, 0] = np.nan
    return {
        "no last rows": last_rows,
        "no last column": last_columns,
        "one number": one,
        "not finite": nan,
        "no last slab": a[:, :-1] @ b[:-1],
        "zeros": np.zeros_like(right),
        "another row's": right[::-1],
        "scaled": right * np.float32(1.0001),
        "shape": right[:, :-1],
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fault", planted(*drawn(5, 3, 4)))
def test_what_is_not_the_product_is_told(size, fault):
    a, b = drawn(*size)
    assert check.deviation(a, b, planted(a, b)[fault], "float32").single > 1


def test_rounding_is_to_nearest_even():
    import torch

    x = np.random.default_rng(0).standard_normal(10000, dtype=np.float32)
    x[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8  # halfway
    for dtype in ("float16", "bfloat16"):
        np.testing.assert_array_equal(check.rounded(x, dtype), torch.from_numpy(x).to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("size", SIZES[:3])
def test_products_by_hand_are_numpys(size):
    a, b = drawn(*size)
    exact = a.astype(np.float64) @ b
    np.testing.assert_allclose(by_hand.in_python(a.tolist(), b.tolist()), exact, rtol=1e-12, atol=1e-12)
    blocks = by_hand.in_blocks(a, b)
    assert blocks.dtype == np.float32
    np.testing.assert_allclose(blocks, exact, rtol=1e-4, atol=1e-4)
