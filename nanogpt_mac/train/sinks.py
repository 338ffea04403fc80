"""Where a run's records go: its folder, wandb, and whatever else follows `Sink`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.fallbacks import report
from nanogpt_mac.files import named, plain, write_json
from nanogpt_mac.records.base import first
from nanogpt_mac.records.fallbacks import Fallbacks
from nanogpt_mac.records.run import EvaluationRow, EventRow, IterationRow, RunFacts, RunSummary, row_line

FLUSH_S = 2.0
OVERDUE_S = 60.0
ANOTHER_RUNS = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
READ_HERE = {f"WANDB_{name}" for name in ("MODE", "DISABLED", "PROJECT", "ENTITY", "RUN_GROUP", "NAME", "TAGS")}
HARMLESS = re.compile(r"[A-Za-z0-9_. -]{1,64}")  # a text that wandb takes as any of its names
PERF = ("iter_ms", "dispatch_ms", "tokens_per_s", "mfu", "mfu_measured", "mfu_a100")

Row = IterationRow | EvaluationRow | EventRow


class Sink:
    """Takes what a run writes down. This one drops it all: it is what a run without wandb has in wandb's place."""

    def row(self, row: Row) -> None:
        """Keep a row; the clock runs, so nothing slow."""

    def tick(self) -> None:
        """After every iteration: write what is cheap to write while the clock runs."""

    def flush(self) -> None:
        """Write everything: the clock is stopped."""

    def overdue(self) -> bool:
        """Whether rows have waited so long that the clock should be stopped for them."""
        return False

    def fallbacks(self, document: Fallbacks, iteration: int) -> None:
        """What the fallback detector found before training."""

    def summary(self, summary: RunSummary) -> None:
        """The last word."""

    def close(self) -> None:
        """Nothing more will come. What takes long may go on behind this, until `wait`."""

    def wait(self) -> None:
        """Return once everything is where it belongs."""


class Folder(Sink):
    """metrics.jsonl, fallbacks.json and summary.json of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = (folder / "metrics.jsonl").open("a")
        self._rows: list[Row] = []  # not yet in the file
        self._flushed = time.monotonic()

    def row(self, row: Row) -> None:
        self._rows.append(row)

    def tick(self) -> None:
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        with named(self.folder / "metrics.jsonl"):
            self._file.writelines(map(row_line, self._rows))
            self._file.flush()
        self._rows.clear()
        self._flushed = time.monotonic()

    def fallbacks(self, document: Fallbacks, iteration: int) -> None:
        write_json(self.folder / "fallbacks.json", document.document())

    def summary(self, summary: RunSummary) -> None:
        write_json(self.folder / "summary.json", summary.document())

    def close(self) -> None:
        self._file.close()


class Wandb(Sink):
    """The same numbers under train/, val/, perf/ and system/. A row costs wandb 0.25 ms, so all wait for a flush.

    `run` is wandb's, or what opens it. Then it is opened behind the first iteration, with the clock stopped: that takes
    a second, which nobody who starts a run should wait for. A refusal is InputError out of `flush`.
    """

    def __init__(self, run: Any) -> None:
        self._open: Callable[[], Any] | None = run if callable(run) else None
        self._run = None if callable(run) else run
        self._rows: list[Row] = []
        self._found: tuple[Fallbacks, int] | None = None
        self._finished: Future[Any] | None = None
        self._flushed = time.monotonic()

    def row(self, row: Row) -> None:
        self._rows.append(row)

    def flush(self) -> None:
        if self._open is not None and self._begun():
            self._start()
        if self._run is None:
            return
        for row in self._rows:
            if figures := _figures(row):
                self._run.log(figures, step=row.iter)
        self._rows.clear()
        self._flushed = time.monotonic()

    def _begun(self) -> bool:
        return any(isinstance(row, IterationRow) for row in self._rows)

    def _start(self) -> None:
        opens, self._open = self._open, None  # once, whatever comes of it
        if opens is not None:
            self._run = opens()
            if self._found is not None:
                self.fallbacks(*self._found)

    def overdue(self) -> bool:
        return time.monotonic() - self._flushed > OVERDUE_S or (self._open is not None and self._begun())

    def fallbacks(self, document: Fallbacks, iteration: int) -> None:
        if self._run is None:
            self._found = document, iteration
            return
        import wandb

        table = wandb.Table(columns=list(report.COLUMNS), data=report.rows(document))
        figures = {"fallbacks/findings": len(document.findings), "fallbacks/complete": document.complete}
        self._run.log({"fallbacks": table, **figures}, step=iteration)

    def summary(self, summary: RunSummary) -> None:
        self._start()  # of a run that ended before its first iteration
        self.flush()
        if self._run is None:
            return
        figures = summary.document()
        figures["iter_ms"] = figures.pop("times")  # its name in wandb since the first version
        self._run.summary.update({f"summary/{key}": value for key, value in figures.items()})

    def close(self) -> None:
        if self._run is not None:
            behind = ThreadPoolExecutor(1)  # half a second, in which a sample can be drawn
            self._finished = behind.submit(self._run.finish)
            behind.shutdown(wait=False)

    def wait(self) -> None:
        if self._finished is not None:
            self._finished.result()


def open_wandb(config: Config, folder: Path, facts: RunFacts, late: bool = False) -> Sink:
    """wandb as its keys, and where they are null its own variables, ask for it. InputError where it refuses.

    `late`: it may be opened behind the first iteration, and is where it has nothing to refuse: offline, under names
    without anything unusual, and with no other variable of its own set.
    """
    w, mode = config.wandb, config.wandb.mode_here()
    if mode == "disabled":
        return Sink()
    given = os.environ.get
    names: dict[str, Any] = {
        "project": w.project or given("WANDB_PROJECT") or "nanogpt-mac",
        "entity": w.entity or given("WANDB_ENTITY"),
        "group": w.group or given("WANDB_RUN_GROUP"),
        "name": w.name or given("WANDB_NAME") or folder.name,
    }
    tags = [*(w.tags or filter(None, given("WANDB_TAGS", "").split(","))), facts.backend, facts.corpus]

    def opened() -> Any:
        import wandb

        with _an_id_of_its_own(), _refused(folder, mode):
            return wandb.init(
                **names,
                tags=tags,
                mode=cast(Any, mode),
                dir=None if given("WANDB_DIR") else folder,
                config=asdict(config) | {"facts": plain(facts.model_dump())},
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )

    others = {name for name in os.environ if name.startswith("WANDB_")} - READ_HERE - {*ANOTHER_RUNS}
    harmless = mode == "offline" and not others and all(map(HARMLESS.fullmatch, filter(None, [*names.values(), *tags])))
    return Wandb(opened if late and harmless else opened())


@contextmanager
def _refused(folder: Path, mode: str) -> Iterator[None]:
    """Within, wandb's errors are InputError, after which `folder` is removed, but for what the user has there."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, ValidationError) as error:
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()
        why = first(error) if isinstance(error, ValidationError) else reason(error)
        raise InputError(f"wandb.mode={mode}: {why}; without an account use offline or disabled") from error


@contextmanager
def _an_id_of_its_own() -> Iterator[None]:
    """Within, what is left in the shell of another run is not there: it would make several runs one in wandb.

    `wandb agent` gives every run of its sweep an id, which stays.
    """
    names = [] if os.environ.get("WANDB_SWEEP_ID") else [name for name in ANOTHER_RUNS if name in os.environ]
    left_out = {name: os.environ.pop(name) for name in names}
    if left_out:
        print(f"{', '.join(names)}: left out; every run here has an id of its own in wandb", file=sys.stderr)
    try:
        yield
    finally:
        os.environ.update(left_out)


def _figures(row: Row) -> dict[str, float]:
    """A row in wandb's names; it has no null, so a figure that is not known is not logged."""
    if isinstance(row, EvaluationRow):
        return {"val/loss": row.val_loss, "val/train_loss": row.train_loss, "val/seconds": row.seconds}
    if isinstance(row, EventRow):
        facts = row.model_dump(exclude={"iter"})
        return {f"system/{key}": value for key, value in facts.items() if isinstance(value, int | float)}
    figures = {"train/loss": row.loss, "train/lr": row.lr, "train/grad_norm": row.grad_norm}
    figures |= {f"perf/{key}": value for key in PERF if (value := getattr(row, key)) is not None}
    return figures | {"system/memory": row.memory}
