"""The variants of training that this machine has, and how a variant is written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanogpt_mac.backends import here, kinds
from nanogpt_mac.backends.base import Kind
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.compare.config import DECIDED
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import key_of, merged, slug
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.records.plan import Variant


class Known(NamedTuple):
    backend: str
    compiled: bool
    label: str


def _known(kind: Kind) -> dict[str, Known]:
    words = {True: f"{kind.label} compiled", False: f"{kind.label} eager" if kind.compiler else kind.label}
    return {name: Known(kind.name, compiled, words[compiled]) for compiled, name in kind.variants.items()}


BACKENDS = tuple(KINDS)
KNOWN = {name: known for kind in KINDS.values() for name, known in _known(kind).items()}  # in the order of showing
NARROWING = ("backend", "compile")  # as top-level keys these choose among the variants
NOT_A_SETTING = (*DECIDED, "run", "run_dir", "init_from", "experiment")


@dataclass(frozen=True)
class Machine:
    """What of this machine decides on the variants."""

    missing: dict[str, str]  # back end -> why it cannot run here
    has: dict[str, Capabilities]  # those that can

    @property
    def accelerated(self) -> bool:
        return any(found.accelerator for found in self.has.values())


def look_around() -> Machine:
    return Machine(*here.look())


def parse(text: str, machine: Machine) -> Variant:
    """A variant as it is written: one of KNOWN, then overrides of train.py. InputError says what to use instead."""
    first, *extras = text.split()
    allowed = [name for name, known in KNOWN.items() if known.backend not in machine.missing]
    spelt = {f"{name}-{how}": kind.variants for name, kind in KINDS.items() for how in ("eager", "compile")}
    if first in spelt:  # every variant can be written in full: cpu-eager is cpu, mlx-compile is mlx
        first = spelt[first].get(first.endswith("-compile"), first)
    if first not in KNOWN:
        raise InputError(f"variants=[{text}]: unknown variant {first}; use one of {', '.join(allowed)}")
    backend, compiled, _ = KNOWN[first]
    for extra in extras:
        if "=" not in extra or key_of(extra).split(".")[0] in NOT_A_SETTING:
            raise InputError(f"variants=[{text}]: {extra}: use settings of train.py after {first}, as key=value")
    chosen = {key_of(extra): extra.partition("=")[2] for extra in extras}
    backend, how = chosen.get("backend", backend), chosen.get("compile", str(compiled)).lower()
    if backend in machine.missing:
        reason = f"not available here: {machine.missing[backend]}"
        raise InputError(f"variants=[{text}]: {reason}. Available: {', '.join(allowed)}")
    if backend not in KINDS or how not in ("true", "false", "auto"):  # train.py says what is wrong
        overrides = [f"backend={KNOWN[first].backend}", f"compile={str(KNOWN[first].compiled).lower()}", *extras]
        return Variant(name=slug(text), label=text, overrides=tuple(merged([], overrides)))
    compiled = kinds.resolve_compile("auto" if how == "auto" else how == "true", backend)
    base = known(KINDS[backend].variants[compiled], machine)
    rest = [extra for extra in extras if key_of(extra) not in NARROWING]
    return Variant(
        name=slug("-".join([base.name, *(_short(extra) for extra in rest)])),
        label=", ".join([base.label, *rest]),
        note=machine.has[backend].note,
        overrides=tuple(merged(base.overrides, rest)),
    )


def known(name: str, machine: Machine) -> Variant:
    backend, compiled, label = KNOWN[name]
    overrides = f"backend={backend}", f"compile={str(compiled).lower()}"
    return Variant(name=name, label=label, note=machine.has[backend].note, overrides=overrides)


def _short(override: str) -> str:
    """dtype=bfloat16 -> dtype-bfloat16, backend.fused_adamw=false -> fused_adamw-false"""
    return f"{key_of(override).rpartition('.')[2]}-{override.partition('=')[2]}"


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
        named.append(variant.model_copy(update={"name": name, "label": label}))
    return named
