"""The compile report as a person reads it: lines that stand over tables, and the tables."""

from __future__ import annotations

from collections.abc import Sequence

from nanogpt_mac.compile_report.checked import CheckedIteration, CheckedReport
from nanogpt_mac.records.compiled import Alike, GraphBreak, Operator

Section = tuple[str, list[str], list[list[str]]]  # title, headings, rows


def lines(report: CheckedReport) -> list[str]:
    """What stands over the tables, one sentence each."""
    compiled, warm = report.compile, report.warm
    m = report.model
    made = [
        f"{report.label} on {report.device} with torch {report.torch}: {m.n_layer} layers, {m.n_head} heads, "
        f"{m.n_embd} channels, dropout {m.dropout:g}, {report.batch_size} x {m.block_size} tokens, {report.dtype}"
    ]
    if compiled:
        without = "" if report.device == "mps" else ", without Apple's shader compiler"
        text = f"compiled in {compiled.seconds:.1f} s{without}"
        if warm and warm.compile:
            text += f"; a second process, from the cache, in {warm.compile.seconds:.1f} s"
        made.append(text)
    for name, it in report.iterations.items():
        made.append(f"{name}: {_summary(it)}")
    unexpected = [row for row in report.recompilations or [] if not row.expected]
    recompiled = None if report.recompilations is None else len(unexpected)
    made.append(
        f"graphs {_figure(report.dynamo_graphs)}, graph breaks {_total(report.graph_breaks)}, "
        f"recompilations {_figure(recompiled)} beside evaluation's own"
    )
    made.append("sizes are the sums of all arguments' sizes, not traffic to memory")
    return made + [f"not known: {line}" for line in report.unknown]


def _summary(it: CheckedIteration) -> str:
    parts = [
        f"{_figure(it.launches)} Metal launches ({_figure(it.pointwise)} pointwise, "
        f"{_figure(it.reduction)} reduction; {_size(it.metal_bytes)})",
        f"{_figure(it.matrix_products)} matrix products",
        f"{_total(it.aten)} ATen calls",
        f"{_figure(it.buffers)} new buffers",
    ]
    if it.ms:
        parts.append(f"{it.ms:.2f} ms")
    if it.compilations:
        parts.append(f"NOT steady: {it.compilations} compilations in it")
    return ", ".join(parts)


def _figure(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _size(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"


def _total(rows: Sequence[Alike | GraphBreak] | None) -> str:
    return "unknown" if rows is None else str(sum(row.count for row in rows))


def sections(report: CheckedReport) -> list[Section]:
    """The report as titled tables, as coverage/report.py shows them."""
    made: list[Section] = []
    if report.suspects:
        rows = [[s.name, s.status, s.evidence, s.claim] for s in report.suspects]
        made.append(("What may make it slow", ["suspect", "status", "evidence in this run", "what it is"], rows))
        commands: dict[str, list[str]] = {}  # the run as it is stands against several suspects
        for suspect in report.suspects:
            for command in suspect.commands if suspect.status != "absent" else []:
                commands.setdefault(command, []).append(suspect.name)
        if commands:
            tries = [[", ".join(names), command] for command, names in commands.items()]
            made.append(("To find out on a Mac: compare the iter_ms of", ["suspect", "command"], tries))
    if report.graph_breaks:
        rows = [[row.line or "", str(row.count), row.reason] for row in report.graph_breaks]
        made.append(("Graph breaks", ["line", "times", "reason"], rows))
    if report.recompilations:
        rows = [
            [f"{row.function} ({row.line})", row.phase or "", row.reason, "yes" if row.expected else "NO"]
            for row in report.recompilations
        ]
        made.append(("Recompilations", ["function", "phase", "guard that failed", "expected"], rows))
    if report.cache:
        made.append(("Compiler caches", ["cache", "process", "hits", "misses", "bypassed"], _cache_rows(report)))
    for name, it in report.iterations.items():
        made += _iteration_sections(name, it)
    return made


def _cache_rows(report: CheckedReport) -> list[list[str]]:
    processes = {"first": report.cache, "second": report.warm and report.warm.cache}
    return [
        [kind, which, *([str(n.hits), str(n.misses), str(n.bypasses)] if n else ["unknown"] * 3)]
        for which, caches in processes.items()
        for kind, n in (caches or {}).items()
    ]


def _iteration_sections(name: str, it: CheckedIteration) -> list[Section]:
    made: list[Section] = []
    if it.kernels:
        rows = [
            [
                f"{row.graph} {row.name}",
                row.kind,
                str(row.count),
                " x ".join(map(str, row.threads)),
                " x ".join(map(str, row.group or ["torch's"])),
                _size(row.bytes),
                ", ".join(row.does),
                " ".join(row.lines),
            ]
            for row in it.kernels
        ]
        headings = ["kernel", "kind", "times", "threads", "group", "arguments", "does", "line"]
        made.append(_timed(f"Metal launches of one {name} iteration", headings, rows, it.kernels))
    if it.externs:
        rows = [_operator(row) for row in it.externs]
        title = f"Matrix products and other extern kernels in one {name} iteration"
        made.append(_timed(title, ["op", "times", "shapes", "arguments", "line"], rows, it.externs))
    if it.aten:
        rows = [[op, row.kind or "unknown", *rest] for row in it.aten for op, *rest in [_operator(row)]]
        title = f"ATen operators called in one {name} iteration"
        made.append(_timed(title, ["op", "on MPS", "times", "shapes", "arguments", "line"], rows, it.aten))
    return made


def _operator(row: Operator) -> list[str]:
    return [row.name, str(row.count), " ".join(map(str, row.shapes)), _size(row.bytes), " ".join(row.lines)]


def _timed(title: str, headings: list[str], rows: list[list[str]], of: Sequence[Alike]) -> Section:
    """A section, with a column of times where any was measured."""
    if all(row.ms_each is None for row in of):
        return title, headings, rows
    times = ["" if row.ms_each is None else f"{row.ms_each:.3f}" for row in of]
    return title, [*headings, "ms each"], [[*row, time] for row, time in zip(rows, times, strict=True)]
