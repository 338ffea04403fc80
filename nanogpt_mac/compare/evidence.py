"""The sections of a report that say whether its figures can be trusted: parity, fallbacks, compile report, machine."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from nanogpt_mac.compare.doubts import PARITY, label
from nanogpt_mac.records.comparison import Comparison, Published, VariantResult
from nanogpt_mac.records.plan import Check, Parity, ParityResult, ParityState
from nanogpt_mac.report.table import Mark, Row, Section, Table
from nanogpt_mac.report.words import DASH, ms, number, percent, size, text, when

_MOST_ROWS = 60  # of a document that another part of the project wrote
_FINDING = ("op", "kind", "phase", "calls_per_iteration", "ms", "bytes", "dtypes", "shapes", "where", "evidence",
            "advice")  # fmt: skip
_MARKS = {ParityState.PASS: Mark.NONE, ParityState.FAIL: Mark.WRONG}

Records = list[dict[str, JsonValue]]


def problems(lines: list[str]) -> Section:
    return Section(
        "problems", "Warnings and failures", empty="No warning and no failure.", items=lines, alarming=True
    )  # fmt: skip


# -- parity -----------------------------------------------------------------------------------------------------------


def parity(document: Parity | None, variants: Sequence[VariantResult]) -> Section:
    found = document.variants if document else {}
    known = {variant.name: label(variant) for variant in variants}
    quantities = list(dict.fromkeys(check.quantity for entry in found.values() for check in entry.checks))
    order = sorted(found, key=lambda name: list(known).index(name) if name in known else len(known))
    rows = [_checked(known.get(name, text(name)), found[name], quantities) for name in order]
    limits = [
        Row([t.dtype, text(t.quantity), _tiny(t.limit), text(t.reason)])
        for t in (document.tolerances if document else ())
    ]
    columns = [
        "variant",
        "result",
        *map(text, quantities),
        "reason, or nearest to its limit",
        "deterministic",
        "device",
    ]
    notes = []
    if document and rows:
        shapes = (document.shape or {}).items()
        sizes = "; ".join(f"{text(name)}: {text(dict(case))}" for name, case in shapes)
        against = text(document.reference or "the reference") + (f" ({sizes})" if sizes else "")
        notes = [f"Before any timing, each variant computed the same model on the same batches as {against}."]
        notes += ["Deterministic: whether one step, done twice in one process, gave the same bits."]
        notes += [f"Not checked: {text(what)}." for what in document.unchecked]
    tables = [
        Table("Largest difference from the reference", columns, rows),
        Table("Limits, and the reason for each", ["dtype", "quantity", "limit", "reason"], limits),
    ]
    empty = "The parity gate was not run, so nothing here shows that the variants compute the same."
    return Section("parity", "Parity", notes, tables, empty, folded=True, matters=True)


def _checked(name: str, entry: ParityResult, quantities: Sequence[str]) -> Row:
    checks = {check.quantity: check for check in entry.checks}
    differences = [_difference(checks[quantity]) if quantity in checks else DASH for quantity in quantities]
    reason = text(entry.reason) if entry.reason else _nearest(entry.checks)
    result = PARITY.get(entry.state, entry.state)
    repeats = DASH if entry.deterministic is None else "yes" if entry.deterministic else f"no: {text(entry.varies)}"
    row = [name, result, *differences, reason, repeats, text(entry.device)]
    return Row(row, _MARKS.get(entry.state, Mark.PARTIAL))


def _nearest(checks: Sequence[Check]) -> str:
    """The check that came nearest to its limit, and the tensor in which it did."""
    shares = [(value / c.limit, c) for c in checks if c.limit and (value := number(c.value)) is not None]
    if not shares:
        return DASH
    share, check = max(shares, key=lambda pair: pair[0])
    place = f": {text(check.worst)}" if check.worst else ""
    return f"{text(check.quantity)}, {percent(share, 0)} of the limit{place}"


def _difference(check: Check) -> str:
    """1.2e-06, or 3.0e-02 WRONG (limit 1.0e-03)"""
    return _tiny(check.value) if check.passed else f"{_tiny(check.value)} WRONG (limit {_tiny(check.limit)})"


def _tiny(value: float) -> str:
    return text(value) if number(value) is None else f"{value:.1e}" if value else "0"


# -- what other parts of the project wrote ----------------------------------------------------------------------------


def fallbacks(variants: Sequence[VariantResult]) -> Section:
    tables, items = [], []
    for variant in variants:
        if variant.fallbacks is None:
            continue
        findings = _records(variant.fallbacks.get("findings"))
        items.append(f"{label(variant)}: {_found(variant.fallbacks, len(findings))}")
        tables += [_free_table(f"Fallbacks of {label(variant)}", findings)] if findings else []
    empty = "No fallback report: the detector looks at MPS, which this comparison did not run or did not record."
    return Section("fallbacks", "CPU fallbacks", [], tables, empty, items, folded=True)


def _found(document: dict[str, JsonValue], findings: int) -> str:
    """How many were found; only a detector that looked everywhere can say that there are none."""
    why, phases = document.get("why_incomplete"), document.get("phases")
    if document.get("complete") is not True:
        reason = text(why) if why else "whether it looked everywhere is not recorded"
        return f"{findings} found, and there may be more: {reason}"
    where = f" in {text(phases)}" if isinstance(phases, list) and phases else ""
    return f"{findings} found{where}" if findings else f"none{where}"


def compile_report(variants: Sequence[VariantResult]) -> Section:
    tables = []
    for variant in variants:
        if variant.compile_report:
            caption = f"Compile report of {label(variant)}"
            facts, lists = _taken_apart(variant.compile_report)
            more = f" (the first {_MOST_ROWS} of {len(facts)} facts)" if len(facts) > _MOST_ROWS else ""
            tables.append(Table(caption + more, ["fact", "value"], [Row([*fact]) for fact in facts[:_MOST_ROWS]]))
            tables += [_free_table(f"{caption}: {name}", rows) for name, rows in lists]
    empty = "No compile report: only compiled MPS runs leave one."
    return Section("compile", "Compile report", [], tables, empty, folded=True)


def _records(value: JsonValue) -> Records:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _free_table(caption: str, rows: Records) -> Table:
    """A table of records whose keys are not ours: known ones first."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys.sort(key=lambda key: _FINDING.index(key) if key in _FINDING else len(_FINDING))
    shown = [Row([text(row.get(key)) for key in keys]) for row in rows[:_MOST_ROWS]]
    more = f" (the first {_MOST_ROWS} of {len(rows)})" if len(rows) > _MOST_ROWS else ""
    return Table(caption + more, [text(key).replace("_", " ") for key in keys], shown)


def _taken_apart(
    document: dict[str, JsonValue], prefix: str = ""
) -> tuple[list[tuple[str, str]], list[tuple[str, Records]]]:
    """A nested document's single facts and its lists of records, each with the words that lead to it."""
    facts: list[tuple[str, str]] = []
    lists: list[tuple[str, Records]] = []
    for key, value in document.items():
        name = text(f"{prefix} {key}".replace("_", " "))
        if records := _records(value):
            lists.append((name, records))
        elif isinstance(value, dict) and value:
            deeper = _taken_apart(value, name)
            facts += deeper[0]
            lists += deeper[1]
        else:
            facts.append((name, text(value)))
    return facts, lists


# -- published figures, and the machine -------------------------------------------------------------------------------


def published(rows: Sequence[Published]) -> Section:
    columns = ["machine", "variant", "ms an iteration", "work", "date", "source", "where", "note"]
    table = Table("Published figures", columns, [
        Row([f"published: {text(row.machine)}", text(row.variant), ms(row.ms_per_iter), *map(text, (row.work, row.date,
             row.source, row.url, row.note))], Mark.QUIET, row.url if row.url.startswith("https://") else "")
        for row in rows
    ])  # fmt: skip
    note = "Taken from the named sources: not measured here, not checked for parity, not ranked."
    return Section("published", "Published elsewhere", [note], [table], "No published figures are known for this work.")


def environment(comparison: Comparison, variants: Sequence[VariantResult]) -> Section:
    env, plan = comparison.environment, comparison.plan
    facts = [("machine", text(comparison.machine.name))] if comparison.machine.name else []
    # `backend` holds one run's own facts, which the sections above have for every variant.
    for key, value in (env.model_dump(exclude={"backend", "schema_", "versions"}) if env else {}).items():
        facts.append((text(key).replace("_", " "), size(value) if key == "memory_bytes" else text(value)))
    facts += [(f"version of {text(name)}", text(version)) for name, version in (env.versions if env else {}).items()]
    plan_facts = {
        "nanogpt-mac": text(comparison.version),
        "schema": text(comparison.SCHEMA),
        "folder": text(comparison.folder),
        "started": when(plan.started),
        "finished": when(plan.finished),
        "rounds": text(plan.rounds),
        "budget, minutes": text(plan.budget_minutes),
    }
    facts += [(name, value) for name, value in plan_facts.items() if value != DASH]
    columns = ["variant", "note", "back end", "device", "compiled", "dtype", "overrides", "details"]
    tables = [
        Table("Machine, software and plan", ["fact", "value"], [Row([*fact]) for fact in facts]),
        Table("How each variant was started", columns, [_started(variant) for variant in variants]),
    ]
    return Section("environment", "Environment", [], tables, "No environment was recorded.", folded=True)


def _started(variant: VariantResult) -> Row:
    cells = [label(variant), text(variant.note)]
    cells += map(text, (variant.backend, variant.device, variant.compile, variant.dtype))
    return Row([*cells, " ".join(map(text, variant.overrides or ())) or DASH, text(variant.details)])
