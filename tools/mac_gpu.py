"""Does this Mac's GPU compute? A virtual one can be there and fail at its first allocation, or answer zeros.

`python tools/mac_gpu.py` asks torch MPS and MLX for results that are known, each in a process of its own, because Metal
can take a process with it. Exit code 0: both are right, 1: one is not, and its line says why.
"""

from __future__ import annotations

import subprocess
import sys

TIMEOUT_S = 180

# A matrix product, an elementwise operator, a kernel of our own and an event: what training and the detector rest on.
TORCH = """
import torch
x = torch.arange(4096.0).reshape(64, 64).remainder(7)
y = x.to("mps")
assert torch.equal((y @ y).cpu(), x @ x), "a matrix product is wrong"
assert torch.allclose(torch.nn.functional.gelu(y).cpu(), torch.nn.functional.gelu(x), atol=1e-5), "gelu is wrong"
source = "kernel void twice(device float* x, uint i [[thread_position_in_grid]]) { x[i] = x[i] * 2.0f; }"
torch.mps.compile_shader(source).twice(y)
event = torch.mps.Event()
event.record()
event.synchronize()
del event
assert torch.equal(y.cpu(), x * 2), "a Metal kernel is wrong"
assert torch.zeros(1 << 26, device="mps").sum().item() == 0, "256 MiB of zeros are something else"
"""

# The same with MLX; mx.compile makes the kernel.
MLX = """
import mlx.core as mx, numpy as np
assert mx.default_device() == mx.Device(mx.gpu), "MLX has no GPU here"
x = (np.arange(4096, dtype=np.float32) % 7).reshape(64, 64)
assert np.array_equal(np.array(mx.array(x) @ mx.array(x)), x @ x), "a matrix product is wrong"
assert np.allclose(np.array(mx.compile(lambda a: mx.exp(-a) * 2 + a)(mx.array(x))), np.exp(-x) * 2 + x, atol=1e-5), (
    "a compiled kernel is wrong"
)
"""

PROBES = {"torch MPS": TORCH, "MLX": MLX}


def failure(program: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """Why a probe failed, in one line; None where it did not."""
    argv = [sys.executable, "-c", program]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with exit code {done.returncode}"


def main() -> int:
    failures = {name: failure(program) for name, program in PROBES.items()}
    for name, why in failures.items():
        print(f"{name}: {why or 'computes'}")
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
