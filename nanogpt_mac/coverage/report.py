"""What `mps_coverage.py` says of the table of one torch, or of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nanogpt_mac.coverage.model_ops import Trace
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.operators.diff import ABSENT, Diff, compare
from nanogpt_mac.operators.native_yaml import Facts
from nanogpt_mac.operators.table import RUNS, Entry, Kind, Table
from nanogpt_mac.report.table import Section

SCHEMA = 1
_GROUPS = ("lost", "gained", "moved", "unclear")
_NO_FACTS = Facts(kernel=None, delegate=None, cpu=False, composite=False, no_device_check=False)


@dataclass(frozen=True)
class Row:
    """One overload of the report, as it stands in the JSON."""

    op: str
    kind: Kind
    kernel: str | None
    delegate: str | None
    reported_as: str
    decomposes_to: Sequence[str] | None
    can_reach: Sequence[str] | None
    note: str | None
    calls: dict[str, int] | None  # phase to number

    @property
    def made_of(self) -> str:
        parts = self.decomposes_to
        made_of = "" if parts is None else ", ".join(parts) or "nothing that is dispatched"
        reach = [name for name in self.can_reach or () if name != self.op]
        warning = f"can reach, and MPS lacks: {', '.join(reach)}" if reach else ""
        return "; ".join(text for text in (made_of, warning, self.note) if text)


def page(
    scope: str, table: Table, ops: list[str], against: Table | None, trace: Trace | None, no_trace: str | None
) -> Page:
    """The report of `scope` (model, ops or surface), which lists and judges the overloads `ops`.

    Under scope=model they come from `trace`; where that is None, `no_trace` says why.
    """
    entries = [
        table.entries.get(op, Entry(op, Kind.UNKNOWN, _NO_FACTS, note=f"not in torch {table.version}")) for op in ops
    ]
    surface = compare(against, table) if against else None
    judged = compare(against, table, ops) if against else None
    code, verdict = _verdict(scope, entries, table, against, judged, trace, no_trace)
    calls = trace.calls() if trace else {}
    rows = [_row(entry, table, calls.get(entry.op)) for entry in entries]
    facts = {
        "schema": SCHEMA,
        "torch": _describe(table),
        "against": _describe(against) if against else None,
        "scope": scope,
        "trace": asdict(trace) if trace else None,
        "no_trace": no_trace,
        "ops": [vars(row) for row in rows],
        "diff": {"scope": asdict(judged), "surface": asdict(surface)} if judged and surface else None,
    }
    both = [table, *([against] if against else [])]
    lines = [f"torch {t.version}" + (f" ({t.git[:9]})" if t.git else "") + f": {t.evidence()}" for t in both]
    if trace:
        lines.append(f"operators of this model: {trace.label}, traced on {trace.device} with torch {trace.torch}")
    title = f"MPS coverage of torch {table.version}"
    return Page(title, lines, _sections(scope, both, rows, surface, judged), code, verdict, facts)


def _describe(table: Table) -> dict[str, object]:
    fields = ("asked", "version", "git", "wheel", "sha256", "binary", "disagreements")
    values = {name: getattr(table, name) for name in fields}
    return values | {"evidence": table.evidence(), "hand_list": table.hand_list(), "counts": table.counts()}


def _row(entry: Entry, table: Table, calls: dict[str, int] | None) -> Row:
    reach = table.left_behind(entry.op) if entry.op in table.entries else None
    kernel, delegate = entry.facts.kernel, entry.facts.delegate
    parts = entry.decomposes_to
    return Row(entry.op, entry.kind, kernel, delegate, entry.reported_as, parts, reach, entry.note, calls)


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


def _sections(
    scope: str, both: list[Table], rows: list[Row], surface: Diff | None, judged: Diff | None
) -> list[Section]:
    """The report as titled tables; `both` are the torch in question and the one before it, where there is one."""
    kinds = [[kind.value, *(str(t.counts()[kind.value]) for t in both)] for kind in Kind]
    by_hand = ["registered by hand", *(", ".join(t.hand_list()) or "none" for t in both)]
    made = [section("Where overloads run", ["", *(t.version for t in both)], [*kinds, by_hand])]
    of_scope = "operators of this model" if scope == "model" else "operators asked for"
    if surface and judged:
        for title, diff in (("whole surface", surface), (of_scope, judged)):
            if diff is surface or scope != "surface":
                title = f"Changes: {title}, {both[1].version} to {both[0].version}"
                made.append(section(title, ["", "op", "before", "after"], _changes(diff), empty=f"{title}: none"))
        changed = [["added", op] for op in surface.hand_added] + [["removed", op] for op in surface.hand_removed]
        made.append(section("Changes: registrations by hand", ["", "op"], changed))
    if scope != "surface":
        cells = [[row.op, row.kind, _calls(row.calls), row.made_of] for row in rows]
        made.append(section(of_scope.capitalize(), ["op", "kind", "calls", "made of, or note"], cells))
    elif not surface:
        cells = [[row.op, row.kind, row.reported_as, row.note or ""] for row in rows if row.kind not in RUNS]
        made.append(section("Overloads that do not run on MPS", ["op", "kind", "torch reports it as", "note"], cells))
        reaching = [row for row in rows if row.kind in RUNS] if both[0].binary else []
        cells = [[row.op, ", ".join(row.can_reach)] for row in reaching if row.can_reach]
        made.append(section("Composites with a branch to one of those", ["op", "can reach"], cells))
    wrong = [[t.version, line] for t in both for line in t.disagreements]
    made.append(section("Where the binary contradicts the other sources", ["torch", "what"], wrong))
    return made


def _changes(diff: Diff) -> list[list[str]]:
    rows = [[group, c.op, c.before, c.after] for group in _GROUPS for c in getattr(diff, group)]
    if diff.removed:  # deprecated overloads go by the hundred
        rows.append(["removed", ", ".join(c.op for c in diff.removed), "", ABSENT])
    return rows


def _calls(calls: dict[str, int] | None) -> str:
    return " ".join(f"{phase} {count}" for phase, count in (calls or {}).items())
