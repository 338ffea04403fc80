"""Our own tiled product in Triton, computed number by number by Triton's interpreter, against numpy in float64."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ASK = """
import numpy as np, torch
from nanogpt_mac.backends.product_triton import product
from nanogpt_mac.suites.gemm import check
for dtype in ("float32", "float16"):  # the interpreter's bfloat16 is no number
    for m, k, n in ((1, 1, 1), (129, 17, 65), (128, 64, 64), (300, 130, 257)):
        rng = np.random.default_rng(m)
        a, b = (check.rounded(rng.standard_normal(s, dtype=np.float32), dtype) for s in ((m, k), (k, n)))
        got = product(*(torch.from_numpy(x).to(getattr(torch, dtype)) for x in (a, b)))
        assert got.dtype == getattr(torch, dtype)
        print(dtype, m, k, n, check.deviation(a, b, got.float().numpy(), dtype).single)
"""


@pytest.mark.slow
def test_the_product_is_right_in_tritons_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}  # read when a kernel is made, so in a process of its own
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 8
    assert all(float(line.split()[-1]) < 1 for line in lines), done.stdout
