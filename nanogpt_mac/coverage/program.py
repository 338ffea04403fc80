"""Any PyTorch program on MPS: run unmodified in a process of its own, watched, and reported line by line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_mac import child, files, simulator
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks.findings import ADVICE
from nanogpt_mac.operators.dispatch import Dispatch
from nanogpt_mac.operators.table import RUNS, Table, load
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.fallbacks import FindingKind
from nanogpt_mac.records.program import Iterations, Judged, Program, ProgramFinding
from nanogpt_mac.report.table import Section
from nanogpt_mac.report.words import seconds, size

_GRACE_S = 20.0  # from the request to stop to the end of a program that does not heed it
_EACH = 0.8  # of the iterations: a wait in so many of them is one of the loop
_UPLOAD = "the host waits until the copy is made: non_blocking=True, or make it on the device"
_DRAIN = (
    "the host waits here until the device has done everything, in each iteration: keep the value on the device, read "
    "it an iteration later, or every so many iterations"
)


def check(config: CoverageConfig) -> Page:
    """Runs the program that `config.script` names, and reports. InputError where there is none, or no device."""
    return page(run(config, torch=config.torch))


def run(
    config: CoverageConfig, python: str = sys.executable, env: Mapping[str, str] | None = None, torch: str = "installed"
) -> Program:
    """The program, run by an interpreter that has torch. `torch` may be another one to judge its operators by."""
    argv, folder = command(config.script or "")
    table = None if torch == "installed" else load(torch, config.python, config.binary, config.nightly_index)
    seen, code = _watched(config, argv, folder, python, env or simulator.environment(fallback=True))
    made = document(seen, argv, folder, code)
    return judged(made, table) if table is not None else made


def command(script: str) -> tuple[list[str], Path]:
    """The program's arguments and its folder, which it runs in. InputError where there is no such file."""
    try:
        words = shlex.split(script)
    except ValueError as error:
        raise InputError(f"script={script}: {error}; use quotes as in a shell") from error
    if words[:1] == ["-m"] and len(words) > 1:
        return words, Path.cwd()
    path = Path(words[0]).expanduser() if words else Path()
    if not path.is_file():
        hint = "leave out the interpreter: script='train.py --epochs 1'" if path.name.startswith("python") else ""
        raise InputError(
            f"script={script}: no such file; {hint or 'use the path of a Python program and its arguments'}"
        )
    path = path.resolve()
    return [path.name, *words[1:]], path.parent


def _watched(
    config: CoverageConfig, argv: list[str], folder: Path, python: str, environment: Mapping[str, str]
) -> tuple[dict[str, Any], int]:
    """What the child wrote down, empty where it could not, and the exit code."""
    path = environment.get("PYTHONPATH", "")
    own = {"KINETO_LOG_LEVEL": "99", "TORCHDYNAMO_DISABLE": "1"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(child.ROOT), path]))
    began = time.monotonic()

    def late() -> list[int]:
        over = time.monotonic() - began - (config.limit_s or float("inf"))
        return [] if over < 0 else [signal.SIGXCPU] if over < _GRACE_S else [signal.SIGXCPU, signal.SIGKILL]

    with files.temporary_folder() as scratch:
        task = {"argv": argv, "steps": config.steps, "map_cuda": config.map == "cuda:mps", "path": path}
        task["answer"] = str(scratch / "answer.json")
        (scratch / "task.json").write_text(json.dumps(task))
        sys.stdout.flush()
        code = child.attend(
            [python, "-m", "nanogpt_mac.fallbacks.program", str(scratch / "task.json")],
            {**environment, **own},
            str(folder),
            asked=late,
            begun=lambda pid: None,
            stdout=None if config.format == "table" else sys.stderr.fileno(),
        )
        answer = scratch / "answer.json"
        return json.loads(answer.read_text()) if answer.exists() else {}, code


# -- from what was seen to the document -------------------------------------------------------------------------------


def document(seen: dict[str, Any], argv: list[str], folder: Path, code: int) -> Program:
    """The document of what the child wrote. InputError where that cannot be read."""
    if code < 0:
        ended = f"killed by {child.signal_name(-code)}"
    elif not seen:
        ended = f"ended with exit code {code} before anything was seen"
    else:
        ended = seen["ended"]
    plain: dict[str, Any] = {"program": argv, "folder": str(folder), "ended": ended, "left_with": code}
    if seen:
        names = ("torch", "python", "device", "seconds", "watched_s", "steps", "kernels", "waits", "reached", "mapped")
        iterations, loop = _iterations(seen["rhythms"])
        refused = {(row["file"], row["line"], row["op"]) for row in seen["refused"]}  # a fallback that then failed
        found = [row for row in seen["found"] if (row["file"], row["line"], row["op"]) not in refused]
        findings = [_finding(row, loop) for row in found] + [_refused(row) for row in seen["refused"]]
        order = list(FindingKind)
        findings.sort(key=lambda f: (order.index(f.kind), not f.each_iteration, -f.waits, f.where or "", f.op))
        plain |= {name: seen[name] for name in names}
        plain |= {"findings": findings, "iterations": iterations, "doubts": _doubts(seen)}
        plain["unseen"] = [f"{what} ({count})" for what, count in sorted(seen["unseen"].items())]
    try:
        return Program.parse(plain, "the watched process's answer")
    except DamagedError as error:
        raise InputError(f"script: {error}") from error


def _iterations(rhythms: dict[str, Any]) -> tuple[Iterations | None, set[tuple[str, int]]]:
    """The middle iteration, and the lines that wait in nearly each. A step ends one, or else a backward pass."""
    steps = sorted((name for name in rhythms if name.startswith("step ")), key=lambda name: int(name.split()[1]))
    name = steps[0] if steps else "backward" if "backward" in rhythms else None
    if name is None:
        return None, set()
    intervals = rhythms[name]["intervals"]
    unit = f"from one step of {name.split()[2]} to the next" if steps else "from one backward pass to the next"
    counted = intervals[1:] or intervals
    kernels, waits = (float(statistics.median(one[i] for one in counted)) for i in (0, 1))
    in_intervals: dict[tuple[str, int], int] = {}
    for file, line, number in rhythms[name]["places"]:
        in_intervals[file, line] = max(number, in_intervals.get((file, line), 0))
    often = {place for place, number in in_intervals.items() if number >= max(2, _EACH * len(counted))}
    return Iterations(unit=unit, count=len(intervals), kernels=kernels, waits=waits), often


def _finding(row: dict[str, Any], loop: set[tuple[str, int]]) -> ProgramFinding:
    fallback = FindingKind.EXPLICIT if row["dispatch"] == Dispatch.BY_HAND else FindingKind.MISSING_CPU
    kind = {"fallback": fallback, "hidden": FindingKind.HIDDEN, "sync": FindingKind.SYNC}[row["sign"]]
    each = kind is FindingKind.SYNC and (row["file"], row["line"]) in loop
    given = {name: row[name] for name in ("calls", "waits", "ms", "bytes", "to_host", "dtypes", "shapes")}
    made = _at(row, kind, called_as=row["api"], each_iteration=each, **given)
    if kind is FindingKind.SYNC and (each or not made.to_host):
        return made.model_copy(update={"advice": _DRAIN if made.to_host else _UPLOAD})
    return made


def _refused(row: dict[str, Any]) -> ProgramFinding:
    kind = FindingKind.MISSING if row["kind"] == "missing" else FindingKind.LIMIT
    return _at(row, kind, called_as=row["op"], calls=row["calls"], evidence=(row["text"],))


def _at(row: dict[str, Any], kind: FindingKind, **given: Any) -> ProgramFinding:
    """A finding at the line of a row."""
    return ProgramFinding(
        op=row["op"],
        kind=kind,
        where=f"{row['file']}:{row['line']}" if row["file"] else None,
        source=row["source"],
        advice=ADVICE[kind].format(name=row["op"].split(".")[0]),
        **given,
    )


def _doubts(seen: dict[str, Any]) -> list[str]:
    """Where torch's own warnings say more than the profile has: a program may silence them, never add to them."""
    profiled: dict[str, int] = {}
    hidden = any(row["sign"] == "hidden" for row in seen["found"])
    for row in seen["found"]:
        if row["sign"] == "fallback":
            profiled[row["op"]] = profiled.get(row["op"], 0) + row["calls"]
    doubts = [
        f"{op}: torch warned of {count} fallbacks, the profile has {profiled.get(op, 0)}"
        for op, count in seen["warned"].items()
        if op and count > profiled.get(op, 0)
    ]
    if seen["warned"].get("") and not hidden:
        doubts.append("a kernel says that it uses the CPU, and the profile has no copy")
    return doubts


def judged(made: Program, table: Table) -> Program:
    """The document with every operator that came to the device, and its kind in another torch."""
    away = {f.op: f.kind.value for f in made.findings if f.kind not in (FindingKind.SYNC, FindingKind.HIDDEN)}
    rows = []
    for op, calls in sorted(made.reached.items()):
        there = table.kind(op) or table.kind(op.removesuffix(".default")) or "absent"
        rows.append(Judged(op=op, calls=calls, here=away.get(op, "runs"), there=there))
    return made.model_copy(update={"against": table.version, "judged": tuple(rows)})


# -- the report -------------------------------------------------------------------------------------------------------


def page(made: Program) -> Page:
    """Exit code 0: every operator stays on the device; 1: one does not; 2: it cannot be told."""
    code, verdict = _verdict(made)
    name = shlex.join(made.program)
    device = made.device or "no device"
    took = f"{seconds(made.seconds)}, {seconds(made.watched_s)} of them to read what was seen"
    lines = [f"torch {made.torch or 'unknown'} on {device}: {name}, in {made.folder}"]
    lines.append(f"the program {made.ended}; exit code {made.left_with}; {took}")
    if made.iterations:
        one = made.iterations
        lines.append(
            f"an iteration ({one.unit}; {one.count} seen): {one.kernels:g} kernels, the host waits {one.waits:g} times"
        )
    lines.append("PYTORCH_ENABLE_MPS_FALLBACK=1 is set, and torch.compile is off while the program is watched")
    if made.mapped:
        lines.append(f"mapped from CUDA to MPS: {', '.join(made.mapped)}")
    lines += [f"not seen: {what}" for what in made.unseen]
    lines += [f"in doubt: {what}" for what in made.doubts]
    sections = [_findings("Leaves the GPU", [f for f in made.findings if f.kind is not FindingKind.SYNC])]
    waits = [f for f in made.findings if f.kind is FindingKind.SYNC]
    sections.append(_findings("The host waits in each iteration", [f for f in waits if f.each_iteration]))
    sections.append(_findings("The host waits, elsewhere", [f for f in waits if not f.each_iteration]))
    advice: dict[str, list[str]] = {}
    for f in made.findings:
        places = advice.setdefault(f.advice, [])
        if f.where and f.where not in places:
            places.append(f.where)
    sections.append(
        section("What to do", ["where", "advice"], [[some(places), what] for what, places in advice.items()])
    )
    if made.against:
        changed = [j for j in made.judged if (j.there in RUNS) != (j.here == "runs")]
        rows = [[j.op, str(j.calls), j.here, j.there] for j in changed]
        title = f"Under torch {made.against}"
        sections.append(section(title, ["op", "calls", "here", "there"], rows, empty="every operator fares as here"))
    reached = [[op, str(calls)] for op, calls in sorted(made.reached.items(), key=lambda item: -item[1])]
    sections.append(section("Operators that came to the device", ["op", "calls"], reached))
    facts = made.document() | {"scope": "script"}
    return Page(f"{name} on MPS, torch {made.torch or 'unknown'}", lines, sections, code, verdict, facts)


def _verdict(made: Program) -> tuple[int, str]:
    left = [f for f in made.findings if f.kind is not FindingKind.SYNC]
    drains = [f.where or f.op for f in made.findings if f.each_iteration]
    waits = f"; the host waits in each iteration at {some(list(dict.fromkeys(drains)))}" if drains else ""
    if made.against:
        lost = [j.op for j in made.judged if j.there not in RUNS]
        if lost:
            return (
                LOST,
                f"{len(lost)} operators of this program do not run on MPS in torch {made.against}: {some(lost)}",
            )
        if not left and made.reached:
            return OK, f"every operator of this program runs on MPS in torch {made.against}{waits}"
    if left:
        places = some(list(dict.fromkeys(f"{f.op} ({f.where})" for f in left)))
        return LOST, f"{len(left)} findings: work leaves the GPU in {places}{waits}"
    if not made.reached:
        why = f"the program {made.ended}" if made.left_with else "it made no tensor there; map=cuda:mps maps CUDA's"
        return CANNOT_TELL, f"nothing of this program came to MPS: {why}"
    if made.left_with:
        return CANNOT_TELL, f"nothing left the GPU until the program {made.ended}{waits}"
    if made.doubts:
        return CANNOT_TELL, f"cannot tell: {made.doubts[0]}"
    return OK, f"nothing of this program leaves the GPU{waits}"


def _findings(title: str, found: list[ProgramFinding]) -> Section:
    rows = [
        [
            f.where or "unknown",
            f.op if f.op.split(".")[0] == f.called_as or not f.called_as else f"{f.called_as} ({f.op})",
            f.kind.value if f.kind is not FindingKind.SYNC else "to the host" if f.to_host else "to the device",
            str(f.calls),
            f"{f.ms:.2f}",
            size(f.bytes) if f.bytes else "",
            f.source,
        ]
        for f in found
    ]
    return section(title, ["where", "operator", "why", "calls", "ms", "copied", "line"], rows)
