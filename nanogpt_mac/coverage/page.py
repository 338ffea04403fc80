"""A coverage report: JSON for programs, and on the report kit for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nanogpt_mac
from nanogpt_mac import files
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import slug
from nanogpt_mac.report import page, show
from nanogpt_mac.report.charts import Chart
from nanogpt_mac.report.table import Report, Section, Table, rows
from nanogpt_mac.report.words import DASH

OK, LOST, CANNOT_TELL = 0, 1, 2  # exit codes
_FOLDED = 12  # rows; more are folded away in a comment


@dataclass(frozen=True)
class Page:
    """What a task of mps_coverage.py has found. `lines` say which torch, and on what evidence; `facts` are the JSON."""

    title: str
    lines: list[str]
    sections: list[Section]
    exit_code: int
    verdict: str
    facts: Mapping[str, object] = field(default_factory=dict)
    charts: Mapping[str, Sequence[Chart]] = field(default_factory=dict)  # section id to its charts, for the page alone

    @property
    def data(self) -> dict[str, object]:
        return {**self.facts, "exit_code": self.exit_code, "verdict": self.verdict}

    @property
    def report(self) -> Report:
        seen = Section("evidence", "What was looked at", items=self.lines)
        sections = [seen, *(one for one in self.sections if one.matters or not one.missing)]
        symbol = {OK: "✅", LOST: "❌", CANNOT_TELL: "❔"}[self.exit_code]
        verdict = f"{self.verdict[0].upper()}{self.verdict[1:]}"
        version = nanogpt_mac.__version__
        return Report("MPS coverage", self.title, verdict, sections, version=version, symbol=symbol)


def section(title: str, columns: list[str], cells: Iterable[Sequence[str]], empty: str = "") -> Section:
    """A section of one table; an empty cell becomes a dash. Without rows it is left out, or says `empty`."""
    table = Table(title, columns, rows([cell or DASH for cell in row] for row in cells))
    folded = len(table.rows) > _FOLDED
    return Section(slug(title), title, tables=[table], empty=empty, folded=folded, matters=bool(empty))


def some(names: list[str], most: int = 8) -> str:
    """A list in a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def emit(made: Page, form: str, html: str | None = None) -> None:
    """Print a page as `table`, `json` or `markdown`, and write it to the file `html` where one is named."""
    if html is not None:
        files.write_aside(writable("html", html), page.html(made.report, made.charts))
    if form == "json":
        print(json.dumps(made.data, indent=1))
    elif form == "markdown":
        print(show.markdown(made.report), end="")
    else:
        show.show(made.report)


def writable(key: str, name: str) -> Path:
    """The file that `key`=`name` names. InputError where it cannot be one."""
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{key}={name}: use a file in a folder that exists")
    return path
