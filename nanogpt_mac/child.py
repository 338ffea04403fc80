"""One run in a process of its own: started, watched, ended when it hangs, and its ending put into words."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.1  # seldom enough to leave the cores alone
GRACE_S = 60.0  # for a run that was asked to end to finish its iteration
ROOM = 64 * 1024  # bytes; less is a full disk
FEWEST_PILOT = 4  # iterations, before a pilot run is asked to end

# The line of a log that says why, by the state that it means; the first that is found, from the end of the log.
OOM = re.compile(
    r"out of memory|MemoryError|bad_alloc|annot allocate memory|can't allocate memory|not enough memory"
    r"|Insufficient Memory|failed to allocate",
    re.IGNORECASE,
)
MISSING = re.compile(
    r"not currently (implemented|supported) (for|on) the MPS|not implemented for ['\"]|NotImplementedError"
    r"|not supported on MPS|(No|no) Metal kernel|Unable to load kernel",
)
RAISED = re.compile(r"^(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Fault)\w*\b")


@dataclass(frozen=True)
class Limits:
    """Seconds. What is exceeded ends the run."""

    first: float  # without any sign of life until the first iteration is recorded, which compiles
    stall: float  # without one after that
    total: float
    enough: float | None = None  # a pilot run: of iterations, after which it is asked to end


@dataclass(frozen=True)
class Ending:
    state: str  # done, failed, timeout, oom, missing_op
    code: int | None
    reason: str | None  # one line
    seconds: float


def run(argv: Sequence[str], folder: Path, environment: Mapping[str, str], limits: Limits) -> Ending:
    """Run `argv`, which writes a run into `folder`; its output goes to log.txt there. Never leaves a process behind."""
    begun = time.monotonic()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on, and helpers of the run end with it
        )
    overdue, asked = None, False
    try:
        _note(process.pid, argv, folder)
        overdue, asked = _watch(process, folder, limits, begun)
    finally:
        _end(process.pid)
        process.wait()
        (folder / "process.json").unlink(missing_ok=True)
    seconds = time.monotonic() - begun
    code = process.returncode
    if overdue:
        return Ending("timeout", code, overdue, seconds)
    well = (0, 128 + signal.SIGTERM, -signal.SIGTERM) if asked else (0,)  # the last: asked when it was done anyway
    if code in well and (folder / "summary.json").exists():
        return Ending("done", code, None, seconds)
    state, reason = _why(code, (folder / "log.txt").read_text(errors="replace"))
    return Ending(state, code, reason, seconds)


def clear(folder: Path) -> None:
    """Remove what a run that was cut off left behind, its process included, where that outlived us."""
    with suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        noted = json.loads((folder / "process.json").read_text())
        # Not one that got its number. By its arguments, which name this folder: its age changes when the clock is set.
        if noted["arguments"] and psutil.Process(noted["pid"]).cmdline()[1:] == noted["arguments"]:
            _end(noted["pid"])
    shutil.rmtree(folder, ignore_errors=True)


def _watch(process: subprocess.Popen[bytes], folder: Path, limits: Limits, begun: float) -> tuple[str | None, bool]:
    """Wait for the end of the process; (why it must be ended, whether it was asked to end, having done enough)."""
    signs, alive = (0, 0), begun
    iterations, iterating, asked = 0, None, None
    while process.poll() is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        seen = (_size(folder / "metrics.jsonl"), _size(folder / "log.txt"))
        if seen != signs:
            signs, alive, iterations = seen, now, _iterations(folder)
        if iterations and iterating is None:
            iterating = now
        patience = limits.stall if iterations else limits.first
        if asked is not None:
            patience = max(patience, GRACE_S)
        if now - alive > patience:
            return f"no sign of life for {now - alive:.0f} s, {_after(iterations)}: ended as hung", False
        if now - begun > limits.total:
            return f"not done within {now - begun:.0f} s, {_after(iterations)}: ended", False
        done = limits.enough is not None and iterating is not None and now - iterating > limits.enough
        if done and asked is None and iterations >= FEWEST_PILOT:
            asked = now
            process.send_signal(signal.SIGTERM)
    return None, asked is not None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _iterations(folder: Path) -> int:
    """How many iterations a run has recorded: it writes them every two seconds."""
    try:
        return (folder / "metrics.jsonl").read_text(errors="replace").count('"kind": "iteration"')
    except OSError:
        return 0


def _after(iterations: int) -> str:
    return f"after {iterations} recorded iterations" if iterations else "before the first iteration was recorded"


def _note(pid: int, argv: Sequence[str], folder: Path) -> None:
    """Who is running, for the next comparison, should this one be killed."""
    (folder / "process.json").write_text(json.dumps({"pid": pid, "arguments": list(argv[1:])}))


def _end(pid: int) -> None:
    """End the process and all of its session: a compiler's workers, whatever it started."""
    with suppress(ProcessLookupError, PermissionError):  # a Mac answers EPERM for a group of zombies
        os.killpg(pid, signal.SIGKILL)


def _why(code: int, log: str) -> tuple[str, str]:
    """State and one-line reason of a run that ended by itself with `code`, from the log that it left."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for state, pattern in (("oom", OOM), ("missing_op", MISSING)):
        found = [line for line in lines if pattern.search(line)]
        if found and code != 2:
            return state, _shortened(found[-1])
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        if -code == signal.SIGKILL:
            return "oom", f"killed ({name}) from outside, which systems do when memory runs out"
        return "failed", f"crashed ({name})" + (f": {_shortened(lines[-1])}" if lines else "")
    diverged = [line for line in lines if "training has diverged" in line]
    raised = [line for line in lines if RAISED.match(line)]
    said = (diverged or raised or lines or ["it said nothing"])[-1]
    return "failed", _shortened(said) if code else f"left no summary: {_shortened(said)}"


def _shortened(line: str, most: int = 240) -> str:
    line = re.sub(r"^(train\.py): ", "", " ".join(line.split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def require_room(folder: Path) -> None:
    """After a failure: OSError where the disk is full, which is nobody's fault and would fail everything to come."""
    if shutil.disk_usage(folder).free < ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def outcome(folder: Path) -> dict[str, Any] | None:
    """outcome.json of a run's folder, or None where the run has not ended."""
    try:
        found = json.loads((folder / "outcome.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def whole(folder: Path) -> bool:
    """Whether the records of a run that has ended hold all that is read from them again."""
    found = outcome(folder)
    try:
        if found is None or not 0 <= found["seconds"] < math.inf or not isinstance(found["state"], str):
            return False
        if found["state"] != "done":
            return isinstance(found["reason"], str)
        summary = json.loads((folder / "summary.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        times = [row["iter_ms"] for row in rows if row["kind"] == "iteration" and not row.get("left_out")]
        timing = summary["iter_ms"]
        figures = [summary["first_iter_s"], *([timing["median"], timing["min"], *times] if times else [])]
        return len(times) == timing.get("count", len(times)) and all(figure > 0 for figure in figures)
    except (OSError, ValueError, KeyError, TypeError):
        return False
