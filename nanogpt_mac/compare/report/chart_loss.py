"""Charts of the loss, against iteration and against wall time: lines that should lie together, and lines that race."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanogpt_mac.compare.report.chart_rows import Chart, shown
from nanogpt_mac.compare.report.table import Row, Table
from nanogpt_mac.compare.report.words import DASH, count, dicts, label, loss, num, seconds, state
from nanogpt_mac.report import svg
from nanogpt_mac.report.svg import COLOURS

_POINTS = 150  # of one line
_DASHES = ("", "6 2.5", "1.2 2", "8 2.5 1.5 2.5")  # as SVG writes them, in points
_MARKERS = ("o", "s", "^", "D", "v")
_SHAPES = {
    "o": '<circle cx="15" cy="6" r="3"/>',
    "s": '<path d="M12 3h6v6h-6z"/>',
    "^": '<path d="M15 2.5l3.6 6.5h-7.2z"/>',
    "D": '<path d="M15 2l4 4-4 4-4-4z"/>',
    "v": '<path d="M15 9.5l3.6-6.5h-7.2z"/>',
}


def against_iteration(comparison: Any) -> Chart | None:
    return _chart(comparison, "iter", "iteration", "chart-loss-iteration", "Loss against iteration", count)


def against_time(comparison: Any) -> Chart | None:
    return _chart(
        comparison, "seconds", "seconds since the first iteration began", "chart-loss-time",
        "Loss against wall time", seconds,
    )  # fmt: skip


def _line(variant: dict[str, Any], key: str) -> tuple[Any, Any, Any, Any] | None:
    """x and loss of the variant's longest round, and x and validation loss of that round's evaluations."""
    rounds = [
        part
        for part in dicts(variant.get("series"))
        if all(isinstance(part.get(k), list) for k in (key, "loss", "iter"))
    ]
    if not rounds:
        return None
    chosen = max(rounds, key=lambda part: len(part["loss"]))
    triples = [
        (x, y, i)
        for x, y, i in zip(map(num, chosen[key]), map(num, chosen["loss"]), map(num, chosen["iter"]), strict=False)
        if x is not None and y is not None and i is not None
    ]
    if not triples:
        return None
    x, y, iterations = (np.array(column) for column in zip(*triples, strict=True))
    found = [  # the first evaluation is before the first iteration, at 0
        (float(np.interp(i, [0, *iterations], [0, *x])), v)
        for e in dicts(variant.get("evaluations"))
        if e.get("round") in (chosen.get("round"), None)
        and (i := num(e.get("iter"))) is not None
        and (v := num(e.get("val_loss"))) is not None
    ]
    step = max(1, -(-len(x) // _POINTS))
    keep = sorted({*range(0, len(x), step), len(x) - 1})
    return x[keep], y[keep], np.array([f[0] for f in found]), np.array([f[1] for f in found])


def _chart(
    comparison: Any, key: str, unit: str, identifier: str, title: str, words: Any
) -> Chart | None:  # fmt: skip
    lines = [(variant, line) for variant in shown(comparison) if (line := _line(variant, key)) is not None]
    if not lines:
        return None
    figure, axes = svg.figure(270)
    axes.grid()
    rows, legend = [], []
    for number, (variant, (x, y, at, validation)) in enumerate(lines):
        colour = "wrong" if state(variant) == "wrong" else f"s{number % 7 + 1}"
        dash, marker = _DASHES[number % len(_DASHES)], _MARKERS[number // len(_DASHES) % len(_MARKERS)]
        (drawn,) = axes.plot(x, y, color=COLOURS[colour], linewidth=1.3)
        if dash:
            drawn.set_dashes([float(part) / 1.3 for part in dash.split()])
        axes.plot(at, validation, marker, color=COLOURS[colour], markersize=4.5, markeredgecolor=COLOURS["page"],
                  markeredgewidth=0.6)  # fmt: skip
        legend.append((label(variant), _swatch(colour, dash, marker if len(at) else "")))
        middle = len(x) // 2
        rows.append(
            Row(
                [
                    label(variant), loss(float(y[0])), words(float(x[middle])), loss(float(y[middle])), words(float(x[-1])),
                    loss(float(y[-1])), loss(float(validation[-1])) if len(validation) else DASH,
                ],
                "wrong" if state(variant) == "wrong" else "",
            )
        )  # fmt: skip
    axes.set_xlabel(unit)
    axes.set_ylabel("loss")
    axes.set_xlim(left=0)
    description = "Lines: training loss; markers: validation loss. " + "; ".join(
        f"{row.cells[0]}: from {row.cells[1]} to {row.cells[5]} after {row.cells[4]} {unit.split()[0]}" for row in rows
    )
    columns = [
        "variant",
        "first loss",
        f"{unit.split()[0]}, midway",
        "loss",
        f"{unit.split()[0]}, at the end",
        "loss",
        "validation",
    ]
    drawn = svg.inline(figure, identifier, title, description)
    return Chart(identifier, title, description, drawn, Table(title, columns, rows), legend)


def _swatch(colour: str, dash: str, marker: str) -> str:
    """A line with its marker, for the legend beside the chart."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true" focusable="false" '
        f'style="color: var(--{colour})"><path d="M0 6h30" stroke="currentColor" stroke-width="1.6"{dashes}/>'
        f'<g fill="currentColor">{_SHAPES.get(marker, "")}</g></svg>'
    )
