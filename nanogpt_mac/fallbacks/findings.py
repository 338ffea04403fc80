"""From what the two passes saw to findings: the kinds, the agreement of the passes, and what to do about each."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Any

from nanogpt_mac.backends.base import PHASES
from nanogpt_mac.fallbacks.signs import NOT_ON_CPU, NOT_ON_MPS, OUT_OF_MEMORY, short

_SHOWN = 8  # calls of one operator whose shapes and places are listed


class Finding(StrEnum):
    """Why work leaves the GPU. The first three are table.Kind's words."""

    MISSING_CPU = "missing, CPU kernel"
    MISSING = "missing, no CPU kernel"
    EXPLICIT = "explicit fallback"
    HIDDEN = "CPU work inside a native kernel"
    LIMIT = "dtype or shape limit"
    SYNC = "copy or sync"


ADVICE = {
    Finding.MISSING_CPU: "set PYTORCH_ENABLE_MPS_FALLBACK=1 to train at all, and see whether a newer torch has it "
    "(python mps_coverage.py scope=ops op={name} torch=nightly); else write it with operators that MPS has",
    Finding.MISSING: "PYTORCH_ENABLE_MPS_FALLBACK cannot help: write it with other operators, or see whether a newer "
    "torch has it (python mps_coverage.py scope=ops op={name} torch=nightly)",
    Finding.EXPLICIT: "torch runs it on the CPU whatever the environment says: see whether a newer torch has a kernel "
    "(python mps_coverage.py scope=ops op={name} torch=nightly), or write it with other operators",
    Finding.HIDDEN: "MPS has a kernel, which does this on the CPU: try another dtype, size or memory layout, or other "
    "operators; worth a report to PyTorch with these shapes and dtypes",
    Finding.LIMIT: "MPS has the operator, but not for this dtype or shape, which the CPU takes: cast (MPS has no "
    "float64) or change the size before the call",
    Finding.SYNC: "the host waits here until the queue is empty: keep the value on the device, or read it an iteration "
    "later",
}


def findings_of(seen: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The findings of what watch.py saw, by phase, and why they may not be all."""
    why = _blind_spots(seen)
    refused = [(refusal, _refused(refusal)) for refusal in seen["refused"]]
    stopped = {(f["phase"], f["op"]) for _, f in refused if f is not None}
    findings = _fallbacks(seen, stopped, why) + _inside(seen, why) + _waits(seen)
    for refusal, finding in refused:
        if finding is None:
            why.append(f"{refusal['phase']}: {refusal['type']}: {refusal['text']}")
            continue
        same = [f for f in findings if (f["phase"], f["op"]) == (finding["phase"], finding["op"])]
        findings = [f for f in findings if f not in same] + [finding]
        finding["evidence"] += [e for f in same for e in f["evidence"]]
    findings.sort(key=lambda f: (PHASES.index(f["phase"]), f["kind"], f["op"]))
    for finding in findings:
        finding["advice"] = ADVICE[finding["kind"]].format(name=finding["op"].split(".")[0])
    return findings, why


def _blind_spots(seen: dict[str, Any]) -> list[str]:
    why = []
    for name in ("warnings", "profiler"):
        if seen[name]["control"] is False:
            why.append(f"{name}: did not see {seen['control']}, which is known to run on the CPU")
    missed = [phase for phase in PHASES if phase not in seen["reached"]]
    if missed:
        why.append(f"not reached: {', '.join(missed)}")
    operators = seen["profiler"]["operators"]
    why += [f"profiler: saw no operator in {phase}" for phase in seen["reached"] if not operators[phase]]
    return why


def _grouped(rows: list[dict[str, Any]], sign: str | None = None) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if sign is None or row["sign"] == sign:
            groups.setdefault((row["phase"], row["op"]), []).append(row)
    return groups


def _finding(kind: Finding, phase: str, op: str, records: list[dict[str, Any]], evidence: list[str]) -> dict[str, Any]:
    """A finding of the profiler's records of one operator in one phase."""
    places = Counter(r["where"] for r in records if r["where"])
    where = places.most_common(1)[0][0] if places else None
    texts = list(dict.fromkeys(text for r in records for text in r["evidence"]))
    evidence += texts[:_SHOWN] + ([f"and {len(texts) - _SHOWN} more like these"] if len(texts) > _SHOWN else [])
    if len(places) > 1:
        evidence.append("also at " + ", ".join(p for p in sorted(places) if p != where))
    signatures = list(dict.fromkeys(tuple(map(tuple, r["shapes"])) for r in records))
    return {
        "op": op,
        "kind": kind,
        "phase": phase,
        "calls_per_iteration": len(records),
        "dtypes": sorted({d for r in records for d in r["dtypes"]}),
        "shapes": [[list(s) for s in shapes] for shapes in signatures[:_SHOWN]],
        "where": where,
        "ms": sum(r["ms"] for r in records),
        "bytes": sum(r["bytes"] for r in records),
        "evidence": evidence,
    }


def _fallbacks(seen: dict[str, Any], stopped: set[tuple[str, str]], why: list[str]) -> list[dict[str, Any]]:
    """What both passes must have seen: CPU fallbacks. Where they differ `why` gets a line.

    Those in `stopped` ended in an error, and torch may then drop the warning.
    """
    told = _grouped(seen["warnings"]["fallbacks"])
    profiled = _grouped(seen["profiler"]["records"], "fallback")
    if not seen["profiler"]["overloads"]:  # this torch's profiler knows no overloads: the warnings' names stand
        profiled = _with_overloads(profiled, told)
    findings = []
    for phase, op in dict.fromkeys([*told, *profiled]):
        warned, records = told.get((phase, op), []), profiled.get((phase, op), [])
        if len(warned) != len(records) and (phase, op) not in stopped:
            why.append(f"{phase}: {op}: {len(warned)} warnings, but the profiler saw {len(records)} fallbacks")
        explicit = seen["dispatch"].get(op) == "explicit"
        evidence = [f"{len(warned)} warnings that it runs on the CPU"] if warned else []
        evidence += [f"the profiler saw its tensors go to the CPU in {len(records)} calls"] if records else []
        evidence += [
            "the dispatcher has it as a CPU fallback" if explicit else "the dispatcher has no MPS kernel of it"
        ]
        kind = Finding.EXPLICIT if explicit else Finding.MISSING_CPU
        finding = _finding(kind, phase, op, records, evidence)
        places = Counter(w["where"] for w in warned if w["where"])  # exact, where there are any
        if places:
            finding["where"] = places.most_common(1)[0][0]
        finding["calls_per_iteration"] = max(len(warned), len(records))
        findings.append(finding)
    return findings


def _with_overloads(
    profiled: dict[tuple[str, str], list[dict[str, Any]]], told: dict[tuple[str, str], list[dict[str, Any]]]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    named = {}
    for (phase, op), records in profiled.items():
        full = [name for p, name in told if p == phase and name.split(".")[0] == op]
        named[phase, full[0] if len(full) == 1 else op] = records
    return named


def _inside(seen: dict[str, Any], why: list[str]) -> list[dict[str, Any]]:
    """CPU work inside native kernels; some of them say so, without their name."""
    admitted = {
        phase: rows for (phase, _), rows in _grouped([{**w, "op": ""} for w in seen["warnings"]["admitted"]]).items()
    }
    findings = []
    for (phase, op), records in _grouped(seen["profiler"]["records"], "hidden").items():
        texts = dict.fromkeys(f"a warning in this phase: {w['text']}" for w in admitted.get(phase, []))
        findings.append(_finding(Finding.HIDDEN, phase, op, records, ["copies between MPS and CPU inside it", *texts]))
    for phase in admitted.keys() - {f["phase"] for f in findings}:
        text, where = admitted[phase][0]["text"], admitted[phase][0]["where"]
        why.append(f"{phase}: a kernel says that it uses the CPU, but the profiler saw no copy: {text} ({where})")
    return findings


def _waits(seen: dict[str, Any]) -> list[dict[str, Any]]:
    groups = _grouped(seen["profiler"]["records"], "sync")
    evidence = "a copy to the CPU, or a wait for values, that this project does not mean to make here"
    return [_finding(Finding.SYNC, phase, op, records, [evidence]) for (phase, op), records in groups.items()]


def _refused(refusal: dict[str, Any]) -> dict[str, Any] | None:
    """A finding of an error, where it is MPS's: the CPU takes the same call, or has no such operator either."""
    text, op = refusal["text"], refusal["op"]
    if named := NOT_ON_CPU.search(text):
        kind, op = Finding.MISSING, short(named[1])
    elif named := NOT_ON_MPS.search(text):  # this torch does not heed the variable
        kind, op = Finding.MISSING_CPU if refusal["cpu"] else Finding.MISSING, short(named[1])
    elif OUT_OF_MEMORY.search(text) or op is None or refusal["type"] not in ("TypeError", "RuntimeError"):
        return None
    elif refusal["cpu"] or (refusal["cpu"] is None and "MPS" in text):
        kind = Finding.LIMIT
    else:
        return None
    evidence = [f"{refusal['type']}: {text}", *refusal["evidence"]]
    if refusal["cpu"] and kind is Finding.LIMIT:
        evidence.append("the CPU ran the same call")
    row = {**refusal, "evidence": [], "ms": 0.0, "bytes": 0}
    return _finding(kind, refusal["phase"], op, [row], evidence)
