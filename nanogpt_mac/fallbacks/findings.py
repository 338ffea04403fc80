"""From what the two passes saw to findings: the kinds, the agreement of the passes, and what to do about each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from nanogpt_mac.backends.base import PHASES
from nanogpt_mac.fallbacks.observed import Call, Observed, Refused, Sign, Warned
from nanogpt_mac.fallbacks.signs import NOT_ON_CPU, NOT_ON_MPS, OUT_OF_MEMORY, short
from nanogpt_mac.operators.dispatch import Dispatch
from nanogpt_mac.records.fallbacks import Finding, FindingKind

_SHOWN = 8  # calls of one operator whose shapes and places are listed

ADVICE = {
    FindingKind.MISSING_CPU: "set PYTORCH_ENABLE_MPS_FALLBACK=1 to train at all, and see whether a newer torch has it "
    "(python mps_coverage.py scope=ops op={name} torch=nightly); else write it with operators that MPS has",
    FindingKind.MISSING: "PYTORCH_ENABLE_MPS_FALLBACK cannot help: write it with other operators, or see whether a "
    "newer torch has it (python mps_coverage.py scope=ops op={name} torch=nightly)",
    FindingKind.EXPLICIT: "torch runs it on the CPU whatever the environment says: see whether a newer torch has a "
    "kernel (python mps_coverage.py scope=ops op={name} torch=nightly), or write it with other operators",
    FindingKind.HIDDEN: "MPS has a kernel, which does this on the CPU: try another dtype, size or memory layout, or "
    "other operators; worth a report to PyTorch with these shapes and dtypes",
    FindingKind.LIMIT: "MPS has the operator, but not for this dtype or shape, which the CPU takes: cast (MPS has no "
    "float64) or change the size before the call",
    FindingKind.SYNC: "the host waits here until the queue is empty: keep the value on the device, or read it an "
    "iteration later",
}

Place = tuple[str, str]  # phase, operator
Row = TypeVar("Row", Call, Warned)


def findings_of(seen: Observed) -> tuple[list[Finding], list[str]]:
    """The findings of what watch.py saw, by phase, and why there may be more."""
    why = _blind_spots(seen)
    refused = [(refusal, _refusal(refusal)) for refusal in seen.refused]
    stopped = {(f.phase, f.op) for _, f in refused if f is not None}
    findings = _fallbacks(seen, stopped, why) + _inside(seen, why) + _waits(seen)
    for refusal, finding in refused:
        if finding is None:
            why.append(f"{refusal.phase}: {refusal.type}: {refusal.text}")
            continue
        same = [f for f in findings if (f.phase, f.op) == (finding.phase, finding.op)]
        evidence = (*finding.evidence, *(e for f in same for e in f.evidence))
        findings = [f for f in findings if f not in same]
        findings.append(finding.model_copy(update={"evidence": evidence}))
    findings.sort(key=lambda f: (PHASES.index(f.phase), f.kind, f.op))
    return findings, why


def _blind_spots(seen: Observed) -> list[str]:
    why = []
    for name, control in (("warnings", seen.warnings.control), ("profiler", seen.profiler.control)):
        if control is False:
            why.append(f"{name}: did not see {seen.control}, which is known to run on the CPU")
    missed = [phase for phase in PHASES if phase not in seen.reached]
    if missed:
        why.append(f"not reached: {', '.join(missed)}")
    operators = seen.profiler.operators
    why += [f"profiler: saw no operator in {phase}" for phase in seen.reached if not operators.get(phase)]
    return why


def _grouped(rows: Iterable[Row]) -> dict[Place, list[Row]]:
    groups: dict[Place, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.phase, row.op), []).append(row)
    return groups


def _signed(seen: Observed, sign: Sign) -> dict[Place, list[Call]]:
    return _grouped(call for call in seen.profiler.records if call.sign is sign)


def _finding(kind: FindingKind, place: Place, calls: Sequence[Call], evidence: Iterable[str]) -> Finding:
    """A finding of the profiler's records of one operator in one phase."""
    phase, op = place
    places = Counter(c.where for c in calls if c.where)
    where = places.most_common(1)[0][0] if places else None
    texts = list(dict.fromkeys(text for c in calls for text in c.evidence))
    more = [f"and {len(texts) - _SHOWN} more like these"] if len(texts) > _SHOWN else []
    also = ["also at " + ", ".join(p for p in sorted(places) if p != where)] if len(places) > 1 else []
    signatures = list(dict.fromkeys(tuple(map(tuple, c.shapes)) for c in calls))
    return Finding(
        op=op,
        kind=kind,
        phase=phase,
        calls_per_iteration=len(calls),
        dtypes=tuple(sorted({d for c in calls for d in c.dtypes})),
        shapes=tuple(signatures[:_SHOWN]),
        where=where,
        ms=sum(c.ms for c in calls),
        bytes=sum(c.bytes for c in calls),
        evidence=(*evidence, *texts[:_SHOWN], *more, *also),
        advice=ADVICE[kind].format(name=op.split(".")[0]),
    )


def _fallbacks(seen: Observed, stopped: set[Place], why: list[str]) -> list[Finding]:
    """What both passes must have seen: CPU fallbacks. Where they differ `why` gets a line.

    Those in `stopped` ended in an error, and torch may then drop the warning.
    """
    warnings, profiled = _grouped(seen.warnings.fallbacks), _signed(seen, Sign.FALLBACK)
    if not seen.profiler.overloads:  # this torch's profiler knows no overloads: the warnings' names stand
        profiled = _with_overloads(profiled, warnings)
    findings = []
    for place in dict.fromkeys([*warnings, *profiled]):
        (phase, op), warned, calls = place, warnings.get(place, []), profiled.get(place, [])
        if len(warned) != len(calls) and place not in stopped:
            why.append(f"{phase}: {op}: {len(warned)} warnings, but the profiler saw {len(calls)} fallbacks")
        explicit = seen.dispatch.get(op) is Dispatch.BY_HAND
        evidence = [f"{len(warned)} warnings that it runs on the CPU"] if warned else []
        evidence += [f"the profiler saw its tensors go to the CPU in {len(calls)} calls"] if calls else []
        evidence += [
            "the dispatcher has it as a CPU fallback" if explicit else "the dispatcher has no MPS kernel of it"
        ]
        finding = _finding(FindingKind.EXPLICIT if explicit else FindingKind.MISSING_CPU, place, calls, evidence)
        places = Counter(w.where for w in warned if w.where)  # exact, where there are any
        where = places.most_common(1)[0][0] if places else finding.where
        most = max(len(warned), len(calls))
        findings.append(finding.model_copy(update={"where": where, "calls_per_iteration": most}))
    return findings


def _with_overloads(profiled: dict[Place, list[Call]], warned: Iterable[Place]) -> dict[Place, list[Call]]:
    named = {}
    for (phase, op), calls in profiled.items():
        full = [name for p, name in warned if p == phase and name.split(".")[0] == op]
        named[phase, full[0] if len(full) == 1 else op] = calls
    return named


def _inside(seen: Observed, why: list[str]) -> list[Finding]:
    """CPU work inside native kernels; some of them say so, without their name."""
    admitted: dict[str, list[Warned]] = {}
    for warning in seen.warnings.admitted:
        admitted.setdefault(warning.phase, []).append(warning)
    findings = []
    for place, calls in _signed(seen, Sign.HIDDEN).items():
        texts = dict.fromkeys(f"a warning in this phase: {w.text}" for w in admitted.get(place[0], []))
        evidence = ["copies between MPS and CPU inside it", *texts]
        findings.append(_finding(FindingKind.HIDDEN, place, calls, evidence))
    for phase in admitted.keys() - {f.phase for f in findings}:
        first = admitted[phase][0]
        why.append(
            f"{phase}: a kernel says that it uses the CPU, but the profiler saw no copy: {first.text} ({first.where})"
        )
    return findings


def _waits(seen: Observed) -> list[Finding]:
    evidence = "a copy to the CPU, or a wait for values, that this project does not mean to make here"
    waits = _signed(seen, Sign.SYNC)
    return [_finding(FindingKind.SYNC, place, calls, [evidence]) for place, calls in waits.items()]


def _refusal(refusal: Refused) -> Finding | None:
    """The finding in an error that is MPS's own: the CPU takes the same call, or has no such operator either."""
    text, op = refusal.text, refusal.op
    if named := NOT_ON_CPU.search(text):
        kind, op = FindingKind.MISSING, short(named[1])
    elif named := NOT_ON_MPS.search(text):  # this torch does not heed the variable
        kind, op = FindingKind.MISSING_CPU if refusal.cpu else FindingKind.MISSING, short(named[1])
    elif OUT_OF_MEMORY.search(text) or op is None or refusal.type not in ("TypeError", "RuntimeError"):
        return None
    elif refusal.cpu or (refusal.cpu is None and "MPS" in text):
        kind = FindingKind.LIMIT
    else:
        return None
    evidence = [f"{refusal.type}: {text}", *refusal.evidence]
    if refusal.cpu and kind is FindingKind.LIMIT:
        evidence.append("the CPU ran the same call")
    call = Call(Sign.SYNC, op, refusal.phase, 0.0, refusal.dtypes, refusal.shapes, refusal.where, [])
    return _finding(kind, (refusal.phase, op), [call], evidence)
