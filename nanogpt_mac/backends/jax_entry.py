"""JAX in the registry: a plugin for Metal, CUDA or the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec

from nanogpt_mac.backends.base import BackendOptions, Kind, setting
from nanogpt_mac.backends.entry import ALLOCATOR, HALVES, RESIDENT_SET, gpu_left_out
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.capabilities import Capabilities

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


class JAXKind(Kind):
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


_JAX_ON_METAL = Capabilities(
    "metal", "jax", True, compiles_evaluation=True, dtypes=HALVES, tf32=True, memory=RESIDENT_SET
)

JAX = JAXKind(
    name="jax",
    cls="nanogpt_mac.backends.jax_backend:JaxBackend",
    arrays="nanogpt_mac.backends.jax_arrays:JaxArrays",
    nets="nanogpt_mac.backends.jax_nets:JaxNet",
    also_on=("cpu",),
    label="JAX",
    framework="jax",
    extra="jax",
    devices=(
        Capabilities("cuda", "jax", True, True, compiles_evaluation=True, dtypes=HALVES, tf32=True, memory=ALLOCATOR),
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
)
