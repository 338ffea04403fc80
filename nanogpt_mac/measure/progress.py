"""How far the rounds are, on a terminal: a bar over the runs, and the time that is left, counted down as it goes by."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


class Bar:
    """Shown while it is open, below what is printed; where standard output is no terminal, nothing is."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), _Left()
        console, off = Console(), not sys.stdout.isatty()
        # Once a second: the processes that are timed have the same cores.
        self._progress = Progress(*columns, console=console, refresh_per_second=1, transient=True, disable=off)
        self._task = self._progress.add_task("", visible=False, ends=0.0, rest_s=0.0)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def run(self, label: str, done: int, runs: int, run_s: float, rest_s: float) -> None:
        """The next of `runs` begins, after `done`; it is expected to take `run_s`, those after it `rest_s` seconds."""
        ends = time.monotonic() + run_s
        self._progress.update(self._task, visible=True, description=label, completed=done, total=runs)
        self._progress.update(self._task, ends=ends, rest_s=rest_s)


class _Left(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        overdue = max(task.fields["ends"] - time.monotonic(), 0.0)
        return Text(f"{minutes(overdue + task.fields['rest_s'])} left")


def minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
