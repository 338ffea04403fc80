"""One member of a sweep: its command in a process of its own, and what came of it."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanogpt_mac import child, composed, files
from nanogpt_mac.records.run import ExitState, RunSummary
from nanogpt_mac.records.sweep import Member, MemberState
from nanogpt_mac.sweep.board import STOPPED, Board, summary_in


class MemberError(Exception):
    """A member gave no objective: how Hydra's sweepers hear of it."""


@dataclass(frozen=True)
class Job:
    """What Hydra says of one member. `folder` is the run's pattern; `cwd` and `program` are the command line's."""

    number: int
    overrides: tuple[str, ...]
    folder: str
    program: str
    cwd: str
    search_path: tuple[str, ...]
    shared_machine: bool


def run(job: Job, config: Any, board: Board) -> Member:
    """Run one member: nothing leaks to the next, and a crash ends only it. Its run lies in `job.folder` unless
    `config.run_dir` is another than the usual. A request to stop is handed on to it."""
    member = Member(number=job.number, overrides=job.overrides, state=MemberState.STOPPED)
    if board.asked():
        return board.note(member)
    print(f"== sweep member {job.number}: {member.title}", flush=True)
    known, given = {f.name: f.default for f in fields(config)}, list(getattr(config, "given", ()))
    if "run_dir" in known and config.run_dir == known["run_dir"]:
        config = replace(config, run_dir=job.folder)
    if job.shared_machine and "shared_machine" in known:
        config = replace(config, shared_machine=True, given=[*given, "shared_machine=true"])
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanogpt-mac-") as scratch:
        told = Path(scratch) / "folder"
        arguments = composed.write(Path(scratch) / "composed.json", config, job.search_path)
        running = member.model_copy(
            update={"state": MemberState.RUNNING, "host": socket.gethostname(), "waiter": os.getpid()}
        )
        board.note(running)
        code = child.attend(
            [sys.executable, job.program, *arguments],
            environment | {files.TELL: str(told)},
            job.cwd,
            asked=board.asked,
            begun=lambda pid: board.note(running.model_copy(update={"process": pid})),
        )
        folder = Path(job.cwd, told.read_text()) if told.exists() else None
    summary = summary_in(folder)
    return board.note(
        member.model_copy(
            update={
                "state": _state(code, summary, board.asked()),
                "code": code,
                "objective": objective(summary, getattr(config, "objective", None)) if not code else None,
                "folder": str(folder) if folder else None,
                "seconds": time.monotonic() - began,
            }
        )
    )


def refused(job: Job, board: Board) -> Member:
    """A member whose config cannot be meant."""
    return board.note(Member(number=job.number, overrides=job.overrides, state=MemberState.BAD_INPUT, code=2))


def returned(member: Member, basic: bool) -> float | None:
    """What Hydra's task returns for `member`: its objective.

    Without one, `MemberError`, by which sweepers that learn know a failure; Hydra's `basic` one, which would leave out
    all batches to come, gets a NaN.
    """
    if member.state is MemberState.DONE:
        return member.objective
    if basic:
        return math.nan
    raise MemberError(f"member {member.number}: {member.state}")


def objective(summary: RunSummary | None, name: str | None) -> float | None:
    """The figure of a run that its sweep is about; None where it has none."""
    if summary is None or name is None:
        return None
    return summary.times.median if name == "iter_ms" else getattr(summary, name)


def ignore_interrupts() -> None:
    """In a worker of a launcher: Ctrl-C reaches every process of a terminal, and the sweep's own asks members to end.

    SIGTERM, a cluster's, ends the member well and then this process.
    """
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which members would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as they would the mask (plugin.py)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _state(code: int, summary: RunSummary | None, asked: Sequence[int]) -> MemberState:
    if code in STOPPED and (asked or code > 0):
        return MemberState.STOPPED
    if summary and summary.exit_state is ExitState.DIVERGED:
        return MemberState.DIVERGED
    return {0: MemberState.DONE, 2: MemberState.BAD_INPUT}.get(code, MemberState.FAILED)
