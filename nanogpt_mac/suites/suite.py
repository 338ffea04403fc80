"""What a suite is: rows that are measured on ways, in fresh processes. run.py carries one out, whichever it is."""

from __future__ import annotations

import fnmatch
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.arrays import Arrays
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.measure import calls
from nanogpt_mac.records.bench import Bench, Reading, State, Task, Way
from nanogpt_mac.report.words import size
from nanogpt_mac.suites.config import BenchConfig

if TYPE_CHECKING:  # children need neither
    from nanogpt_mac.report.charts import Chart
    from nanogpt_mac.report.table import Report

SHARE = 0.5  # of the free memory that a row may take

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


class RefusedError(Exception):
    """A row that is not timed, or whose time is not shown, and why."""

    def __init__(self, state: State, why: str) -> None:
        super().__init__(why)
        self.state = state


class Measuring(ABC):
    """Measures rows on one way, in a child: what became of each is its Reading, whatever happens."""

    reading: ClassVar[type[Reading]]

    def __init__(self, task: Task, arrays: Arrays) -> None:
        self.task, self.arrays = task, arrays
        self.spent: dict[str, float] = {}  # seconds of a row, by what for

    @abstractmethod
    def figures(self, row: str) -> dict[str, Any]:
        """All that a right row's reading has beside its name and state."""

    def must_fit(self, on_device: float, on_host: float) -> None:
        """Refused: a row that takes so many bytes, more than half of what is free."""
        for where, needed, free in (
            ("", on_device, self.arrays.free_memory()),
            (" in main memory", on_host, psutil.virtual_memory().available),
        ):
            if needed > SHARE * free:
                why = f"it needs {size(needed)}{where}, more than half of the {size(free)} that are free"
                raise RefusedError(State.SKIPPED, why)

    def timed(self, call: Callable[[int], calls.Outputs], copies: int, made: int) -> calls.Measured:
        """`call` of copy after copy of the inputs, each of which makes `made` bytes; the last of each copy are kept."""
        keep = copies if self.arrays.outputs_last else 1
        most = max(1, min(calls.MOST_QUEUED, int(self.arrays.free_memory() / 4 / max(made, 1))))
        return calls.measure(call, self.arrays, self.task.row_s, keep, most)

    def __call__(self, row: str) -> Reading:
        self.spent = {}
        state, why, found = State.OK, "", dict[str, Any]()
        try:
            found = self.figures(row)
        except RefusedError as refused:
            state, why = refused.state, str(refused)
        except Exception as error:
            why = f"{type(error).__name__}: {reason(error)}"
            told = {"oom": State.SKIPPED, "missing_op": State.ABSENT}
            words = f"{type(error).__name__}: {error}"
            state = next((told[s] for s, sign in kinds.signs().items() if sign.search(words)), State.FAILED)
        finally:
            self.arrays.release()
        known: dict[str, Any] = {"row": row, "way": self.task.way.name, "round": self.task.round, "spent": self.spent}
        return self.reading(**known, state=state, reason=why, **found)


class Suite(ABC):
    """One suite. `plan` and `report` are called in the parent, which loads no framework; `measuring` in a child."""

    contents: ClassVar[str]  # the module that has its `report` and, if it has any, its `charts`
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

    def report(self, bench: Bench) -> Report:
        made: Report = importlib.import_module(self.contents).report(bench)
        return made

    def environment(self, way: Way) -> Mapping[str, str] | None:
        """Of the processes that measure `way`; None: this one's."""
        return None

    def finished(self, bench: Bench) -> None:  # noqa: B027 (most keep nothing)
        """What is to be remembered of it, beyond its report."""

    def charts(self, bench: Bench) -> dict[str, list[Chart]]:
        """Section id -> its charts."""
        drawn = getattr(importlib.import_module(self.contents), "charts", None)
        return drawn(bench) if drawn else {}

    def files(self, bench: Bench) -> dict[str, str]:
        """Name -> text of further files in the report's folder."""
        return {}


def asked(
    rows: str | None, names: Iterable[str], such_as: Iterable[str] = (), what: str = "row", ends: bool = False
) -> list[str]:
    """Of `names` those that rows= asks for: the one that is called so, or all that have it in them (* is anything), or
    any of a list: [softmax,relu]. With `ends`, what ends in a digit is the end of a name.

    InputError where there are none; `such_as` are then named, by default all of `names`."""
    known, chosen = list(names), set()
    if rows in known:
        return [rows]
    if rows is None:
        return known
    for one in re.sub(r"^\[(.*)\]$", r"\1", rows.strip()).split(","):
        wanted = one.strip(" \"'").lower()
        pattern = f"*{wanted}" if ends and wanted[-1:].isdigit() else f"*{wanted}*"
        if not wanted:
            raise InputError(f"rows={rows}: has an empty part; use a part of a name, or a list of them")
        if not (found := {name for name in known if fnmatch.fnmatchcase(name.lower(), pattern)}):
            examples = ", ".join(dict.fromkeys(such_as or known))
            called = "so" if one == rows else one.strip()
            raise InputError(f"rows={rows}: no {what} is called {called}; use a part of a name such as {examples}")
        chosen |= found
    return [name for name in known if name in chosen]


def row_seconds(config: BenchConfig, rows: int, ways: int, rounds: int, most: float = 1.0) -> float:
    """What one row may be timed for, so that half of the budget is left for everything else."""
    return min(most, max(0.01, 0.5 * 60 * config.budget_minutes / max(rows * ways * rounds, 1)))
