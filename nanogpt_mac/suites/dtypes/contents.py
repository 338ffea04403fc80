"""The report of the dtype matrix: a table for each way, and what frameworks say of what they refuse."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from nanogpt_mac.records.bench import DtypeBench, DtypeReading, Outcome, State, Way
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import DASH, listed, plural
from nanogpt_mac.suites import contents
from nanogpt_mac.suites.dtypes.probe import DTYPES, INTEGERS

BAD = (Outcome.WRONG, Outcome.ERROR, Outcome.CRASHED)
TAKEN = (Outcome.OK, Outcome.PROMOTES)
MATRIX = ("matmul", "linear")  # what the article complains about


@dataclass(frozen=True)
class Matrix:
    bench: DtypeBench

    @cached_property
    def cells(self) -> dict[tuple[str, str, str], DtypeReading]:
        """(way, operation, dtype) -> what was found."""
        return {(r.way, *_split(r.row)): r for r in self.bench.readings}

    @cached_property
    def operations(self) -> list[str]:
        return list(dict.fromkeys(_split(row)[0] for row in self.bench.rows))

    def outcome(self, way: Way, operation: str, dtype: str) -> Outcome | None:
        """None: not tried, or not written for this way."""
        found = self.cells.get((way.name, operation, dtype))
        if found is None or found.state is State.ABSENT:
            return None
        return None if found.state is State.SKIPPED and found.outcome is not Outcome.MEMORY else found.outcome

    def with_outcome(self, way: Way, *outcomes: Outcome) -> list[DtypeReading]:
        return [r for r in self.bench.readings if r.way == way.name and self.outcome(way, *_split(r.row)) in outcomes]


def _split(row: str) -> tuple[str, str]:
    operation, _, dtype = row.rpartition(" ")
    return operation, dtype


def report(bench: DtypeBench) -> Report:
    matrix = Matrix(bench)
    facts = contents.facts(bench, rounds=None)
    alarms = contents.alarms(
        bench,
        "A simulated device takes what torch takes on a CPU: what it refuses is not what a Mac refuses.",
        "what was not tried is empty.",
    )
    sections = [_answer(matrix), *(_table(matrix, way) for way in bench.ways), _problems(matrix), _refusals(matrix)]
    shown = ("answer", *(f"matrix-{way.name}" for way in bench.ways), "problems")
    return Report(
        "Dtypes", "Dtypes: " + ", ".join(facts[:2]), _verdict(matrix), sections, facts=facts, version=bench.version,
        alarms=alarms, first_screen=shown,
    )  # fmt: skip


def _verdict(matrix: Matrix) -> str:
    told = []
    for way in matrix.bench.ways:
        known = (matrix.outcome(way, *_split(row)) for row in matrix.bench.rows)
        counts = Counter(outcome for outcome in known if outcome)
        bad = sum(counts[outcome] for outcome in BAD)
        told.append(
            f"{way.label}: {counts[Outcome.OK]} of {sum(counts.values())} keep their dtype, {counts[Outcome.PROMOTES]} "
            f"promote, {counts[Outcome.REFUSED]} are refused, {counts[Outcome.ON_CPU]} go to the CPU, "
            f"{counts[Outcome.COARSER]} have float32 inside, {bad} wrong"
        )
    return "; ".join(told) + "."


def _answer(matrix: Matrix) -> Section:
    """What is true on this machine of the article's complaint, in a sentence for each way."""
    notes = [
        "The article behind the published table (Istvan Benedek, March 2024, "
        "https://medium.com/@istvan.benedek/pytorch-speed-analysis-on-macbook-pro-m3-max-6a0972e57a3a) complains that "
        "on MPS matrices are multiplied in float32 alone: neither in float64 nor in integers. On this machine, today:",
    ]
    items = []
    for way in matrix.bench.ways:
        parts = [_integers(matrix, way, operation) for operation in MATRIX]
        parts += [_over_all(matrix, way, dtype) for dtype in ("bfloat16", "float16", "float64")]
        integers = sum(matrix.outcome(way, op, d) in TAKEN for op in matrix.operations for d in INTEGERS)
        parts.append(f"{integers} of {len(matrix.operations) * len(INTEGERS)} cells of integers give a right result")
        items.append(f"{way.label}: " + "; ".join(filter(None, parts)) + ".")
    return Section("answer", "What of the complaint is true here", notes=notes, items=items)


def _integers(matrix: Matrix, way: Way, operation: str) -> str:
    by_outcome: dict[Outcome, list[str]] = {}
    for dtype in INTEGERS:
        if outcome := matrix.outcome(way, operation, dtype):
            by_outcome.setdefault(outcome, []).append(dtype)
    told = [f"{o.value} in {'integers' if len(of) == len(INTEGERS) else listed(of)}" for o, of in by_outcome.items()]
    return f"{operation} {listed(told)}" if told else ""


def _over_all(matrix: Matrix, way: Way, dtype: str) -> str:
    known = {op: outcome for op in matrix.operations if (outcome := matrix.outcome(way, op, dtype))}
    lacking = [op for op, outcome in known.items() if outcome not in TAKEN]
    if not known:
        return ""
    return f"{dtype} in " + ("every operation" if not lacking else f"all but {listed(lacking)}" if len(lacking) < 6
                             else f"{len(known) - len(lacking)} of {len(known)} operations")  # fmt: skip


def _table(matrix: Matrix, way: Way) -> Section:
    rows = []
    for operation in matrix.operations:
        outcomes = {dtype: matrix.outcome(way, operation, dtype) for dtype in DTYPES}
        cells = [_cell(matrix.cells.get((way.name, operation, dtype)), outcome) for dtype, outcome in outcomes.items()]
        rows.append(Row([operation, *cells], Mark.WRONG if set(outcomes.values()) & set(BAD) else Mark.NONE))
    note = "ok: the result is right and of the same dtype (argmax: an index); → another: it is right, and of that one."
    table = Table(f"What {way.label} makes of each dtype", ["operation", *DTYPES], rows)
    return Section(f"matrix-{way.name}", way.label, notes=[note], tables=[table])


def _cell(found: DtypeReading | None, outcome: Outcome | None) -> str:
    if found is None or outcome is None:
        return DASH
    return f"→ {found.became}" if outcome is Outcome.PROMOTES else outcome.value


def _problems(matrix: Matrix) -> Section:
    items = [f"{way.label}: {r.outcome}: {r.row}: {r.reason}" for way in matrix.bench.ways for r in
             matrix.with_outcome(way, *BAD, Outcome.MEMORY)]  # fmt: skip
    return Section(
        "problems", "What is wrong", items=items, alarming=True, empty="Every result that was given is right."
    )


def _refusals(matrix: Matrix) -> Section:
    rows = []
    for way in matrix.bench.ways:
        by_text: dict[tuple[str, str], list[str]] = {}
        for r in matrix.with_outcome(way, Outcome.REFUSED, Outcome.ON_CPU):
            operation, dtype = _split(r.row)
            by_text.setdefault((operation, r.reason), []).append(dtype)
        rows += [Row([way.label, op, ", ".join(dtypes), said]) for (op, said), dtypes in by_text.items()]
    table = Table("In the framework's own words", ["way", "operation", "dtypes", "what it says"], rows)
    title = f"{plural(len(rows), 'refusal')}, and what went to the CPU"
    return Section("refusals", title, tables=[table], folded=True, empty="Nothing was refused.")
