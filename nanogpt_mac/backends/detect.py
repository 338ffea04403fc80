"""What this machine has, and making a back end of it."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from nanogpt_mac import simulator
from nanogpt_mac.backends.base import NAMES, Backend, BackendOptions, Tokens
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec

# A virtual Mac can have a GPU that does not compute, as GitHub's may: then MPS is left out, and MLX takes the CPU.
NO_GPU = "NANOGPT_MAC_NO_GPU"


def gpu_left_out() -> bool:
    """Whether the user said that this machine's GPU is not to be used."""
    return os.environ.get(NO_GPU, "0") not in ("", "0")


def missing(name: str) -> str | None:
    """Why back end `name` cannot run here, or None when it can."""
    if name == "mlx":
        return None if find_spec("mlx") else "the package mlx is not installed"
    if not find_spec("torch"):
        return "the package torch is not installed"
    if name == "cpu":
        return None
    simulated = simulator.install_if_asked()  # before anything asks torch for its devices
    import torch

    if not simulated and gpu_left_out():
        return f"{NO_GPU} leaves this machine's GPU out"
    if name == "cuda":
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if simulated or torch.backends.mps.is_available():
        return None
    if torch.backends.mps.is_built():
        return "torch finds no Metal device (it needs macOS 14 or later on Apple silicon)"
    return f"this torch is built without MPS, which exists on macOS alone ({simulator.VARIABLE}=1 simulates it)"


def available() -> list[str]:
    return [name for name in NAMES if missing(name) is None]


def resolve(name: str) -> str:
    """The back end that `backend=name` means here; InputError, naming what is there, when it is absent.

    `auto` takes CUDA, then MLX on Metal, then MPS, then the CPU. MLX stands before MPS because the one published
    comparison with sound timing has it ahead (richiksc/mlx-benchmarks, M1: 0.365 s against 0.652 s an epoch).
    """
    if name == "auto":
        order = ("cuda", "mlx", "mps", "cpu") if sys.platform == "darwin" else ("cuda", "cpu", "mlx")
        return next(candidate for candidate in order if missing(candidate) is None)
    reason = missing(name)
    if reason:
        raise InputError(f"backend={name}: not available here: {reason}. Available: auto, {', '.join(available())}")
    return name


def resolve_compile(value: bool | str, backend: str) -> bool:
    """`compile=auto` compiles where that is known to be faster: MLX and CUDA. True and false are obeyed."""
    return backend in ("mlx", "cuda") if value == "auto" else bool(value)


def create(spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> Backend:
    """Make the back end that `options` describe."""
    if options.name == "mlx":
        _prepare_mlx(options)
        from nanogpt_mac.backends.mlx_backend import MLXBackend

        return MLXBackend(spec, options, tokens)
    if options.name == "cpu" and options.compile:
        _require_compiler("torch.compile", os.environ.get("CXX", "g++"), "g++", "clang++")
    from nanogpt_mac.backends.torch_backend import TorchBackend

    return TorchBackend(spec, options, tokens)


def _require_compiler(what: str, *compilers: str) -> None:
    if not any(shutil.which(compiler) for compiler in compilers):
        names = " or ".join(dict.fromkeys(compilers))
        raise InputError(f"compile=true: {what} on a CPU needs {names}, not found on PATH; allowed is compile=false")


def _prepare_mlx(options: BackendOptions) -> None:
    """Set what MLX reads once a process: TF32, and whose BLAS its Linux CPU build calls."""
    tf32 = "0" if options.matmul_precision == "highest" else "1"
    loaded = "mlx.core" in sys.modules
    if loaded and os.environ.get("MLX_ENABLE_TF32") not in (None, tf32):
        raise InputError(
            f"matmul_precision={options.matmul_precision}: MLX reads it once, and this process has used the other "
            "setting; allowed is a new process"
        )
    os.environ["MLX_ENABLE_TF32"] = tf32
    if options.blas == "torch" and not _lent:
        if loaded:
            raise InputError("backend.blas=torch: must be set before MLX is loaded; allowed is a new process")
        _borrow_torch_blas()
    import mlx.core as mx

    if gpu_left_out():
        mx.set_default_device(mx.Device(mx.cpu))
    if options.compile and mx.default_device() == mx.Device(mx.cpu):
        _require_compiler("mx.compile", "g++")  # the only one that MLX asks for; without it nothing would be fused


_lent: list[ctypes.CDLL] = []  # libtorch, where this process has loaded it before MLX


def _borrow_torch_blas() -> None:
    """Let libtorch's sgemm serve MLX, whose Linux CPU wheel carries the slow reference BLAS.

    The dynamic linker takes a symbol from the first library that was loaded globally, so libtorch goes first.
    """
    torch = find_spec("torch")
    places = torch.submodule_search_locations if torch else None
    library = Path(places[0]) / "lib" / "libtorch_cpu.so" if places else None
    if library is None or not library.exists():
        raise InputError("backend.blas=torch: there is no libtorch_cpu.so here; allowed off Linux is own")
    _lent.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
