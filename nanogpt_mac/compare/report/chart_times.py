"""Charts of iteration times: against the fastest, over time, and how they are distributed."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanogpt_mac.compare.report.chart_rows import (
    BAR,
    Chart,
    at_right,
    colour_of,
    few_ticks,
    log_x,
    rows_axes,
    short,
    shown,
)
from nanogpt_mac.compare.report.sections import mark
from nanogpt_mac.compare.report.table import Row, Table
from nanogpt_mac.compare.report.words import (
    DASH,
    dicts,
    get,
    interval,
    label,
    ms,
    num,
    nums,
    percent,
    ratio,
    state,
    text,
)
from nanogpt_mac.report import svg
from nanogpt_mac.report.svg import COLOURS


def ratios(comparison: Any) -> Chart | None:
    variants = [
        variant
        for variant in shown(comparison)
        if num(get(variant, "ratio", "value")) or mark(variant, comparison) == "fastest"
    ]
    if len(variants) < 2:
        return None
    fastest = next((label(variant) for variant in variants if mark(variant, comparison) == "fastest"), "the fastest")
    title = f"Times as long as {fastest}"
    figure, axes = rows_axes([short(variant) for variant in variants])
    axes.axvline(1, color=COLOURS["accent"], linewidth=1.2)
    rows, drawn = [], [1.0]
    for i, variant in enumerate(variants):
        value, bounds = num(get(variant, "ratio", "value")) or 1.0, nums(get(variant, "ratio", "ci"), 2)
        pairs = get(variant, "ratio", "pairs")
        pairs = [v for v in map(num, pairs) if v] if isinstance(pairs, list) else []
        colour = {"fastest": "accent", "wrong": "wrong"}.get(mark(variant, comparison), "ink")
        axes.plot(pairs, [i + BAR] * len(pairs), "|", color=COLOURS["muted"], markersize=9)
        if bounds:
            axes.plot(bounds, [i + BAR] * 2, color=COLOURS[colour], linewidth=2.2, solid_capstyle="butt")
        axes.plot(value, i + BAR, "o", color=COLOURS[colour], markersize=5.5)
        drawn += [value, *pairs, *(bounds or [])]
        said = (
            "1"
            if mark(variant, comparison) == "fastest"
            else ratio(value) + (" tie" if get(variant, "ratio", "tie") else "")
        )
        at_right(axes, i, said)
        rows.append(Row([label(variant), said, interval(bounds, ratio), ", ".join(map(ratio, pairs)) or DASH]))
    if max(drawn) > 3 and min(drawn) > 0:
        log_x(axes)
    else:
        few_ticks(axes)
    axes.set_xlabel("dot and interval; thin ticks are single rounds")
    description = "Dots with intervals. " + "; ".join(f"{r.cells[0]}: {r.cells[1]} {r.cells[2]}" for r in rows) + "."
    table = Table(title, ["variant", "ratio", "interval", "by round"], rows)
    return Chart("chart-ratio", title, description, svg.inline(figure, "chart-ratio", title, description), table)


# -- iteration times ---------------------------------------------------------------------------------------------------


def _relative(variant: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Per round, (round, iteration times over the variant's median less 1)."""
    median = num(get(variant, "iter_ms", "median"))
    found: list[tuple[Any, Any]] = []
    for part in dicts(variant.get("series")):
        values = [v for v in map(num, part.get("iter_ms") or []) if v] if isinstance(part.get("iter_ms"), list) else []
        if values and median:
            found.append((text(part.get("round")), np.array(values) / median - 1))
    return found


def _band(values: Any) -> tuple[float, float]:
    """The range that shows nearly all of `values` (shares), at least two per cent wide to either side."""
    low, high = np.percentile(values, [2, 96])
    return min(1.6 * float(low), -0.02), max(2.0 * float(high), 0.02)


def over_time(comparison: Any) -> Chart | None:
    known = {id(variant): _relative(variant) for variant in shown(comparison)}
    variants = [variant for variant in shown(comparison) if known[id(variant)]]
    if not variants:
        return None
    low, high = _band(np.concatenate([values for variant in variants for _, values in known[id(variant)]]))
    numbers = list(dict.fromkeys(number for variant in variants for number, _ in known[id(variant)]))
    rounds = len(numbers)
    most = max(12, 240 // rounds)
    figure, axes = rows_axes([short(variant) for variant in variants], 50)
    axes.grid(visible=False)
    rows = []
    for i, variant in enumerate(variants):
        colour = COLOURS[colour_of(variant, comparison)]
        axes.plot([0, rounds], [_height(0, low, high, i)] * 2, color=COLOURS["rule"], linewidth=0.8)
        for number, values in known[id(variant)]:
            r = numbers.index(number)
            x, y, slowest = _stretches(values, most)
            axes.plot(r + 0.03 + 0.94 * x, _height(y, low, high, i), color=colour, linewidth=0.9)
            outside = slowest > high
            axes.plot(r + 0.03 + 0.94 * x[outside], np.full(outside.sum(), _height(high, low, high, i)), "^",
                      color=COLOURS["ink"], markersize=3)  # fmt: skip
        medians = ", ".join(f"{100 * float(np.median(values)):+.1f} %" for _, values in known[id(variant)])
        worst = max(float(values.max()) for _, values in known[id(variant)])
        rows.append(Row([label(variant), medians, f"{100 * worst:+.0f} %"], ""))
    for r in range(1, rounds):
        axes.axvline(r, color=COLOURS["rule"], linewidth=0.8)
    axes.set_xlim(0, rounds)
    axes.set_xticks(np.arange(rounds) + 0.5, numbers)
    axes.tick_params(length=0)
    axes.set_xlabel("round" if rounds > 1 else "one round, from its first to its last iteration")
    title = "Iteration time as the runs went on"
    description = (
        f"One band a variant, each from {100 * low:+.0f} % to {100 * high:+.0f} % of the variant's own median. Lines: medians "
        "of short stretches; triangles: iterations beyond the band."
    )
    table = Table(title, ["variant", "median of each round against the variant's own", "slowest iteration"], rows)
    return Chart("chart-series", title, description, svg.inline(figure, "chart-series", title, description), table)


def _height(value: Any, low: float, high: float, row: int) -> Any:
    """Where in its row's band a value lies."""
    return row + 0.38 - 0.56 * (np.clip(value, low, high) - low) / (high - low)


def _stretches(values: Any, most: int) -> tuple[Any, Any, Any]:
    """(position 0..1, median, slowest) of at most `most` equal stretches of a series."""
    parts = np.array_split(values, min(most, len(values)))
    position = (np.arange(len(parts)) + 0.5) / len(parts)
    return position, np.array([np.median(part) for part in parts]), np.array([part.max() for part in parts])


def distribution(comparison: Any) -> Chart | None:
    found = [(variant, values) for variant in shown(comparison) if (values := _values(variant)) is not None]
    if not found:
        return None
    low, high = _band(np.concatenate([values for _, values in found]))
    edges = np.linspace(low, high, 61)
    figure, axes = rows_axes([short(variant) for variant, _ in found], 50)
    rows = []
    for i, (variant, values) in enumerate(found):
        counts, _ = np.histogram(values, edges)
        wrong, top = state(variant) == "wrong", max(int(counts.max()), 1)
        axes.stairs(i + 0.38 - 0.54 * counts / top, edges, baseline=i + 0.38, fill=not wrong, linewidth=1,
                    color=COLOURS[colour_of(variant, comparison)])  # fmt: skip
        beyond = float((values > high).mean())
        if beyond:
            at_right(axes, i, f"{percent(beyond)} slower ▸", "muted")
        quantiles = [ms(get(variant, "iter_ms", key)) for key in ("p10", "median", "p90", "max")]
        rows.append(Row([label(variant), *quantiles, percent(beyond)]))
    axes.axvline(0, color=COLOURS["rule"], linewidth=1)
    axes.set_xlim(low, high)
    few_ticks(axes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g} %" if abs(value) > 1e-9 else "median")
    axes.set_xlabel("difference from the variant's own median")
    title = "Distribution of iteration times"
    description = "Histograms, one a variant, each against the variant's own median. " + "; ".join(
        f"{r.cells[0]}: 10th percentile {r.cells[1]} ms, 90th {r.cells[3]} ms" for r in rows
    )
    table = Table(title, ["variant", "p10", "median", "p90", "max", "beyond the chart"], rows)
    return Chart("chart-spread", title, description, svg.inline(figure, "chart-spread", title, description), table)


def _values(variant: dict[str, Any]) -> Any:
    """Iteration times over the variant's median less 1: of the series, or the middles of the histogram's bins."""
    series = [values for _, values in _relative(variant)]
    if series:
        return np.concatenate(series)
    counts, median = get(variant, "histogram", "counts"), num(get(variant, "iter_ms", "median"))
    counts = nums(counts, len(counts)) if isinstance(counts, list) else None
    edges = nums(get(variant, "histogram", "edges"), len(counts) + 1) if counts else None
    if not counts or not edges or not median or sum(counts) <= 0:
        return None
    middles = (np.array(edges[1:]) + np.array(edges[:-1])) / 2
    return np.repeat(middles, np.maximum(counts, 0).astype(int)) / median - 1
