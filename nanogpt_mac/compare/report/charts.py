"""The charts of a comparison's page. Each has a title, words for who cannot see it, and its figures as a table."""

from __future__ import annotations

from typing import Any

from nanogpt_mac.compare.report import chart_loss, chart_times
from nanogpt_mac.compare.report.chart_rows import (
    BAR,
    Chart,
    at_right,
    bar,
    bar_chart,
    few_ticks,
    log_x,
    rows_axes,
    short,
    shown,
)
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
    seconds,
    size,
    state,
    text,
)
from nanogpt_mac.report import svg
from nanogpt_mac.report.svg import COLOURS


def draw(comparison: Any) -> dict[str, list[Chart]]:
    """Section id -> its charts; a chart without data is not there."""
    with svg.style():
        return {
            section: [chart for maker in makers if (chart := maker(comparison)) is not None]
            for section, makers in _CHARTS.items()
        }


def board(number: int, entries: list[tuple[str, float, str]]) -> Chart:
    """A leaderboard's bars: (label, ms, what stands at the bar's end) of each entry, the fastest first."""
    with svg.style():
        figure, axes = rows_axes([name if len(name) <= 46 else name[:45] + "…" for name, _, _ in entries])
        for i, (_, value, said) in enumerate(entries):
            bar(axes, i, value, said, "accent" if i == 0 else "bar")
        axes.set_xlim(0, max(value for _, value, _ in entries) * 1.32)
        axes.set_xlabel("ms an iteration, median")
        identifier, title = f"chart-board-{number}", "Milliseconds an iteration"
        description = "Bars. " + "; ".join(f"{name}: {said}" for name, _, said in entries) + "."
        table = Table(title, ["entry", "ms"], [Row([name, said]) for name, _, said in entries])
        return Chart(identifier, title, description, svg.inline(figure, identifier, title, description), table)


def _key(shape: str, name: str) -> tuple[str, str]:
    """A legend's entry: a small filled shape."""
    return name, (
        '<svg viewBox="0 0 12 12" width="12" height="12" aria-hidden="true" focusable="false">' + shape + "</svg>"
    )


_MFU = (
    ("mfu", "share of this chip's peak", "o", '<circle cx="6" cy="6" r="4" fill="var(--accent)"/>'),
    ("mfu_measured", "share of the best matmul measured here", "D", '<path d="M6 1l5 5-5 5-5-5z" fill="var(--ink)"/>'),
)


def _mfu(comparison: Any) -> Chart | None:
    variants = [variant for variant in shown(comparison) if any(num(variant.get(key)) is not None for key, *_ in _MFU)]
    if not variants:
        return None
    shares = [share for variant in variants for key, *_ in _MFU if (share := num(variant.get(key))) is not None]
    figure, axes = rows_axes([short(variant) for variant in variants])
    rows = []
    for i, variant in enumerate(variants):
        axes.plot([0, 100], [i + BAR] * 2, color=COLOURS["rule"], linewidth=1)
        values = []
        for key, _, marker, _ in _MFU:
            share = num(variant.get(key))
            values.append(percent(share))
            if share is not None:
                colour = (
                    COLOURS["wrong"] if state(variant) == "wrong" else COLOURS["accent" if marker == "o" else "ink"]
                )
                axes.plot(100 * share, i + BAR, marker, color=colour, markersize=6.5, clip_on=False)
        said = " · ".join(value for value in values if value != DASH)
        at_right(axes, i, said)
        rows.append(Row([label(variant), *values]))
    axes.set_xlim(0, 105 * max(shares) if max(shares) > 1 else 100)  # a disputed peak may be too low
    axes.set_xlabel("% of the peak")
    title = "Model FLOPs utilisation"
    table = Table(title, ["variant", *(name for _, name, _, _ in _MFU)], rows)
    description = "Dots from 0 to 100 %. " + "; ".join(
        f"{r.cells[0]}: {r.cells[1]} of this chip's peak, {r.cells[2]} of the best matmul measured here" for r in rows
    )
    legend = [
        _key(shape, name)
        for key, name, _, shape in _MFU
        if any(num(variant.get(key)) is not None for variant in variants)
    ]
    return Chart("chart-mfu", title, description, svg.inline(figure, "chart-mfu", title, description), table, legend)


def _roofline(comparison: Any) -> Chart | None:
    variants = [variant for variant in shown(comparison) if num(get(variant, "roofline", "floor_ms"))]
    if not variants:
        return None
    figure, axes = rows_axes([short(variant) for variant in variants])
    rows = []
    for i, variant in enumerate(variants):
        floor, measured = (num(v) or 0.0 for v in (variant["roofline"]["floor_ms"], get(variant, "iter_ms", "median")))
        colour = COLOURS["wrong" if state(variant) == "wrong" else "ink"]
        axes.plot([floor, measured], [i + BAR] * 2, color=COLOURS["bar"], linewidth=2)
        axes.plot(floor, i + BAR, "|", color=COLOURS["accent"], markersize=13, markeredgewidth=2.4)
        axes.plot(measured, i + BAR, "o", color=colour, markersize=6)
        said = f"{ratio(measured / floor)} x its floor"
        at_right(axes, i, said)
        rows.append(Row([label(variant), ms(floor), ms(measured), said, text(get(variant, "roofline", "bound"))]))
    log_x(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low * 0.9, high * 1.1)
    axes.set_xlabel("ms an iteration, logarithmic")
    title = "Floor and measured time"
    description = "Bar ends. " + "; ".join(
        f"{r.cells[0]}: floor {r.cells[1]} ms, measured {r.cells[2]} ms" for r in rows
    )
    table = Table(title, ["variant", "floor ms", "measured ms", "measured", "bound by"], rows)
    legend = [
        _key('<path d="M6 0v12" stroke="var(--accent)" stroke-width="3"/>', "floor: arithmetic"),
        _key('<circle cx="6" cy="6" r="4" fill="var(--ink)"/>', "measured median"),
    ]
    return Chart(
        "chart-roofline", title, description, svg.inline(figure, "chart-roofline", title, description), table, legend
    )


def _phases(comparison: Any) -> Chart | None:
    """Compiling once, then the projected recipe: what is not its iterations is its evaluations."""
    found = []
    for variant in shown(comparison):
        iterations, whole = num(get(variant, "recipe", "iters")), num(get(variant, "recipe", "seconds"))
        median = num(get(variant, "iter_ms", "median"))
        if iterations is not None and whole is not None and median is not None:
            compiling, training = max(num(variant.get("compile_s")) or 0.0, 0.0), iterations * median / 1e3
            found.append((variant, [compiling, training, max(whole - training, 0.0)]))
    if not found:
        return None
    figure, axes = rows_axes([short(variant) for variant, _ in found])
    names, colours = ("compiling", "training", "evaluating"), ("ink", "bar", "page")
    rows = []
    for i, (variant, parts) in enumerate(found):
        left = 0.0
        for part, colour in zip(parts, colours, strict=True):
            axes.barh(i + BAR, part, 0.36, left=left, color=COLOURS[colour], edgecolor=COLOURS["ink"], linewidth=0.7)
            left += part
        axes.annotate(seconds(left), (left, i + BAR), (4, 0), textcoords="offset points", va="center", in_layout=False)
        rows.append(
            Row([label(variant), *map(seconds, parts), seconds(left)], "wrong" if state(variant) == "wrong" else "")
        )
    longest = max(sum(parts) for _, parts in found)
    axes.set_xlim(0, longest * 1.32 or 1)
    unit, name = next(
        pair for pair in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if longest > 2 * pair[0] or pair[0] == 1
    )
    few_ticks(axes, unit)
    axes.set_xlabel(f"{name}, projected from these runs")
    title = "Compiling and the full recipe, by phase"
    description = "Stacked bars. " + "; ".join(
        f"{r.cells[0]}: compiling {r.cells[1]}, training {r.cells[2]}, evaluating {r.cells[3]}" for r in rows
    )
    table = Table(title, ["variant", *names, "together"], rows)
    square = '<path d="M1 1h10v10H1z" fill="var(--{})" stroke="var(--ink)"/>'
    legend = [_key(square.format(colour), name) for colour, name in zip(colours, names, strict=True)]
    return Chart(
        "chart-phases", title, description, svg.inline(figure, "chart-phases", title, description), table, legend
    )


def _levers(comparison: Any) -> Chart | None:
    found = [lever for lever in dicts(get(comparison, "levers")) if num(get(lever, "ratio", "value")) is not None]
    if not found:
        return None
    variants = {
        variant.get("name"): variant
        for variant in dicts(get(comparison, "variants"))
        if isinstance(variant.get("name"), str)
    }
    labels, wrong = [], []
    for lever in found:
        base = variants.get(str(lever.get("base")))
        wrong.append(state(variants.get(str(lever.get("name")), {"state": "ok"})) == "wrong")
        on = short(base) if base else text(lever.get("base"), 30)
        what = text(lever.get("what") or lever.get("name"), 40 - len(on))
        labels.append(f"{what}, {on}" + (" (WRONG)" if wrong[-1] else ""))
    figure, axes = rows_axes(labels)
    rows = []
    for i, (lever, name) in enumerate(zip(found, labels, strict=True)):
        value, bounds, tie = (
            lever["ratio"]["value"],
            nums(get(lever, "ratio", "ci"), 2),
            bool(get(lever, "ratio", "tie")),
        )
        colour = COLOURS["wrong" if wrong[i] else "muted" if tie else "ink"]
        if bounds:
            axes.plot(bounds, [i + BAR] * 2, color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(value, i + BAR, "o", color=colour, markerfacecolor=COLOURS["page"] if tie else colour, markersize=5.5)
        said = ratio(value) + (" tie" if tie else "")
        at_right(axes, i, said)
        rows.append(Row([name, said, interval(bounds, ratio)]))
    axes.axvline(1, color=COLOURS["accent"], linewidth=1.2)
    axes.set_xlabel("time with the switch over time without it; left of 1 is faster")
    title = "What each lever is worth"
    description = "Dots with intervals. " + "; ".join(f"{row.cells[0]}: {row.cells[1]} {row.cells[2]}" for row in rows)
    table = Table(title, ["lever", "ratio", "interval"], rows)
    return Chart("chart-levers", title, description, svg.inline(figure, "chart-levers", title, description), table)


def _joules(variant: Any) -> float | None:
    return num(get(variant, "energy", "joules_per_1000_tokens"))


_median = bar_chart(
    "chart-median", "Milliseconds an iteration", "ms, median", lambda variant: num(get(variant, "iter_ms", "median")),
    lambda variant: f"{ms(get(variant, 'iter_ms', 'median'))} ms",
)  # fmt: skip
_memory = bar_chart(
    "chart-memory", "Peak memory", "GiB", lambda variant: num(variant.get("peak_memory")),
    lambda variant: size(variant.get("peak_memory")), 2**-30,
)  # fmt: skip
_energy = bar_chart(
    "chart-energy", "Energy", "J per 1000 tokens", _joules, lambda variant: f"{text(_joules(variant))} J"
)

_CHARTS = {
    "variants": (_median, chart_times.ratios),
    "times": (chart_times.over_time, chart_times.distribution),
    "loss": (chart_loss.against_iteration, chart_loss.against_time),
    "utilisation": (_mfu, _roofline),
    "phases": (_phases,),
    "memory": (_memory,),
    "energy": (_energy,),
    "levers": (_levers,),
}
