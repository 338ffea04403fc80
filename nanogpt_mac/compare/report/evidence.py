"""The sections of a report that say whether its figures can be trusted: parity, fallbacks, compile report, machine."""

from __future__ import annotations

from typing import Any

from nanogpt_mac.compare.report.sections import ordered, problems
from nanogpt_mac.compare.report.table import Row, Section, Table
from nanogpt_mac.compare.report.words import DASH, dicts, get, label, ms, num, percent, size, state, text, when

_MOST_ROWS = 60  # of a document that another part of the project wrote
_FINDING = (
    "op",
    "kind",
    "phase",
    "calls_per_iteration",
    "ms",
    "bytes",
    "dtypes",
    "shapes",
    "where",
    "evidence",
    "advice",
)


def problems_section(comparison: Any) -> Section:
    return Section(
        "problems", "Warnings and failures", empty="No warning and no failure.", items=problems(comparison)
    )  # fmt: skip


def parity_section(comparison: Any) -> Section:
    parity = get(comparison, "parity")
    checked = get(parity, "variants")
    found = {text(name): entry for name, entry in checked.items()} if isinstance(checked, dict) else {}
    known = {text(variant.get("name")): variant for variant in ordered(comparison)}
    quantities = list(dict.fromkeys(text(c.get("quantity")) for e in found.values() for c in dicts(get(e, "checks"))))
    rows = []
    for name in sorted(found, key=lambda name: list(known).index(name) if name in known else len(known)):
        entry = found[name]
        checks = {text(check.get("quantity")): check for check in dicts(get(entry, "checks"))}
        result = {"fail": "WRONG", "error": "could not be checked"}.get(
            str(get(entry, "state")), text(get(entry, "state"))
        )
        rows.append(
            Row(
                [
                    label(known[name]) if name in known else name,
                    result,
                    *(_difference(checks.get(quantity)) for quantity in quantities),
                    text(get(entry, "reason")) if get(entry, "reason") else _nearest(checks),
                    text(get(entry, "device")),
                ],
                {"WRONG": "wrong", "pass": ""}.get(result, "partial"),
            )
        )
    limits = [
        Row([text(t.get("dtype")), text(t.get("quantity")), _tiny(t.get("limit")), text(t.get("reason"))])
        for t in dicts(get(parity, "tolerances"))
    ]
    shape = get(parity, "shape")
    notes = []
    if rows:
        against, sizes = text(get(parity, "reference") or "the reference"), f" ({text(shape)})" if shape else ""
        notes.append(
            f"Before any timing, each variant computed the same model on the same batches as {against}{sizes}."
        )
    columns = ["variant", "result", *quantities, "reason, or nearest to its limit", "device"]
    return Section(
        "parity",
        "Parity",
        notes,
        [
            Table("Largest difference from the reference", columns, rows),
            Table("What is allowed, and why", ["dtype", "quantity", "limit", "reason"], limits),
        ],
        "The parity gate was not run: nothing here says that the variants compute the same.",
    )


def _nearest(checks: dict[str, Any]) -> str:
    """The check that came nearest to its limit, and the tensor in which it did."""
    shares = {
        quantity: value / limit
        for quantity, check in checks.items()
        if (value := num(check.get("value"))) is not None and (limit := num(check.get("limit")))
    }
    if not shares:
        return DASH
    quantity = max(shares, key=lambda name: shares[name])
    worst = checks[quantity].get("worst")
    return f"{quantity}, {percent(shares[quantity], 0)} of the limit" + (f": {text(worst)}" if worst else "")


def _difference(check: Any) -> str:
    """1.2e-06, or 3.0e-02 WRONG (1.0e-03 allowed)"""
    said = _tiny(get(check, "value"))
    return f"{said} WRONG ({_tiny(get(check, 'limit'))} allowed)" if get(check, "pass") is False else said


def _tiny(value: Any) -> str:
    number = num(value)
    return text(value) if number is None else f"{number:.1e}" if number else "0"


def fallbacks_section(comparison: Any) -> Section:
    tables, items = [], []
    for variant in ordered(comparison):
        document = variant.get("fallbacks")
        if not isinstance(document, dict):
            continue
        findings = dicts(document.get("findings"))
        items.append(f"{label(variant)}: {_found(document, len(findings))}")
        if findings:
            tables.append(_free_table(f"Fallbacks of {label(variant)}", findings))
    empty = "The detector of CPU fallbacks looks at MPS, which this comparison did not run or did not record."
    return Section("fallbacks", "CPU fallbacks", [], tables, empty, items)


def _found(document: dict[str, Any], findings: int) -> str:
    """How many were found; that there are none is only said by a detector that looked everywhere."""
    why, phases = document.get("why_incomplete"), document.get("phases")
    if document.get("complete") is not True:
        said = text(why) if why else "whether it looked everywhere is not recorded"
        return f"{findings} found, and there may be more: {said}"
    where = f" in {text(phases)}" if isinstance(phases, list) and phases else ""
    return f"{findings} found{where}" if findings else f"none{where}"


def _free_table(caption: str, rows: list[dict[str, Any]]) -> Table:
    """A table of records whose keys are not ours: known ones first."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys.sort(key=lambda key: _FINDING.index(key) if key in _FINDING else len(_FINDING))
    shown = [Row([text(row.get(key)) for key in keys]) for row in rows[:_MOST_ROWS]]
    more = f" (the first {_MOST_ROWS} of {len(rows)})" if len(rows) > _MOST_ROWS else ""
    return Table(caption + more, [text(key).replace("_", " ") for key in keys], shown)


def compile_section(comparison: Any) -> Section:
    tables = []
    for variant in ordered(comparison):
        document = variant.get("compile_report")
        if isinstance(document, dict) and document:
            caption = f"Compile report of {label(variant)}"
            facts, lists = _taken_apart(document)
            more = f" (the first {_MOST_ROWS} of {len(facts)} facts)" if len(facts) > _MOST_ROWS else ""
            tables.append(Table(caption + more, ["fact", "value"], [Row([*fact]) for fact in facts[:_MOST_ROWS]]))
            tables += [_free_table(f"{caption}: {name}", rows) for name, rows in lists]
    empty = "No variant here left a compile report; compiled MPS runs do."
    return Section("compile", "Compile report", [], tables, empty)


def _taken_apart(
    document: dict[str, Any], prefix: str = ""
) -> tuple[list[tuple[str, str]], list[tuple[str, list[dict[str, Any]]]]]:
    """A nested document's single facts and its lists of records, each with the words that lead to it."""
    facts: list[tuple[str, str]] = []
    lists: list[tuple[str, list[dict[str, Any]]]] = []
    for key, value in document.items():
        name = text(f"{prefix} {key}".replace("_", " "))
        if dicts(value):
            lists.append((name, dicts(value)))
        elif isinstance(value, dict) and value:
            deeper = _taken_apart(value, name)
            facts += deeper[0]
            lists += deeper[1]
        else:
            facts.append((name, text(value)))
    return facts, lists


def published_section(comparison: Any) -> Section:
    keys = ("machine", "variant", "ms_per_iter", "work", "date", "source", "url", "note")
    rows = []
    for published in dicts(get(comparison, "published")):
        values = {key: text(published.get(key)) for key in keys}
        values["ms_per_iter"] = ms(published.get("ms_per_iter"))
        values["machine"] = f"published: {values['machine']}"
        link = values["url"] if values["url"].startswith("https://") else ""
        rows.append(Row(list(values.values()), "published", link))
    columns = ["machine", "variant", "ms an iteration", "work", "date", "source", "where", "note"]
    return Section(
        "published", "Published elsewhere",
        ["Taken from the named sources: not measured here, not checked for parity, not ranked."] if rows else [],
        [Table("Published figures", columns, rows)],
        "No published figures are shown for this work.",
    )  # fmt: skip


def environment_section(comparison: Any) -> Section:
    environment, machine, plan = (get(comparison, key) for key in ("environment", "machine", "plan"))
    rows = [Row(["machine", text(get(machine, "name"))])] if get(machine, "name") else []
    for key, value in (environment if isinstance(environment, dict) else {}).items():
        if key == "backend":  # one run's own facts, which the sections above have for every variant
            continue
        if key == "versions" and isinstance(value, dict):
            rows += [Row([f"version of {text(name)}", text(v)]) for name, v in value.items()]
            continue
        shown = size(value) if key == "memory_bytes" else text(value)
        rows.append(Row([text(key).replace("_", " "), shown]))
    for name, value in (
        ("nanogpt-mac", text(get(comparison, "version"))),
        ("schema", text(get(comparison, "schema"))),
        ("folder", text(get(comparison, "folder"))),
        ("started", when(get(plan, "started"))),
        ("finished", when(get(plan, "finished"))),
        ("rounds", text(get(plan, "rounds"))),
        ("budget, minutes", text(get(plan, "budget_minutes"))),
    ):
        if value != DASH:
            rows.append(Row([name, value]))
    started = [_started(variant) for variant in ordered(comparison)]
    columns = ["variant", "back end", "device", "compiled", "dtype", "overrides", "details"]
    return Section(
        "environment",
        "Environment",
        [],
        [
            Table("Machine, software and plan", ["fact", "value"], rows),
            Table("How each variant was started", columns, started),
        ],
        "No environment was recorded.",
    )


def _started(variant: dict[str, Any]) -> Row:
    overrides = variant.get("overrides")
    cells = [label(variant), *(text(variant.get(key)) for key in ("backend", "device", "compile", "dtype"))]
    cells += [" ".join(map(text, overrides)) if isinstance(overrides, list) else DASH, text(variant.get("details"))]
    return Row(cells, state(variant) if state(variant) != "ok" else "")
