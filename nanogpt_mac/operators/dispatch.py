"""Where the dispatcher of the torch at hand has an operator for MPS. Needs torch and nothing else."""

from __future__ import annotations

from enum import StrEnum


class Dispatch(StrEnum):
    KERNEL = "kernel"
    BY_HAND = "explicit fallback"  # registered in MPSFallback.mm: to fall back, or to raise
    MISSING = "missing"  # the backend fallback: an error, or the CPU with PYTORCH_ENABLE_MPS_FALLBACK=1
    COMPOSITE = "composite"
    UNKNOWN = "unknown"  # no such operator, or a table that cannot be read


def dispatch_of(op: str) -> Dispatch:
    """By torch's own dump of the dispatch table of `op`, which is in `aten` unless it names its namespace."""
    import torch

    try:
        table = torch._C._dispatch_dump_table(op if "::" in op else f"aten::{op}")
    except RuntimeError:
        return Dispatch.UNKNOWN
    row = next((line for line in table.splitlines() if line.startswith("MPS: ")), "")
    if "[backend fallback]" in row:
        return Dispatch.MISSING
    if "MPSFallback" in row:
        return Dispatch.BY_HAND
    if "[math kernel]" in row or "[default backend kernel]" in row:
        return Dispatch.COMPOSITE
    if "[kernel]" in row:
        return Dispatch.KERNEL
    return Dispatch.UNKNOWN if not table or "fallthrough" in row else Dispatch.MISSING
