"""What PyTorch registers for MPS by hand, outside of `native_functions.yaml`: one list for the table and the simulator.

Source: aten/src/ATen/mps/MPSFallback.mm and the composite kernels that are compiled with USE_MPS, read back from the
binaries of the macOS wheels of `CHECKED`. Imports nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

CHECKED = ("2.5.0", "2.15.0")  # the oldest and the newest torch that the list was checked against


@dataclass(frozen=True)
class ByHand:
    """One registration. It stands until the operator `until` has a kernel."""

    op: str
    raises: bool = False  # an error, whatever the environment says; otherwise it runs on the CPU, with a warning
    until: str | None = None

    @property
    def note(self) -> str:
        return "registered to raise an error" if self.raises else "registered as a CPU fallback"


LIST = (
    ByHand("embedding_renorm_"),
    ByHand("linalg_svd", until="_linalg_svd"),  # both left the list in 2.14, when _linalg_svd got a kernel
    ByHand("linalg_svd.U", until="_linalg_svd"),
    ByHand("_slow_conv2d_forward", raises=True),
    ByHand("im2col"),  # until 2.5.1
    ByHand("col2im"),  # until 2.7.1, as is the next
    ByHand("upsample_nearest3d.vec", until="upsample_nearest3d"),
)
RAISING = frozenset(row.op for row in LIST if row.raises)
# Composite, without an entry: their code has a branch of its own for MPS.
IN_COMPOSITE = ("copy_", "convolution", "convolution_backward", "convolution_overrideable")


def in_force(native: Collection[str]) -> dict[str, ByHand]:
    """The rows that a torch has whose operators with MPS kernels, their own or their out= form's, are `native`."""
    return {row.op: row for row in LIST if row.until not in native and row.op not in native}
