"""A comparison's files: the document, the report in markdown, and one page that opens offline. Loads matplotlib."""

from __future__ import annotations

from pathlib import Path

from nanogpt_mac.compare import charts
from nanogpt_mac.compare.contents import report
from nanogpt_mac.files import write_aside, write_json
from nanogpt_mac.records.comparison import Comparison
from nanogpt_mac.report import page, show


def publish(folder: Path, comparison: Comparison) -> None:
    """Write comparison.json, report.md and report.html into `folder`."""
    write_json(folder / "comparison.json", comparison.document())
    write_aside(folder / "report.md", show.markdown(report(comparison)))
    write_aside(folder / "report.html", html(comparison))


def html(comparison: Comparison) -> str:
    """One self-contained page."""
    return page.html(report(comparison), charts.draw(comparison))
