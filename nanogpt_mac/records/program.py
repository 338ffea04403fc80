"""What a program that is not ours does that leaves MPS: the document of `mps_coverage.py script=...`."""

from __future__ import annotations

from nanogpt_mac.records.base import Amount, Count, Document, Record
from nanogpt_mac.records.fallbacks import FindingKind


class ProgramFinding(Record):
    """One operator, or one wait, at one line of the program. `where` is file:line; None where that is not known."""

    op: str
    kind: FindingKind
    where: str | None
    source: str  # the line
    called_as: str  # what the line calls
    calls: Count
    waits: Count = 0  # of the host, in all calls
    each_iteration: bool = False  # the host waits here in (nearly) every iteration
    ms: Amount = 0.0  # of the host, in all calls, the profiler's cost included
    bytes: Count = 0  # copied between the devices
    to_host: bool = False
    dtypes: tuple[str, ...] = ()
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    evidence: tuple[str, ...] = ()
    advice: str = ""


class Iterations(Record):
    """The middle iteration, without the first. `unit` says what an iteration is here."""

    unit: str
    count: Count
    kernels: Amount
    waits: Amount


class Judged(Record):
    """One operator that came to the device, here and in another torch."""

    op: str
    calls: Count
    here: str
    there: str


class Program(Document):
    """A whole run. `unseen` is what could not be watched, `doubts` is where two ways of looking differ."""

    program: tuple[str, ...]
    folder: str
    torch: str | None = None
    python: str | None = None
    device: str | None = None
    ended: str
    left_with: int  # the program's own exit code
    seconds: Amount = 0.0
    watched_s: Amount = 0.0  # of them, spent on reading what was seen
    steps: Count = 0  # of torch's optimizers
    iterations: Iterations | None = None
    kernels: Count = 0
    waits: Count = 0
    reached: dict[str, Count] = {}
    findings: tuple[ProgramFinding, ...] = ()
    unseen: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    against: str | None = None
    judged: tuple[Judged, ...] = ()
