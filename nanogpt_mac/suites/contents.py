"""What the reports of all suites have in common: the state of a row on a way, facts, alarms, what has no time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scipy import special

from nanogpt_mac.backends import kinds
from nanogpt_mac.records.bench import Bench, State
from nanogpt_mac.records.run import Times
from nanogpt_mac.report.table import Section
from nanogpt_mac.report.words import DASH, plural, seconds, text, when

HELD = {  # what may stand in a cell in place of a time
    State.WRONG: "WRONG",
    State.FAILED: "failed",
    State.ABSENT: "absent",
    State.SKIPPED: "skipped",
}
WORST_FIRST = (State.WRONG, State.FAILED, State.OK, State.ABSENT, State.SKIPPED)
LITTLE = 0.01  # of all time: not named
BAD = (State.WRONG, State.FAILED)


@dataclass(frozen=True)
class Found:
    """A time over all rounds, ms: the median of the rounds' medians, and its 95 % interval."""

    value: float
    bounds: tuple[float, float] | None


def found_of(rounds: Sequence[Times]) -> Found | None:
    """None without any time. The interval is Student's t of the rounds' medians, as logarithms: what two processes
    differ by is several times what the batches of one do, so of one round there is none."""
    medians = [times.median for times in rounds if times.median]
    if not medians:
        return None
    value, n = statistics.median(medians), len(medians)
    if n == 1:
        return Found(value, None)
    logs = [math.log(median) for median in medians]
    half = float(special.stdtrit(n - 1, 0.975)) * statistics.stdev(logs) / math.sqrt(n)
    middle = statistics.fmean(logs)
    return Found(value, (min(value, math.exp(middle - half)), max(value, math.exp(middle + half))))


@dataclass(frozen=True)
class Results:
    """A bench by row and way."""

    bench: Any  # a Bench, with the readings of its suite

    @cached_property
    def readings(self) -> dict[tuple[str, str], list[Any]]:
        found: dict[tuple[str, str], list[Any]] = {}
        for reading in self.bench.readings:
            found.setdefault((reading.row, reading.way), []).append(reading)
        return found

    def state(self, row: str, way: str) -> State | None:
        """The worst of the rounds that were tried; None: not yet tried."""
        states = {reading.state for reading in self.readings.get((row, way), [])}
        return next((state for state in WORST_FIRST if state in states), None)

    def held(self, row: str, way: str) -> str:
        """What stands in the cell of a row that has no time."""
        state = self.state(row, way)
        return HELD.get(state, DASH) if state else DASH

    def count(self, *states: State) -> int:
        """Cells of these states."""
        return sum(self.state(row, way.name) in states for row in self.bench.rows for way in self.bench.ways)


def facts(bench: Bench, *more: str, rounds: str | None = "round") -> list[str]:
    """The machine, its frameworks, `more`, how many rounds (or what they are called), how long and when."""
    env, known = bench.environment, kinds.frameworks()
    return [
        *(text(fact) for fact in ((env.gpu, env.chip) if env else ()) if fact),
        *(f"{name} {v}" for name, v in (env.versions if env else {}).items() if v and name in known),
        *more,
        *([plural(bench.rounds, rounds)] if rounds else []),
        _spent(bench),
        when(bench.created),
    ]


def _spent(bench: Bench) -> str:
    """How long it took, and for what."""
    known = sorted(((s, what) for what, s in bench.spent.items() if s >= LITTLE * bench.seconds), reverse=True)
    told = ", ".join(f"{what} {seconds(s)}" for s, what in known)
    return seconds(bench.seconds) + (f" ({told})" if len(known) > 1 else "")


def alarms(
    bench: Bench,
    simulated: str = "A simulated device was used: it has counts and no times.",
    missing: str = "what is missing is listed as skipped.",
    more: Sequence[str] = (),
) -> list[str]:
    incomplete = [] if bench.complete else [f"It is not complete: {missing}"]
    return [*incomplete, *more, *([simulated] if any(way.simulated for way in bench.ways) else [])]


def problems(found: Results) -> Section:
    """What has no time, and why; equal reasons once."""
    labels = {way.name: way.label for way in found.bench.ways}
    lines: dict[tuple[State, str, str], list[str]] = {}
    for (row, way), readings in found.readings.items():
        for reading in readings:
            if reading.state is not State.OK and found.state(row, way) is not State.OK:
                rows = lines.setdefault((reading.state, way, reading.reason), [])
                rows += [row] if row not in rows else []
    order = list(HELD)
    items = [
        f"{labels[way]}: {HELD[state]}: {some(rows)}: {why}"
        for (state, way, why), rows in sorted(lines.items(), key=lambda item: order.index(item[0][0]))
    ]
    alarming = bool(found.count(*BAD))
    return Section("problems", "What has no time", items=items, alarming=alarming, empty="Every row has its times.")


def some(rows: Sequence[str]) -> str:
    return ", ".join(rows) if len(rows) < 4 else f"{', '.join(rows[:2])} and {len(rows) - 2} more"
