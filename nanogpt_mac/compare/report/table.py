"""What a report is made of: titled sections of tables, rendered in the terminal, markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from nanogpt_mac.compare.report.words import DASH


@dataclass(frozen=True)
class Row:
    """Cells of one table row; the first is its heading. `mark`: fastest, wrong, failed, partial, published or nothing.

    `link`: the address that one of the cells is, which a reader can follow.
    """

    cells: list[str]
    mark: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under `columns`, with a caption that says what they are."""

    caption: str
    columns: list[str]
    rows: list[Row]

    @cached_property
    def right(self) -> list[bool]:
        """Per column: whether it holds figures, which are aligned to the right."""
        cells = [[row.cells[i] for row in self.rows if row.cells[i] != DASH] for i in range(len(self.columns))]
        return [i > 0 and bool(column) and all(_figure(cell) for cell in column) for i, column in enumerate(cells)]


@dataclass
class Section:
    """One part of a report. `empty` is the sentence that stands there when there is nothing to show."""

    id: str
    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    empty: str = ""
    items: list[str] = field(default_factory=list)

    @property
    def missing(self) -> bool:
        return not self.items and not any(table.rows for table in self.tables)


def _figure(cell: str) -> bool:
    return cell in ("fastest", "tie", "0") or cell[0].isdigit() or (cell[0] in "[+-" and any(c.isdigit() for c in cell))
