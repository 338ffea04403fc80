"""suite=parts: where an iteration goes, by part of the model, beside the iteration itself."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter

from nanogpt_mac import memory
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.backends.parts import NAMES, Call, Inside, Parts
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.config import validate as validate_run
from nanogpt_mac.corpus import prepare
from nanogpt_mac.corpus.batches import starts
from nanogpt_mac.measure import calls
from nanogpt_mac.measure.times import order_interval, summary
from nanogpt_mac.records.bench import Bench, Reading, State, Task, Way
from nanogpt_mac.records.parts import ITERATION, Account, PartReading, PartsBench
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, beside, count, interval, ms, percent, plural, ratio, text
from nanogpt_mac.suites import contents, ways
from nanogpt_mac.suites.account import accounts
from nanogpt_mac.suites.config import BenchConfig, training
from nanogpt_mac.suites.suite import Measure, Plan, Suite, asked, row_seconds
from nanogpt_mac.train.clock import Clock, Completion
from nanogpt_mac.train.schedule import learning_rate
from nanogpt_mac.train.source import open_source

ROWS = (ITERATION, *NAMES)
ROUNDS = 3
FEWEST, MOST = 4, 200  # iterations that are counted
LIKELY = (0.5, 2.0)  # what the parts may add up to, of an iteration
QUEUED = 4  # iterations that are enqueued together


class PartsSuite(Suite):
    contents = "nanogpt_mac.suites.parts"
    reading: ClassVar[type[Reading]] = PartReading
    document: ClassVar[type[Bench]] = PartsBench

    def plan(self, config: BenchConfig) -> Plan:
        chosen, missing = ways.here_for(config, brings="cls")
        rows = tuple(asked(config.rows, ROWS, what="part"))
        common = training(config)
        configs = {}
        for way in chosen:
            own = replace(common, backend=replace(config.backend, name=way.backend), compile=way.compiled)
            validate_run(own)
            memory.check(own, way.backend)
            configs[way.name] = own
        open_source(common, prepare(common.data))  # once, before children do: what does not fit is bad input
        return plan_of(chosen, configs, config, rows, missing)

    def measuring(self, task: Task) -> Measure:
        return _Measured(task).reading


SUITE = PartsSuite()


def plan_of(
    chosen: Sequence[Way],
    configs: Mapping[str, Config],
    config: BenchConfig,
    rows: tuple[str, ...] = ROWS,
    missing: Mapping[str, str] | None = None,
) -> Plan:
    """All `rows` of a way in one process, which prepares its model once."""
    rounds = config.rounds or ROUNDS
    work = {"configs": {name: asdict(own) for name, own in configs.items()}}
    return Plan(
        tuple(chosen), (rows,), rounds, row_seconds(config, len(rows), len(chosen), rounds), dict(missing or {}), work
    )


# -- in the child -----------------------------------------------------------------------------------------------------


class _Measured:
    """One way's model, in the process that measures it."""

    def __init__(self, task: Task) -> None:
        way, self.task = task.way, task
        self.config: Config = TypeAdapter(Config).validate_python(task.work["configs"][way.name])
        kind = kinds.KINDS[kinds.resolve(way.backend)]  # which also brings a simulated device
        options = backend_options(self.config, way.backend, way.compiled)
        kind.prepare(options)
        if way.device not in ("", kind.load().device_of(kind)):  # the other one that it can take
            os.environ[kinds.NO_GPU] = "1"
        corpus = prepare(self.config.data)
        source = open_source(self.config, corpus)
        tokens = Tokens({"train": corpus.train, "val": corpus.val}, source.spec.block_size)
        self.length, self.block_size = len(corpus.train), source.spec.block_size
        self.backend = kinds.create(source.spec, options, tokens)
        self.backend.restore(source.state)

    @cached_property
    def parts(self) -> Parts | None:
        return self.backend.parts(self._starts(0))

    @cached_property
    def inside(self) -> Inside:
        """Once: the first round's, of a device whose times mean something."""
        if self.parts is None or self.task.way.simulated or self.task.round:
            return Inside({}, 0.0)
        return self.parts.inside(self._step)

    def reading(self, row: str) -> Reading:
        named: dict[str, Any] = {"row": row, "way": self.task.way.name, "round": self.task.round}
        if self.parts is None:
            return Reading(**named, state=State.ABSENT, reason=f"{self.task.way.label} gives no parts")
        if row == ITERATION:
            return PartReading(**named, state=State.OK, **self._iteration(self.parts))
        part = self.parts.parts.get(row)
        if part is None:
            return Reading(**named, state=State.ABSENT, reason="an iteration has none here")
        found: dict[str, Any] = {"note": part.note, "times": part.times, "inside": self.inside.parts.get(row)}
        found["counts"] = self.parts.counted(part.both or part.forward)
        faults = set()
        for key, call in (("forward", part.forward), ("both", part.both)):
            if call is not None and not self.task.way.simulated:
                found[key], fault = self._timed(self.parts, call)
                faults.add(fault)
        fault = max(faults, default="")
        return PartReading(**named, state=State.WRONG if fault else State.OK, reason=fault, **found)

    def _timed(self, parts: Parts, call: Call) -> tuple[Any, str]:
        for number in range(2):  # the first compiles
            parts.wait(call(number))
        measured = calls.measure(call, parts, self.task.row_s / 2)
        return measured.throughput, measured.fault

    def _iteration(self, parts: Parts) -> dict[str, Any]:
        """As train.py times it; beside it, where the device runs behind the host, what waiting and enqueuing take."""
        if self.task.way.simulated:
            self._step()
            return {"counts": parts.counted(lambda number: self._step())}
        backend, config = self.backend, self.config
        clock = Clock(backend.wait, config.sync, config.log_interval, config.timing_warmup, backend.runs_ahead)
        done: list[Completion] = []
        number, end = 0, None
        while len(done) < MOST:
            done += clock.submit(number, partial(backend.step, self._starts(number), learning_rate(config, number)))
            number += 1
            counted = sum(d.left_out is None for d in done)
            end = end or (time.perf_counter() + 2 * self.task.row_s if counted else None)
            if counted >= FEWEST and end and time.perf_counter() > end:
                break
        done += clock.drain()
        counted_ms = [d.iter_ms for d in done if d.left_out is None]
        found: dict[str, Any] = {
            "forward": summary(counted_ms, order_interval(counted_ms)),
            "counts": parts.counted(lambda number: self._step()),
            "inside_iteration": self.inside.iteration_ms or None,
            "not_inside": self.inside.why_not,
        }
        if backend.runs_ahead:
            found["dispatch"] = float(np.median([d.dispatch_ms for d in done if d.left_out is None]))
            found["queued"] = self._queued()
        if parts.smallest is not None:
            found["launch"] = self._timed(parts, parts.smallest)[0].median
        return found

    def _queued(self) -> float | None:
        """ms an iteration of several behind each other; None where the device's memory holds but one."""
        backend, took = self.backend, []
        if (backend.iteration_bytes() or 0) * QUEUED > backend.free_memory():
            return None
        for _ in range(FEWEST):
            began = time.perf_counter()
            handles = [backend.step(self._starts(number), 0.0) for number in range(QUEUED)]
            for handle in handles:
                backend.wait(handle)
            took.append(1e3 * (time.perf_counter() - began) / QUEUED)
        return float(np.median(took))

    def _step(self) -> Sequence[Any]:
        self.backend.wait(self.backend.step(self._starts(0), 0.0))
        return ()

    def _starts(self, number: int) -> np.ndarray:
        shape = (self.config.gradient_accumulation_steps, self.config.batch_size)
        size = shape[0] * shape[1]
        return starts(self.config.seed, number, "train", size, self.length, self.block_size).reshape(shape)


# -- what is shown ----------------------------------------------------------------------------------------------------


def report(bench: PartsBench) -> Report:
    found = accounts(bench)
    timed = [(a, a.iteration.ms) for a in found if a.iteration and not a.simulated]
    where = [f"{a.label} {ms(whole)} ms" for a, whole in timed]
    sentence = f"An iteration: {', '.join(where)}." if where else "No iteration was timed."
    for a, whole in timed:
        largest = max(a.parts, key=lambda part: part.ms)
        sentence += f" {a.label}: {largest.name}, measured alone, is {percent(largest.ms / whole, 0)} of it."
    for a in found:
        if a.kernels is not None and a.simulated:
            sentence += f" {a.label}: an iteration has {a.kernels} kernels and {plural(a.waits or 0, 'wait')}."
    unmeasured = contents.problems(contents.Results(bench)) if any(a.why_not for a in found) else None
    sections = [section(found), *([unmeasured] if unmeasured else [])]
    return Report("Parts", "Where an iteration goes", sentence, sections, contents.facts(bench),
                  alarms=contents.alarms(bench), version=bench.version)  # fmt: skip


def section(found: Sequence[Account], identifier: str = "parts") -> Section:
    """Where each way's iteration goes."""
    notes = [
        "Each part alone, at the run's sizes, times its places in an iteration; backward is forward and backward in "
        "one call, less forward. Alone a part finds its input in the caches, and is compiled without its neighbours."
    ]
    for a in found:
        said = [f"{part.name} {part.note}" for part in a.parts if part.note]
        notes += [f"{a.label}: {'; '.join(said)}."] if said else []
    for a in found:
        if a.iteration and not a.simulated and not LIKELY[0] < a.total / a.iteration.ms < LIKELY[1]:
            times = ratio(a.total / a.iteration.ms)
            notes.append(f"{a.label}: its parts are {times} x its iteration: something else ran. Close other programs.")
    notes += [f"{a.label}: times inside the step are not known: {a.not_inside}." for a in found if a.not_inside]
    notes += [f"{a.label}: not measured: {text(a.why_not)}." for a in found if a.why_not]
    tables = [_counts(a) if a.simulated else _times(a) for a in found if a.parts]
    return Section(identifier, "Where an iteration goes", notes, tables, "No part was measured.")


def _times(found: Account) -> Table:
    inside = any(part.inside for part in found.parts)
    columns = [
        "part",
        "times",
        "forward ms [95 %]",
        "backward ms [95 %]",
        "together",
        "share",
        "inside the step",
        "kernels",
    ]
    whole = found.iteration.ms if found.iteration else None

    def figure(each: Any) -> str:
        return beside(ms(each.ms), interval((each.low, each.high))) if each else DASH

    def row(name: str, value: float, mark: Mark = Mark.NONE) -> Row:
        return Row([name, DASH, DASH, DASH, ms(value), percent(whole and value / whole), DASH, DASH], mark)

    rows = [
        Row([
            part.name, count(part.times), figure(part.forward),
            figure(part.backward), ms(part.ms), percent(whole and part.ms / whole),
            ms(sum(part.inside)) if part.inside else DASH, count(part.kernels),
        ])
        for part in found.parts
    ]  # fmt: skip
    rows.append(row("all parts", found.total, Mark.QUIET))
    rows += [row(left.name, left.ms) for left in found.left]
    if found.iteration:
        cells = row("iteration", found.iteration.ms, Mark.BEST)
        cells.cells[6] = ms(found.inside_iteration) if inside else DASH
        cells.cells[7] = count(found.kernels)
        rows.append(cells)
    return Table(f"{found.label}: milliseconds an iteration", columns, rows)


def _counts(found: Account) -> Table:
    rows = [Row([part.name, count(part.times), count(part.kernels), count(part.waits)]) for part in found.parts]
    kernels, waits = (sum(getattr(part, key) or 0 for part in found.parts) for key in ("kernels", "waits"))
    rows.append(Row(["all parts", DASH, count(kernels), count(waits)], Mark.QUIET))
    if found.kernels is not None:
        rows.append(Row(["left over", DASH, count(found.kernels - kernels), count((found.waits or 0) - waits)]))
        rows.append(Row(["iteration", DASH, count(found.kernels), count(found.waits)], Mark.BEST))
    return Table(f"{found.label}: what an iteration has the device do", ["part", "times", "kernels", "waits"], rows)
