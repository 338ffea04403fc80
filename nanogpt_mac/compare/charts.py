"""The charts of a comparison's page: what its tables cannot show as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nanogpt_mac.compare import doubts
from nanogpt_mac.compare.contents import mark, plain
from nanogpt_mac.compare.doubts import label
from nanogpt_mac.records.comparison import Comparison, LeverRow, VariantResult, VariantState
from nanogpt_mac.report import svg
from nanogpt_mac.report.charts import BAR, Chart, RowsChart, dot_and_interval, few_ticks, key, log_x, shortened
from nanogpt_mac.report.svg import COLOURS
from nanogpt_mac.report.table import Mark, Row, Table
from nanogpt_mac.report.words import DASH, interval, loss, ms, number, ratio, seconds, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL = 30  # characters of a variant's label that fit a chart
_POINTS = 150  # of one line
_DASHES = ("", "6 2.5", "1.2 2", "8 2.5 1.5 2.5")  # as SVG writes them, in points
_SHAPES = {
    "o": '<circle cx="15" cy="6" r="3"/>',
    "s": '<path d="M12 3h6v6h-6z"/>',
    "^": '<path d="M15 2.5l3.6 6.5h-7.2z"/>',
    "D": '<path d="M15 2l4 4-4 4-4-4z"/>',
    "v": '<path d="M15 9.5l3.6-6.5h-7.2z"/>',
}


def draw(comparison: Comparison) -> dict[str, list[Chart]]:
    """Section id -> its charts; a chart without data is not there."""
    makers = {"variants": _ratios, "times": _over_time, "loss": _losses, "utilisation": _roofline, "levers": _levers}
    with svg.style():
        return {section: [chart] for section, make in makers.items() if (chart := make(comparison)) is not None}


def short(variant: VariantResult, most: int = _LABEL) -> str:
    """A label that fits; what is to be said against the variant is never cut off."""
    mark = f" ({doubts.MARKS[variant.state]})" if variant.state in doubts.MARKS else ""
    return shortened(label(variant).removesuffix(mark), most - len(mark)) + mark


def _shown(comparison: Comparison) -> list[VariantResult]:
    return [variant for variant in plain(comparison) if variant.median and variant.ranks == 1]


def _colour(variant: VariantResult, comparison: Comparison, usual: str) -> str:
    """The colour's name: one accent, for the fastest."""
    return {Mark.BEST: "accent", Mark.WRONG: "wrong"}.get(mark(variant, comparison), usual)


# -- rows -------------------------------------------------------------------------------------------------------------


def _ratios(comparison: Comparison) -> Chart | None:
    """Every variant against the fastest, with its rounds: the table has no room for those."""
    fastest = comparison.named(comparison.verdict.fastest)
    variants = [v for v in _shown(comparison) if v.ratio or (v is fastest and mark(v, comparison) is Mark.BEST)]
    if len(variants) < 2:
        return None
    drawn = [1.0]

    def row(axes: Axes, i: int) -> tuple[str, Row]:
        variant, found = variants[i], variants[i].ratio
        best = mark(variant, comparison) is Mark.BEST or found is None
        value, bounds, pairs = (1.0, None, ()) if best or not found else (found.value, found.ci, found.pairs)
        axes.plot(pairs, [i + BAR] * len(pairs), "|", color=COLOURS["muted"], markersize=9)
        dot_and_interval(axes, i, value, bounds, _colour(variant, comparison, "ink"))
        drawn.extend([value, *pairs, *(bounds or ())])
        words = "1" if best or not found else ratio(value) + (" tie" if found.tie else "")
        return words, Row([label(variant), words, interval(bounds, ratio), ", ".join(map(ratio, pairs)) or DASH])

    def finish(axes: Axes) -> None:
        _mark_1(axes)
        (log_x if max(drawn) > 3 and min(drawn) > 0 else few_ticks)(axes)

    title = f"Time relative to {label(fastest) if fastest else 'the fastest'}"
    x_label = "dot and interval; thin ticks are single rounds"
    chart = RowsChart(
        "chart-ratio", title, x_label, ["variant", "ratio", "interval", "by round"], "Dots with intervals."
    )
    return chart.of([short(v) for v in variants], row, finish)


def _mark_1(axes: Axes) -> None:
    axes.axvline(1, color=COLOURS["accent"], linewidth=1.2)


def _over_time(comparison: Comparison) -> Chart | None:
    """Each variant's iteration times, round after round, against its own median."""
    found = {v.name: _relative(v) for v in _shown(comparison)}
    variants = [variant for variant in _shown(comparison) if found[variant.name]]
    if not variants:
        return None
    low, high = _band(np.concatenate([values for v in variants for values in found[v.name].values()]))
    numbers = sorted({r for v in variants for r in found[v.name]})
    most = max(12, 240 // len(numbers))

    def row(axes: Axes, i: int) -> tuple[str, Row]:
        variant = variants[i]
        colour, values = COLOURS[_colour(variant, comparison, "bar")], found[variant.name]
        axes.plot([0, len(numbers)], [_height(0, low, high, i)] * 2, color=COLOURS["rule"], linewidth=0.8)
        for r, times in values.items():
            x, y, slowest = _stretches(times, most)
            x = numbers.index(r) + 0.03 + 0.94 * x
            axes.plot(x, _height(y, low, high, i), color=colour, linewidth=0.9)
            outside = slowest > high
            axes.plot(x[outside], np.full(outside.sum(), _height(high, low, high, i)), "^", color=COLOURS["ink"],
                      markersize=3)  # fmt: skip
        medians = ", ".join(f"{100 * float(np.median(times)):+.1f} %" for times in values.values())
        worst = max(float(times.max()) for times in values.values())
        return "", Row([label(variant), medians, f"{100 * worst:+.0f} %"])

    def finish(axes: Axes) -> None:
        axes.grid(visible=False)
        for r in range(1, len(numbers)):
            axes.axvline(r, color=COLOURS["rule"], linewidth=0.8)
        axes.set_xlim(0, len(numbers))
        axes.set_xticks(np.arange(len(numbers)) + 0.5, [str(r) for r in numbers])
        axes.tick_params(length=0)

    chart = RowsChart(
        "chart-series", "Iteration time as the runs went on",
        "round" if len(numbers) > 1 else "one round, from its first to its last iteration",
        ["variant", "median of each round against the variant's own", "slowest iteration"],
        f"One band a variant, each from {100 * low:+.0f} % to {100 * high:+.0f} % of the variant's own median. Lines: "
        "medians of short stretches; triangles: iterations beyond the band.",
        row_pt=50,
    )  # fmt: skip
    return chart.of([short(v) for v in variants], row, finish)


def _relative(variant: VariantResult) -> dict[int, np.ndarray]:
    """Round -> its iteration times over the variant's median, less 1."""
    median = variant.median or 1.0
    return {part.round: np.array(part.ms) / median - 1 for part in variant.series if part.ms}


def _band(values: np.ndarray) -> tuple[float, float]:
    """The range that shows nearly all of `values` (shares), at least two per cent wide to either side."""
    low, high = np.percentile(values, [2, 96])
    return min(1.6 * float(low), -0.02), max(2.0 * float(high), 0.02)


def _height(value: np.ndarray | float, low: float, high: float, row: int) -> np.ndarray:
    """Where in its row's band a value lies."""
    return np.asarray(row + 0.38 - 0.56 * (np.clip(value, low, high) - low) / (high - low))


def _stretches(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position 0..1, median, slowest) of at most `most` equal stretches of a series."""
    parts = np.array_split(values, min(most, len(values)))
    position = (np.arange(len(parts)) + 0.5) / len(parts)
    return position, np.array([np.median(part) for part in parts]), np.array([part.max() for part in parts])


def _roofline(comparison: Comparison) -> Chart | None:
    found = [(variant, variant.roofline) for variant in _shown(comparison) if variant.roofline]
    if not found:
        return None

    def row(axes: Axes, i: int) -> tuple[str, Row]:
        variant, roof = found[i]
        median, colour = variant.median or 0.0, "wrong" if variant.state is VariantState.WRONG else "ink"
        axes.plot([roof.floor_ms, median], [i + BAR] * 2, color=COLOURS["bar"], linewidth=2)
        axes.plot(roof.floor_ms, i + BAR, "|", color=COLOURS["accent"], markersize=13, markeredgewidth=2.4)
        dot_and_interval(axes, i, median, None, colour)
        words = f"{ratio(median / roof.floor_ms)} x its floor" if roof.floor_ms else DASH
        return words, Row([label(variant), ms(roof.floor_ms), ms(median), words, text(roof.bound)])

    def finish(axes: Axes) -> None:
        log_x(axes)
        low, high = axes.get_xlim()
        axes.set_xlim(low * 0.9, high * 1.1)

    legend = [
        key('<path d="M6 0v12" stroke="var(--accent)" stroke-width="3"/>', "floor: arithmetic"),
        key('<circle cx="6" cy="6" r="4" fill="var(--ink)"/>', "measured median"),
    ]
    columns = ["variant", "floor ms", "measured ms", "measured", "bound by"]
    chart = RowsChart(
        "chart-roofline", "Floor and measured time", "ms an iteration, logarithmic", columns, "Bar ends.", legend
    )
    return chart.of([short(variant) for variant, _ in found], row, finish)


def _levers(comparison: Comparison) -> Chart | None:
    found = [(lever, lever.ratio) for lever in comparison.levers or () if lever.ratio]
    if not found:
        return None
    names = [_lever_name(lever, comparison) for lever, _ in found]

    def row(axes: Axes, i: int) -> tuple[str, Row]:
        lever, worth = found[i]
        variant, tie = comparison.named(lever.name), bool(worth.tie)
        wrong = variant is not None and variant.state is VariantState.WRONG
        dot_and_interval(axes, i, worth.value, worth.ci, "wrong" if wrong else "muted" if tie else "ink", hollow=tie)
        words = ratio(worth.value) + (" tie" if tie else "")
        return words, Row([names[i], words, interval(worth.ci, ratio)])

    x_label = "time with the switch over time without it; left of 1 is faster"
    columns = ["lever", "ratio", "interval"]
    chart = RowsChart("chart-levers", "What each lever is worth", x_label, columns, "Dots with intervals.")
    return chart.of(names, row, _mark_1)


def _lever_name(lever: LeverRow, comparison: Comparison) -> str:
    variant, base = comparison.named(lever.name), comparison.named(lever.base)
    on = short(base) if base else text(lever.base, 30)
    wrong = variant is not None and variant.state is VariantState.WRONG
    return f"{text(lever.what or lever.name, 40 - len(on))}, {on}" + (" (WRONG)" if wrong else "")


def board(number: int, entries: Sequence[tuple[str, float, Sequence[float] | None]]) -> Chart:
    """A leaderboard's (label, median ms, interval), the fastest first: overlaps decide the ranks."""

    def row(axes: Axes, i: int) -> tuple[str, Row]:
        name, median, bounds = entries[i]
        dot_and_interval(axes, i, median, bounds, "accent" if i == 0 else "ink")
        return f"{ms(median)} ms", Row([name, ms(median), interval(bounds)])

    def finish(axes: Axes) -> None:
        (log_x if entries[-1][1] > 3 * entries[0][1] else few_ticks)(axes)

    columns = ["entry", "ms", "interval"]
    title, x_label = "Milliseconds an iteration", "ms an iteration: median and its 95 % interval"
    with svg.style():
        chart = RowsChart(f"chart-board-{number}", title, x_label, columns, "Dots with intervals.")
        return chart.of([shortened(name, 46) for name, _, _ in entries], row, finish)


# -- lines ------------------------------------------------------------------------------------------------------------


def _losses(comparison: Comparison) -> Chart | None:
    """Loss against wall time: lines that race to the same loss."""
    lines = [(variant, line) for variant in _shown(comparison) if (line := _line(variant)) is not None]
    if not lines:
        return None
    figure, axes = svg.figure(270)
    axes.grid()
    rows, legend = [], []
    for i, (variant, (x, y, at, validation)) in enumerate(lines):
        wrong = variant.state is VariantState.WRONG
        colour = "wrong" if wrong else f"s{i % 7 + 1}"
        dash, marker = _DASHES[i % len(_DASHES)], list(_SHAPES)[i // len(_DASHES) % len(_SHAPES)]
        (drawn,) = axes.plot(x, y, color=COLOURS[colour], linewidth=1.3)
        if dash:
            drawn.set_dashes([float(part) / 1.3 for part in dash.split()])
        axes.plot(at, validation, marker, color=COLOURS[colour], markersize=4.5, markeredgecolor=COLOURS["page"],
                  markeredgewidth=0.6)  # fmt: skip
        legend.append((label(variant), _swatch(colour, dash, marker if len(at) else "")))
        last = loss(float(validation[-1])) if len(validation) else DASH
        cells = [loss(float(y[0])), seconds(float(x[-1])), loss(float(y[-1])), last]
        rows.append(Row([label(variant), *cells], Mark.WRONG if wrong else Mark.NONE))
    axes.set_xlabel("seconds since the first iteration began")
    axes.set_ylabel("loss")
    axes.set_xlim(left=0)
    title = "Loss against wall time"
    description = "Lines: training loss; markers: validation loss. " + "; ".join(
        f"{row.cells[0]}: from {row.cells[1]} to {row.cells[3]} after {row.cells[2]}" for row in rows
    )
    columns = ["variant", "first loss", "time", "last loss", "validation"]
    image = svg.inline(figure, "chart-loss-time", title, description)
    return Chart("chart-loss-time", title, description, image, Table(title, columns, rows), legend)


def _line(variant: VariantResult) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Seconds and loss of the variant's longest round, and seconds and validation loss of that round's evaluations."""
    rounds = [part for part in variant.series if part.loss]
    if not rounds:
        return None
    chosen = max(rounds, key=lambda part: len(part.loss))
    points = [
        (x, y, i)
        for x, y, i in zip(chosen.seconds, map(number, chosen.loss), chosen.iter, strict=True)
        if y is not None
    ]  # fmt: skip
    if not points:
        return None
    x, y, iterations = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    found = [  # the first evaluation is before the first iteration, at 0
        (float(np.interp(e.iter, [0, *iterations], [0, *x])), value)
        for e in variant.evaluations
        if e.round in (chosen.round, None) and (value := number(e.val_loss)) is not None
    ]
    keep = sorted({*range(0, len(x), max(1, -(-len(x) // _POINTS))), len(x) - 1})
    return x[keep], y[keep], np.array([f[0] for f in found]), np.array([f[1] for f in found])


def _swatch(colour: str, dash: str, marker: str) -> str:
    """A line with its marker, for the legend beside the chart."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true" focusable="false" '
        f'style="color: var(--{colour})"><path d="M0 6h30" stroke="currentColor" stroke-width="1.6"{dashes}/>'
        f'<g fill="currentColor">{_SHAPES.get(marker, "")}</g></svg>'
    )
