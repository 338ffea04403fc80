"""A run in a child process, watched while it works: ended where it hangs or takes too long, and why it failed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from nanogpt_mac import child
from nanogpt_mac.records.run import RunState

POLL_S = 0.1  # seldom enough to leave the cores alone
GRACE_S = 60.0  # for a run that was asked to end to finish its iteration
FEWEST_PILOT = 4  # iterations, before a pilot run is asked to end

OOM = re.compile(r"out of memory|MemoryError|bad_alloc|an(no|')t allocate memory", re.IGNORECASE)  # of any program


@dataclass(frozen=True)
class Limits:
    """Seconds. What is exceeded ends the run."""

    first: float  # without any sign of life until the first iteration is recorded, which compiles
    stall: float  # without one after that
    total: float
    enough: float | None = None  # of iterations, after which it is asked to end, and counts with those it has done
    fewest: int = FEWEST_PILOT  # iterations, before it is asked


@dataclass(frozen=True)
class Ending:
    state: RunState  # done, failed, timeout, oom or missing_op
    code: int | None
    reason: str | None  # one line
    seconds: float
    cut: bool = False  # it was asked to end, and did


def supervise(
    argv: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    limits: Limits,
    signs: Mapping[str, re.Pattern[str]] | None = None,
) -> Ending:
    """Run `argv`, which writes a run into `folder`; its output goes to log.txt there. Never leaves a process behind.

    `signs` are the states, by name, that a line of the log means in the words of the program that runs.
    """
    begun = time.monotonic()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,  # mlx.launch reads it, and would spin at its end
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
        child.end(process.pid)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        (folder / "process.json").unlink(missing_ok=True)
    seconds = time.monotonic() - begun
    code = process.returncode
    if overdue:
        return Ending(RunState.TIMEOUT, code, overdue, seconds)
    well = (0, 128 + signal.SIGTERM, -signal.SIGTERM) if asked else (0,)  # the last: asked when it was done anyway
    if code in well and (folder / "summary.json").exists():
        return Ending(RunState.DONE, code, None, seconds, cut=code == 128 + signal.SIGTERM)
    state, reason = _why(code, (folder / "log.txt").read_text(errors="replace"), signs or {})
    return Ending(state, code, reason, seconds)


def clear(folder: Path) -> None:
    """Remove what a run that was cut off left behind, its process included, where that outlived us."""
    with suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        noted = json.loads((folder / "process.json").read_text())
        # Not one that got its number. By its arguments, which name this folder: its age changes when the clock is set.
        if noted["arguments"] and psutil.Process(noted["pid"]).cmdline()[1:] == noted["arguments"]:
            child.end(noted["pid"])
    shutil.rmtree(folder, ignore_errors=True)


def _watch(process: subprocess.Popen[bytes], folder: Path, limits: Limits, begun: float) -> tuple[str | None, bool]:
    """Wait for the end of the process; (why it must be ended, whether it was asked to end, having done enough)."""
    signs, alive = (0, 0), begun
    count, iterating, asked = 0, None, None
    while process.poll() is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        seen = (_size(folder / "metrics.jsonl"), _size(folder / "log.txt"))
        if seen != signs:
            signs, alive, count = seen, now, iterations(folder)
        if count and iterating is None:
            iterating = now
        patience = limits.stall if count else limits.first
        if asked is not None:
            patience = max(patience, GRACE_S)
        if now - alive > patience:
            return f"no sign of life for {now - alive:.0f} s, {_after(count)}: ended as hung", False
        if now - begun > limits.total:
            return f"not done within {now - begun:.0f} s, {_after(count)}: ended", False
        done = limits.enough is not None and iterating is not None and now - iterating > limits.enough
        if done and asked is None and count >= limits.fewest:
            asked = now
            process.send_signal(signal.SIGTERM)
    return None, asked is not None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def iterations(folder: Path) -> int:
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


def _why(code: int, log: str, signs: Mapping[str, re.Pattern[str]]) -> tuple[RunState, str]:
    """State and one-line reason of a run that ended by itself with `code`, from the log that it left."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for state, pattern in ((RunState.OOM, OOM), *signs.items()):
        found = [line for line in lines if pattern.search(line)]
        if found and code != 2:
            return RunState(state), child.shortened(found[-1])
    if code < 0:
        name = child.signal_name(-code)
        if -code == signal.SIGKILL:
            return RunState.OOM, f"killed by {name}, probably out of memory"
        return RunState.FAILED, f"crashed ({name})" + (f": {child.shortened(lines[-1])}" if lines else "")
    diverged = [line for line in lines if "training has diverged" in line]
    raised = [line for line in lines if child.RAISED.match(line)]
    words = child.shortened((diverged or raised or lines or ["it printed nothing"])[-1])
    return RunState.FAILED, words if code else f"left no summary: {words}"
