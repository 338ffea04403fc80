"""A report in the terminal and as markdown for an issue or a pull request; the HTML page is page.py's."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDTH = 100  # columns, where there is no terminal to ask
_NARROWEST = (28, 14)  # what a row's heading, and a column of words, is wrapped to

_HEADING = 8  # a heading of figures is wrapped to no less
_FIRST = 5  # lines of a section on the first screen
_GAP = 2  # between two columns

# -- markdown ---------------------------------------------------------------------------------------------------------


def escape(words: str) -> str:
    """Text that markdown shows as it is, also within a table."""
    for character in "\\`*_[]|~":
        words = words.replace(character, f"\\{character}")
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def markdown(report: Report) -> str:
    """The verdict first, everything long folded away. An empty section is left out, unless its absence matters."""
    symbol = f"{report.symbol} " if report.symbol else ""
    blocks = [f"### {escape(report.title)}", f"{symbol}**{escape(report.verdict)}**"]
    for section in report.sections:
        if section.missing:
            blocks += [escape(section.empty)] if section.matters else []
            continue
        block = _block(section)
        if section.folded:
            block = f"<details><summary>{escape(section.title)}</summary>\n\n{block}\n\n</details>"
        elif not section.alarming and section.id not in report.first_screen:
            block = f"#### {escape(section.title)}\n\n{block}"
        blocks.append(block)
    return "\n\n".join([*blocks, f"nanogpt-mac {escape(report.version)}"]) + "\n"


def _block(section: Section) -> str:
    parts = [escape(note) for note in section.notes]
    parts += ["\n".join(f"- {escape(line)}" for line in section.items)] if section.items else []
    parts += [f"{escape(t.caption)}:\n\n{markdown_table(t)}" for t in section.tables if t.rows]
    return "\n\n".join(parts)


def markdown_table(table: Table) -> str:
    """A table in GitHub's markdown, without columns in which nothing is known."""
    rule = ["---:" if table.right[i] else "---" for i in table.known]
    rows = [[_cell(row, i) for i in table.known] for row in table.rows]
    lines = ([escape(table.columns[i]) for i in table.known], rule, *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(row: Row, i: int) -> str:
    if row.link and row.cells[i] == row.link:
        return f"<{row.link}>" if row.link.isascii() and not set(row.link) & set("<>| ") else escape(row.link)
    return f"**{escape(row.cells[i])}**" if row.mark is Mark.BEST and i == 0 else escape(row.cells[i])


# -- the terminal -----------------------------------------------------------------------------------------------------

_STYLES = {Mark.BEST: "bold", Mark.WRONG: "red", Mark.FAILED: "red", Mark.PARTIAL: "yellow", Mark.QUIET: "dim"}


def show(report: Report, details: bool = False) -> None:
    """The verdict and the sections of the first screen; with `details` all that hold anything.

    Lines and tables fit the terminal, or 100 columns where the output goes to a file or a pipe.
    """
    from rich.console import Console
    from rich.text import Text

    out = Console(highlight=False)
    out = out if out.is_terminal else Console(highlight=False, width=WIDTH)

    def say(words: str, style: str = "") -> None:
        out.print(Text(printable(words), style=style))

    say(report.verdict, "bold")
    if report.facts:
        say(", ".join(report.facts), "dim")
    for line in report.alarms:
        say(f"! {line}", "yellow")
    brief = bool(report.first_screen) and not details
    for section in report.sections:
        if brief and section.id not in report.first_screen:
            continue
        if section.missing:
            if section.matters:
                say(section.empty)
            continue
        if details and report.first_screen:
            out.print()
            say(section.title, "bold")
        for note in section.notes if not brief else []:
            say(note, "dim")
        hidden = len(section.items) - _FIRST if brief else 0
        for line in section.items[: _FIRST if brief else None]:
            say(f"{'!' if section.alarming else '-'} {line}", "yellow" if section.alarming else "")
        if hidden > 0:
            say(f"and {hidden} more", "dim")
        for table in (t for t in section.tables if t.rows):
            for columns in _columns(table, brief, out.width):
                out.print()
                say(table.caption)
                out.print(_rich(table, columns))


def _columns(table: Table, brief: bool, width: int) -> list[list[int]]:
    """Columns in which something is known, as one table or, where figures would not fit beside each other, several.

    The first screen has the columns that fit, and no second table.
    """
    parts, room = [[0]], width - _least(table, 0)
    for i in table.known[1:]:
        if (room := room - _least(table, i) - _GAP) < 0 and len(parts[-1]) > 1:
            parts.append([0])
            room = width - _least(table, 0) - _least(table, i) - _GAP
        parts[-1].append(i)
    return parts[:1] if brief else parts


def _least(table: Table, i: int) -> int:
    """The width that a column needs: figures are never broken, words are wrapped."""
    longest, heading = max(len(row.cells[i]) for row in table.rows), _unbroken(table.columns[i])
    word = max(map(len, textwrap.wrap(heading, 1, break_long_words=False)), default=0)
    return max(longest if table.right[i] else min(longest, _NARROWEST[i > 0]), word, min(len(heading), _HEADING))


def _unbroken(heading: str) -> str:
    return heading.replace(" %", "\xa0%")


def _rich(table: Table, columns: list[int]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i in columns:
        least, figures = _least(table, i), table.right[i]
        heading = "\n".join(textwrap.wrap(_unbroken(table.columns[i]), least)) if figures else table.columns[i]
        shown.add_column(
            Text(heading), justify="right" if figures else "left", no_wrap=figures, overflow="fold",
            min_width=least if i == 0 else None,
        )  # fmt: skip
    for row in table.rows:
        shown.add_row(*(Text(printable(row.cells[i])) for i in columns), style=_STYLES.get(row.mark, ""))
    return shown
