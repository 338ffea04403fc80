"""tinygrad in the registry: Metal, CUDA or the CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_mac.backends.base import BackendOptions, Kind, setting
from nanogpt_mac.backends.entry import ALLOCATOR, HALVES, RESIDENT_SET, gpu_left_out
from nanogpt_mac.records.capabilities import Capabilities


@dataclass(frozen=True)
class TinygradSettings:
    beam: int = setting(0, 0, 1, 2, 4, 8)
    """Versions of each tinygrad kernel that are timed side by side before one is taken; 0: none is."""


class Tinygrad(Kind):
    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        # Its CPU device compiles helpers as it is opened, and a cache that holds them already only puts that off.
        if _tinygrad_device().split(":")[0] != "CPU":
            return None
        compiler = os.environ.get("CC") or "clang"
        return (
            None
            if _is_clang(compiler)
            else f"on a CPU tinygrad needs clang, and {compiler} is not one"
            + ("; unset CC, or set it to clang" if os.environ.get("CC") else ", or not on PATH")
        )

    def prepare(self, options: BackendOptions) -> None:
        """Its device, and bfloat16 by hand on a CPU, where clang 14 has none on x86."""
        read = {"DEV": _tinygrad_device()}
        if read["DEV"].startswith("CPU"):
            read["EMULATED_DTYPES"] = os.environ.get("EMULATED_DTYPES", "bfloat16")
        os.environ |= read
        if "tinygrad" in sys.modules:  # and has read what was there
            from tinygrad import helpers

            for name, value in read.items():
                getattr(helpers, name).value = value
        if folder := os.environ.get(TINYGRAD_CACHE):
            os.environ["CACHEDB"] = str(Path(folder, "cache.db"))


TINYGRAD_CACHE = "NANOGPT_MAC_TINYGRAD_CACHE"  # a folder, where tinygrad's own variable names a file


def _tinygrad_device() -> str:
    """The user's choice, which is tinygrad's own variable; else the GPU that it is known to train on, else the CPU."""
    if chosen := os.environ.get("DEV"):
        return chosen
    if gpu_left_out():
        return "CPU"
    if sys.platform == "darwin":
        return "METAL" if platform.machine() == "arm64" else "CPU"
    return "CUDA" if Path("/dev/nvidiactl").exists() and _loads("libcuda.so.1") else "CPU"


def _loads(library: str) -> bool:
    try:
        return bool(ctypes.CDLL(library))
    except OSError:
        return False


def _is_clang(compiler: str) -> bool:
    try:
        asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "clang version" in asked.stdout


# No `runs_ahead`: reading a loss waits for all that is enqueued, and on Metal so does bringing a batch.
_TINYGRAD = Capabilities("metal", "tinygrad", True, compiles_evaluation=True, dtypes=HALVES, memory=ALLOCATOR)

TINYGRAD = Tinygrad(
    name="tinygrad",
    cls="nanogpt_mac.backends.tinygrad_backend:TinygradBackend",
    arrays="nanogpt_mac.backends.tinygrad_arrays:TinygradArrays",
    nets="nanogpt_mac.backends.tinygrad_nets:TinygradNet",
    label="tinygrad",
    framework="tinygrad",
    extra="tinygrad",
    devices=(
        replace(_TINYGRAD, device="metal"),
        replace(_TINYGRAD, device="cuda", tf32=True),
        Capabilities("cpu", "tinygrad", compiles_evaluation=True, memory=RESIDENT_SET, note="CPU"),
    ),
    compiler="TinyJit",
    compiled_by_default=True,
    eager_by_name=False,
    settings=TinygradSettings,
    keeps_attention=True,
    caches={TINYGRAD_CACHE: "tinygrad"},
    out_of_memory=r"(?i:out of memory)",
)
