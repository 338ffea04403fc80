"""The variants of training that this machine has, and how a variant is written on the command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt_mac import simulator
from nanogpt_mac.backends import kinds
from nanogpt_mac.compare.config import DECIDED
from nanogpt_mac.errors import InputError
from nanogpt_mac.machine import probe
from nanogpt_mac.overrides import key_of, merged, slug

KNOWN = {  # name -> back end, compiled, label; the order in which they are shown
    "mps": ("mps", False, "MPS eager"),
    "mps-compile": ("mps", True, "MPS compiled"),
    "cuda": ("cuda", False, "CUDA eager"),
    "cuda-compile": ("cuda", True, "CUDA compiled"),
    "mlx": ("mlx", True, "MLX compiled"),
    "mlx-eager": ("mlx", False, "MLX eager"),
    "cpu": ("cpu", False, "CPU eager"),
    "cpu-compile": ("cpu", True, "CPU compiled"),
}
BACKENDS = tuple(dict.fromkeys(backend for backend, _, _ in KNOWN.values()))
NARROWING = ("backend", "compile")  # as top-level keys these choose among the variants
NOT_A_SETTING = (*DECIDED, "run", "run_dir", "init_from", "experiment")


@dataclass(frozen=True)
class Variant:
    """One variant of training: overrides of train.py under a name of its own."""

    name: str  # unique, fit for a file name
    label: str
    overrides: tuple[str, ...]
    lever: dict[str, Any] | None = None  # base (a variant's name), key, value, what
    script: str | None = None  # in train.py's place: tests alone

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Variant:
        return cls(found["name"], found["label"], tuple(found["overrides"]), found["lever"], found.get("script"))

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self) | {"overrides": list(self.overrides)}
        return {key: value for key, value in document.items() if key != "script" or value is not None}


@dataclass(frozen=True)
class Machine:
    """What of this machine decides on the variants."""

    missing: dict[str, str]  # back end -> why it cannot run here
    mlx_gpu: bool  # whether MLX computes on Metal or CUDA
    simulated: bool  # MPS is the simulated device
    lends_blas: bool  # MLX's Linux CPU wheel has the reference BLAS, ten times slower than libtorch's; no Mac has

    @property
    def accelerated(self) -> bool:
        return ("mps" not in self.missing and not self.simulated) or "cuda" not in self.missing or self.mlx_gpu

    def runs_ahead(self, backend: str) -> bool:
        """Whether the device works behind the host, so that how the host waits makes a difference."""
        return backend in ("mps", "cuda") or (backend == "mlx" and self.mlx_gpu)


def look_around() -> Machine:
    missing = {backend: reason for backend in BACKENDS if (reason := kinds.missing(backend))}
    # In a process of its own: MLX reads its environment once, and on a Mac takes the GPU.
    question = "import mlx.core as mx; print(mx.default_device() == mx.Device(mx.gpu))"
    answer = None if "mlx" in missing else probe.run((sys.executable, "-c", question), timeout=60)
    gpu = (answer or "").strip() == "True"
    lends = sys.platform == "linux" and not gpu and not {"mlx", "cpu"} & missing.keys()
    return Machine(missing, gpu, simulator.active(), lends)


def parse(text: str, machine: Machine) -> Variant:
    """A variant as it is written: one of KNOWN, then overrides of train.py. InputError says what is allowed."""
    first, *extras = text.split()
    allowed = [name for name, (backend, _, _) in KNOWN.items() if backend not in machine.missing]
    if first not in KNOWN:
        raise InputError(f"variants=[{text}]: {first} is no variant; allowed here are {', '.join(allowed)}")
    backend, compiled, _ = KNOWN[first]
    for extra in extras:
        if "=" not in extra or key_of(extra).split(".")[0] in NOT_A_SETTING:
            raise InputError(
                f"variants=[{text}]: {extra}: allowed after {first} are settings of train.py, as key=value"
            )
    chosen = {key_of(extra): extra.partition("=")[2] for extra in extras}
    backend, name = chosen.get("backend", backend), chosen.get("compile", str(compiled)).lower()
    compiled = kinds.resolve_compile("auto", backend) if name == "auto" else name == "true"
    if backend in machine.missing:
        reason = f"not available here: {machine.missing[backend]}"
        raise InputError(f"variants=[{text}]: {reason}. Available: {', '.join(allowed)}")
    found = next((n for n, (b, c, _) in KNOWN.items() if (b, c) == (backend, compiled)), None)
    if found is None or name not in ("true", "false", "auto"):
        return Variant(slug(text), text, tuple(merged(_base(first, machine), extras)))  # train.py says what is wrong
    rest = [extra for extra in extras if key_of(extra) not in NARROWING]
    return Variant(
        slug("-".join([found, *(_short(extra) for extra in rest)])),
        ", ".join([_label(found, machine), *rest]),
        tuple(merged(_base(found, machine), rest)),
    )


def known(name: str, machine: Machine) -> Variant:
    return Variant(name, _label(name, machine), tuple(_base(name, machine)))


def _short(override: str) -> str:
    """dtype=bfloat16 -> dtype-bfloat16, backend.fused_adamw=false -> fused_adamw-false"""
    return f"{key_of(override).rpartition('.')[2]}-{override.partition('=')[2]}"


def _base(name: str, machine: Machine) -> list[str]:
    backend, compiled, _ = KNOWN[name]
    overrides = [f"backend={backend}", f"compile={str(compiled).lower()}"]
    if backend == "mlx" and machine.lends_blas:
        overrides.append("backend.blas=torch")
    return overrides


def _label(name: str, machine: Machine) -> str:
    backend, _, label = KNOWN[name]
    if backend == "mlx" and machine.lends_blas:
        return f"{label} (CPU, torch's BLAS)"
    if backend == "mlx" and not machine.mlx_gpu:
        return f"{label} (CPU)"
    return f"{label} (simulated)" if backend == "mps" and machine.simulated else label


def setting(variant: Variant, key: str) -> str | None:
    return next((o.partition("=")[2] for o in variant.overrides if key_of(o) == key), None)


def unique(variants: Sequence[Variant]) -> list[Variant]:
    """The same variant entered twice becomes cpu and cpu-2."""
    taken: set[str] = set()
    named = []
    for variant in variants:
        name, label, number = variant.name, variant.label, 1
        while name in taken:
            number += 1
            name, label = f"{variant.name}-{number}", f"{variant.label} ({number})"
        taken.add(name)
        named.append(dataclasses.replace(variant, name=name, label=label))
    return named
