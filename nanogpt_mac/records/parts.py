"""Where an iteration goes, part by part: what suite=parts read, and what it adds up to. Times are ms."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from nanogpt_mac.records.base import Amount, Count, Record
from nanogpt_mac.records.bench import Bench, Reading
from nanogpt_mac.records.run import Times

ITERATION = "iteration"  # the row of the whole, beside those of its parts
Signed = Annotated[float, Field(allow_inf_nan=False)]  # a difference: noise may put it below 0


class PartReading(Reading):
    """One part, alone, or the whole iteration as it is trained: ms a call, and `times` calls an iteration."""

    note: str = ""
    times: Count = 1
    forward: Times | None = None  # of the whole iteration: between completions
    both: Times | None = None  # forward and backward in one call
    inside: tuple[Signed, Signed] | None = None  # ms an iteration by a profiler: forward, backward
    counts: dict[str, Count] = {}  # of one call, forward and backward: kernels, and waits on a simulated device
    # of the whole iteration alone
    queued: Amount | None = None  # an iteration where several are enqueued and waited for together
    dispatch: Amount | None = None  # of the host, to enqueue it
    launch: Amount | None = None  # the smallest kernel, behind others
    inside_iteration: Amount | None = None  # under the profiler
    not_inside: str = ""  # why no profiler tells


class PartsBench(Bench):
    """bench.json of suite=parts."""

    readings: tuple[PartReading, ...] = ()

    @field_validator("readings", mode="before")
    @classmethod
    def _of_parts(cls, readings: Any) -> Any:
        """A reading that has nothing but its state is one too."""
        return [r.model_dump() if isinstance(r, Reading) else r for r in readings]


class Figure(Record):
    """A median over rounds; all rounds' 95 % intervals lie between `low` and `high`."""

    ms: Signed
    low: Signed
    high: Signed
    rounds: dict[int, Signed] = {}  # round -> its own


class PartCost(Record):
    """A part's share of an iteration, all its places together."""

    name: str
    note: str = ""
    times: Count
    forward: Figure | None = None
    backward: Figure | None = None
    inside: tuple[Signed, Signed] | None = None
    kernels: Count | None = None  # launched in an iteration
    waits: Count | None = None

    @property
    def ms(self) -> float:
        return sum(each.ms for each in (self.forward, self.backward) if each)


class Left(Record):
    """Some of what the iteration takes beyond its parts; below 0 it takes less than they do alone."""

    name: str
    ms: Signed


class Account(Record):
    """One way's iteration. The parts and what is left over add up to it."""

    name: str
    label: str
    simulated: bool = False
    iteration: Figure | None = None
    parts: tuple[PartCost, ...] = ()
    left: tuple[Left, ...] = ()
    kernels: Count | None = None  # of a whole iteration
    waits: Count | None = None
    launch: Amount | None = None
    inside_iteration: Amount | None = None
    not_inside: str = ""
    why_not: str = ""  # nothing could be measured

    @property
    def total(self) -> float:
        """Of the parts alone."""
        return sum(part.ms for part in self.parts)


class Cause(Record):
    """What the slower of two takes longer in."""

    name: str
    ms: Signed


class Reason(Record):
    """Why `slower` takes longer than `faster`: names of variants. `causes`: those that are clear, the largest first."""

    faster: str
    slower: str
    difference: Signed
    causes: tuple[Cause, ...] = ()
    sentence: str


class Explanation(Record):
    accounts: tuple[Account, ...]
    reasons: tuple[Reason, ...] = ()
    seconds: Amount = 0.0
    complete: bool = True  # False: the budget was spent
