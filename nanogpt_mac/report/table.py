"""What a report is made of, whatever it is about: titled sections of tables under a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from nanogpt_mac.report.words import DASH


class Mark(StrEnum):
    """How a row is set off; also the CSS class of the page."""

    NONE = ""
    BEST = "best"
    WRONG = "wrong"
    FAILED = "failed"
    PARTIAL = "partial"
    QUIET = "quiet"  # not ours, or of no weight


@dataclass(frozen=True)
class Row:
    """Cells of one table row; the first is its heading. `link`: the address that one of the cells is."""

    cells: list[str]
    mark: Mark = Mark.NONE
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under `columns`, the most telling first, with a caption that says what they are."""

    caption: str
    columns: list[str]
    rows: list[Row]

    @cached_property
    def right(self) -> list[bool]:
        """Per column: whether it holds figures, which are aligned to the right."""
        cells = [[row.cells[i] for row in self.rows if row.cells[i] != DASH] for i in range(len(self.columns))]
        return [i > 0 and bool(column) and all(map(_figure, column)) for i, column in enumerate(cells)]

    @cached_property
    def known(self) -> list[int]:
        """Columns in which something is known; the first always."""
        return [i for i in range(len(self.columns)) if i == 0 or any(row.cells[i] != DASH for row in self.rows)]


@dataclass
class Section:
    """One part of a report. `empty` is the sentence that stands there when there is nothing to show."""

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    empty: str = ""
    items: list[str] = field(default_factory=list)
    alarming: bool = False  # its items are warnings
    folded: bool = False  # long: markdown folds it away
    searchable: bool = False  # its tables are long: the page has a field that leaves the rows with some words
    matters: bool = False  # markdown says so where it is empty; other sections are left out

    @property
    def missing(self) -> bool:
        return not self.items and not any(table.rows for table in self.tables)


@dataclass
class Report:
    """A whole report: show.py puts it on the terminal and into markdown, page.py into HTML.

    `verdict` is one or several sentences; the page makes the first its heading. `symbol` stands before it in markdown.
    """

    kind: str  # "Comparison": stands over the verdict
    title: str  # of the page and of the markdown
    verdict: str
    sections: list[Section]
    facts: list[str] = field(default_factory=list)  # what, where, when: short pieces
    figures: list[tuple[str, str, str]] = field(default_factory=list)  # figure, what it is, more; in large type
    alarms: list[str] = field(default_factory=list)  # under the verdict
    version: str = ""
    symbol: str = ""
    first_screen: tuple[str, ...] = ()  # ids of the sections the terminal shows unasked; empty: all


def rows(items: Iterable[Iterable[str]]) -> list[Row]:
    """Plain rows, without marks."""
    return [Row(list(cells)) for cells in items]


def _figure(cell: str) -> bool:
    words = ("fastest", "tie", "0")
    return cell in words or cell[:1].isdigit() or (cell[:1] in "[+-" and any(c.isdigit() for c in cell))
