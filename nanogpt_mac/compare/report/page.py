"""The HTML page: one file, no script, nothing fetched, light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt_mac.compare.report import render
from nanogpt_mac.compare.report.chart_rows import Chart
from nanogpt_mac.compare.report.sections import headline, mark, ordered, verdict
from nanogpt_mac.compare.report.table import Section
from nanogpt_mac.compare.report.words import DASH, count, get, interval, label, ms, percent, seconds, size, text

_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z0-9])")
TEMPLATE = Path(__file__).with_name("template.html.j2")

# name -> (light, dark). Text has at least 4.5:1 against its ground in both, lines and bars 3:1; a test computes it.
PALETTE = {
    "page": ("#fbfaf8", "#121416"),
    "card": ("#ffffff", "#191c1f"),
    "ink": ("#1b1d1f", "#e9e7e3"),
    "muted": ("#5a5f66", "#a4a9b0"),
    "rule": ("#dedbd5", "#33383d"),
    "accent": ("#0a6b62", "#4cc2b1"),
    "tint": ("#e9f3f1", "#16302d"),
    "bar": ("#7d8590", "#79828c"),
    "wrong": ("#b3261e", "#ff8a80"),
    "caution": ("#8a5300", "#e5ac54"),
    "s1": ("#0a6b62", "#4cc2b1"),
    "s2": ("#b4520c", "#f0975a"),
    "s3": ("#5246c4", "#a79dff"),
    "s4": ("#a3245f", "#f184b2"),
    "s5": ("#50701a", "#a6c75f"),
    "s6": ("#1f63ad", "#74b3f2"),
    "s7": ("#6b5548", "#c9b1a1"),
}


@dataclass
class Page:
    """What the template is filled with."""

    kind: str  # what stands over the verdict
    title: str
    verdict: str  # its first sentence is the heading
    facts: list[str]
    figures: list[tuple[str, str, str]]  # name, figure, what it is
    alarms: list[str]  # shown right under the verdict
    sections: list[Section]
    version: str
    charts: Mapping[str, list[Chart]] = field(default_factory=dict)


def comparison_page(comparison: Any) -> str:
    """The page of one comparison; see render.html."""
    from nanogpt_mac.compare.report import charts

    said = verdict(comparison)
    wrong = [variant for variant in ordered(comparison) if mark(variant, comparison) in ("wrong", "failed")]
    untold = [variant for variant in wrong if text(variant.get("label") or variant.get("name")) not in said]
    alarms = [f"{label(variant)}: {text(variant.get('reason'))}" for variant in untold]
    if get(comparison, "machine", "simulated") and "simulated" not in said:
        alarms.insert(0, "The MPS device here is simulated on a CPU: its times say nothing about a Mac.")
    return filled(
        Page(
            "Comparison",
            "Comparison: " + text(get(comparison, "machine", "name") or "machine not known"),
            said,
            headline(comparison),
            _figures(comparison),
            alarms,
            render.sections(comparison),
            text(get(comparison, "version")),
            charts.draw(comparison),
        )
    )


def _figures(comparison: Any) -> list[tuple[str, str, str]]:
    """The fastest variant's own figures, as far as they are known; of variants that tie, the first's, by name."""
    variant = next((w for w in ordered(comparison) if mark(w, comparison) == "fastest"), None)
    if variant is None:
        return []
    bounds = interval(get(variant, "iter_ms", "ci95"))
    share, of = variant.get("mfu"), "MFU, of this chip's peak"
    if percent(share) == DASH:
        share, of = variant.get("mfu_measured"), "MFU, of the best matmul measured here"
    found = [
        (f"{ms(get(variant, 'iter_ms', 'median'))} ms", f"an iteration of {label(variant)}",
         "" if bounds == DASH else f"95 % {bounds}"),
        (count(variant.get("tokens_per_s")), "tokens a second", ""),
        (percent(share), of, ""),
        (seconds(get(variant, "recipe", "seconds")), "for the full recipe", "projected"),
        (size(variant.get("peak_memory")), "peak memory", ""),
    ]  # fmt: skip
    return [figure for figure in found if figure[0] != DASH]


def filled(page: Page) -> str:
    """The template filled with `page`. Everything in it but the charts is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    first, _, more = _SENTENCE.sub("\n", page.verdict, count=1).partition("\n")
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, heading=first, more=more, palette=PALETTE, safe=Markup, dash=DASH) + "\n"
