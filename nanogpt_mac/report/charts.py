"""What the charts of any report share: the type, rows with a label over their mark, axes.

A chart has a title, words for those who cannot see it, and its figures as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanogpt_mac.report import svg
from nanogpt_mac.report.svg import COLOURS
from nanogpt_mac.report.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW_PT = 38  # a label and its mark
BAR = 0.1  # how far under its row's middle a mark is drawn


@dataclass(frozen=True)
class Chart:
    """`legend` pairs what a line or marker stands for with a small SVG of it."""

    id: str
    title: str
    description: str
    svg: str
    table: Table
    legend: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class RowsChart:
    """A chart of labelled rows: what is drawn in each is `draw`'s business, everything else is the same for all."""

    id: str
    title: str
    x_label: str
    columns: list[str]  # of the table beneath
    what: str  # the beginning of the description: "Dots with intervals."
    legend: list[tuple[str, str]] = field(default_factory=list)
    row_pt: float = _ROW_PT

    def of(
        self,
        labels: Sequence[str],
        draw: Callable[[Axes, int], tuple[str, Row]],
        finish: Callable[[Axes], None] = lambda axes: None,
    ) -> Chart:
        """`draw(axes, i)` draws row i around y = i and answers the words at its right end and its row of the table."""
        figure, axes = svg.figure(len(labels) * self.row_pt + 46)
        axes.set_ylim(len(labels) - 0.45, -0.62)
        axes.yaxis.set_visible(False)
        axes.spines.left.set_visible(False)
        axes.grid(axis="x")
        where, rows = axes.get_yaxis_transform(), []
        for i, label in enumerate(labels):
            axes.text(0, i - 0.22, label, transform=where, va="bottom", in_layout=False)
            words, row = draw(axes, i)
            axes.text(1, i - 0.22, words, transform=where, ha="right", va="bottom", in_layout=False)
            rows.append(row)
        finish(axes)
        axes.set_xlabel(self.x_label)
        description = f"{self.what} " + "; ".join(f"{r.cells[0]}: {', '.join(r.cells[1:])}" for r in rows) + "."
        drawn = svg.inline(figure, self.id, self.title, description)
        return Chart(self.id, self.title, description, drawn, Table(self.title, self.columns, rows), self.legend)


def dot_and_interval(
    axes: Axes, row: int, value: float, bounds: Sequence[float] | None, colour: str, hollow: bool = False
) -> None:
    """A figure with its interval in a row; `colour` is a name of the palette."""
    if bounds:
        axes.plot(bounds, [row + BAR] * 2, color=COLOURS[colour], linewidth=2.2, solid_capstyle="butt")
    face = COLOURS["page" if hollow else colour]
    axes.plot(value, row + BAR, "o", color=COLOURS[colour], markerfacecolor=face, markersize=5.5)


def key(shape: str, name: str) -> tuple[str, str]:
    """A legend's entry: a small filled shape."""
    return name, f'<svg viewBox="0 0 12 12" width="12" height="12" aria-hidden="true" focusable="false">{shape}</svg>'


def log_x(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def few_ticks(axes: Axes) -> None:
    """About five ticks on a linear x axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 9):g}"))


def shortened(label: str, most: int) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
