"""What `watch` saw, as the record that is kept of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from nanogpt_mac import simulator
from nanogpt_mac.compile_report import dynamo, suspects
from nanogpt_mac.compile_report.recorders import Call, What
from nanogpt_mac.compile_report.seen import Iteration, Seen
from nanogpt_mac.records import compiled as made
from nanogpt_mac.records.compiled import CompileReport

SCHEMA = 1
_GRADIENTS_OFF = re.compile(r"\d+/\d+: GLOBAL_STATE changed: grad_mode")
_CACHES = {"fx_graph": ("inductor", "fxgraph_cache_"), "aot_autograd": ("aot_autograd", "autograd_cache_")}
_OUTCOMES = ("hit", "miss", "bypass")


def describe(seen: Seen) -> CompileReport:
    """The report of what was seen. A figure that this torch does not give is None, with a line under `unknown`."""
    import torch

    seen.collect()
    simulated = simulator.active()
    training = seen.iterations.get("training")
    counters = seen.counters()
    stats = counters.get("stats", Counter()) if counters is not None else None
    compiled = stats["unique_graphs"] if stats is not None else None
    if compiled and not seen.graphs:
        seen.doubt("graphs", "Dynamo made graphs, and no module that Inductor generated was seen")
    if any(seen.graphs.values()) and not seen.libraries:
        seen.doubt("launches", "generated modules hold Metal kernels, and none went through torch.mps.compile_shader")
    times = suspects.Times(training.ms if training else None, seen.ms_each, live=seen.execute and not simulated)
    graphs = [
        made.Graph(name, kernels, {phase: it.runs[name] for phase, it in seen.iterations.items()})
        for name, kernels in seen.graphs.items()
    ]
    return CompileReport(
        schema=SCHEMA,
        torch=torch.__version__,
        device=simulator.DEVICE_NAME if simulated else "mps",
        executed=seen.execute,
        dynamo_graphs=compiled,
        graphs=graphs if seen.known("graphs") else None,
        graph_breaks=_breaks(seen, counters),
        recompilations=_recompilations(seen) if seen.known("compilations") else None,
        compile=_compile_times(seen) if seen.known("compilations") else None,
        cache=_caches(seen, counters, compiled),
        kernels_generated=sum(seen.graphs.values()) if seen.known("graphs") else None,
        iterations={name: _iteration(seen, it) for name, it in seen.iterations.items()},
        suspects=suspects.judge(training.calls, times, seen.known) if training is not None else [],
        unknown=list(seen.unknown),
    )


def _breaks(seen: Seen, counters: dict[str, Counter[str]] | None) -> list[made.GraphBreak] | None:
    """Graph breaks from the log, which has their lines, held against torch's own count of them."""
    rows = [made.GraphBreak(reason, line, count) for (reason, line), count in Counter(seen.breaks).items()]
    if counters is None:
        return rows or None
    counted = counters.get("graph_break", Counter())
    if (absent := sum(counted.values()) - len(seen.breaks)) > 0:
        seen.doubt("lines of graph breaks", f"{absent} of {sum(counted.values())} breaks were counted and not logged")
        return [made.GraphBreak(dynamo.one_line(reason), None, count) for reason, count in counted.items()]
    return rows


def _recompilations(seen: Seen) -> list[made.Recompilation]:
    return [
        made.Recompilation(
            function=record.co_name,
            line=f"{dynamo.short(record.co_filename)}:{record.co_firstlineno}",
            reason=dynamo.one_line(record.recompile_reason),
            phase=phase,
            expected=_GRADIENTS_OFF.fullmatch(record.recompile_reason.strip()) is not None,
        )
        for phase, record in seen.compiled
        if record.recompile_reason
    ]


def _compile_times(seen: Seen) -> made.Compilations:
    rows = [
        made.Compilation(record.co_name, record.is_forward is False, phase, round((record.duration_us or 0) / 1e6, 3))
        for phase, record in seen.compiled
    ]
    shader_s = round(seen.shader_s, 3) if seen.execute else None
    return made.Compilations(round(sum(row.seconds for row in rows), 3), shader_s, rows)


def _caches(seen: Seen, counters: dict[str, Counter[str]] | None, compiled: int | None) -> made.Caches | None:
    if counters is None:
        return None
    caches: made.Caches = {}
    for cache, (group, prefix) in _CACHES.items():
        counts = [counters.get(group, Counter())[prefix + outcome] for outcome in _OUTCOMES]
        caches[cache] = made.CacheCounts(*counts)
        if compiled and not sum(counts):
            seen.doubt(f"{cache} cache", "graphs were compiled, and torch counted neither hit, miss nor bypass")
            caches[cache] = None
    return caches


def _iteration(seen: Seen, iteration: Iteration) -> made.Iteration:
    metal = [call for call in iteration.calls if call.what is What.METAL]
    externs = [call for call in iteration.calls if call.what is What.EXTERN]
    aten = [call for call in iteration.calls if call.what is What.ATEN]
    reductions = sum(call.is_reduction for call in metal)
    launched, graphs = seen.known("launches"), seen.known("graphs")
    matmuls, buffers = seen.known("graphs", "matmuls"), seen.known("graphs", "buffers")
    return made.Iteration(
        ms=iteration.ms,
        compilations=iteration.compilations,
        launches=len(metal) if launched else None,
        pointwise=len(metal) - reductions if launched else None,
        reduction=reductions if launched else None,
        metal_bytes=sum(call.bytes for call in metal) if launched else None,
        kernels=[_kernel(seen, group) for group in _alike(metal)] if launched else None,
        externs=[_operator(seen, group) for group in _alike(externs)] if matmuls else None,
        extern_bytes=sum(call.bytes for call in externs) if matmuls else None,
        aten=[_operator(seen, group) for group in _alike(aten)] if graphs else None,
        aten_bytes=sum(call.bytes for call in aten) if graphs else None,
        matrix_products=sum(call.products for call in (*externs, *aten)) if matmuls else None,
        buffers=sum(c.what is What.BUFFER for c in iteration.calls) if buffers else None,
    )


def _alike(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that are alike, in the order of their first."""
    groups: dict[object, list[Call]] = {}
    for call in calls:
        groups.setdefault((call.alike, call.threads, call.group), []).append(call)
    return list(groups.values())


def _row(seen: Seen, group: Sequence[Call]) -> made.Alike:
    first = group[0]
    return made.Alike(
        name=first.name,
        graph=first.graph,
        count=len(group),
        shapes=first.shapes,
        dtypes=first.dtypes,
        bytes=sum(call.bytes for call in group),
        lines=sorted({call.line for call in group if call.line}),
        ms_each=seen.ms_each.get(first.alike),
    )


def _kernel(seen: Seen, group: Sequence[Call]) -> made.Kernel:
    first = group[0]
    kind = "reduction" if first.is_reduction else "pointwise"
    return made.Kernel(
        **vars(_row(seen, group)), kind=kind, does=_does(first), threads=first.threads or (), group=first.group or None
    )


def _operator(seen: Seen, group: Sequence[Call]) -> made.Operator:
    return made.Operator(**vars(_row(seen, group)), products=group[0].products)


def _does(call: Call) -> list[str]:
    """What stands out in a kernel: how it reduces, whether it adds atomically, draws random numbers or only copies."""
    does = sorted(set(re.findall(r"threadgroup_((?!barrier)\w+)\s*\(", call.code)))
    does += [name for name, mark in (("atomic_add", "atomic_add"), ("random", "metal::rand")) if mark in call.code]
    return [*does, *(["copy"] if suspects.is_copy(call) else [])]
