"""The fallback detector's document as a person reads it, and as rows of a table."""

from __future__ import annotations

import io
import shutil
from typing import Any

from nanogpt_mac.records.fallbacks import Fallbacks

COLUMNS = ("op", "kind", "phase", "calls", "dtypes", "shapes", "where", "ms", "bytes", "evidence", "advice")


def headline(document: Fallbacks) -> str:
    """One line: how many findings, or none."""
    findings, why = document.findings, document.why_incomplete
    took = f" ({document.seconds:.1f} s)" if document.seconds else ""
    if why:
        found = f"{len(findings)} found, " if findings else ""
        return f"fallbacks: {found}incomplete: {'; '.join(why)}"
    if findings:
        return f"fallbacks: {len(findings)} found in {', '.join(dict.fromkeys(f.phase for f in findings))}{took}"
    return f"fallbacks: none in {', '.join(document.phases)}{took}"


def rows(document: Fallbacks) -> list[list[Any]]:
    """One row of COLUMNS a finding; lists become text."""
    return [
        [
            f.op,
            str(f.kind),
            f.phase,
            f.calls_per_iteration,
            ", ".join(f.dtypes),
            "; ".join(" ".join("x".join(map(str, s)) or "scalar" for s in shapes) for shapes in f.shapes),
            f.where or "",
            f.ms,
            f.bytes,
            "; ".join(f.evidence),
            f.advice,
        ]
        for f in document.findings
    ]


def text(document: Fallbacks) -> str:
    """The headline; where there are findings a table and, for each kind, what to do about it."""
    if not document.findings:
        return headline(document)
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("operator", "phase", "why", "calls", "ms", "MB", "where"):
        table.add_column(name, overflow="fold", justify="right" if name in ("calls", "ms", "MB") else "left")
    for f in document.findings:
        figures = (str(f.calls_per_iteration), f"{f.ms:.2f}", f"{f.bytes / 1e6:.2f}")
        table.add_row(f.op, f.phase, str(f.kind), *figures, f.where or "")
    out = io.StringIO()
    width = max(100, shutil.get_terminal_size().columns)
    console = Console(file=out, width=width, highlight=False, markup=False)
    console.print(table)
    advice: dict[str, list[str]] = {}
    for f in document.findings:
        ops = advice.setdefault(f.advice, [])
        if f.op not in ops:
            ops.append(f.op)
    lines = [f"{', '.join(ops)}: {what}" for what, ops in advice.items()]
    return "\n".join([headline(document), out.getvalue().rstrip(), *lines])
