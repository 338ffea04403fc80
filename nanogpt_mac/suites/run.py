"""`python bench.py`: carry out a suite, row by row in fresh processes, and report."""

from __future__ import annotations

import importlib
import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import nanogpt_mac
from nanogpt_mac import child, signals
from nanogpt_mac.backends import kinds
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import run_folder, write_aside, write_json
from nanogpt_mac.machine import probe
from nanogpt_mac.measure.progress import Bar
from nanogpt_mac.records.bench import Bench, Reading, State, Task
from nanogpt_mac.records.run import Environment
from nanogpt_mac.report.words import plural
from nanogpt_mac.suites.config import BenchConfig, validate
from nanogpt_mac.suites.suite import Plan, Suite
from nanogpt_mac.train.display import say

MODULES = {  # each has a SUITE
    "ops": "nanogpt_mac.suites.ops.suite",
    "dtypes": "nanogpt_mac.suites.dtypes.suite",
    "gemm": "nanogpt_mac.suites.gemm.suite",
    "mlp": "nanogpt_mac.suites.mlp",
    "lm": "nanogpt_mac.suites.lm",
    "parts": "nanogpt_mac.suites.parts",
}
SHARED = "shared"  # folder of the processes of a run under way
LEAST_ROW_S = 0.02
SILENCE_S = 600.0  # of one row: compiling, and drawing its inputs, may take minutes; more is a hang


def suite_of(name: str) -> Suite:
    """The suite called `name`; imported now: each loads what only it needs."""
    suite: Suite = importlib.import_module(MODULES[name]).SUITE
    return suite


def _name(config: BenchConfig) -> str:
    return "dtypes" if config.suite == "ops" and config.dtypes else config.suite


def run(config: BenchConfig) -> int:
    """Measure as `config` says; 0: all is right or was skipped, 1: something is wrong, failed, or nothing was measured,
    128 + signal: stopped, with a report of what there is."""
    began = time.monotonic()
    validate(config)
    suite = suite_of(_name(config))
    plan = suite.plan(config)
    folder = run_folder(config.run_dir, f"bench-{_name(config)}").resolve()
    if (folder / SHARED).exists():  # two would take each other's time, and the last to end write over the other
        why = "another bench.py is at work there, or was killed; use a new or an empty folder"
        raise InputError(f"run_dir={config.run_dir}: {why}")
    _announce(config, plan, folder)
    running = Running(suite, config, plan, folder, began + 60 * config.budget_minutes)
    code = None
    try:
        with signals.watched("bench.py"), probe.awake():
            running.carry_out()
    except signals.Stop as stopped:
        code = stopped.code
        say(f"{signals.words(stopped.signum)}; the report is of what was measured until then")
        running.skip_the_rest("the run was stopped")
    with signals.patience(signals.CHECKPOINT_S):  # of a run that was stopped too
        environment = Environment.model_validate(probe.environment(kinds.frameworks()))
        bench = running.bench(time.monotonic() - began, code is None, plan.work, environment)
        suite.finished(bench)
        publish(folder, suite, bench)
    states = {reading.state for reading in bench.readings}
    return code if code is not None else int(bool(states & {State.WRONG, State.FAILED}) or State.OK not in states)


def publish(folder: Path, suite: Suite, bench: Bench) -> None:
    """bench.json, report.md and report.html in `folder`, and the report in the terminal."""
    from nanogpt_mac.report import page, show, svg  # matplotlib: not before all is measured

    write_json(folder / "bench.json", bench.document())
    for name, text in suite.files(bench).items():
        write_aside(folder / name, text)
    report = suite.report(bench)
    write_aside(folder / "report.md", show.markdown(report))
    with svg.style():
        charts = suite.charts(bench)
    write_aside(folder / "report.html", page.html(report, charts))
    show.show(report)
    say(f"report: {folder / 'report.html'}")


def _announce(config: BenchConfig, plan: Plan, folder: Path) -> None:
    size = f"{plural(len(plan.rows), 'row')}, {plural(len(plan.ways), 'way')}"
    say(f"suite={config.suite}: {size}: {', '.join(way.name for way in plan.ways)}")
    for backend, reason in plan.missing.items():
        say(f"not here: {backend}: {reason}")
    say(f"{plural(plan.rounds, 'round')}, at most {config.budget_minutes:g} minutes -> {folder}")


class Running:
    """A suite under way: its readings, in the order in which they came."""

    def __init__(
        self,
        suite: Suite,
        config: BenchConfig,
        plan: Plan,
        folder: Path,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suite, self.config, self.plan, self.deadline, self.clock = suite, config, plan, deadline, clock
        self.folder = folder
        self.readings: list[Reading] = []
        # Seconds of processes until their first row, of all that they took, and that they might time rows.
        self.starting = self.all_s = self.timed_s = 0.0

    @property
    def complete(self) -> bool:
        return not any(reading.reason == self._spent for reading in self.readings)

    @property
    def _spent(self) -> str:
        return f"budget_minutes={self.config.budget_minutes:g} was spent"

    def tasks(self) -> Iterator[Task]:
        """Round after round, chunk after chunk, the ways of each in an order drawn anew."""
        drawn = random.Random(self.config.seed)
        for number in range(self.plan.rounds):
            for chunk in self.plan.chunks:
                for way in drawn.sample(self.plan.ways, len(self.plan.ways)):
                    yield Task(
                        suite=_name(self.config),
                        way=way,
                        rows=chunk,
                        round=number,
                        row_s=self.plan.row_s,
                        folder=str(self.folder / SHARED),
                        work=self.plan.work,
                    )

    def carry_out(self) -> None:
        rounds = [list(tasks) for _, tasks in groupby(self.tasks(), attrgetter("round"))]
        begun, began, total = 0, self.clock(), sum(map(len, rounds))
        shared = self.folder / SHARED
        shutil.rmtree(shared, ignore_errors=True)  # of one that was killed
        shared.mkdir()
        try:
            with Bar() as bar:
                for tasks in rounds:
                    left = deque(tasks)
                    while left and (now := self.clock()) < self.deadline:
                        # A share of the time each, so that a slow way leaves the others theirs; it goes on in the rest.
                        task, until = left.popleft(), now + (self.deadline - now) / (len(left) + 1)
                        each = (now - began) / begun if begun else 0.0
                        bar.run(f"{task.way.label}: {task.rows[0]}", begun, total, each, each * (total - begun - 1))
                        begun += 1
                        if rows := self._one(self._fair(task), until):
                            left.append(task.model_copy(update={"rows": rows}))
                            total += 1
            self.skip_the_rest(self._spent)
        finally:
            shutil.rmtree(shared, ignore_errors=True)

    def _fair(self, task: Task) -> Task:
        """What a row may be timed for: of the time that is left its share, less what rows take besides."""
        done = len(self.readings)
        left = len(self.plan.rows) * len(self.plan.ways) * self.plan.rounds - done
        if not done:
            return task
        share = (self.deadline - self.clock()) / left - (self.all_s - self.timed_s) / done
        least = min(LEAST_ROW_S, self.plan.row_s)
        return task.model_copy(update={"row_s": min(max(share, least), self.plan.row_s)})

    def bench(
        self, seconds: float, whole: bool = True, work: Any = None, environment: Environment | None = None
    ) -> Bench:
        """What was measured, as it is written down; `whole`: it was not stopped."""
        return self.suite.document.model_validate(
            {
                "suite": _name(self.config),
                "created": datetime.now().astimezone().isoformat(timespec="seconds"),
                "version": nanogpt_mac.__version__,
                "seconds": seconds,
                "complete": whole and self.complete,
                "seed": self.config.seed,
                "rounds": self.plan.rounds,
                "environment": environment,
                "ways": self.plan.ways,
                "missing": self.plan.missing,
                "rows": self.plan.rows,
                "work": work or {},
                "readings": tuple(self.readings),
                "spent": self.spent(),
            }
        )

    def spent(self) -> dict[str, float]:
        found = {"starting processes": self.starting}
        for reading in self.readings:
            for what, took in reading.spent.items():
                found[what] = found.get(what, 0.0) + took
        return found | {"other": max(self.all_s - sum(found.values()), 0.0)}

    def _one(self, task: Task, until: float) -> tuple[str, ...]:
        """One process, or as many as it takes to get past rows that end theirs; the rows that are left at `until`."""
        left = list(task.rows)
        while left:
            if self.clock() >= until:
                break
            question = child.Question(
                "nanogpt_mac.suites.child",
                task.model_copy(update={"rows": tuple(left)}).model_dump(mode="json"),
                timeout_s=min(SILENCE_S, self.deadline - self.clock() + 1),
            )
            begun, before, began = None, len(left), self.clock()
            try:
                for line in child.ask_lines(question):
                    if "begun" in line and begun is None:
                        self.starting += self.clock() - began
                    begun = line.get("begun", begun)
                    if "row" in line:
                        self.timed_s += task.row_s
                        self.readings.append(self._read(line))
                        left.remove(line["row"])
                    if self.clock() >= (until if len(left) < before else self.deadline):  # one row is measured at least
                        break
                else:
                    if left:
                        raise child.ChildError("it ended without a word")
            except child.ChildError as error:
                if self.clock() >= self.deadline:
                    break
                lost = [begun] if begun in left else []
                if not lost and len(left) == before:  # it never came to a row, and would not the next time
                    lost = left
                self._lost(task, lost, State.FAILED, str(error))
                left = [row for row in left if row not in lost]
            finally:
                self.all_s += self.clock() - began
        return tuple(left)

    def _read(self, line: dict[str, object]) -> Reading:
        return self.suite.reading.model_validate(line)

    def skip_the_rest(self, reason: str) -> None:
        """Name what has no reading."""
        had = {(reading.row, reading.way, reading.round) for reading in self.readings}
        for task in self.tasks():
            left = [row for row in task.rows if (row, task.way.name, task.round) not in had]
            self._lost(task, left, State.SKIPPED, reason)

    def _lost(self, task: Task, rows: Sequence[str], state: State, reason: str) -> None:
        for row in rows:
            lost = {"row": row, "way": task.way.name, "round": task.round, "state": state, "reason": reason}
            self.readings.append(self._read(lost))
