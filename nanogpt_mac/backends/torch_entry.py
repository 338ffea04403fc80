"""torch in the registry: MPS, CUDA and the CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from nanogpt_mac import simulator
from nanogpt_mac.backends.base import BackendOptions, Kind, Rung, setting
from nanogpt_mac.backends.entry import ALLOCATOR, HALVES, NO_GPU, POOL, RESIDENT_SET, gpu_left_out, require_compiler
from nanogpt_mac.garbage import uncollected
from nanogpt_mac.records.capabilities import Capabilities

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class TorchSettings:
    compile_mode: str = setting("default", *COMPILE_MODES)
    """torch.compile's `mode`."""
    fused_adamw: bool | None = setting(None)
    """AdamW as one kernel; null is "wherever torch has it"."""
    cuda_graph: bool | None = setting(None)
    """A whole iteration as one CUDA graph; null is "on CUDA, with compile=true". False: a sampled token is none
    either."""
    own_kernels: bool | None = setting(None)
    """Everything but matrix products by Triton kernels of our own; null is "on CUDA, with compile=true or a graph,
    where they can". In a graph torch.compile has nothing left to do: it is called for another compile_mode alone."""


class Torch(Kind):
    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        if self.name == "cpu":
            return None
        with uncollected():
            simulated = simulator.install_if_asked()  # before anything asks torch for its devices
            import torch

        if not simulated and gpu_left_out():
            return f"{NO_GPU} leaves this machine's GPU out"
        if self.name == "cuda":
            return None if torch.cuda.is_available() else "torch finds no CUDA device"
        if simulated or torch.backends.mps.is_available():
            return None
        if torch.backends.mps.is_built():
            return "torch finds no Metal device (it needs macOS 14 or later on Apple silicon)"
        return f"this torch is built without MPS, which exists on macOS alone ({simulator.VARIABLE}=1 simulates it)"

    def prepare(self, options: BackendOptions) -> None:
        if self.name == "cpu" and sys.platform == "linux":
            _keep_freed_memory()
        if self.name == "cpu" and options.compile:
            require_compiler("torch.compile", os.environ.get("CXX", "g++"), "g++", "clang++")


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free: every iteration asks for the same again, and Linux would clear each page anew.

    An iteration of the quick recipe has 3000 page faults without it, of the full recipe a quarter of its time.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, size in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, _TRIM_, M_TOP_PAD
            libc.mallopt(option, size)


TORCH: dict[str, Any] = {
    "cls": "nanogpt_mac.backends.torch_backend:TorchBackend",
    "arrays": "nanogpt_mac.backends.torch_arrays:TorchArrays",
    "nets": "nanogpt_mac.backends.torch_nets:TorchNet",
    "world": "nanogpt_mac.backends.torch_world:TorchWorld",
    "framework": "torch",
    "compiler": "torch.compile",
    "settings": TorchSettings,
    "caches": {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"},
    "compiles_side_by_side": True,
    "out_of_memory": r"(?i:can't allocate memory|not enough memory)",
    "missing_operator": r"not currently (implemented|supported) (for|on) the MPS|not implemented for ['\"]"
    r"|NotImplementedError|not supported on MPS",
}


_MPS = Capabilities(
    "mps", "torch", True, True, compiles_evaluation=True, dtypes=HALVES, detector=True, memory=POOL
)  # fmt: skip

MPS = Torch(
    name="mps",
    label="MPS",
    devices=(
        _MPS,
        replace(_MPS, device=simulator.DEVICE_NAME, accelerator=False, simulated=True, note="simulated"),
    ),
    rank={"darwin": 30},
    falls_back={"PYTORCH_ENABLE_MPS_FALLBACK": "1"},
    rungs=(
        Rung(
            "tiled",
            "our tiled kernel, Metal",
            ("mps", simulator.DEVICE_NAME),
            "nanogpt_mac.backends.product_metal:product",
        ),
    ),
    **TORCH,
)

CUDA = Torch(
    name="cuda",
    nvidia=True,
    label="CUDA",
    devices=(
        Capabilities("cuda", "torch", True, True, compiles_evaluation=True, dtypes=HALVES, tf32=True, memory=ALLOCATOR),
    ),
    compiled_by_default=True,
    rank={"darwin": 10, "linux": 10},
    rungs=(
        Rung(
            "tiled",
            "our tiled kernel, Triton",
            ("cuda",),
            "nanogpt_mac.gpt.triton_ops:product",
            missing=lambda: None if find_spec("triton") else "the package triton is not installed",
        ),
    ),
    **{**TORCH, "compiler": "our kernels in one CUDA graph, else torch.compile"},
)

CPU = Torch(
    name="cpu",
    label="CPU",
    devices=(
        Capabilities("cpu", "torch", compiles_evaluation=True, dtypes=("float32", "bfloat16"), memory=RESIDENT_SET),
    ),
    rank={"darwin": 40, "linux": 20},
    by_threads=True,
    **TORCH,
)
