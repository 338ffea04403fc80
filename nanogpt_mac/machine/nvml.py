"""The NVIDIA GPU that this process's CUDA device 0 is, through NVML (nvidia-ml-py). It needs no CUDA context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class NvmlError(Exception):
    """NVML has no GPU to read; the text says why."""


@contextmanager
def device() -> Iterator[tuple[Any, Any]]:
    """Yields (the pynvml module, the device's handle). NvmlError if there is none, or if NVML refuses."""
    try:
        import pynvml
    except ImportError:
        raise NvmlError("nvidia-ml-py is not installed") from None
    try:
        _start(pynvml)
        yield pynvml, _first_visible(pynvml)
    except pynvml.NVMLError as error:
        raise NvmlError(f"NVML: {error}") from error


@cache
def _start(pynvml: Any) -> None:
    """Once a process: NVML's start and end take a tenth of a second, and a run asks whenever it evaluates."""
    pynvml.nvmlInit()


def _first_visible(pynvml: Any) -> Any:
    """CUDA numbers devices after CUDA_VISIBLE_DEVICES, NVML does not; an entry there is an index or a UUID."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(first)
    if not first.isdigit():
        raise NvmlError("CUDA_VISIBLE_DEVICES hides every GPU")
    return pynvml.nvmlDeviceGetHandleByIndex(int(first))
