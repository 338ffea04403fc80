"""THE registry: the back ends that there are, which of them this machine has, and making one.

An entry imports no framework; what must be set before one is imported is set here. A back end of another package
registers itself: an entry point of the group `nanogpt_mac.backends` names its Kind (docs/add-a-backend.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from nanogpt_mac import simulator
from nanogpt_mac.backends import blas
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Rung, Tokens, setting
from nanogpt_mac.errors import InputError
from nanogpt_mac.garbage import uncollected
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.capabilities import Capabilities

HALVES = ("float32", "bfloat16", "float16")
RESIDENT_SET, POOL, ALLOCATOR = "the process's resident set", "the driver's pool", "the allocator's peak"

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# A virtual Mac can have a GPU that does not compute, as GitHub's may: then MPS is left out, and MLX takes the CPU.
NO_GPU = "NANOGPT_MAC_NO_GPU"


def gpu_left_out() -> bool:
    """Whether the user said that this machine's GPU is not to be used."""
    return os.environ.get(NO_GPU, "0") not in ("", "0")


# -- torch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchSettings:
    compile_mode: str = setting("default", *COMPILE_MODES)
    """torch.compile's `mode`."""
    fused_adamw: bool | None = setting(None)
    """AdamW as one kernel; null is "wherever torch has it"."""
    cuda_graph: bool | None = setting(None)
    """A whole iteration as one CUDA graph; null is "on CUDA, when it is compiled". False: a sampled token is none
    either."""
    own_kernels: bool | None = setting(None)
    """Attention, and residual sums with dropout and layer norm, by Triton kernels of our own; null is "on CUDA, where
    they can"."""


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
            _require_compiler("torch.compile", os.environ.get("CXX", "g++"), "g++", "clang++")


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
    "out_of_memory": r"(?i:can't allocate memory|not enough memory)",
    "missing_operator": r"not currently (implemented|supported) (for|on) the MPS|not implemented for ['\"]"
    r"|NotImplementedError|not supported on MPS",
}


# -- MLX --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLXSettings:
    blas: str = setting("auto", "auto", "own", *blas.LIBRARIES)
    """On a Linux CPU: MLX calls whose matrix product; auto: torch's, else scipy's; its own is many times slower."""


class MLX(Kind):
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
        blas.lend(MLXSettings(**options.settings).blas)
        import mlx.core as mx

        if gpu_left_out():
            mx.set_default_device(mx.Device(mx.cpu))
        if options.compile and mx.default_device() == mx.Device(mx.cpu):
            _require_compiler("mx.compile", "g++")  # the only one that MLX asks for; without it nothing is fused


# -- JAX --------------------------------------------------------------------------------------------------------------

# What brings JAX onto a Mac's GPU: distribution -> the name that it gives its platform. Each is a device of its own.
JAX_PLUGINS = {"jax-mps": "mps", "metaljax": "metal"}


def jax_plugins() -> dict[str, str]:
    """The plugins that JAX would load, jax-metal and CUDA's included: distribution -> version. JAX is not imported."""
    found = (entry.dist for entry in entry_points(group="jax_plugins"))
    return {dist.name: dist.version for dist in found if dist}


@dataclass(frozen=True)
class JAXSettings:
    jax_device: str = setting("auto", "auto", "cpu", "cuda", *JAX_PLUGINS)
    """auto: a plugin for Metal, else CUDA, else the CPU."""


class JAX(Kind):
    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        if version := jax_plugins().get("jax-metal"):
            return (
                f"jax-metal {version} is given up and breaks every JAX since 0.5.1 (jax issue 26968): uninstall it; "
                f"{' or '.join(JAX_PLUGINS)} takes its place"
            )
        return None

    def programs(self) -> tuple[str, ...]:
        return (self.framework, "jaxlib", *jax_plugins()) if find_spec(self.framework) else (self.framework,)

    def prepare(self, options: BackendOptions) -> None:
        """The device, and what JAX, its compiler and its plugins read from the environment."""
        plugins = jax_plugins()
        device = JAXSettings(**options.settings).jax_device
        if device in JAX_PLUGINS and device not in plugins:
            raise InputError(f"backend.jax_device={device}: not installed; use auto, or pip install {device}")
        if device == "auto":
            device = "cpu" if gpu_left_out() else next((name for name in JAX_PLUGINS if name in plugins), "auto")
        if device != "auto":
            platforms = (JAX_PLUGINS.get(device, device), "cpu")  # the CPU beside it, as `also_on` says
            os.environ["JAX_PLATFORMS"] = ",".join(dict.fromkeys(platforms))
        if device in JAX_PLUGINS:  # both bring MLX, and M5 can multiply float32 in less
            exact = options.matmul_precision == "highest"
            os.environ["MLX_ENABLE_TF32"] = "0" if exact else "1"
            os.environ["METALJAX_MATMUL_PRECISION"] = "high" if exact else "default"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else it takes three quarters of an NVIDIA card
        os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # a CPU is its own host: what has returned is complete
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # where a cache folder is named


def _require_compiler(what: str, *compilers: str) -> None:
    if not any(shutil.which(compiler) for compiler in compilers):
        names = " or ".join(dict.fromkeys(compilers))
        raise InputError(f"compile=true: {what} on a CPU needs {names}, not found on PATH; use compile=false")


# -- tinygrad ---------------------------------------------------------------------------------------------------------


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


# -- the registry -----------------------------------------------------------------------------------------------------

# The order in which variants are shown. backend=auto goes by rank: CUDA, then MLX on Metal, then MPS, then the CPU. MLX
# stands before MPS because the one published comparison with sound timing has it ahead (richiksc/mlx-benchmarks, M1:
# 0.365 s against 0.652 s an epoch).
_MPS = Capabilities(
    "mps", "torch", True, True, compiles_evaluation=True, dtypes=HALVES, detector=True, memory=POOL
)  # fmt: skip
_JAX_ON_METAL = Capabilities(
    "metal", "jax", True, compiles_evaluation=True, dtypes=HALVES, tf32=True, memory=RESIDENT_SET
)
# No `runs_ahead`: reading a loss waits for all that is enqueued, and on Metal so does bringing a batch.
_TINYGRAD = Capabilities("metal", "tinygrad", True, compiles_evaluation=True, dtypes=HALVES, memory=ALLOCATOR)
_PRODUCT = "nanogpt_mac.backends.product_"
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Torch(
            name="mps",
            label="MPS",
            devices=(
                _MPS,
                replace(_MPS, device=simulator.DEVICE_NAME, accelerator=False, simulated=True, note="simulated"),
            ),
            rank={"darwin": 30},
            falls_back={"PYTORCH_ENABLE_MPS_FALLBACK": "1"},
            rungs=(
                Rung("tiled", "our tiled kernel, Metal", ("mps", simulator.DEVICE_NAME), f"{_PRODUCT}metal:product"),
            ),
            **TORCH,
        ),
        Torch(
            name="cuda",
            nvidia=True,
            label="CUDA",
            devices=(
                Capabilities(
                    "cuda", "torch", True, True, compiles_evaluation=True, dtypes=HALVES, tf32=True, memory=ALLOCATOR
                ),
            ),
            compiled_by_default=True,
            rank={"darwin": 10, "linux": 10},
            rungs=(
                Rung(
                    "tiled",
                    "our tiled kernel, Triton",
                    ("cuda",),
                    f"{_PRODUCT}triton:product",
                    missing=lambda: None if find_spec("triton") else "the package triton is not installed",
                ),
            ),
            **TORCH,
        ),
        MLX(
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
        ),
        Torch(
            name="cpu",
            label="CPU",
            devices=(
                Capabilities(
                    "cpu", "torch", compiles_evaluation=True, dtypes=("float32", "bfloat16"), memory=RESIDENT_SET
                ),
            ),
            rank={"darwin": 40, "linux": 20},
            by_threads=True,
            **TORCH,
        ),
        JAX(
            name="jax",
            cls="nanogpt_mac.backends.jax_backend:JaxBackend",
            arrays="nanogpt_mac.backends.jax_arrays:JaxArrays",
            nets="nanogpt_mac.backends.jax_nets:JaxNet",
            also_on=("cpu",),
            label="JAX",
            framework="jax",
            extra="jax",
            devices=(
                Capabilities(
                    "cuda", "jax", True, True, compiles_evaluation=True, dtypes=HALVES, tf32=True, memory=ALLOCATOR
                ),
                replace(_JAX_ON_METAL, device="jax-mps", note="jax-mps"),  # which waits for each executable
                replace(_JAX_ON_METAL, device="metaljax", runs_ahead=True, note="metaljax"),
                Capabilities("cpu", "jax", compiles_evaluation=True, memory=RESIDENT_SET, note="CPU"),
            ),
            compiler="jax.jit",
            compiled_by_default=True,
            eager_by_name=False,
            settings=JAXSettings,
            keeps_attention=True,
            caches={"JAX_COMPILATION_CACHE_DIR": "jax"},
            out_of_memory="RESOURCE_EXHAUSTED",
            missing_operator="UNIMPLEMENTED",
        ),
        Tinygrad(
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
        ),
    )
}


class _Broken(Kind):
    """A back end of another package whose entry point cannot be loaded: it is missing, and says why."""

    def missing(self) -> str | None:
        return self.label


def _registered_elsewhere() -> dict[str, Kind]:
    """Back ends that other installed packages bring; none of them takes the place of one above."""
    found: dict[str, Kind] = {}
    for entry in entry_points(group="nanogpt_mac.backends"):
        try:
            kind = entry.load()
            if not isinstance(kind, Kind) or kind.name in KINDS:
                raise TypeError(f"{entry.value} is not the Kind of a new back end")
        except Exception as error:
            reason = f"its entry point {entry.value} cannot be loaded: {type(error).__name__}: {error}"
            kind = _Broken(entry.name, "", " ".join(reason.split()), "", ())
        found.setdefault(kind.name, kind)
    return found


KINDS |= {name: kind for name, kind in _registered_elsewhere().items() if name not in KINDS}


def missing(name: str) -> str | None:
    """Why back end `name` cannot run here, or None when it can."""
    return KINDS[name].missing()


def available() -> list[str]:
    return [name for name in KINDS if missing(name) is None]


def resolve(name: str) -> str:
    """The back end that `backend=name` means here; InputError, naming what is there, when it is absent."""
    if name == "auto":
        ranks = {kind.name: kind.rank[sys.platform] for kind in KINDS.values() if sys.platform in kind.rank}
        return next(candidate for candidate in sorted(ranks, key=ranks.__getitem__) if missing(candidate) is None)
    reason = missing(name)
    if reason:
        raise InputError(f"backend={name}: not available here: {reason}. Available: auto, {', '.join(available())}")
    return name


def resolve_compile(value: bool | str, backend: str) -> bool:
    """`compile=auto` compiles where that is known to be faster: MLX and CUDA. True and false are obeyed."""
    kind = KINDS[backend]
    if value is True and not kind.compiler:
        raise InputError(f"compile=true: backend={backend} has no compiler; use compile=false or compile=auto")
    return kind.compiled_by_default if value == "auto" else bool(value)


def create(spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> Backend:
    """Make the back end that `options` describe."""
    kind = KINDS[options.name]
    kind.prepare(options)
    return kind.load()(spec, options, tokens)


def recorded(backend: str, device: str) -> Capabilities:
    """What back end `backend` says of itself on `device`, for records that do not have it (schema 1)."""
    return KINDS[backend].on(device) if backend in KINDS else Capabilities(device)


def frameworks() -> tuple[str, ...]:
    """Distributions whose versions are recorded."""
    return tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.programs() if name))


def settings() -> dict[str, tuple[Any, Any, tuple[Any, ...]]]:
    """Every key under `backend.` that some kind has: its type, its default and its values (none: any of the type)."""
    found: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {}
    for kind in KINDS.values():
        types = get_type_hints(kind.settings) if kind.settings else {}
        for f in fields(kind.settings) if kind.settings else ():
            found.setdefault(f.name, (types[f.name], f.default, f.metadata.get("allowed", ())))
    return found


def own_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings `given` under `backend.`, those that back end `name` has; it ignores the others'."""
    own = KINDS[name].settings
    return {f.name: given[f.name] for f in fields(own) if f.name in given} if own else {}


def less_to_enqueue(name: str, compiled: bool, details: Mapping[str, Any]) -> str:
    """What to use where the host takes too long to enqueue an iteration of back end `name`, which chose `details`."""
    kind = KINDS.get(name)
    if kind and kind.compiler and not compiled:
        return "compile=true"
    if kind and kind.nvidia and "cuda_graph" in settings() and not details.get("cuda_graph"):
        return "backend.cuda_graph=true"
    return "a larger batch_size"


def signs() -> dict[str, re.Pattern[str]]:
    """What the line of a log means, in the words of any framework: a state of records.run.RunState -> its pattern."""
    joined = {
        "oom": "|".join({kind.out_of_memory for kind in KINDS.values()} - {""}),
        "missing_op": "|".join({kind.missing_operator for kind in KINDS.values()} - {""}),
    }
    return {state: re.compile(pattern) for state, pattern in joined.items() if pattern}
