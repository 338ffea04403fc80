"""fallbacks.json: what of a model's training leaves the GPU."""

from __future__ import annotations

from enum import StrEnum

from nanogpt_mac.records.base import Amount, Count, Document, Record
from nanogpt_mac.records.compiled import CompileReport
from nanogpt_mac.records.run import FallbackCounts


class FindingKind(StrEnum):
    """Why work leaves the GPU. The first three are table.Kind's words."""

    MISSING_CPU = "missing, CPU kernel"
    MISSING = "missing, no CPU kernel"
    EXPLICIT = "explicit fallback"
    HIDDEN = "CPU work inside a native kernel"
    LIMIT = "dtype or shape limit"
    SYNC = "copy or sync"


class Finding(Record):
    """One operator in one phase. `op` has no aten::, `where` is file.py:line, where it is known."""

    op: str
    kind: FindingKind
    phase: str
    calls_per_iteration: Count
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()  # of each different call's tensors
    where: str | None = None
    ms: Amount = 0.0  # of the host, over all calls
    bytes: Count = 0  # copied between the devices
    evidence: tuple[str, ...] = ()
    advice: str = ""


class Meant(Record):
    """Transfers that the back end declares and that are no findings."""

    phase: str
    op: str
    reason: str
    calls: Count


class WarningPass(Record):
    """torch's own warnings: phase to operator to calls."""

    calls: dict[str, dict[str, int]] = {}
    admitted: Count = 0  # kernels that say that they use the CPU
    control: bool | None = None


class ProfilerPass(Record):
    calls: dict[str, dict[str, int]] = {}
    meant: tuple[Meant, ...] = ()
    operators: dict[str, int] = {}  # phase to operators that took tensors of the device
    overloads: bool = True
    control: bool | None = None


class Passes(Record):
    """What each pass saw; empty where the detector's child failed."""

    control: str | None = None  # an operator known to fall back, which each pass must see
    warnings: WarningPass | None = None
    profiler: ProfilerPass | None = None


class Fallbacks(Document):
    """fallbacks.json. `complete` is False where something could not be seen: `why_incomplete` has the reasons."""

    torch: str | None = None
    python: str | None = None
    device: str | None = None
    backend: str
    compile: bool
    dtype: str
    model: dict[str, bool | int | float | str | None] = {}
    batch_size: Count
    gradient_accumulation_steps: Count
    complete: bool
    why_incomplete: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()  # that were reached
    findings: tuple[Finding, ...] = ()
    passes: Passes = Passes()
    seconds: Amount | None = None
    compile_report: CompileReport | None = None

    def counts(self) -> FallbackCounts:
        return FallbackCounts(findings=len(self.findings), why_incomplete=len(self.why_incomplete))
