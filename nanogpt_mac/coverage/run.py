"""What `mps_coverage.py` does."""

from __future__ import annotations

import difflib
import traceback

from nanogpt_mac.coverage import page, report
from nanogpt_mac.coverage.config import CoverageConfig, operators, validate
from nanogpt_mac.coverage.model_ops import NoTrace, trace_model
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import wheel
from nanogpt_mac.operators.table import RUNS, Kind, Table, load


def run(config: CoverageConfig) -> int:
    """Prints the report. 0: nothing is lost; 1: something is, or falls back to the CPU; 2: cannot tell."""
    validate(config)
    try:
        made = _page(config)
    except OSError as error:  # the cache folder, mostly
        raise InputError(f"{error.filename}: cannot be read or written: {error.strerror or error}") from error
    except InputError:
        raise
    except Exception:  # whatever it is, no operator is lost, which exit code 1 would say
        traceback.print_exc()
        return CANNOT_TELL
    page.emit(made, config.format, config.html)
    return made.exit_code


def _page(config: CoverageConfig) -> Page:
    """What was asked for. Each of these is imported where it is wanted: some are slow to load."""
    if config.history is not None:
        from nanogpt_mac.coverage import history

        return history.check(config)
    if config.bisect is not None:
        from nanogpt_mac.coverage import bisect

        return bisect.check(config)
    if config.script is not None:
        from nanogpt_mac.coverage import program

        return program.check(config)
    if config.verify:
        from nanogpt_mac.coverage import verify

        return verify.predict(config) if config.verify == "predict" else verify.check(config)
    if config.run:
        from nanogpt_mac.coverage import other_torch

        return other_torch.check(config)
    if config.compiled:
        return _compiled(config)
    if config.scope == "opinfo":
        from nanogpt_mac.coverage import opinfo

        return opinfo.page(opinfo.sweep(operators(config), config.samples))
    return _static(config)


def _compiled(config: CoverageConfig) -> Page:
    """The compile report. Exit code 1 where generated code calls an operator that leaves the GPU, 2 where unknown."""
    from nanogpt_mac.compile_report import check as compiled

    made = compiled.check(config.model, config.dtype, config.batch_size)
    rows = [row for iteration in made.iterations.values() for row in iteration.aten or []]
    left = sorted({row.name for row in rows if row.kind is not None and row.kind not in RUNS})
    unclear = sorted({row.name for row in rows if row.kind is None or row.kind == Kind.UNKNOWN})
    training = made.iterations.get("training")
    launches = training.launches if training else None
    if left:
        code, verdict = LOST, f"generated code calls operators that MPS does not have: {some(left)}"
    elif launches is None:
        code, verdict = CANNOT_TELL, f"cannot tell what was launched: {'; '.join(made.unknown)}"
    elif unclear:
        code, verdict = CANNOT_TELL, f"cannot tell where generated code runs {some(unclear)}"
    else:
        code, verdict = OK, f"a compiled iteration stays on the GPU, in {launches} Metal launches"
    title = f"This model compiled for MPS, torch {made.torch}"
    sections = [section(*table) for table in compiled.sections(made)]
    return Page(title, compiled.lines(made), sections, code, verdict, made.document() | {"scope": "compiled"})


def _static(config: CoverageConfig) -> Page:
    """The tables of one torch or two, without running any."""
    table = load(config.torch, config.python, config.binary, config.nightly_index)
    against = None
    if config.against is not None:
        with wheel.asked_by("against"):
            against = load(config.against, config.python, config.binary, config.nightly_index)
    trace, no_trace, ops = None, None, sorted(table.entries)
    if config.scope == "ops":
        ops = _named(operators(config), [table, *([against] if against else [])])
    elif config.scope == "model":
        try:
            traces = [trace_model(config.model, config.dtype, t) for t in (table, against) if t]
            trace, ops = traces[0], sorted({op for t in traces for op in t.calls()})
        except NoTrace as reason:
            no_trace, ops = str(reason), []
    return report.page(config.scope, table, ops, against, trace, no_trace)


def _named(names: list[str], tables: list[Table]) -> list[str]:
    """The overloads meant: a full name, or every overload of a bare one. InputError for a name that none has."""
    known = sorted({op for table in tables for op in table.entries})
    meant: list[str] = []
    for name in names:
        found = [op for op in known if op == name or op.split(".")[0] == name]
        if not found:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "use a name such as gelu or add.Tensor"
            raise InputError(f"op={name}: torch {tables[0].version} has no such operator; {hint}")
        meant += [op for op in found if op not in meant]
    return meant
