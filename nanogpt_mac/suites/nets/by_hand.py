"""Ways of suite=mlp by kernels of our own (backends/by_hand). They take part where `ways=` names them.

metal-v1, -v2 and -v3 drive Metal themselves; mps-v1 to -v3 and mlx-v3 leave the same kernels to torch's and MLX's
queues; cuda-v1 to -v3 are the same structures on an NVIDIA GPU. metal-v3-5 puts five batches into a command buffer,
metal-v3-all all of an epoch; metal-v3-queue1024 lets so many buffers be in flight.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.by_hand import launches, metal
from nanogpt_mac.backends.by_hand.launches import Version
from nanogpt_mac.config import backend_options
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import Way
from nanogpt_mac.suites import config as configs
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig

LABELS = {
    "metal": "Metal",
    "mps": "torch MPS, our Metal kernels",
    "mlx": "MLX compiled, our Metal kernels",
    "cuda": "CUDA, our kernels",
}
HAVE = {"mps": ("v1", "v2", "v3"), "mlx": ("v3",), "cuda": ("v1", "v2", "v3")}


def parsed(name: str) -> tuple[str, Version] | None:
    """Who submits, and the version; None for another way's name. InputError for a version that there is not."""
    base, _, words = name.partition("-")
    if base not in LABELS or not words.startswith("v"):
        return None
    if base in HAVE and words not in HAVE[base]:
        raise InputError(f"ways=[{name}]: use {', '.join(f'{base}-{known}' for known in HAVE[base])}")
    try:
        return base, launches.version(words)
    except InputError as error:
        raise InputError(f"ways=[{name}]: {error}") from None


def asked(config: BenchConfig, found: ways.Ways) -> ways.Ways:
    """`found` and those of these ways that `config` names. InputError, with the reason, for one that is not here."""
    made = dict(found)
    for name in configs.ways(config) or ():
        by = parsed(name)
        if by is None:
            continue
        base, words = by[0], name.partition("-")[2]
        of = next((way for way in found.values() if way.backend == base and (base != "mlx" or way.compiled)), None)
        if base == "metal":
            simulated = sys.platform != "darwin"
            of = Way(name=name, label="", device="metal", accelerator=not simulated, simulated=simulated)
        if of is None:  # ways.py says why the back end is not here
            continue
        if reason := _missing(base, of):
            raise InputError(f"ways=[{name}]: not available here: {reason}")
        label = f"{LABELS[base]}, {words}{' (simulated)' if of.simulated else ''}"
        made[name] = of.model_copy(update={"name": name, "label": label})
    return made


def _missing(base: str, of: Way) -> str | None:
    if base == "metal":
        return metal.missing()
    if base == "mlx" and of.device != "metal":
        return f"mx.fast.metal_kernel needs MLX on Metal, and it computes on the {of.device.upper()} here"
    if base == "cuda" and find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def of_way(way: Way, config: BenchConfig) -> tuple[Any, Any] | None:
    """In the child that measures `way`: its arrays, and what makes its network; None where the kernels are not ours."""
    by = parsed(way.name)
    if by is None:
        return None
    base, version = by
    from nanogpt_mac.backends.by_hand.net import HandNet

    if base == "metal":
        return metal.MetalArrays(version), HandNet
    if base == "mlx":
        from nanogpt_mac.backends.by_hand.mlx_kernels import MLXKernelNet

        return ways.arrays(way, config), MLXKernelNet
    kind = kinds.KINDS[kinds.resolve(way.backend)]  # which also installs a simulated device
    kind.prepare(backend_options(config, way.backend, False))
    from nanogpt_mac.backends.by_hand import torch_devices

    made = torch_devices.ShaderArrays if base == "mps" else torch_devices.TritonArrays
    return made(version, kind, way.device), HandNet
