"""What a run leaves behind: one row an iteration, evaluation and event, and a summary, handed to every sink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
)
from nanogpt_mac.train.clock import Completion
from nanogpt_mac.train.sinks import Row, Sink


@dataclass(frozen=True)
class Work:
    """What one iteration computes, and the FLOP/s that its rate is held against."""

    flops: float  # model FLOPs an iteration
    tokens: int
    peaks: Denominators

    def mfu(self, iter_ms: float | None) -> Mfu:
        if not iter_ms:
            return Mfu(mfu=None, mfu_measured=None, mfu_a100=None)
        rate = self.flops / (iter_ms / 1e3)
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
        self._impossible = 0  # iterations faster than the measured peak allows
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
            self._impossible += bool(self.work.peaks.mfu_measured) and mfu.mfu_measured is None
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

    def summary(self, facts: RunFacts, ending: Ending) -> RunSummary:
        """Figures over the whole run, under what it was and how it ended, written to every sink."""
        self.flush()
        timing = times.summary(self._iter_ms, times.order_interval(self._iter_ms))
        median, first, evaluations = timing.median, self._first_ms, self._evaluations
        best = min(evaluations, key=lambda row: row.val_loss, default=None)
        summary = RunSummary(
            **dict(facts),
            **dict(ending),
            times=timing,
            left_out=self._left_out,
            first_iter_s=None if first is None else first / 1e3,
            compile_s=(first - median) / 1e3 if first is not None and median else None,
            tokens_per_s=self.work.tokens / median * 1e3 if median else None,
            flops_per_iter=self.work.flops,
            **dict(self.work.mfu(median)),
            mfu_denominators=self.work.peaks,
            peak_memory=self._peak_memory,
            evaluations=len(evaluations),
            eval_s=sum(row.seconds for row in evaluations),
            first_eval_s=evaluations[0].seconds if evaluations else None,
            val_loss=evaluations[-1].val_loss if evaluations else None,
            train_loss=evaluations[-1].train_loss if evaluations else None,
            best_val_loss=best.val_loss if best else None,
            best_iter=best.iter if best else None,
            errors=[_IMPOSSIBLE.format(self._impossible)] if self._impossible else [],
        )
        for sink in self.sinks:
            sink.summary(summary)
        return summary

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


_IMPOSSIBLE = (
    "mfu_measured would be above 1 in {} iterations, which cannot be: the measured peak or the time is wrong, so they "
    "have no figure; close other programs or raise gemm_seconds"
)
