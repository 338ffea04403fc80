"""What `mps_coverage.py` says of the table of one torch, or of two: one dictionary, and the page made of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nanogpt_mac.coverage.model_ops import Trace
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.operators.diff import ABSENT, Diff, compare
from nanogpt_mac.operators.native_yaml import Facts
from nanogpt_mac.operators.table import RUNS, Entry, Kind, Table
from nanogpt_mac.report.table import Section

SCHEMA = 1
_GROUPS = ("lost", "gained", "moved", "unclear", "removed")
_NO_FACTS = Facts(kernel=None, delegate=None, cpu=False, composite=False, no_device_check=False)


def build(
    scope: str, table: Table, ops: list[str], against: Table | None, trace: Trace | None, no_trace: str | None
) -> dict[str, Any]:
    """The report of `scope` (model, ops or surface), which lists and judges the overloads `ops`.

    Under scope=model they come from `trace`; where that is None, `no_trace` says why.
    """
    calls = trace.calls() if trace else {}
    entries = [
        table.entries.get(op, Entry(op, Kind.UNKNOWN, _NO_FACTS, note=f"not in torch {table.version}")) for op in ops
    ]
    surface = compare(against, table) if against else None
    judged = compare(against, table, ops) if against else None
    code, verdict = _verdict(scope, entries, table, against, judged, trace, no_trace)
    return {
        "schema": SCHEMA,
        "torch": _describe(table),
        "against": _describe(against) if against else None,
        "scope": scope,
        "trace": asdict(trace) if trace else None,
        "no_trace": no_trace,
        "ops": [{**_row(entry, table), "calls": calls.get(entry.op)} for entry in entries],
        "diff": {"scope": asdict(judged), "surface": asdict(surface)} if judged and surface else None,
        "exit_code": code,
        "verdict": verdict,
    }


def _describe(table: Table) -> dict[str, Any]:
    fields = ("asked", "version", "git", "wheel", "sha256", "binary", "disagreements")
    values = {name: getattr(table, name) for name in fields}
    return values | {"evidence": table.evidence(), "hand_list": table.hand_list(), "counts": table.counts()}


def _row(entry: Entry, table: Table) -> dict[str, Any]:
    return {
        "op": entry.op,
        "kind": entry.kind.value,
        "kernel": entry.facts.kernel,
        "delegate": entry.facts.delegate,
        "reported_as": entry.reported_as,
        "decomposes_to": entry.decomposes_to,
        "can_reach": table.left_behind(entry.op) if entry.op in table.entries else None,
        "note": entry.note,
    }


def _verdict(
    scope: str,
    entries: list[Entry],
    table: Table,
    against: Table | None,
    judged: Diff | None,
    trace: Trace | None,
    no_trace: str | None,
) -> tuple[int, str]:
    """The exit code and the sentence that explains it. What is known to be lost weighs more than what is not known."""
    whose = {"model": "that this model calls", "ops": "asked for", "surface": "of the whole surface"}[scope]
    bad = [e.op for e in entries if not e.runs and e.kind is not Kind.UNKNOWN]
    unclear = [e.op for e in entries if e.kind is Kind.UNKNOWN]
    if judged and against:
        lost = [change.op for change in judged.lost]
        if scope != "surface":  # something calls these: a new overload that does not run is a loss, as is one removed
            lost += [op for op in bad if op not in against.entries] + [change.op for change in judged.removed]
        if lost:
            return LOST, f"{len(lost)} operators {whose} were lost since {against.version}: {some(lost)}"
        unclear = sorted({*unclear, *(change.op for change in judged.unclear)})
    elif bad and scope != "surface":
        return LOST, f"{len(bad)} operators {whose} are missing or run on the CPU: {some(bad)}"
    if no_trace:
        return CANNOT_TELL, f"cannot tell which operators this model calls: {no_trace} (scope=surface needs no trace)"
    if trace and trace.stopped:
        return CANNOT_TELL, f"the trace of this model stopped early: {trace.stopped}"
    if unclear:
        return CANNOT_TELL, f"cannot tell for {len(unclear)} operators {whose}: {some(unclear)}"
    if scope == "ops" and (doubt := _doubt(entries, table, against)):
        return CANNOT_TELL, doubt
    if against:
        still = f"; {len(bad)} run in neither: {some(bad)}" if bad and scope != "surface" else ""
        return OK, f"no operator {whose} was lost since {against.version}{still}"
    if scope == "surface":
        return OK, f"{len(entries) - len(bad)} of {len(entries)} overloads run on MPS or are made of others"
    return OK, f"all {len(entries)} operators {whose} run on MPS"


def _doubt(entries: list[Entry], table: Table, against: Table | None) -> str | None:
    """Why it cannot be said that composites among the operators asked for run; None where it can."""
    reach = {entry.op: table.left_behind(entry.op) for entry in entries}
    unseen = [op for op, found in reach.items() if found is None]
    if unseen:
        return f"cannot tell what {some(unseen)} are made of: binary=true reads it from the binary"
    for op, found in reach.items():
        before = against.left_behind(op) if against and op in against.entries else None
        if new := sorted(set(found or []) - set(before or [])):
            return f"cannot tell whether {op} runs: in some branch it calls {some(new)}, which MPS does not have"
    return None


# -- for people -------------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> Page:
    """The report for people."""
    title = f"MPS coverage of torch {report['torch']['version']}"
    return Page(title, _lines(report), sections(report), report["exit_code"], report["verdict"], report)


def sections(report: dict[str, Any]) -> list[Section]:
    """The report as titled tables."""
    torch, against, scope = report["torch"], report["against"], report["scope"]
    both = [torch, *([against] if against else [])]
    kinds = [[kind.value, *(str(t["counts"][kind.value]) for t in both)] for kind in Kind]
    by_hand = ["registered by hand", *(", ".join(t["hand_list"]) or "none" for t in both)]
    made = [section("Where overloads run", ["", *(t["version"] for t in both)], [*kinds, by_hand])]
    if diff := report["diff"]:
        for title, key in (("whole surface", "surface"), (_scope_title(report), "scope")):
            if key != "scope" or scope != "surface":
                title = f"Changes: {title}, {against['version']} to {torch['version']}"
                rows = _changes(diff[key])
                made.append(section(title, ["", "op", "before", "after"], rows, empty=f"{title}: none"))
        changed = [[how, op] for how in ("added", "removed") for op in diff["surface"][f"hand_{how}"]]
        made.append(section("Changes: registrations by hand", ["", "op"], changed))
    if scope != "surface":
        rows = [[op["op"], op["kind"], _calls(op["calls"]), _parts(op)] for op in report["ops"]]
        made.append(section(_scope_title(report).capitalize(), ["op", "kind", "calls", "made of, or note"], rows))
    elif not diff:
        bad = [op for op in report["ops"] if op["kind"] not in RUNS]
        rows = [[op["op"], op["kind"], op["reported_as"], op["note"] or ""] for op in bad]
        made.append(section("Overloads that do not run on MPS", ["op", "kind", "torch reports it as", "note"], rows))
        reaching = [op for op in report["ops"] if op["kind"] in RUNS and op["can_reach"]] if torch["binary"] else []
        rows = [[op["op"], ", ".join(op["can_reach"])] for op in reaching]
        made.append(section("Composites with a branch to one of those", ["op", "can reach"], rows))
    wrong = [[t["version"], line] for t in both for line in t["disagreements"]]
    made.append(section("Where the binary contradicts the other sources", ["torch", "what"], wrong))
    return made


def _scope_title(report: dict[str, Any]) -> str:
    return "operators of this model" if report["scope"] == "model" else "operators asked for"


def _changes(diff: dict[str, Any]) -> list[list[str]]:
    rows = [[group, c["op"], c["before"], c["after"]] for group in _GROUPS if group != "removed" for c in diff[group]]
    if diff["removed"]:  # deprecated overloads go by the hundred
        rows.append(["removed", ", ".join(c["op"] for c in diff["removed"]), "", ABSENT])
    return rows


def _calls(calls: dict[str, int] | None) -> str:
    return " ".join(f"{phase} {count}" for phase, count in (calls or {}).items())


def _parts(op: dict[str, Any]) -> str:
    parts = op["decomposes_to"]
    made_of = "" if parts is None else ", ".join(parts) or "nothing that is dispatched"
    reach = [name for name in op["can_reach"] or [] if name != op["op"]]
    warning = f"can reach, and MPS lacks: {', '.join(reach)}" if reach else ""
    return "; ".join(text for text in (made_of, warning, op["note"]) if text)


def _lines(report: dict[str, Any]) -> list[str]:
    """What stands over the tables: which torch, on what evidence, how traced."""
    lines = [
        f"torch {t['version']}" + (f" ({t['git'][:9]})" if t["git"] else "") + f": {t['evidence']}"
        for t in (report["torch"], report["against"])
        if t
    ]
    if trace := report["trace"]:
        lines.append(
            f"operators of this model: {trace['label']}, traced on {trace['device']} with torch {trace['torch']}"
        )
    return lines
