"""sweep.json: what became of every member of a multirun sweep."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import ClassVar

from nanogpt_mac.records.base import Amount, Count, Document, Number, Record

SPEEDS = ("iter_ms", "tokens_per_s")  # objectives that a machine shared with other members falsifies
MAXIMIZED = ("tokens_per_s",)  # unless the sweeper is given a direction


class MemberState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    DIVERGED = "diverged"
    FAILED = "failed"
    BAD_INPUT = "bad input"
    STOPPED = "stopped"


class Member(Record):
    """One combination of a sweep's values: what its run gave, where it lies."""

    number: Count  # Hydra's job number
    overrides: tuple[str, ...]
    state: MemberState
    code: int | None = None  # its process's exit code; None: it has none, or has not been started
    objective: Number | None = None
    folder: str | None = None
    seconds: Amount = 0.0
    host: str | None = None  # while it runs: where, and the processes that wait for it and train
    waiter: Count | None = None
    process: Count | None = None

    @property
    def title(self) -> str:
        return " ".join(self.overrides)


class Sweep(Document):
    """sweep.json. `objective` is None for a command without one; `direction` is minimize or maximize."""

    SCHEMA: ClassVar[int] = 1

    version: str = ""
    created: str | None = None
    launcher: str = ""
    sweeper: str = ""
    objective: str | None = None
    direction: str = "minimize"
    shared_machine: bool = False  # members run side by side
    complete: bool = False
    signal: str | None = None  # that ended it
    members: tuple[Member, ...] = ()
    best: Count | None = None  # a member's number; None where nothing can be called best

    def found_best(self) -> Member | None:
        """The member with the best objective; None where there is none, or side by side where it is a speed."""
        if self.shared_machine and self.objective in SPEEDS:
            return None
        known = [(m.objective, m) for m in self.members if m.objective is not None and math.isfinite(m.objective)]
        sign = -1 if self.direction == "maximize" else 1
        return min(known, key=lambda pair: sign * pair[0])[1] if known else None
