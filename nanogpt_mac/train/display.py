"""What the terminal shows: a progress bar on a terminal, nanoGPT's lines anywhere else."""

from __future__ import annotations

import os
import sys
from typing import Any

from nanogpt_mac.train.clock import Completion


def say(text: str) -> None:
    """Print a line; where `| head` has seen enough the run goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Lines:
    """nanoGPT's own format, one line an interval."""

    def __init__(self, total: int, interval: int) -> None:
        self.total, self.interval = total, interval

    def iteration(self, done: Completion, mfu: float | None) -> None:
        if done.iteration % self.interval == 0:
            shown = "n/a" if mfu is None else f"{mfu * 100:.2f}%"
            self.say(f"iter {done.iteration}: loss {done.loss:.4f}, time {done.iter_ms:.2f}ms, mfu {shown}")

    def evaluation(self, iteration: int, train_loss: float, val_loss: float) -> None:
        self.say(f"step {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")

    def say(self, text: str) -> None:
        say(text)

    def close(self) -> None:
        pass


class Bar(Lines):
    """A live bar with iteration, loss, time, MFU and ETA; what is said stays above it."""

    def __init__(self, total: int, interval: int, start: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        super().__init__(total, interval)
        columns: list[Any] = [TextColumn("iter {task.completed}/{task.total}"), BarColumn(), TaskProgressColumn()]
        columns += [TextColumn("{task.fields[figures]}"), TextColumn("ETA"), TimeRemainingColumn()]
        self.progress = Progress(*columns, refresh_per_second=4)
        self.task = self.progress.add_task("train", total=total, completed=start, figures="compiling, first iteration")
        self.progress.start()

    def iteration(self, done: Completion, mfu: float | None) -> None:
        shown = "n/a" if mfu is None else f"{mfu * 100:.1f}%"
        figures = f"loss {done.loss:.4f}  {done.iter_ms:.1f} ms  mfu {shown}"
        self.progress.update(self.task, completed=done.iteration + 1, figures=figures)

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def make(total: int, interval: int, start: int) -> Lines:
    return Bar(total, interval, start) if sys.stdout.isatty() else Lines(total, interval)
