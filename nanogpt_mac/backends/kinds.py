"""THE registry: the back ends that there are, which of them this machine has, and making one.

An entry imports no framework; what must be set before one is imported is set there. A back end of another package
registers itself: an entry point of the group `nanogpt_mac.backends` names its Kind (docs/add-a-backend.md).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from nanogpt_mac.backends import jax_entry, mlx_entry, tinygrad_entry, torch_entry
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Tokens
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.capabilities import Capabilities

# The order in which variants are shown. backend=auto goes by rank: CUDA, then MLX on Metal, then MPS, then the CPU. MLX
# stands before MPS because the one published comparison with sound timing has it ahead (richiksc/mlx-benchmarks, M1:
# 0.365 s against 0.652 s an epoch).
_OWN = (torch_entry.MPS, torch_entry.CUDA, mlx_entry.MLX, torch_entry.CPU, jax_entry.JAX, tinygrad_entry.TINYGRAD)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _OWN}


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


def resolve(name: str, launcher: str = "") -> str:
    """What `backend=name` means here, also under a `launcher` of several processes; InputError when it is absent."""
    if name == "auto":
        fit = [kind for kind in KINDS.values() if sys.platform in kind.rank and kind.is_for(launcher)]
        ranks = {kind.name: kind.rank[sys.platform] for kind in fit}
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
