"""The device's clock and its counters.

By default a kernel takes no time on the device. Under a plan every kernel adds planned time to a queue that the host
does not wait for, as on a Mac: `torch.mps.synchronize`, event waits, `.item()`, blocking copies to and from the device
and operators whose result size depends on values wait; non-blocking copies do not; events carry the queue's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Counts:
    """What the queue did since the last `reset_counts`: kernels, milliseconds of work, waits of the host."""

    kernels: int
    device_ms: float
    waits: int
    waited_ms: float


@contextmanager
def plan(us_per_kernel: float = 0, us_per_megabyte: float = 0, us_per_gigaflop: float = 0) -> Iterator[None]:
    """Plans the device's time while the context lasts.

    A kernel takes `us_per_kernel` microseconds, and `us_per_megabyte` per 1e6 bytes of its arguments and results, and
    `us_per_gigaflop` per 1e9 floating point operations of a matrix product (mm, bmm, addmm, baddbmm, linear and its
    backward, attention; others count none). Views and allocations take none.
    """
    import torch

    torch.ops.nanogpt_mps.set_plan(us_per_kernel, us_per_megabyte, us_per_gigaflop)
    try:
        yield
    finally:
        torch.ops.nanogpt_mps.set_plan(0.0, 0.0, 0.0)


def counts() -> Counts:
    """The queue's counters."""
    import torch

    kernels, device_ns, waits, waited_ns = torch.ops.nanogpt_mps.timeline_counts()
    return Counts(kernels, device_ns / 1e6, waits, waited_ns / 1e6)


def operators(kind: Literal["native", "fallback", "refused"] = "native") -> dict[str, int]:
    """Calls since `reset_counts`, by operator name: run natively, on the CPU by fallback, or refused as missing."""
    import torch

    return dict(torch.ops.nanogpt_mps.calls(kind))


def reset_counts() -> None:
    """Sets all counters to zero."""
    import torch

    torch.ops.nanogpt_mps.reset_counts()


def set_max_memory(size: int) -> None:
    """Sets the device's memory in bytes (default 16 GiB); allocations beyond 1.7 times that fail, as on a Mac."""
    import torch

    torch.ops.nanogpt_mps.set_max_memory(size)
