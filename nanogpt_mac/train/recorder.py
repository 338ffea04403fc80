"""What a run leaves behind: its folder, one row an iteration, a summary, and the same numbers in wandb."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac.errors import InputError
from nanogpt_mac.train.clock import Completion

SCHEMA = 1
FLUSH_SECONDS = 2.0


@dataclass(frozen=True)
class Work:
    """What one iteration computes, and what its rate is held against. A denominator of None is not known."""

    flops: float  # model FLOPs an iteration
    tokens: int
    peaks: dict[str, float | None]  # mfu, mfu_measured, mfu_a100 -> FLOP/s

    def mfu(self, iter_ms: float) -> dict[str, float | None]:
        """Model FLOPs utilisation, 0..1, against each denominator."""
        rate = self.flops / (iter_ms / 1e3)
        shares = {key: rate / peak if peak else None for key, peak in self.peaks.items()}
        if (shares["mfu_measured"] or 0) > 1:  # more than the best matmul reached here: peak or time is wrong
            shares["mfu_measured"] = None
        return shares


def make_folder(pattern: str, name: str) -> Path:
    """Make the run's folder from `pattern` ({date}, {time}, {name}); a taken name gets a number, a given one does not.

    InputError when a folder that was named outright already holds a run.
    """
    now = datetime.now()
    text = pattern.replace("{date}", now.strftime("%Y-%m-%d")).replace("{time}", now.strftime("%H-%M-%S"))
    folder = Path(text.replace("{name}", name))
    is_pattern = any(name in pattern for name in ("{date}", "{time}", "{name}"))
    if not is_pattern and (folder / "metrics.jsonl").exists():
        raise InputError(f"run_dir={pattern}: already holds a run; allowed is a new or an empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                candidate.mkdir()
            except FileExistsError:
                if is_pattern:
                    continue
            break
        if not os.access(candidate, os.W_OK | os.X_OK) or not candidate.is_dir():
            raise PermissionError(errno.EACCES, "not a folder that can be written", str(candidate))
    except OSError as error:
        raise InputError(f"run_dir={pattern}: cannot be made: {error.strerror}: {error.filename}") from error
    return candidate


class Recorder:
    """Rows are kept in memory while the clock runs and written where it does not."""

    def __init__(self, folder: Path, work: Work, wandb_run: Any = None) -> None:
        self.folder, self.work, self.wandb = folder, work, wandb_run
        self._file = (folder / "metrics.jsonl").open("a")
        self._rows: list[dict[str, Any]] = []  # not yet in the file
        self._unlogged: list[dict[str, Any]] = []  # not yet in wandb
        self._iter_ms: list[float] = []
        self._left_out: Counter[str] = Counter()
        self._first_ms: float | None = None
        self._impossible = 0  # iterations faster than the measured peak allows
        self._flushed = self._flushed_wandb = time.monotonic()
        self.evaluations: list[dict[str, Any]] = []
        self.peak_memory = 0

    def iteration(self, done: Completion, lr: float, memory: dict[str, int]) -> dict[str, float | None]:
        """Keep one finished iteration; return its MFUs."""
        mfu = self.work.mfu(done.iter_ms)
        row = {
            "kind": "iteration",
            "iter": done.iteration,
            "loss": done.loss,
            "lr": lr,
            "grad_norm": done.grad_norm,
            "iter_ms": done.iter_ms,
            "dispatch_ms": done.dispatch_ms,
            "tokens_per_s": self.work.tokens / done.iter_ms * 1e3,
            **mfu,
            "memory": memory["current"],
        }
        if done.left_out is None:
            self._iter_ms.append(done.iter_ms)
            self._impossible += bool(self.work.peaks["mfu_measured"]) and mfu["mfu_measured"] is None
        else:
            row["left_out"] = done.left_out
            self._left_out[done.left_out] += 1
            if done.left_out == "first":
                self._first_ms = done.iter_ms
        self.peak_memory = max(self.peak_memory, memory["peak"])
        self._rows.append(row)
        self._unlogged.append(row)
        return mfu

    def evaluation(self, iteration: int, train_loss: float, val_loss: float, seconds: float) -> None:
        row = {"kind": "evaluation", "iter": iteration, "train_loss": train_loss, "val_loss": val_loss}
        row["seconds"] = seconds
        self.evaluations.append(row)
        self._rows.append(row)
        self._unlogged.append(row)

    def event(self, name: str, iteration: int, **facts: Any) -> None:
        row = {"kind": "event", "iter": iteration, "event": name, **facts}
        self._rows.append(row)
        self._unlogged.append(row)

    def fallbacks(self, document: dict[str, Any], iteration: int) -> None:
        """The fallback detector's document (docs/coverage.md): fallbacks.json, and a table in wandb."""
        write_json(self.folder / "fallbacks.json", document)
        if self.wandb is not None:
            import wandb

            from nanogpt_mac.fallbacks.report import COLUMNS, rows

            table = wandb.Table(columns=list(COLUMNS), data=rows(document))
            figures = {"fallbacks/findings": len(document["findings"]), "fallbacks/complete": document["complete"]}
            self.wandb.log({"fallbacks": table, **figures}, step=iteration)

    def flush_file(self) -> None:
        """Write rows to metrics.jsonl if some seconds have passed: cheap enough for a running clock."""
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._write_rows()

    def flush(self) -> None:
        """Write everything everywhere. Only while the clock is stopped: wandb takes 0.25 ms a row."""
        self._write_rows()
        if self.wandb is not None:
            for row in self._unlogged:
                figures = _wandb_figures(row)
                if figures:
                    self.wandb.log(figures, step=row["iter"])
        self._unlogged.clear()
        self._flushed_wandb = time.monotonic()

    def overdue(self) -> bool:
        """Whether wandb has waited for a minute: a run without evaluations pauses for it."""
        return self.wandb is not None and time.monotonic() - self._flushed_wandb > 60

    def _write_rows(self) -> None:
        self._file.writelines(json.dumps(_finite(row)) + "\n" for row in self._rows)
        self._file.flush()
        self._rows.clear()
        self._flushed = time.monotonic()

    def summary(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Figures over the whole run, merged with `facts`, written to summary.json and wandb."""
        self.flush()
        timing = _statistics(self._iter_ms)
        errors = list(facts.pop("errors", []))
        mfu = self.work.mfu(timing["median"]) if timing["median"] else dict.fromkeys(self.work.peaks)
        if self._impossible:
            errors.append(
                f"mfu_measured would be above 1 in {self._impossible} iterations: that is impossible, so the measured "
                "peak or the time is wrong; they have no figure"
            )
        best = min(self.evaluations, key=lambda row: row["val_loss"], default=None)
        compile_s = None
        if self._first_ms is not None and timing["median"]:
            compile_s = (self._first_ms - timing["median"]) / 1e3
        summary = {
            "schema": SCHEMA,
            **facts,
            "iter_ms": timing,
            "left_out": dict(self._left_out),
            "first_iter_s": None if self._first_ms is None else self._first_ms / 1e3,
            "compile_s": compile_s,
            "tokens_per_s": self.work.tokens / timing["median"] * 1e3 if timing["median"] else None,
            "flops_per_iter": self.work.flops,
            **mfu,
            "mfu_denominators": self.work.peaks,
            "peak_memory": self.peak_memory,
            "evaluations": len(self.evaluations),
            "eval_s": sum(row["seconds"] for row in self.evaluations),
            "first_eval_s": self.evaluations[0]["seconds"] if self.evaluations else None,
            "val_loss": self.evaluations[-1]["val_loss"] if self.evaluations else None,
            "train_loss": self.evaluations[-1]["train_loss"] if self.evaluations else None,
            "best_val_loss": best["val_loss"] if best else None,
            "best_iter": best["iter"] if best else None,
            "errors": errors,
        }
        write_json(self.folder / "summary.json", summary)
        if self.wandb is not None:
            self.wandb.summary.update({f"summary/{key}": value for key, value in _finite(summary).items()})
        return summary

    def close(self) -> None:
        self._file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wandb_figures(row: dict[str, Any]) -> dict[str, Any]:
    if row["kind"] == "evaluation":
        return {
            "val/loss": row["val_loss"],
            "val/train_loss": row["train_loss"],
            "val/seconds": row["seconds"],
        }
    if row["kind"] == "event":
        return {f"system/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "iter"}
    perf = ("iter_ms", "dispatch_ms", "tokens_per_s", "mfu", "mfu_measured", "mfu_a100")
    figures = {f"train/{key}": row[key] for key in ("loss", "lr", "grad_norm")}
    figures |= {f"perf/{key}": row[key] for key in perf if row[key] is not None}
    return figures | {"system/memory": row["memory"]}


def _statistics(iter_ms: list[float]) -> dict[str, Any]:
    """Median with its 95 % confidence interval from order statistics, mean and spread.

    The interval leaves out as many values on either side as a fair coin's heads fall short of in 2.5 % of cases: what
    scipy.stats.quantile_test gives, without the second that importing scipy.stats takes at the end of every run.
    """
    if not iter_ms:
        return dict.fromkeys(("median", "ci95", "mean", "min", "p10", "p90", "max")) | {"count": 0}
    values = np.array(iter_ms)
    interval = None
    if len(values) > 5:  # fewer than six cannot bound a median at 95 %
        from scipy.special import bdtrik

        outside = int(bdtrik(0.025, len(values), 0.5))
        interval = [float(np.sort(values)[i]) for i in (outside, len(values) - 1 - outside)]
    p10, median, p90 = (float(p) for p in np.percentile(values, [10, 50, 90]))
    return {
        "median": median,
        "ci95": interval,
        "mean": float(values.mean()),
        "min": float(values.min()),
        "p10": p10,
        "p90": p90,
        "max": float(values.max()),
        "count": len(values),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names, never a silent null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def write_json(path: Path, document: Any) -> None:
    """Write JSON so that a reader sees the old file or the new, never half of one."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_text(json.dumps(_finite(document), indent=1) + "\n")
        aside.replace(path)
    except OSError:  # a full disk
        aside.unlink(missing_ok=True)
        raise
