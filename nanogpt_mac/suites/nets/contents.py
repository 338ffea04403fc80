"""The report of suite=mlp and suite=lm: times with intervals over runs, accuracy, checks, what is published."""

from __future__ import annotations

import csv
import statistics
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from nanogpt_mac.measure import stats
from nanogpt_mac.records.bench import NetBench, NetReading, State, Way
from nanogpt_mac.report import charts as kit
from nanogpt_mac.report.charts import BAR, Chart, RowsChart
from nanogpt_mac.report.svg import COLOURS
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, beside, compared, interval, listed, ms, percent, ratio
from nanogpt_mac.suites import contents
from nanogpt_mac.suites.contents import BAD
from nanogpt_mac.suites.nets import by_hand

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED_WAYS = {"mlx-cpu": "MLX CPU", "cpu": "torch CPU", "mlx-eager": "MLX GPU", "mps": "torch MPS"}


class Results(contents.Results):
    """A bench by row and way: a time a row is ms an epoch, or of inference ms a call."""

    bench: NetBench

    def right(self, row: str, way: str) -> list[NetReading]:
        good = self.state(row, way) is State.OK
        return [r for r in self.readings[row, way] if r.state is State.OK] if good else []

    def medians(self, row: str, way: str) -> dict[int, float]:
        """Round -> its median, ms."""
        found = {}
        for r in self.right(row, way):
            value = 1e3 * r.median_s if r.median_s else r.calls.median if r.calls else None
            if value:
                found[r.round] = value
        return found

    def time(self, row: str, way: str) -> tuple[float, tuple[float, float] | None] | None:
        """The median of the rounds' medians, and its interval: it needs five rounds."""
        medians = self.medians(row, way)
        if not medians:
            return None
        epochs = [1e3 * np.array(r.epochs_s) for r in self.right(row, way) if r.epochs_s]
        rounds = epochs or [np.array([m]) for m in medians.values()]
        return statistics.median(medians.values()), stats.median_interval(rounds)

    def cell(self, row: str, way: str) -> str:
        found = self.time(row, way)
        if found:
            return beside(ms(found[0]), interval(found[1]))
        counts = [r.counts for r in self.right(row, way) if r.counts]
        if counts:
            return ", ".join(f"{n:,} {what[:-1] if n == 1 else what}" for what, n in counts[0].items())
        return self.held(row, way)

    @cached_property
    def base(self) -> Way:
        return max(self.bench.ways, key=lambda way: sum(bool(self.time(row, way.name)) for row in self.bench.rows))

    @property
    def data(self) -> str:
        return str(self.bench.work.get("data", ""))


def report(bench: NetBench) -> Report:
    found = Results(bench)
    lm = bench.suite == "lm"
    sections = [_times(found, lm), _speeds(found), contents.problems(found), _checks(found, lm), _use(found)]
    sections += [] if lm else [_published(found)]
    placed = [f"{key}={bench.work.get(key)}" for key in ("placement", "sync")]
    facts = contents.facts(bench, found.data, *placed, rounds="run")
    means = "losses do not." if lm else "accuracies only say that training works."
    stand_in = f"The data are the built-in stand-in: times compare with the real data, {means}"
    alarms = contents.alarms(bench, more=[stand_in] if "stand-in" in found.data else [])
    what = "A Transformer language model" if lm else "A classifier on MNIST's shapes"
    return Report(
        "Small networks", f"{what}: {found.data}", _verdict(found), sections, facts=facts, alarms=alarms,
        version=bench.version, first_screen=("times", "problems", "checks"),
    )  # fmt: skip


def _verdict(found: Results) -> str:
    rows, ways = found.bench.rows, found.bench.ways
    bad, right = found.count(*BAD), found.count(State.OK)
    worst = f"{bad} wrong or failed" if bad else "none wrong"
    first = f"{right} of {len(rows) * len(ways)} were measured and right, {worst}."
    first_row = rows[0]
    known = [(t[0], way.label) for way in ways if (t := found.time(first_row, way.name))]
    if len(known) < 2:
        return first
    (best, label), *others = sorted(known)
    speeds = listed([f"{ratio(t / best)} times as fast as {name}" for t, name in others])
    return f"{first} {label} is fastest at {first_row}: {speeds}."


def _times(found: Results, lm: bool) -> Section:
    ways = found.bench.ways
    rows = []
    for row in found.bench.rows:
        times = {way.name: t[0] for way in ways if (t := found.time(row, way.name))}
        wrong = any(found.state(row, way.name) in BAD for way in ways)
        fastest = min(times, key=times.__getitem__) if len(times) > 1 else DASH
        label = next((way.label for way in ways if way.name == fastest), DASH)
        mark = Mark.WRONG if wrong else Mark.NONE
        rows.append(Row([row, *(found.cell(row, way.name) for way in ways), label], mark))
    epoch = f"{found.bench.work.get('iterations')} iterations" if lm else "an epoch"
    caption = f"Milliseconds of {epoch}, and of asking everything at once ({found.data})"
    notes = [
        "The median over runs, each a fresh process; in brackets its 95 % interval, which needs five runs. The first "
        "epoch is not among them: it was held against float64."
    ]
    if any(by_hand.parsed(way.name) for way in ways):
        notes.append("Kernels of ours decide themselves where rows are and when the host waits: docs/metal.md.")
    table = Table(caption, ["row", *(way.label for way in ways), "fastest"], rows)
    return Section("times", "Times", notes=notes, tables=[table])


def _speeds(found: Results) -> Section:
    timed = [way for way in found.bench.ways if any(found.medians(row, way.name) for row in found.bench.rows)]
    others = [way for way in timed if way is not found.base]
    rows = []
    for row in found.bench.rows:
        cells = [row]
        for way in others:
            confidence = stats.confidence_for(len(found.bench.ways))
            pair = stats.paired_ratio(found.medians(row, found.base.name), found.medians(row, way.name), confidence)
            cells.append(compared(pair))
        rows.append(Row(cells))
    note = f"Times as fast as {found.base.label}, run by run, with an interval from two runs on."
    table = Table(f"Speed against {found.base.label} ({found.data})", ["row", *(way.label for way in others)], rows)
    return Section("speeds", "Speed", notes=[note], tables=[table] if others else [], empty="No two ways have times.")


def _checks(found: Results, lm: bool) -> Section:
    rows = []
    for row in found.bench.rows:
        for way in found.bench.ways:
            good = found.right(row, way.name)
            if good:
                firsts = [r.distance for r in good if r.distance is not None]
                lasts = [r.distance_last for r in good if r.distance_last is not None]
                rows.append(Row([
                    row, way.label, *(f"{max(d):.1e}" if d else DASH for d in (firsts, lasts)),
                    percent(good[0].accuracy, 2), percent(good[0].accuracy_last, 2),
                ]))  # fmt: skip
    columns = ["row", "way", "first: from float64", "last: from float64", "accuracy, first", "accuracy, last"]
    of = "what AdamW added in the first steps" if lm else "the weights"
    notes = [
        f"Before any time: the loss and the gradients of the first batch, then {of}, against float64 in numpy, from "
        "the same weights and rows: an epoch, or 235 steps of it, without rows on which rounding decides whether a "
        "ReLU is open. After it: the last timed epoch where it has no more steps, and the logits of what is asked.",
    ]
    return Section(
        "checks", "What was checked", notes=notes, tables=[Table(f"Relative distances ({found.data})", columns, rows)]
    )


def _use(found: Results) -> Section:
    rows = []
    for row in found.bench.rows:
        for way in found.bench.ways:
            cpu, gpu = (
                [v for r in found.right(row, way.name) if (v := getattr(r, a)) is not None] for a in ("cpu", "gpu")
            )
            if cpu:
                busy = percent(statistics.fmean(gpu), 0) if gpu else DASH
                rows.append(Row([row, way.label, f"{statistics.fmean(cpu):.2f}", busy]))
    note = "Seconds of CPU time of the process for each second of its epochs; how busy the GPU said it was after each."
    table = Table(f"CPU and GPU ({found.data})", ["row", "way", "CPU cores", "GPU busy"], rows)
    return Section("use", "CPU and GPU", notes=[note], tables=[table], folded=True)


def published() -> list[dict[str, str]]:
    text_ = files("nanogpt_mac.suites.nets").joinpath("richiksc.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text_.splitlines() if not line.startswith("#")))


def _published(found: Results) -> Section:
    ways = found.bench.ways
    rows = []
    for line in published():
        if line["row"] in found.bench.rows:
            unit = 1 if line["row"].endswith("inference") else 1e3
            theirs = [ms(unit * float(line[way])) for way in PUBLISHED_WAYS]
            ours = [found.cell(line["row"], way.name) for way in ways]
            rows.append(Row([line["row"], *theirs, *ours, line["wrong"]], Mark.QUIET))
    columns = ["row", *(f"published {w}" for w in PUBLISHED_WAYS.values()), *(f"ours {w.label}" for w in ways), "wrong"]
    note = "richiksc/mlx-benchmarks, December 2023, on an Apple M1 with 8 GPU cores: ms an epoch, ms of inference."
    table = Table(f"Published beside ours ({found.data})", columns, rows)
    return Section("published", "The published table beside ours", notes=[note], tables=[table], folded=True)


def charts(bench: NetBench) -> dict[str, list[Chart]]:
    """Every way's time at the first row, and for the sweep a line over batch sizes each."""
    found = Results(bench)
    drawn = [_bars(found, row, f"chart-{i}") for i, row in enumerate(bench.rows[:2])]
    sweep = _sweep(found)
    return {"times": [chart for chart in [*drawn, sweep] if chart is not None]}


def _bars(found: Results, name: str, identifier: str) -> Chart | None:
    known = [(way.label, t) for way in found.bench.ways if (t := found.time(name, way.name))]
    if not known:
        return None

    def draw(axes: Axes, i: int) -> tuple[str, Row]:
        label, (value, bounds) = known[i]
        axes.barh(i + BAR, value, height=0.26, color=COLOURS["bar"])
        return beside(ms(value), interval(bounds)), Row([label, ms(value), interval(bounds)])

    def finish(axes: Axes) -> None:
        axes.set_xlim(0, max(value for _, (value, _) in known) * 1.1)
        kit.few_ticks(axes)

    title = f"{name} ({found.data})"
    chart = RowsChart(identifier, title, "ms", ["way", "ms", "interval"], "Bars.", row_pt=32)
    return chart.of([label for label, _ in known], draw, finish)


def _sweep(found: Results) -> Chart | None:
    """How many times as long as the fastest way an epoch takes, a row for each batch size and way."""
    batches = sorted((int(r.split()[-1]), r) for r in found.bench.rows if r.startswith("784-32-32-10 batch "))
    points = [
        (f"{batch}, {way.label}", t[0]) for batch, row in batches for way in found.bench.ways
        if (t := found.time(row, way.name))
    ]  # fmt: skip
    if len(batches) < 2 or not points:
        return None

    def draw(axes: Axes, i: int) -> tuple[str, Row]:
        label, value = points[i]
        kit.dot_and_interval(axes, i, value, None, "accent")
        return ms(value), Row([label, ms(value)])

    title = f"An epoch by batch size ({found.data})"
    chart = RowsChart("chart-sweep", title, "ms an epoch", ["batch, way", "ms"], "Dots.", row_pt=26)
    return chart.of([label for label, _ in points], draw, kit.log_x)
