"""What the detector's child is asked, and what it saw, as it is sent to its parent.

Plain dataclasses: the child runs where only torch and numpy are installed. The parent validates them (detect.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from nanogpt_mac.backends.base import BackendOptions
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.operators.dispatch import Dispatch
from nanogpt_mac.records.compiled import CompileReport


@dataclass(frozen=True)
class Task:
    """A run whose phases are looked at."""

    options: BackendOptions
    spec: GPTSpec
    batch_size: int
    gradient_accumulation_steps: int = 1


class Sign(StrEnum):
    """What a profile shows of a call that left the device."""

    FALLBACK = "fallback"  # the CPU ran it
    HIDDEN = "hidden"  # a native kernel used the CPU inside
    SYNC = "sync"  # the host waited for the device


@dataclass
class Call:
    """One operator call that left the device, or waited for it. `op` has no aten::, `where` is file.py:line."""

    sign: Sign
    op: str
    phase: str
    ms: float  # of the host
    dtypes: list[str]
    shapes: list[list[int]]
    where: str | None
    evidence: list[str]
    bytes: int = 0  # copied between the devices


@dataclass
class MeantCalls:
    """Transfers that the back end declares (base.Meant)."""

    phase: str
    op: str
    reason: str
    calls: int = 1


@dataclass
class Warned:
    """One of torch's warnings: that `op` falls back, or (`admitted`) that a kernel uses the CPU."""

    phase: str
    where: str | None
    op: str = ""
    text: str = ""


@dataclass
class Warnings:
    """The first pass. `control` is whether it saw the control; None where there was none."""

    fallbacks: list[Warned] = field(default_factory=list)
    admitted: list[Warned] = field(default_factory=list)
    control: bool | None = None


@dataclass
class Profiled:
    """The second pass. `operators` counts those that took tensors of the device, by phase."""

    records: list[Call] = field(default_factory=list)
    meant: list[MeantCalls] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)
    overloads: bool = True  # whether operators carry their overload names
    control: bool | None = None


@dataclass
class Refused:
    """An error that ended a phase. `op` raised it, and `cpu` is whether the CPU ran the same call; None: not known."""

    phase: str
    type: str
    text: str
    op: str | None = None
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    where: str | None = None
    cpu: bool | None = None
    evidence: list[str] = field(default_factory=list)


@dataclass
class Observed:
    """Both passes, and where they ran. `control` is an operator known to fall back, which both must have seen."""

    reached: list[str]  # phases, in order
    warnings: Warnings
    profiler: Profiled
    control: str | None = None
    refused: list[Refused] = field(default_factory=list)
    dispatch: dict[str, Dispatch] = field(default_factory=dict)
    torch: str | None = None
    python: str | None = None
    device: str | None = None
    seconds: float | None = None
    compile_report: CompileReport | None = None
