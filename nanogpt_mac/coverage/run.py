"""What `mps_coverage.py` does."""

from __future__ import annotations

import difflib
import json

from nanogpt_mac.coverage import report
from nanogpt_mac.coverage.config import CoverageConfig, operators, validate
from nanogpt_mac.coverage.table import Table, load
from nanogpt_mac.coverage.trace import NoTrace, trace_model
from nanogpt_mac.errors import InputError


def run(config: CoverageConfig) -> int:
    """Prints the report. 0: nothing is lost; 1: something is, or falls back to the CPU; 2: cannot tell."""
    validate(config)
    table = load(config.torch, config.python, config.binary, config.nightly_index)
    against = None
    if config.against is not None:
        try:
            against = load(config.against, config.python, config.binary, config.nightly_index)
        except InputError as error:
            raise InputError(str(error).replace(f"torch={config.against}", f"against={config.against}", 1)) from error
    trace, no_trace, ops = None, None, sorted(table.entries)
    if config.scope == "ops":
        ops = _named(operators(config), [table, *([against] if against else [])])
    elif config.scope == "model":
        try:
            traces = [trace_model(config.model, config.dtype, t) for t in (table, against) if t]
            trace, ops = traces[0], sorted({op for t in traces for op in t.calls()})
        except NoTrace as reason:
            no_trace, ops = str(reason), []
    made = report.build(config.scope, table, ops, against, trace, no_trace)
    if config.format == "json":
        print(json.dumps(made, indent=1))
    elif config.format == "markdown":
        print(report.markdown(made), end="")
    else:
        report.show(made)
    return int(made["exit_code"])


def _named(names: list[str], tables: list[Table]) -> list[str]:
    """The overloads meant: a full name, or every overload of a bare one. InputError for a name that none has."""
    known = sorted({op for table in tables for op in table.entries})
    meant: list[str] = []
    for name in names:
        found = [op for op in known if op == name or op.split(".")[0] == name]
        if not found:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "allowed are names such as gelu and add.Tensor"
            raise InputError(f"op={name}: torch {tables[0].version} has no such operator; {hint}")
        meant += [op for op in found if op not in meant]
    return meant
