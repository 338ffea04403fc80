"""A report as a person reads it: tables on the console, or markdown for a pull-request comment; and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

OK, LOST, CANNOT_TELL = 0, 1, 2  # exit codes

# What GitHub would take for markup: operators are called `_fused_adamw_`, errors quote `<class 'X'>`.
_MARKUP = re.compile(r"[|*<`~]|(?<![^\W_])_|_(?![^\W_])")

Section = tuple[str, list[str], list[list[str]]]  # title, headings, rows


@dataclass(frozen=True)
class Page:
    """One report.

    Args:
        lines: what stands over the tables: which torch, on what evidence.
        data: the report for programs, which `format=json` prints.
    """

    title: str
    lines: list[str]
    sections: list[Section]
    verdict: str
    exit_code: int
    data: dict[str, Any]


def some(names: list[str], most: int = 8) -> str:
    """A list in a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def emit(page: Page, form: str) -> None:
    """Prints a page as `table`, `json` or `markdown`."""
    if form == "json":
        print(json.dumps(page.data, indent=1))
    elif form == "markdown":
        print(markdown(page), end="")
    else:
        show(page)


def markdown(page: Page) -> str:
    """For a pull-request comment: the verdict first, everything long folded away."""
    mark = {OK: "✅", LOST: "❌", CANNOT_TELL: "❔"}[page.exit_code]

    def cell(text: str) -> str:
        return _MARKUP.sub(r"\\\g<0>", text).replace("\n", " ")

    parts = [f"### {page.title}", f"{mark} **{cell(page.verdict)}**"]
    parts.append("\n".join(f"- {cell(line)}" for line in page.lines))
    for title, headings, rows in page.sections:
        body = ["| " + " | ".join(map(cell, row)) + " |" for row in (headings, ["---"] * len(headings), *rows)]
        block = "\n".join(body)
        fold = len(rows) > 12
        parts.append(
            f"<details><summary>{title} ({len(rows)})</summary>\n\n{block}\n\n</details>"
            if fold
            else f"**{title}**\n\n{block}"
        )
    return "\n\n".join(parts) + "\n"


def show(page: Page) -> None:
    """Tables on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    width = None if console.is_terminal else 160  # a file or a pipe has no width of its own
    console = Console(highlight=False, width=width)
    for line in page.lines:
        console.print(line, markup=False)
    for title, headings, rows in page.sections:
        table = RichTable(title=title, box=box.SIMPLE, title_justify="left")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(table)
    console.print(page.verdict, style="bold" if page.exit_code else None, markup=False)
