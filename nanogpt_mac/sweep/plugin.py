"""A sweep as its own process sees it: told by Hydra when it begins, and stopped by signals under any launcher."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

import nanogpt_mac
from nanogpt_mac import child, signals
from nanogpt_mac.records.sweep import MAXIMIZED, SPEEDS, Member, MemberState, Sweep
from nanogpt_mac.sweep.board import Board
from nanogpt_mac.sweep.report import verdict

POLL_S = 0.2


class Announced(Callback):
    """Hydra's callback (hydra.callbacks in conf/): a sweep begins."""

    current: Running | None = None  # the one of this process

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with suppress(OSError):  # the folder cannot be made, as its sweeper will find as well
            Announced.current = Running(config)


class Running:
    """A sweep under way: its board, and what its process does with signals. `close` ends it."""

    def __init__(self, config: DictConfig) -> None:
        sweeper = config.hydra.sweeper
        objective = config.get("objective")
        direction = getattr(sweeper.get("direction"), "name", sweeper.get("direction"))
        if not isinstance(direction, str):
            direction = "maximize" if objective in MAXIMIZED else "minimize"
        self.sweep = Sweep(
            version=nanogpt_mac.__version__,
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
            launcher=name_of(config.hydra.launcher),
            sweeper=name_of(sweeper),
            objective=objective,
            direction=direction,
            shared_machine=side_by_side(config.hydra.launcher),
        )
        self.board = Board(Path(config.hydra.sweep.dir).absolute())
        self.board.begin(self.sweep)
        self._advise()
        named = any(o.split("=")[0].endswith("max_failure_rate") for o in config.hydra.overrides.hydra)
        if sweeper.get("max_failure_rate") == 0 and not named:  # the plugins' default: the first failure would end all
            with read_write(config):
                sweeper.max_failure_rate = 1.0
        # Workers import what this process runs, wherever that lies.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(child.ROOT), os.environ.get("PYTHONPATH", "")]))
        self.signum: int | None = None
        self._closing = False
        self._previous = {s: signal.signal(s, self._signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)
        self._over = threading.Event()
        self._patient = ExitStack()
        self._patient.enter_context(signals.patience(signals.CHECKPOINT_S))  # members may be writing theirs
        if self.sweep.shared_machine:
            # Ctrl-C reaches a launcher's workers as well, and those without work would die of it, the rest with them.
            # What is blocked here is blocked in all that is started from here, but not in this one thread. Resource
            # trackers lift the block when they start, so they start now.
            resource_tracker.ensure_running()
            with suppress(ImportError):
                from joblib.externals.loky.backend import resource_tracker as lokys

                lokys.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            threading.Thread(target=self._take_interrupts, daemon=True).start()

    def close(self, complete: bool) -> Sweep:
        """Wait for members that were asked to end, and write the last of the records."""
        self._closing = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        while self.signum is not None and self.board.running():
            time.sleep(POLL_S)
        self._over.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._patient.close()
        return self.board.close(self.signum, complete and self.signum is None)

    def _signal(self, signum: int, frame: Any) -> None:
        self.signum = self.signum or signum
        self.board.stop(signum)
        if not self._closing:
            signal.setitimer(signal.ITIMER_REAL, POLL_S, POLL_S)
        self._look(signum, frame)

    def _look(self, _signum: int, _frame: Any) -> None:
        if not self._closing and not self.board.running():
            self._closing = True
            raise KeyboardInterrupt

    def _take_interrupts(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._over.wait()

    def _advise(self) -> None:
        """What a sweeper will not find the way it is asked."""
        sweep = self.sweep
        if sweep.shared_machine and sweep.objective in SPEEDS:
            print(
                f"objective={sweep.objective}: hydra/launcher={sweep.launcher} runs members side by side, which slows "
                "them down, so none is called best; use hydra/launcher=basic",
                file=sys.stderr,
            )
        if sweep.objective in MAXIMIZED and sweep.direction == "minimize":
            print(f"objective={sweep.objective}: its sweeper looks for the lowest; use "
                  "hydra.sweeper.direction=maximize", file=sys.stderr)  # fmt: skip


def side_by_side(launcher: DictConfig) -> bool:
    """Whether a launcher may run several members at once on one machine: any but Hydra's own, or joblib's with one."""
    name = name_of(launcher)
    return name != "basic" and not (name == "joblib" and launcher.get("n_jobs") == 1)


def name_of(plugin: DictConfig) -> str:
    """As `hydra/launcher=` and `hydra/sweeper=` spell it, as far as a class's name tells: basic, joblib, optuna."""
    module, _, name = str(plugin.get("_target_", "")).rpartition(".")
    short = name.removesuffix("Launcher").removesuffix("Sweeper").lower()
    return f"submitit_{short}" if "submitit" in module else short


def say(sweep: Sweep, folder: Path) -> int:
    """Say how every member ended; 0 when all did well, 2 when all that failed were given bad input, else 1."""
    print("== sweep")
    for member in sweep.members:
        print(f"{member.number}: {member.title}: {_how(member, sweep)}")
    if sweep.objective and len(sweep.members) > 1:
        print(verdict(sweep))
    print(f"sweep: {folder} (python report.py {folder})")
    bad = [member for member in sweep.members if member.state is not MemberState.DONE]
    if not sweep.members:
        print(f"no member has left a record in {folder}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(sweep.members)} failed", file=sys.stderr)
    if not bad and sweep.members:
        return 0
    return 2 if bad and all(member.code == 2 for member in bad) else 1


def _how(member: Member, sweep: Sweep) -> str:
    if member.state is MemberState.DONE:
        known = member.objective is not None
        return f"done, {sweep.objective}={member.objective:.6g}" if known else "done"
    if member.state is MemberState.STOPPED:
        return "stopped" if member.code is not None else "not started"
    words = member.state if member.state is MemberState.BAD_INPUT else member.state.upper()
    return words if member.code is None else f"{words} (exit code {member.code})"
