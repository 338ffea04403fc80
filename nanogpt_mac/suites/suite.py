"""What a suite is: rows that are measured on ways, in fresh processes. run.py carries one out, whichever it is."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nanogpt_mac.records.bench import Bench, Reading, Task, Way
from nanogpt_mac.suites.config import BenchConfig

if TYPE_CHECKING:  # children need neither
    from nanogpt_mac.report.charts import Chart
    from nanogpt_mac.report.table import Report

Measure = Callable[[str], Reading]


@dataclass(frozen=True)
class Plan:
    """`chunks` are the rows, by name, that one process measures. `work` is what its children must know, as JSON."""

    ways: tuple[Way, ...]
    chunks: Sequence[tuple[str, ...]]
    rounds: int
    row_s: float  # that timing a row may take, in one round on one way
    missing: dict[str, str] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(row for chunk in self.chunks for row in chunk)


class Suite(ABC):
    """One suite. `plan` and `report` are called in the parent, which loads no framework; `measuring` in a child."""

    reading: ClassVar[type[Reading]]
    document: ClassVar[type[Bench]] = Bench

    @abstractmethod
    def plan(self, config: BenchConfig) -> Plan:
        """What is to be measured. InputError for what cannot be had here."""

    @abstractmethod
    def measuring(self, task: Task) -> Measure:
        """Load the framework of `task.way`; what then measures one of its rows, in their order.

        An exception is the row's: it failed. A row that this way does not have, or that is too large, is a Reading too.
        """

    @abstractmethod
    def report(self, bench: Bench) -> Report: ...

    def environment(self, way: Way) -> Mapping[str, str] | None:
        """Of the processes that measure `way`; None: this one's."""
        return None

    def finished(self, bench: Bench) -> None:  # noqa: B027 (most keep nothing)
        """What is to be remembered of it, beyond its report."""

    def charts(self, bench: Bench) -> dict[str, list[Chart]]:
        """Section id -> its charts."""
        return {}

    def files(self, bench: Bench) -> dict[str, str]:
        """Name -> text of further files in the report's folder."""
        return {}


def asked(rows: str | None, names: Iterable[str]) -> list[str]:
    """Of `names` those that rows= asks for: the one that is called so, or all that have it in them (* is anything)."""
    known = list(names)
    if rows in known:
        return [rows]
    pattern = f"*{(rows or '').lower()}*"
    return [name for name in known if fnmatch.fnmatchcase(name.lower(), pattern)]


def row_seconds(config: BenchConfig, rows: int, ways: int, rounds: int, most: float = 1.0) -> float:
    """What one row may be timed for, so that half of the budget is left for everything else."""
    return min(most, max(0.01, 0.5 * 60 * config.budget_minutes / max(rows * ways * rounds, 1)))
