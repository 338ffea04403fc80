"""What the terminal shows: a progress bar on a terminal, nanoGPT's lines anywhere else."""

from __future__ import annotations

import os
import sys
from typing import Any

from nanogpt_mac.records.run import EvaluationRow, EventRow, IterationRow
from nanogpt_mac.train.sinks import Row, Sink


def say(text: str) -> None:
    """Print a line; where `| head` has seen enough the run goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Lines(Sink):
    """nanoGPT's own format: a line every `interval` iterations, and one an evaluation."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def row(self, row: Row) -> None:
        if isinstance(row, IterationRow):
            self.iteration(row)
        elif isinstance(row, EvaluationRow):
            self.say(f"step {row.iter}: train loss {row.train_loss:.4f}, val loss {row.val_loss:.4f}")
        elif isinstance(row, EventRow) and row.event == "diverged":
            loss = (row.model_extra or {})["loss"]
            self.say(f"iter {row.iter}: loss is {loss}: training has diverged and stops here")
        elif isinstance(row, EventRow) and row.event == "one_in_flight":
            held = (row.model_extra or {})["bytes"]
            self.say(f"an iteration takes {held / 1e9:.3g} GB, and two do not fit: each is waited for before the next")

    def iteration(self, row: IterationRow) -> None:
        if row.iter % self.interval == 0:
            self.say(f"iter {row.iter}: loss {row.loss:.4f}, time {row.iter_ms:.2f}ms, mfu {_mfu(row, 2)}")

    def say(self, text: str) -> None:
        say(text)


class Silent(Lines):
    """Of a rank that another one speaks for."""

    def say(self, text: str) -> None:
        pass


class Bar(Lines):
    """A live bar with iteration, loss, time, MFU and ETA; what is said stays above it."""

    def __init__(self, total: int, start: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        super().__init__(interval=1)
        columns: list[Any] = [TextColumn("iter {task.completed}/{task.total}"), BarColumn(), TaskProgressColumn()]
        columns += [TextColumn("{task.fields[figures]}"), TextColumn("ETA"), TimeRemainingColumn()]
        self.progress = Progress(*columns, refresh_per_second=4)
        self.task = self.progress.add_task("train", total=total, completed=start, figures="compiling, first iteration")
        self.progress.start()

    def iteration(self, row: IterationRow) -> None:
        figures = f"loss {row.loss:.4f}  {row.iter_ms:.1f} ms  mfu {_mfu(row, 1)}"
        self.progress.update(self.task, completed=row.iter + 1, figures=figures)

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def make(total: int, interval: int, start: int) -> Lines:
    return Bar(total, start) if sys.stdout.isatty() else Lines(interval)


def _mfu(row: IterationRow, digits: int) -> str:
    """Against the chip's peak, or where that is not known the measured one."""
    share = row.mfu if row.mfu is not None else row.mfu_measured
    return "n/a" if share is None else f"{share * 100:.{digits}f}%"
