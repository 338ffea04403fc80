"""What a run leaves behind: one row an iteration, evaluation and event, and a summary, handed to every sink."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanogpt_mac.backends import kinds
from nanogpt_mac.measure import times
from nanogpt_mac.records.fallbacks import Fallbacks
from nanogpt_mac.records.run import (
    Denominators,
    Ending,
    EvaluationRow,
    EventRow,
    IterationRow,
    LeftOut,
    Mfu,
    RunFacts,
    RunSummary,
    Times,
    WorldFacts,
)
from nanogpt_mac.train.clock import Completion
from nanogpt_mac.train.sinks import Row, Sink

Ranks = Callable[[Times, int], WorldFacts | None]

HOST_BOUND = 0.8  # of an iteration's time, spent enqueuing it: the device has nothing to do until then
FAR_BELOW = 0.8  # of the best matmul ever seen


@dataclass(frozen=True)
class Work:
    """What one iteration computes, and the FLOP/s that its rate is held against."""

    flops: float  # model FLOPs an iteration
    tokens: int
    peaks: Denominators
    ranks: int = 1  # that share it: a utilisation is that of one

    def mfu(self, iter_ms: float | None) -> Mfu:
        if not iter_ms:
            return Mfu(mfu=None, mfu_measured=None, mfu_a100=None)
        rate = self.flops / self.ranks / (iter_ms / 1e3)
        shares = {key: rate / peak if (peak := getattr(self.peaks, key)) else None for key in Mfu.model_fields}
        if (shares["mfu_measured"] or 0) > 1:  # more than the best matmul reached here: peak or time is wrong
            shares["mfu_measured"] = None
        return Mfu(**shares)


class Recorder:
    """Makes the rows, keeps the figures of the summary, and hands both to the sinks."""

    def __init__(self, work: Work, sinks: Sequence[Sink]) -> None:
        self.work, self.sinks = work, sinks
        self._iter_ms: list[float] = []  # of iterations that no reason leaves out
        self._left_out: Counter[LeftOut] = Counter()
        self._first_ms: float | None = None
        self._dispatch_ms: list[float] = []  # of the same
        self._evaluations: list[EvaluationRow] = []
        self._peak_memory = 0

    def iteration(self, done: Completion, lr: float, memory: dict[str, int]) -> None:
        """Keep one finished iteration. `memory` has the bytes in use and their peak, as the back end counts them."""
        mfu = self.work.mfu(done.iter_ms)
        row = IterationRow(
            kind="iteration",
            iter=done.iteration,
            loss=done.loss,
            lr=lr,
            grad_norm=done.grad_norm,
            iter_ms=done.iter_ms,
            dispatch_ms=done.dispatch_ms,
            tokens_per_s=self.work.tokens / done.iter_ms * 1e3,
            memory=memory["current"],
            **dict(mfu),
        )
        if done.left_out is None:
            self._iter_ms.append(done.iter_ms)
            self._dispatch_ms.append(done.dispatch_ms)
        else:
            left_out = LeftOut(done.left_out)
            row = row.model_copy(update={"left_out": left_out})
            self._left_out[left_out] += 1
            if left_out is LeftOut.FIRST:
                self._first_ms = done.iter_ms
        self._peak_memory = max(self._peak_memory, memory["peak"])
        self._keep(row)

    def evaluation(self, iteration: int, train_loss: float, val_loss: float, seconds: float) -> None:
        row = EvaluationRow(
            kind="evaluation", iter=iteration, train_loss=train_loss, val_loss=val_loss, seconds=seconds
        )
        self._evaluations.append(row)
        self._keep(row)

    def event(self, name: str, iteration: int, **facts: Any) -> None:
        self._keep(EventRow(kind="event", iter=iteration, event=name, **facts))

    def fallbacks(self, document: Fallbacks, iteration: int) -> None:
        """What the fallback detector found before training."""
        for sink in self.sinks:
            sink.fallbacks(document, iteration)

    def _keep(self, row: Row) -> None:
        for sink in self.sinks:
            sink.row(row)

    def tick(self) -> None:
        """After every iteration, the clock running."""
        for sink in self.sinks:
            sink.tick()

    def flush(self) -> None:
        """Write everything everywhere, the clock stopped."""
        for sink in self.sinks:
            sink.flush()

    def overdue(self) -> bool:
        """Whether a run without evaluations should pause for its records' sake."""
        return any(sink.overdue() for sink in self.sinks)

    def summary(self, facts: RunFacts, ending: Ending, ranks: Ranks = lambda times, memory: None) -> RunSummary:
        """Figures over the whole run, under what it was and how it ended, written to every sink. `ranks` is given this
        one's times and peak memory, and asks the other ranks for theirs."""
        self.flush()
        timing = times.summary(self._iter_ms, times.order_interval(self._iter_ms))
        middle, first, evaluations = timing.median, self._first_ms, self._evaluations
        dispatch = median(self._dispatch_ms) if self._dispatch_ms else None
        known = self.work.peaks.mfu_measured  # the best at the end, which may be more than the rows were held against
        impossible = sum(self.work.mfu(ms).mfu_measured is None for ms in self._iter_ms) if known else 0
        best = min(evaluations, key=lambda row: row.val_loss, default=None)
        summary = RunSummary(
            **dict(facts),
            **dict(ending),
            times=timing,
            left_out=self._left_out,
            first_iter_s=None if first is None else first / 1e3,
            compile_s=(first - middle) / 1e3 if first is not None and middle else None,
            dispatch_ms=dispatch,
            tokens_per_s=self.work.tokens / middle * 1e3 if middle else None,
            flops_per_iter=self.work.flops,
            **dict(self.work.mfu(middle)),
            mfu_denominators=self.work.peaks,
            peak_memory=self._peak_memory,
            evaluations=len(evaluations),
            eval_s=sum(row.seconds for row in evaluations),
            first_eval_s=evaluations[0].seconds if evaluations else None,
            val_loss=evaluations[-1].val_loss if evaluations else None,
            train_loss=evaluations[-1].train_loss if evaluations else None,
            best_val_loss=best.val_loss if best else None,
            best_iter=best.iter if best else None,
            errors=[_IMPOSSIBLE.format(impossible)] if impossible else [],
            world=ranks(timing, self._peak_memory),
            warnings=[*waiting_device(facts, dispatch, middle), *busy_peak(self.work.peaks)],
        )
        for sink in self.sinks:
            sink.summary(summary)
        return summary

    def close(self) -> None:
        """Nothing more will come; `wait` returns once all of it is where it belongs."""
        for sink in self.sinks:
            sink.close()

    def wait(self) -> None:
        for sink in self.sinks:
            sink.wait()


def waiting_device(facts: RunFacts, dispatch_ms: float | None, iter_ms: float | None) -> list[str]:
    """What to know, by the medians of a run, where a device that can run behind the host waits for it instead."""
    able = facts.capabilities
    if able is None or not able.runs_ahead or able.simulated or not dispatch_ms or not iter_ms:
        return []
    if dispatch_ms < HOST_BOUND * iter_ms:
        return []
    lever = kinds.less_to_enqueue(facts.backend, facts.compile, facts.details)
    return [f"the device waits for the host: {dispatch_ms:.2f} of {iter_ms:.2f} ms went into enqueuing; use {lever}"]


def busy_peak(peaks: Denominators) -> list[str]:
    """What to know where a run's own matmul was so slow that the machine had other work."""
    own, best = peaks.measured_here or math.inf, peaks.mfu_measured or 0.0
    if own >= FAR_BELOW * best:
        return []
    return [
        f"mfu_measured is doubtful: this run's own matmul reached {own / 1e9:.0f} GFLOP/s, less than {FAR_BELOW:.0%} "
        f"of the {best / 1e9:.0f} that this machine can do; close other programs"
    ]


_IMPOSSIBLE = (
    "mfu_measured would be above 1 in {} iterations, which cannot be: the measured peak or the time is wrong, so they "
    "have no figure; close other programs or raise gemm_seconds"
)
