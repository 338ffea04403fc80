"""MLX in the registry: Metal, CUDA or the CPU."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from nanogpt_mac.backends import blas
from nanogpt_mac.backends.base import BackendOptions, Kind, Rung, setting
from nanogpt_mac.backends.entry import ALLOCATOR, HALVES, RESIDENT_SET, gpu_left_out, require_compiler
from nanogpt_mac.errors import InputError
from nanogpt_mac.machine import nvml
from nanogpt_mac.records.capabilities import Capabilities

# Of what a CUDA graph of MLX reads, on GPUs for which its own limit is 1000: the host then has ten of them under way
# and not two iterations, so that MLX holds half as much, and is no slower.
GRAPH_MB, LARGE = "250", {(9, 0), (10, 0), (12, 0)}  # compute capability


@dataclass(frozen=True)
class MLXSettings:
    blas: str = setting("auto", "auto", "own", *blas.LIBRARIES)
    """On a Linux CPU: MLX calls whose matrix product; auto: torch's, else scipy's; its own is many times slower."""
    memory_limit_gb: float = setting(0.0)
    """10^9 bytes that MLX may hold before the host waits for the GPU; 0: of a GPU's free memory most."""


class MLXKind(Kind):
    def prepare(self, options: BackendOptions) -> None:
        """TF32, and whose BLAS its Linux CPU build calls."""
        tf32 = "0" if options.matmul_precision == "highest" else "1"
        loaded = "mlx.core" in sys.modules
        if loaded and os.environ.get("MLX_ENABLE_TF32") not in (None, tf32):
            raise InputError(
                f"matmul_precision={options.matmul_precision}: MLX reads it once, and this process has used the other "
                "setting; start a new process"
            )
        os.environ["MLX_ENABLE_TF32"] = tf32
        if not loaded:
            _shorten_graphs()
        settings = MLXSettings(**options.settings)
        if settings.memory_limit_gb < 0:
            raise InputError(f"backend.memory_limit_gb={settings.memory_limit_gb:g}: use 0 or more")
        blas.lend(settings.blas)
        import mlx.core as mx

        if gpu_left_out():
            mx.set_default_device(mx.Device(mx.cpu))
        if options.compile and mx.default_device() == mx.Device(mx.cpu):
            require_compiler("mx.compile", "g++")  # the only one that MLX asks for; without it nothing is fused


def _shorten_graphs() -> None:
    """Where an NVIDIA GPU gains by it, and nobody has set the length: MLX reads it once."""
    try:
        with nvml.device() as (pynvml, handle):
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    except nvml.NvmlError:
        return
    if capability in LARGE:
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", GRAPH_MB)


MLX = MLXKind(
    name="mlx",
    cls="nanogpt_mac.backends.mlx_backend:MLXBackend",
    arrays="nanogpt_mac.backends.mlx_arrays:MLXArrays",
    nets="nanogpt_mac.backends.mlx_nets:MLXNet",
    world="nanogpt_mac.backends.mlx_world:MLXWorld",
    launcher="mlx.launch",
    also_on=("cpu",),
    label="MLX",
    framework="mlx",
    devices=(
        Capabilities("metal", "mlx", True, True, dtypes=HALVES, tf32=True, memory=ALLOCATOR),
        Capabilities("cuda", "mlx", True, True, dtypes=HALVES, tf32=True, memory=ALLOCATOR),
        Capabilities("cpu", "mlx", memory=RESIDENT_SET, note="CPU"),
    ),
    compiler="mx.compile",
    compiled_by_default=True,
    eager_by_name=False,
    rank={"darwin": 20, "linux": 30},
    settings=MLXSettings,
    keeps_attention=True,
    rungs=(
        Rung(
            "own",
            "its own BLAS",
            ("cpu",),
            settings={"blas": "own"},
            missing=lambda: None if blas.wanted() else "MLX's product is its own here as it is",
        ),
    ),
    caches={"TMPDIR": "tmp"} if sys.platform == "linux" else {},  # its CPU build keeps compiled kernels there
    out_of_memory=r"(?i:Insufficient Memory|failed to allocate)",
    missing_operator=r"(No|no) Metal kernel|Unable to load kernel",
)
