"""A sweep's folder, which is all that its processes share: sweep.json, sweep.md, and a request to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from nanogpt_mac.files import lock, write_aside, write_json
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.run import ExitState, RunSummary
from nanogpt_mac.records.sweep import Member, MemberState, Sweep

STOPPED = {128 + s for s in (signal.SIGINT, signal.SIGTERM)} | {-s for s in (signal.SIGINT, signal.SIGTERM)}


@dataclass(frozen=True)
class Board:
    """The records in `folder`, written by whichever process has news, one at a time."""

    folder: Path

    @property
    def _stop(self) -> Path:
        return self.folder / ".stop"

    def begin(self, sweep: Sweep) -> None:
        """Write the records of a new sweep over those of one that lay here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stop.unlink(missing_ok=True)
        self._write(sweep)

    def read(self) -> Sweep:
        return Sweep.load(self.folder / "sweep.json")

    def note(self, member: Member) -> Member:
        """Keep what is known of one member now."""

        def noted(sweep: Sweep) -> Sweep:
            others = [other for other in sweep.members if other.number != member.number]
            members = tuple(sorted([*others, member], key=lambda m: m.number))
            return sweep.model_copy(update={"members": members})

        self._change(noted)
        return member

    def close(self, signum: int | None, complete: bool) -> Sweep:
        """Nothing runs any more: what a member's own process could not write is put down, and how it all ended."""

        def closed(sweep: Sweep) -> Sweep:
            members = tuple(self._left(m) if m.state is MemberState.RUNNING else m for m in sweep.members)
            name = signal.Signals(signum).name if signum else None
            return sweep.model_copy(update={"members": members, "signal": name, "complete": complete})

        self._stop.unlink(missing_ok=True)
        return self._change(closed)

    def remove(self) -> None:
        """Of a sweep that was refused: nothing of ours stays."""
        for name in ("sweep.json", "sweep.md", ".lock"):
            (self.folder / name).unlink(missing_ok=True)

    def running(self) -> bool:
        """Whether a member trains, or the process that waits for it has yet to write down how it ended."""
        return any(m.state is MemberState.RUNNING and _alive(m) for m in self.read().members)

    def stop(self, signum: int) -> None:
        """Ask every member to end, and none to begin; a second time as a second signal would."""
        with self._stop.open("a") as file:
            file.write(f"{signum}\n")

    def asked(self) -> list[int]:
        """The signals that have been asked for."""
        try:
            return [int(line) for line in self._stop.read_text().split()]
        except FileNotFoundError:
            return []

    def _left(self, member: Member) -> Member:
        """A member whose waiting process was killed, from what its run left behind."""
        place = next(iter(sorted(self.folder.glob(f"{member.number}-*"))), None)
        summary = summary_in(place)
        stopped = summary and summary.exit_state is ExitState.STOPPED
        state = MemberState.STOPPED if stopped else MemberState.FAILED
        return member.model_copy(update={"state": state, "folder": str(place) if place else None})

    def _change(self, change: Callable[[Sweep], Sweep]) -> Sweep:
        with lock(self.folder / ".lock"):
            return self._write(change(self.read()))

    def _write(self, sweep: Sweep) -> Sweep:
        from nanogpt_mac.report.show import markdown
        from nanogpt_mac.sweep.report import report

        best = sweep.found_best()
        sweep = sweep.model_copy(update={"best": best.number if best else None})
        write_json(self.folder / "sweep.json", sweep.document())
        write_aside(self.folder / "sweep.md", markdown(report(sweep)))
        return sweep


def summary_in(folder: Path | None) -> RunSummary | None:
    try:
        return RunSummary.load(folder / "summary.json") if folder else None
    except (FileNotFoundError, DamagedError):
        return None


def _alive(member: Member) -> bool:
    if member.host != socket.gethostname():
        return True
    return any(pid is not None and _pid_alive(pid) for pid in (member.waiter, member.process))


def _pid_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
