"""Sections in the terminal and in markdown for an issue; the HTML page is page.py's."""

from __future__ import annotations

from typing import Any

from nanogpt_mac.compare.report.table import Row, Section, Table
from nanogpt_mac.compare.report.words import DASH

_FOLDED = (
    "times",
    "loss",
    "utilisation",
    "phases",
    "memory",
    "energy",
    "fallbacks",
    "compile",
    "parity",
    "environment",
)

# -- markdown ---------------------------------------------------------------------------------------------------------


def escape(words: str) -> str:
    """Text that markdown shows as it is, also within a table."""
    for character in "\\`*_[]|~":
        words = words.replace(character, f"\\{character}")
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def markdown_table(table: Table) -> str:
    """A table in GitHub's markdown, without columns in which nothing is known."""
    known = [i for i in range(len(table.columns)) if i == 0 or any(row.cells[i] != DASH for row in table.rows)]
    rule = ["---:" if table.right[i] else "---" for i in known]
    rows = [[_cell(row, i) for i in known] for row in table.rows]
    lines = ([escape(table.columns[i]) for i in known], rule, *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(row: Row, i: int) -> str:
    if row.cells[i] == row.link:
        return f"<{row.link}>" if row.link.isascii() and not set(row.link) & set("<>| ") else escape(row.link)
    return f"**{escape(row.cells[i])}**" if row.mark == "fastest" and i == 0 else escape(row.cells[i])


def markdown_page(heading: str, sentence: str, parts: list[Section], version: str) -> str:
    """Sections as markdown for an issue; an empty one is left out, unless its absence matters."""
    blocks = [f"### {escape(heading)}", f"**{escape(sentence)}**"]
    for section in parts:
        if section.missing:
            blocks += [escape(section.empty)] if section.id in ("variants", "parity") else []
            continue
        body = [escape(note) for note in section.notes]
        body += ["\n".join(f"- {escape(line)}" for line in section.items)] if section.items else []
        filled = [table for table in section.tables if table.rows]
        body += [f"{escape(table.caption)}:\n\n{markdown_table(table)}" for table in filled]
        block = "\n\n".join(body)
        if section.id in _FOLDED:
            block = f"<details><summary>{escape(section.title)}</summary>\n\n{block}\n\n</details>"
        elif section.id not in ("variants", "problems"):
            block = f"#### {escape(section.title)}\n\n{block}"
        blocks.append(block)
    return "\n\n".join([*blocks, f"nanogpt-mac {escape(version)}"]) + "\n"


# -- the terminal -----------------------------------------------------------------------------------------------------

_STYLES = {"fastest": "bold", "wrong": "red", "failed": "red", "partial": "yellow", "published": "dim"}


def show_page(sentence: str, facts: str, warnings: list[str], parts: list[Section]) -> None:
    """A verdict and sections as rich tables; a file or a pipe has no width of its own."""
    from rich.console import Console
    from rich.text import Text

    out = Console(highlight=False)
    out = out if out.is_terminal else Console(highlight=False, width=160)
    out.print(Text(sentence, style="bold"))
    out.print(Text(facts, style="dim"))
    for line in warnings:
        out.print(Text(f"! {line}", style="yellow"))
    for section in parts:
        if section.missing and section.id == "variants":
            out.print(Text(section.empty))
        for note in section.notes if not section.missing else []:
            out.print(Text(note, style="dim"))
        for line in section.items:
            out.print(Text(f"- {line}"))
        for table in section.tables:
            if table.rows:
                out.print(_rich(table))


def _rich(table: Table) -> Any:
    """One table, without columns in which nothing is known."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(table.caption), box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    known = [i for i in range(len(table.columns)) if i == 0 or any(row.cells[i] != DASH for row in table.rows)]
    for i in known:
        shown.add_column(Text(table.columns[i]), justify="right" if table.right[i] else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(row.cells[i]) for i in known), style=_STYLES.get(row.mark, ""))
    return shown
