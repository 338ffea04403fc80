"""The report of suite=gemm: the ladder of each dtype, every size, and what others have published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from nanogpt_mac.machine import chips
from nanogpt_mac.machine.gemm import DTYPES
from nanogpt_mac.records.bench import GemmBench, GemmReading, State, Way
from nanogpt_mac.report import charts as kit
from nanogpt_mac.report.charts import Chart, RowsChart
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, beside, interval, listed, number, percent, plural, ratio
from nanogpt_mac.suites import contents
from nanogpt_mac.suites.gemm.suite import Work
from nanogpt_mac.suites.ops.contents import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PYTHON = "python"


@dataclass(frozen=True)
class Rate:
    """GFLOP/s of a row on a way: the median over rounds, and from the lowest to the highest that they allow."""

    row: str
    value: float
    bounds: tuple[float, float] | None


@dataclass(frozen=True)
class Rates:
    bench: GemmBench

    @cached_property
    def work(self) -> Work:
        return Work.model_validate(self.bench.work)

    @cached_property
    def found(self) -> Results:
        return Results(self.bench)

    @cached_property
    def dtypes(self) -> list[str]:
        return [d for d in DTYPES if any(self.dtype(row) == d for row in self.bench.rows)]

    def dtype(self, row: str) -> str:
        return self.work.sizes[row][0]

    def rate(self, row: str, way: str) -> Rate | None:
        time = self.found.time(row, way, "throughput")
        if time is None:
            return None
        giga = 1e-6 * self.work.flops(row)  # FLOP a millisecond
        bounds = (giga / time.bounds[1], giga / time.bounds[0]) if time.bounds else None
        return Rate(row, giga / time.value, bounds)

    def best(self, way: str, dtype: str) -> Rate | None:
        rates = [self.rate(row, way) for row in self.bench.rows if self.dtype(row) == dtype]
        return max((rate for rate in rates if rate), key=lambda rate: rate.value, default=None)

    def best_of_unit(self, like: Way, dtype: str) -> float:
        same = [w.name for w in self.bench.ways if w.accelerator == like.accelerator]
        return max((rate.value for name in same if (rate := self.best(name, dtype))), default=0.0)

    def library(self, way: str, dtype: str) -> str:
        readings: list[GemmReading] = [r for r in self.bench.readings if r.way == way and self.dtype(r.row) == dtype]
        return next((r.library for r in readings if r.library), DASH)


def report(bench: GemmBench) -> Report:
    rates = Rates(bench)
    facts = contents.facts(bench)
    alarms = contents.alarms(bench, "A simulated device was used: its products are checked, and have no times.")
    sections = [_ladder(rates), contents.problems(rates.found), _sizes(rates), _published(), _checks(rates)]
    return Report(
        "Matrix products", "Matrix products: " + ", ".join(facts[:2]), _verdict(rates), sections, facts=facts,
        version=bench.version, alarms=alarms, first_screen=("ladder", "problems"),
    )  # fmt: skip


def _verdict(rates: Rates) -> str:
    told = []
    for dtype in rates.dtypes:
        known = [(best, way) for way in rates.bench.ways if (best := rates.best(way.name, dtype))]
        if known:
            best, way = max(known, key=lambda pair: pair[0].value)
            told.append(f"{dtype} {gflops(best.value)} GFLOP/s ({way.label})")
    wrong = sum(r.state in contents.BAD for r in rates.bench.readings)
    end = f" {plural(wrong, 'product')} wrong or failed." if wrong else " Every product that is shown is right."
    return (f"The fastest here: {listed(told)}." if told else "Nothing was measured.") + end


def gflops(value: object) -> str:
    known = number(value)
    return DASH if known is None else f"{known:,.0f}" if known >= 1000 else f"{known:.3g}"


def _ladder(rates: Rates) -> Section:
    tables = []
    for dtype in rates.dtypes:
        lowest, rows = rates.best(PYTHON, dtype), []
        highest = max((b.value for way in rates.bench.ways if (b := rates.best(way.name, dtype))), default=0.0)
        for way in rates.bench.ways:
            best, peak = rates.best(way.name, dtype), rates.work.peak(way, dtype)
            if best is None:
                continue
            rows.append(Row([
                way.label, rates.library(way.name, dtype), best.row.removeprefix(dtype).strip(),
                beside(gflops(best.value), interval(best.bounds, gflops)),
                percent(1e9 * best.value / peak.flops) if peak else DASH,
                percent(best.value / rates.best_of_unit(way, dtype)),
                ratio(best.value / lowest.value) if lowest else DASH,
            ], Mark.BEST if best.value == highest else Mark.NONE))  # fmt: skip
        columns = ["way", "whose product", "fastest at", "GFLOP/s", "of the peak", "of the fastest on this unit"]
        tables.append(Table(f"The ladder in {dtype}", [*columns, "times pure Python"], rows))
    notes = [
        "Each way at the size where it is fastest; in brackets from the lowest to the highest that a round's interval "
        "allows. Sizes that would take too long are left out, never estimated.",
        *_peaks(rates),
        "The fastest product of each framework, device and dtype is kept: mfu_measured of later runs is a share of it.",
    ]
    return Section("ladder", "The ladder", notes=notes, tables=[t for t in tables if t.rows])


def _peaks(rates: Rates) -> list[str]:
    lines = []
    for unit, peaks, here in (
        ("GPU", rates.work.gpu, any(way.accelerator for way in rates.bench.ways)),
        ("CPU", rates.work.cpu, any(not way.accelerator and not way.simulated for way in rates.bench.ways)),
    ):
        by_source: dict[str, list[str]] = {}
        for dtype, peak in peaks.items():
            by_source.setdefault(f"{peak.source}, {peak.link}", []).append(
                f"{dtype} {gflops(peak.flops / 1e9)} GFLOP/s"
            )
        lines += [f"Peak of the {unit}: {listed(told)} ({source})." for source, told in by_source.items() if here]
        if here and not peaks:
            lines.append(f"Nobody has published a peak of this {unit}, so no share of one is shown.")
    return lines


def _sizes(rates: Rates) -> Section:
    tables = []
    for dtype in rates.dtypes:
        rows = []
        for row in rates.bench.rows:
            if rates.dtype(row) == dtype:
                cells = [row.removeprefix(dtype).strip()]
                for way in rates.bench.ways:
                    rate = rates.rate(row, way.name)
                    cells.append(gflops(rate.value) if rate else rates.found.held(row, way.name))
                rows.append(Row(cells))
        tables.append(Table(f"GFLOP/s by size in {dtype}", ["size", *(way.label for way in rates.bench.ways)], rows))
    note = "n stands for (n x n) by (n x n); MxKxN for (M x K) by (K x N). Medians of calls that are queued."
    return Section("sizes", "Every size", notes=[note], tables=tables, folded=True)


def _published() -> Section:
    dtypes, rows = (*DTYPES, "float64"), []
    for rate in chips.PRODUCTS:
        known = [gflops(rate.flops[d] / 1e9) if d in rate.flops else DASH for d in dtypes]
        cells = [rate.chip, rate.what, *known, rate.status, rate.source, rate.link]
        rows.append(Row(cells, Mark.QUIET, rate.link))
    notes = [
        "Of other machines, as their sources have them: theoretical, measured there, or by digest of a page that "
        "could not be read. The Swift story went from its first to its last in ten steps.",
    ]
    columns = ["chip", "unit", *dtypes, "status", "source", "link"]
    table = Table("GFLOP/s, published", columns, rows)
    return Section("published", "What others have published", notes=notes, tables=[table], folded=True)


def _checks(rates: Rates) -> Section:
    rows = []
    for way in rates.bench.ways:
        right = [r for r in rates.bench.readings if r.way == way.name and r.state is State.OK]
        worst = max((r for r in right if r.error is not None), key=lambda r: r.error or 0, default=None)
        coarse = sorted({rates.dtype(r.row) for r in right if r.coarse})
        told = f"{worst.error:.2f} ({worst.row})" if worst and worst.error is not None else DASH
        rows.append(Row([way.label, str(len(right)), told, ", ".join(coarse) or "none"]))
    notes = [
        "Every product was held against float64 before it was timed, and that of the last timed call again: small ones "
        "in full, large ones by random signs (Freivalds) and some rows in full. Reduced precision is refused by name.",
    ]
    columns = ["way", "readings", "largest error, 1 is wrong", "sums in less than float32"]
    return Section("checks", "What was checked", notes=notes, tables=[Table("Checks", columns, rows)])


def charts(bench: GemmBench) -> dict[str, list[Chart]]:
    rates = Rates(bench)
    drawn = []
    for dtype in rates.dtypes:
        known = [(way.label, best) for way in bench.ways if (best := rates.best(way.name, dtype))]
        if len(known) > 1:
            drawn.append(_dots(f"chart-{dtype}", f"The fastest product of each way, {dtype}", known))
    return {"ladder": drawn} if drawn else {}


def _dots(identifier: str, title: str, known: list[tuple[str, Rate]]) -> Chart:
    def row(axes: Axes, i: int) -> tuple[str, Row]:
        label, rate = known[i]
        kit.dot_and_interval(axes, i, rate.value, rate.bounds, "accent")
        return gflops(rate.value), Row([label, gflops(rate.value), interval(rate.bounds, gflops)])

    chart = RowsChart(identifier, title, "GFLOP/s", ["way", "GFLOP/s", "interval"], "Dots with intervals.", row_pt=30)
    return chart.of([kit.shortened(label, 50) for label, _ in known], row, kit.log_x)
