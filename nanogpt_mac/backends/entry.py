"""What the entries of the registry share."""

from __future__ import annotations

import os
import shutil

from nanogpt_mac.errors import InputError

HALVES = ("float32", "bfloat16", "float16")
RESIDENT_SET, POOL, ALLOCATOR = "the process's resident set", "the driver's pool", "the allocator's peak"

# A virtual Mac can have a GPU that does not compute, as GitHub's may: then MPS is left out, and MLX takes the CPU.
NO_GPU = "NANOGPT_MAC_NO_GPU"


def gpu_left_out() -> bool:
    """Whether the user said that this machine's GPU is not to be used."""
    return os.environ.get(NO_GPU, "0") not in ("", "0")


def require_compiler(what: str, *compilers: str) -> None:
    if not any(shutil.which(compiler) for compiler in compilers):
        names = " or ".join(dict.fromkeys(compilers))
        raise InputError(f"compile=true: {what} on a CPU needs {names}, not found on PATH; use compile=false")
