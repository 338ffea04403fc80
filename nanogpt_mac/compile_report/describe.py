"""What `watch` saw, as one JSON-able dictionary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nanogpt_mac import simulator
from nanogpt_mac.compile_report import dynamo, suspects
from nanogpt_mac.compile_report.recorders import Call, What
from nanogpt_mac.compile_report.seen import Iteration, Seen

SCHEMA = 1
_GRADIENTS_OFF = re.compile(r"\d+/\d+: GLOBAL_STATE changed: grad_mode")
_CACHES = {"fx_graph": ("inductor", "fxgraph_cache_"), "aot_autograd": ("aot_autograd", "autograd_cache_")}
_OUTCOMES = {"hits": "hit", "misses": "miss", "bypasses": "bypass"}


def describe(seen: Seen) -> dict[str, Any]:
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
    if seen.graphs and not seen.libraries and any(graph["kernels"] for graph in seen.graphs.values()):
        seen.doubt("launches", "generated modules hold Metal kernels, and none went through torch.mps.compile_shader")
    times = suspects.Times(training.ms if training else None, seen.ms_each, live=seen.execute and not simulated)
    return {
        "schema": SCHEMA,
        "torch": torch.__version__,
        "device": simulator.DEVICE_NAME if simulated else "mps",
        "executed": seen.execute,
        "dynamo_graphs": compiled,
        "graphs": _graphs(seen) if seen.known("graphs") else None,
        "graph_breaks": _breaks(seen, counters),
        "recompilations": _recompilations(seen) if seen.known("compilations") else None,
        "compile": _compile_times(seen) if seen.known("compilations") else None,
        "cache": _caches(seen, counters, compiled),
        "kernels_generated": sum(graph["kernels"] for graph in seen.graphs.values()) if seen.known("graphs") else None,
        "iterations": {name: _iteration(seen, it) for name, it in seen.iterations.items()},
        "suspects": suspects.judge(training.calls, times, seen.known) if training is not None else [],
        "unknown": list(seen.unknown),
    }


def _graphs(seen: Seen) -> list[dict[str, Any]]:
    return [
        {**graph, "runs": {phase: it.runs[graph["name"]] for phase, it in seen.iterations.items()}}
        for graph in seen.graphs.values()
    ]


def _breaks(seen: Seen, counters: dict[str, Counter[str]] | None) -> list[dict[str, Any]] | None:
    """Graph breaks from the log, which has their lines, held against torch's own count of them."""
    rows = [{"reason": reason, "line": line, "count": count} for (reason, line), count in Counter(seen.breaks).items()]
    if counters is None:
        return rows or None
    counted = counters.get("graph_break", Counter())
    if (absent := sum(counted.values()) - len(seen.breaks)) > 0:
        seen.doubt("lines of graph breaks", f"{absent} of {sum(counted.values())} breaks were counted and not logged")
        return [{"reason": dynamo.one_line(r), "line": None, "count": n} for r, n in counted.items()]
    return rows


def _recompilations(seen: Seen) -> list[dict[str, Any]]:
    """Every compilation of a function that had been compiled before, with the guard that failed.

    One for evaluation is expected: without gradients it is another graph.
    """
    return [
        {
            "function": record.co_name,
            "line": f"{dynamo.short(record.co_filename)}:{record.co_firstlineno}",
            "reason": dynamo.one_line(record.recompile_reason),
            "phase": phase,
            "expected": _GRADIENTS_OFF.fullmatch(record.recompile_reason.strip()) is not None,
        }
        for phase, record in seen.compiled
        if record.recompile_reason
    ]


def _compile_times(seen: Seen) -> dict[str, Any]:
    """Seconds of compilation in this process, and of those the seconds inside `torch.mps.compile_shader`."""
    rows = [
        {
            "function": record.co_name,
            "backward": record.is_forward is False,
            "phase": phase,
            "seconds": round((record.duration_us or 0) / 1e6, 3),
        }
        for phase, record in seen.compiled
    ]
    return {
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "shader_seconds": round(seen.shader_s, 3) if seen.execute else None,
        "compilations": rows,
    }


def _caches(seen: Seen, counters: dict[str, Counter[str]] | None, compiled: int | None) -> dict[str, Any] | None:
    if counters is None:
        return None
    made: dict[str, Any] = {}
    for cache, (group, prefix) in _CACHES.items():
        counts = counters.get(group, Counter())
        made[cache] = {name: counts[prefix + outcome] for name, outcome in _OUTCOMES.items()}
        if compiled and not sum(made[cache].values()):
            seen.doubt(f"{cache} cache", "graphs were compiled, and torch counted neither hit, miss nor bypass")
            made[cache] = None
    return made


def _iteration(seen: Seen, iteration: Iteration) -> dict[str, Any]:
    metal = [call for call in iteration.calls if call.what is What.METAL]
    externs = [call for call in iteration.calls if call.what is What.EXTERN]
    aten = [call for call in iteration.calls if call.what is What.ATEN]
    reductions = sum(call.is_reduction for call in metal)
    launched, graphs = seen.known("launches"), seen.known("graphs")
    matmuls, buffers = seen.known("graphs", "matmuls"), seen.known("graphs", "buffers")
    return {
        "ms": iteration.ms,
        "compilations": iteration.compilations,
        "launches": len(metal) if launched else None,
        "pointwise": len(metal) - reductions if launched else None,
        "reduction": reductions if launched else None,
        "metal_bytes": sum(call.bytes for call in metal) if launched else None,
        "kernels": _rows(seen, metal) if launched else None,
        "externs": _rows(seen, externs) if matmuls else None,
        "extern_bytes": sum(call.bytes for call in externs) if matmuls else None,
        "aten": _rows(seen, aten) if graphs else None,
        "aten_bytes": sum(call.bytes for call in aten) if graphs else None,
        "matrix_products": sum(call.products for call in (*externs, *aten)) if matmuls else None,
        "buffers": sum(c.what is What.BUFFER for c in iteration.calls) if buffers else None,
    }


def _rows(seen: Seen, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """One row for all calls that are alike, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.alike, call.threads, call.group), []).append(call)
    rows = []
    for group in groups.values():
        first = group[0]
        row: dict[str, Any] = {"name": first.name, "graph": first.graph, "count": len(group)}
        if first.what is What.METAL:
            row["kind"] = "reduction" if first.is_reduction else "pointwise"
            row["does"] = _does(first)
            row["threads"] = list(first.threads or ())
            row["group"] = list(first.group) if first.group else None
        else:
            row["products"] = first.products
        row["shapes"] = [list(shape) for shape in first.shapes]
        row["dtypes"] = list(first.dtypes)
        row["bytes"] = sum(call.bytes for call in group)
        row["lines"] = sorted({call.line for call in group if call.line})
        row["ms_each"] = seen.ms_each.get(first.alike)
        rows.append(row)
    return rows


def _does(call: Call) -> list[str]:
    """What stands out in a kernel: how it reduces, whether it adds atomically, draws random numbers or only copies."""
    does = sorted(set(re.findall(r"threadgroup_((?!barrier)\w+)\s*\(", call.code)))
    does += [name for name, mark in (("atomic_add", "atomic_add"), ("random", "metal::rand")) if mark in call.code]
    return [*does, *(["copy"] if suspects.is_copy(call) else [])]
