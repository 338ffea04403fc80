"""The first call of each of MKL's vector functions, made alone: by several threads at once it may be far off.

torch hands square roots, exponentials and the like of contiguous numbers on an x86 CPU to MKL, chunk by chunk, from
each of its threads. Up to MKL 2024.2 the kernel is chosen in a function's first call, and where several threads make
that call at the same time one of them may run a kernel of about half the bits for its chunk (pytorch issue 188792). It
happens in fresh processes on busy machines: in a first step of AdamW, or in a row of a suite. Whoever computes with
torch calls `settle` before.
"""

from __future__ import annotations

import functools

import torch

FUNCTIONS = ("acos", "asin", "atan", "cos", "erf", "erfc", "exp", "expm1", "log", "log10", "log1p", "log2", "sin",
             "sqrt", "tan", "tanh")  # fmt: skip


@functools.cache
def settle() -> None:
    """Once a process: every function in each precision, of so few numbers that one thread makes the call."""
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            few = torch.full((1,), 0.5, dtype=dtype)
            for name in FUNCTIONS:
                getattr(torch, name)(few)
