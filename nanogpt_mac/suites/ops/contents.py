"""The report of suite=ops: averages first, every row after them, the published table beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from nanogpt_mac.records.bench import OpsBench, State, Way
from nanogpt_mac.report import charts as kit
from nanogpt_mac.report.charts import BAR, Chart, RowsChart
from nanogpt_mac.report.svg import COLOURS
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, beside, interval, listed, ms, plural, ratio
from nanogpt_mac.suites import contents
from nanogpt_mac.suites.contents import BAD, Found, found_of, some
from nanogpt_mac.suites.ops.rows import PUBLISHED_WAYS, WITH_GRADIENT, published, source

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = ("throughput", "latency")


class Results(contents.Results):
    bench: OpsBench

    def time(self, row: str, way: str, figure: str) -> Found | None:
        if self.state(row, way) is not State.OK:
            return None
        return found_of([times for r in self.readings[row, way] if (times := getattr(r, figure))])

    def common(self, a: str, b: str, figure: str, rows: Iterable[str]) -> list[tuple[float, float]]:
        """The times of both ways where both have one."""
        pairs = ((self.time(row, a, figure), self.time(row, b, figure)) for row in rows)
        return [(x.value, y.value) for x, y in pairs if x and y]

    def speed(self, way: str, base: str, figure: str, rows: Iterable[str]) -> tuple[float, int] | None:
        """How many times as fast as `base`: geometric mean of ratios over the rows that both have, and their number."""
        pairs = self.common(way, base, figure, rows)
        return (statistics.geometric_mean(y / x for x, y in pairs), len(pairs)) if pairs else None

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """The rows of each operation; forward and with gradient apart."""
        found: dict[str, list[str]] = {}
        for row in self.bench.rows:
            family = row.removesuffix(WITH_GRADIENT) if row.startswith("Model ") else row.split()[0]
            found.setdefault(family + (WITH_GRADIENT if row.endswith(WITH_GRADIENT) else ""), []).append(row)
        return found

    @cached_property
    def base(self) -> Way:
        """What others are compared with: the way that has most rows, the first of them."""
        return max(self.bench.ways, key=lambda w: sum(self.state(row, w.name) is State.OK for row in self.bench.rows))

    @property
    def others(self) -> list[Way]:
        return [way for way in self.bench.ways if way is not self.base]


def report(bench: OpsBench) -> Report:
    found = Results(bench)
    sections = [
        _overall(found),
        contents.problems(found),
        _families(found),
        _detailed(found, "throughput", "Throughput: milliseconds a call, many queued and waited for once"),
        _detailed(found, "latency", "Latency: milliseconds of one call and one wait"),
        _published(found),
        _means(found),
        _checks(found),
    ]
    work = f"scale {bench.work.get('scale'):g}" if bench.work.get("scale") != 1 else "full size"
    where = contents.facts(bench, work, str(bench.work.get("cache", "")))
    title = "Operations: " + ", ".join(where[:2])
    return Report(
        "Operations", title, _verdict(found), sections, facts=where, version=bench.version,
        alarms=contents.alarms(bench), first_screen=("overall", "problems"),
    )  # fmt: skip


def _verdict(found: Results) -> str:
    right, wrong = found.count(State.OK), found.count(*BAD)
    cells = len(found.bench.rows) * len(found.bench.ways)
    bad = f"{wrong} wrong or failed" if wrong else "none wrong"
    rest = cells - right - wrong
    rows = f"{plural(len(found.bench.rows), 'row')} on {plural(len(found.bench.ways), 'way')}"
    first = f"{rows}: {right:,} right, {bad}" + (f", {rest:,} without a result." if rest else ".")
    told = []
    for way in found.others:
        speed = found.speed(way.name, found.base.name, "throughput", found.bench.rows)
        if speed:
            both = plural(speed[1], "row")
            told.append(f"{way.label} is {ratio(speed[0])} times as fast as {found.base.label} ({both})")
    return first + (f" By geometric mean {listed(told)}." if told else "")


def _overall(found: Results) -> Section:
    columns, rows = ["way", "rows right"], []
    kinds: dict[str, Callable[[str], bool]] = {
        "forward": lambda row: not row.endswith(WITH_GRADIENT),
        "with gradient": lambda row: row.endswith(WITH_GRADIENT),
    }
    columns += [f"{figure}, {kind}" for figure in FIGURES for kind in kinds]
    for way in found.bench.ways:
        cells = [way.label, str(sum(found.state(row, way.name) is State.OK for row in found.bench.rows))]
        for figure in FIGURES:
            for wanted in kinds.values():
                speed = found.speed(way.name, found.base.name, figure, filter(wanted, found.bench.rows))
                cells.append(DASH if not speed else f"{ratio(speed[0])} ({speed[1]})")
        rows.append(Row(cells, Mark.BEST if way is found.base else Mark.NONE))
    note = (
        f"How many times as fast as {found.base.label}: geometric means of the ratios over the rows that both have, "
        "whose number is in brackets."
    )
    return Section("overall", "Every way", notes=[note], tables=[Table("Speed, by geometric mean", columns, rows)])


def _families(found: Results) -> Section:
    columns = ["operation", "rows"] + [f"{way.label}: {figure}" for way in found.others for figure in FIGURES]
    rows = []
    for family, names in found.families.items():
        cells = [family, str(len(names))]
        for way in found.others:
            for figure in FIGURES:
                speed = found.speed(way.name, found.base.name, figure, names)
                cells.append(DASH if not speed else f"{ratio(speed[0])} ({speed[1]})")
        rows.append(Row(cells))
    note = f"How many times as fast as {found.base.label}, by geometric mean over the rows that both have (how many)."
    tables = [Table("Speed by operation", columns, rows)] if found.others else []
    return Section(
        "operations", "By operation", notes=[note], tables=tables, folded=True, empty="There is one way alone."
    )


def _detailed(found: Results, figure: str, title: str) -> Section:
    others = found.others
    columns = ["row", *(way.label for way in found.bench.ways), *(f"{way.label}: times as fast" for way in others)]
    rows = []
    for row in found.bench.rows:
        cells, mark = [row], Mark.NONE
        for way in found.bench.ways:
            cells.append(_cell(found, row, way, figure))
            mark = Mark.WRONG if found.state(row, way.name) in BAD else mark
        for way in others:
            pair = found.common(way.name, found.base.name, figure, [row])
            cells.append(ratio(pair[0][1] / pair[0][0]) if pair else DASH)
        rows.append(Row(cells, mark))
    note = (
        f"In brackets from the lowest to the highest that a round's interval allows; speed against {found.base.label}."
    )
    return Section(figure, title.split(":")[0], notes=[note], tables=[Table(title, columns, rows)], folded=True)


def _cell(found: Results, row: str, way: Way, figure: str) -> str:
    """A time; of a simulated device what it counted; or why there is none."""
    if time := found.time(row, way.name, figure):
        return beside(ms(time.value), interval(time.bounds))
    counts = next((r.counts for r in found.readings.get((row, way.name), []) if r.counts), None)
    if counts and figure == "latency":
        return ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
    return found.held(row, way.name)


def _published(found: Results) -> Section:
    rows = []
    for name, row in published().items():
        if name in found.bench.rows:
            theirs = [ms(row.times.get(way)) for way in PUBLISHED_WAYS]
            ours = [ms(t.value) if (t := found.time(name, way.name, "latency")) else DASH for way in found.bench.ways]
            rows.append(Row([name, *theirs, *ours, row.wrong or DASH], Mark.QUIET if row.wrong else Mark.NONE))
    columns = ["row", *(f"published {way}" for way in PUBLISHED_WAYS), *(f"ours {w.label}" for w in found.bench.ways)]
    notes = [
        f"Published: {source()}. Its figures are latencies, and so are ours here. In 33 of its 85 rows the columns are "
        "of different work, as the last column says; docs/suites.md has more.",
    ]
    if found.bench.work.get("scale") != 1:
        notes.append("Ours are of smaller sizes, so they cannot be compared with it.")
    table = Table("Milliseconds of one call and one wait", [*columns, "why it cannot be compared"], rows)
    return Section("published", "The published table beside ours", notes=notes, tables=[table], folded=True)


def _means(found: Results) -> Section:
    rows = []
    for family, names in found.families.items():
        whole = [n for n in names if all(found.time(n, way.name, "latency") for way in found.bench.ways)]
        cells = [family, f"{len(whole)} of {len(names)}"]
        for way in found.bench.ways:
            times = [t.value for n in whole if (t := found.time(n, way.name, "latency"))]
            cells.append(ms(statistics.fmean(times)) if times else DASH)
        rows.append(Row(cells))
    columns = ["operation", "rows", *(way.label for way in found.bench.ways)]
    note = "As the published averages are made: the largest shape decides. Only rows that every way has are in them."
    table = Table("Arithmetic means of latency, ms", columns, rows)
    return Section("means", "Arithmetic means, as published", notes=[note], tables=[table], folded=True)


def _checks(found: Results) -> Section:
    rows = []
    for way in found.bench.ways:
        all_of = [r for (_, w), rs in found.readings.items() if w == way.name for r in rs if r.state is State.OK]
        worst = max((r for r in all_of if r.error is not None), key=lambda r: r.error or 0, default=None)
        unsteady = sorted({r.row for r in all_of if r.deterministic is False})
        careless = sorted({f"{r.row} ({r.careless})" for r in all_of if r.careless})
        cold = sum(r.cold for r in all_of)
        rows.append([
            way.label, str(len(all_of)), f"{cold}",
            DASH if worst is None or worst.error is None else f"{worst.error:.2f} ({worst.row})",
            some(unsteady) if unsteady else "none",
            some(careless) if careless else "none",
        ])  # fmt: skip
    columns = ["way", "readings", "of them cold", "largest error, 1 is wrong", "two calls gave different bits",
               "right, but sums lost more than they had to"]  # fmt: skip
    notes = [
        "Every result was held against float64 before its row was timed, and that of the last timed call again.",
        "cold: inputs and outputs rotate past the last cache; other rows need too many copies for that, and are warm.",
    ]
    table = Table("Checks", columns, [Row(cells) for cells in rows])
    return Section("checks", "What was checked", notes=notes, tables=[table])


# -- charts -----------------------------------------------------------------------------------------------------------


def charts(bench: OpsBench) -> dict[str, list[Chart]]:
    found = Results(bench)
    drawn: dict[str, list[Chart]] = {"overall": [], "operations": []}
    for way in found.others:
        for suffix, words in (("", "forward"), (WITH_GRADIENT, "with gradient")):
            families = {
                family.removesuffix(WITH_GRADIENT): speed[0]
                for family, names in found.families.items()
                if family.endswith(WITH_GRADIENT) == bool(suffix)
                and (speed := found.speed(way.name, found.base.name, "throughput", names))
            }
            if families:
                identifier = f"chart-{way.name}{'-gradient' if suffix else ''}"
                title = f"{way.label} against {found.base.label}, {words}"
                drawn["operations"].append(_bars(identifier, title, families))
    overall = {
        way.label: speed[0]
        for way in bench.ways
        if (speed := found.speed(way.name, found.base.name, "throughput", bench.rows))
    }
    if len(overall) > 1:
        drawn["overall"].append(_bars("chart-overall", f"Speed against {found.base.label}", overall))
    return {section: made for section, made in drawn.items() if made}


def _bars(identifier: str, title: str, speeds: Mapping[str, float]) -> Chart:
    """A bar for each, from 1 to its speed, on a logarithmic axis."""
    names = list(speeds)

    def row(axes: Axes, i: int) -> tuple[str, Row]:
        speed = speeds[names[i]]
        axes.barh(i + BAR, speed - 1, left=1, height=0.26, color=COLOURS["accent" if speed >= 1 else "bar"])
        return ratio(speed), Row([names[i], ratio(speed)])

    def finish(axes: Axes) -> None:
        axes.axvline(1, color=COLOURS["muted"], linewidth=1)
        low, high = min(speeds.values()), max(speeds.values())
        axes.set_xlim(min(low, 1) / 1.15, max(high, 1) * 1.15)
        (kit.log_x if high / low > 1.2 or math.isclose(low, high) else kit.few_ticks)(axes)

    chart = RowsChart(identifier, title, "times as fast, by geometric mean", ["", "times as fast"], "Bars.", row_pt=30)
    return chart.of([kit.shortened(name, 40) for name in names], row, finish)
