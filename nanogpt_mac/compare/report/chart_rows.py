"""What the charts share: the type, rows with a label over a bar, axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanogpt_mac.compare.report.sections import mark, plain
from nanogpt_mac.compare.report.table import Row, Table
from nanogpt_mac.compare.report.words import get, label, num, state
from nanogpt_mac.report import svg
from nanogpt_mac.report.svg import COLOURS

_LABEL = 30  # characters of a variant's label that fit a chart
_ROW_PT = 38  # a variant's label and its bar
BAR = 0.1  # how far under its row's middle a bar or dot is drawn


@dataclass(frozen=True)
class Chart:
    """`legend` pairs what a line or marker stands for with a small SVG of it."""

    id: str
    title: str
    description: str
    svg: str
    table: Table
    legend: list[tuple[str, str]] = field(default_factory=list)


def short(variant: Any) -> str:
    """A label that fits; what is to be said against the variant is never cut off."""
    whole = label(variant)
    if len(whole) <= _LABEL:
        return whole
    name, _, said = whole.rpartition(" (") if state(variant) != "ok" else (whole, "", "")
    kept = _LABEL - (len(said) + 2 if said else 0)
    return f"{name[: kept - 1]}…" + (f" ({said}" if said else "") if len(name) > kept else whole


# -- rows: a label over a bar ------------------------------------------------------------------------------------------


def rows_axes(labels: list[str], row_pt: float = _ROW_PT) -> tuple[Any, Any]:
    """Axes with a labelled row for each of `labels`, from the top; row i is centred on y = i."""
    figure, axes = svg.figure(len(labels) * row_pt + 46)
    axes.set_ylim(len(labels) - 0.45, -0.62)
    axes.yaxis.set_visible(False)
    axes.spines.left.set_visible(False)
    axes.grid(axis="x")
    for i, words in enumerate(labels):
        axes.text(0, i - 0.22, words, transform=axes.get_yaxis_transform(), va="bottom", in_layout=False)
    return figure, axes


def at_right(axes: Any, row: int, words: str, colour: str = "ink") -> None:
    """Words at the right end of a row's label."""
    where = axes.get_yaxis_transform()
    axes.text(1, row - 0.22, words, transform=where, ha="right", va="bottom", color=COLOURS[colour], in_layout=False)


def colour_of(variant: dict[str, Any], comparison: Any) -> str:
    """The colour's name: one accent, for the fastest."""
    return {"fastest": "accent", "wrong": "wrong"}.get(mark(variant, comparison), "bar")


def bar(axes: Any, row: int, value: float, words: str, colour: str) -> None:
    """A bar with words at its end; one of a wrong variant is hollow."""
    fill = "none" if colour == "wrong" else COLOURS[colour]
    axes.barh(row + BAR, value, 0.36, color=fill, edgecolor=COLOURS[colour], linewidth=1)
    axes.annotate(words, (value, row + BAR), (4, 0), textcoords="offset points", va="center", in_layout=False)


def bar_chart(
    identifier: str,
    title: str,
    unit: str,
    value: Callable[[Any], float | None],
    words: Callable[[Any], str],
    scale: float = 1.0,
) -> Callable[[Any], Chart | None]:
    """What makes a chart of one figure a variant: `value` of a variant times `scale` is the bar, `words` stand at its end."""

    def chart(comparison: Any) -> Chart | None:
        variants = [variant for variant in shown(comparison) if value(variant) is not None]
        if not variants:
            return None
        figure, axes = rows_axes([short(variant) for variant in variants])
        values = [(value(variant) or 0.0) * scale for variant in variants]
        for i, (variant, long) in enumerate(zip(variants, values, strict=True)):
            bar(axes, i, long, words(variant), colour_of(variant, comparison))
        axes.set_xlim(0, max(values) * 1.32 or 1)
        axes.set_xlabel(unit)
        rows = [Row([label(variant), words(variant)]) for variant in variants]
        description = "Bars. " + "; ".join(": ".join(row.cells) for row in rows) + "."
        drawn = svg.inline(figure, identifier, title, description)
        return Chart(identifier, title, description, drawn, Table(title, ["variant", unit], rows))

    return chart


def shown(comparison: Any) -> list[dict[str, Any]]:
    return [variant for variant in plain(comparison) if (num(get(variant, "iter_ms", "median")) or 0) > 0]


def log_x(axes: Any) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def few_ticks(axes: Any, unit: float = 1.0) -> None:
    """About five ticks on a linear x axis, at round multiples of `unit`, which the axis is labelled in."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = axes.get_xlim()
    ticks = [float(tick) * unit for tick in np.asarray(MaxNLocator(5).tick_values(low / unit, high / unit))]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value / unit, 9):g}"))
