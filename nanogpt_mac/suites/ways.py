"""The ways of computing that this machine has: every back end's variants, on each device that it can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nanogpt_mac.backends import here, kinds
from nanogpt_mac.backends.arrays import Arrays
from nanogpt_mac.backends.base import Kind
from nanogpt_mac.config import backend_options
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import Way
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.suites import config as configs
from nanogpt_mac.suites.config import BenchConfig


def here_for(config: BenchConfig, brings: str = "arrays") -> tuple[tuple[Way, ...], dict[str, str]]:
    """The ways that `config` asks for, and why other back ends are missing.

    `brings` is the attribute of a Kind without which it takes no part. InputError for a way that is not there.
    """
    missing, has = here.look()
    missing |= {name: f"it brings no {brings}" for name in has if not getattr(kinds.KINDS[name], brings)}
    found = {way.name: way for name, at in has.items() if name not in missing for way in _of(kinds.KINDS[name], at)}
    return _chosen(config, found, missing), missing


def _of(kind: Kind, at: Capabilities) -> list[Way]:
    """A back end's ways, the default device first."""
    ways = []
    others = [kind.on(device) for device in kind.also_on if device != at.device]
    for place in (at, *others):
        note = f" ({place.note})" if place.note else ""
        named = kind if place is at else replace(kind, name=f"{kind.name}-{place.device}")
        for compiled, name in named.variants.items():
            if compiled and not place.compiles:
                continue
            words = f" {'compiled' if compiled else 'eager'}" if kind.compiler else ""
            ways.append(
                Way(
                    name=name,
                    label=f"{kind.label}{words}{note}",
                    backend=kind.name,
                    device=place.device,
                    compiled=compiled,
                    accelerator=place.accelerator,
                    simulated=place.simulated,
                )
            )
    return ways


def _chosen(config: BenchConfig, found: Mapping[str, Way], missing: Mapping[str, str]) -> tuple[Way, ...]:
    names = configs.ways(config)
    for name in names or ():
        if _spelt(name, found) is None:
            why = next((f"{b} is not available here: {r}" for b, r in missing.items() if name.split("-")[0] == b), "")
            raise InputError(f"ways=[{name}]: {why or 'there is no such way'}; use one of {', '.join(found)}")
    backend, compile_ = config.backend.name, config.compile
    if backend != "auto" and backend in missing:
        raise InputError(f"backend={backend}: not available here: {missing[backend]}; use one of {', '.join(found)}")
    wanted = found if names is None else {way.name: way for name in names if (way := _spelt(name, found))}
    ways = tuple(
        way for way in wanted.values() if backend in ("auto", way.backend) and compile_ in ("auto", way.compiled)
    )
    if not ways:
        raise InputError(f"backend={backend} compile={str(compile_).lower()}: leaves none of {', '.join(wanted)}")
    return ways


def _spelt(name: str, found: Mapping[str, Way]) -> Way | None:
    """A way by its name, or written in full: cpu-eager is cpu, mlx-compile is mlx."""
    base, _, how = name.rpartition("-")
    if name in found or not base or how not in ("eager", "compile"):
        return found.get(name)
    return next(
        (way for way in found.values() if way.name.startswith(base) and way.name == base
         and way.compiled is (how == "compile")), None,
    )  # fmt: skip


def arrays(way: Way, config: BenchConfig) -> Arrays:
    """The operations of `way`, in the child that measures it."""
    kind = kinds.KINDS[kinds.resolve(way.backend)]  # which also installs a simulated device
    kind.prepare(backend_options(config, way.backend, way.compiled))
    return kind.load_arrays()(kind, way.device, way.compiled)
