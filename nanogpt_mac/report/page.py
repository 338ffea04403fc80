"""A report as an HTML page: one file, nothing fetched, light and dark; no script but for a table that is searched."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanogpt_mac.report.charts import Chart
from nanogpt_mac.report.table import Report

_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z0-9])")
TEMPLATE = Path(__file__).with_name("template.html.j2")

# Leaves the rows of a section's tables that hold every word typed.
_SEARCH = """for (const field of document.querySelectorAll("input[data-table]")) {
  const rows = document.getElementById(field.dataset.table).querySelectorAll("tbody tr");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}"""

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


def html(report: Report, charts: Mapping[str, Sequence[Chart]] | None = None) -> str:
    """The page, with `charts` (section id -> its charts) over the tables. Everything but the charts is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    heading, _, more = _SENTENCE.sub("\n", report.verdict, count=1).partition("\n")
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    search = _SEARCH if any(section.searchable for section in report.sections) else ""
    digest = base64.b64encode(hashlib.sha256(search.encode()).digest()).decode()
    filled = template.render(
        page=report,
        charts_of=charts or {},
        heading=heading,
        more=more,
        palette=PALETTE,
        safe=Markup,
        search=search,
        policy=Markup(f"; script-src 'sha256-{digest}'") if search else "",
    )
    return filled + "\n"
