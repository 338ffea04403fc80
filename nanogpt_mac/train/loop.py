"""The training loop: nanoGPT's, from top to bottom, for every back end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from nanogpt_mac.backends.base import Backend
from nanogpt_mac.config import Config
from nanogpt_mac.corpus.batches import starts
from nanogpt_mac.train.clock import Clock, Completion
from nanogpt_mac.train.display import Lines
from nanogpt_mac.train.recorder import Recorder
from nanogpt_mac.train.schedule import learning_rate

EVAL_CHUNK = 10  # batches


@dataclass
class Loop:
    """One run, ready to go. `save(iteration, best)` writes a checkpoint; `stop` is the signal that asks for the end."""

    config: Config
    backend: Backend
    lengths: dict[str, int]  # tokens in each split
    block_size: int
    recorder: Recorder
    display: Lines
    save: Callable[[float, bool], Any] | None
    stop: Callable[[], int | None]
    facts: Callable[[], dict[str, Any]]  # power, heat and the like, asked for at each pause
    best: float = math.inf
    rates: dict[int, float] = field(default_factory=dict)  # learning rate of iterations under way

    def train(self, start: int) -> str:
        """Run iterations from `start` to max_iters; return how it ended: finished, stopped, diverged."""
        config, backend, recorder = self.config, self.backend, self.recorder
        clock = Clock(backend.wait, config.sync, config.log_interval, config.timing_warmup, backend.runs_ahead)
        for iteration in range(start, config.max_iters + 1):
            last = iteration == config.max_iters or self.stop() is not None
            if last or self._evaluates(iteration) or recorder.overdue():
                if not self._record(clock.drain()):
                    return "diverged"
                self._pause(iteration, start, last)
            if last:
                break

            lr = self.rates[iteration] = learning_rate(config, iteration)
            batch = self._starts("train", iteration, config.gradient_accumulation_steps)
            done = clock.submit(iteration, partial(backend.step, batch, lr))
            if not self._record(done):
                return "diverged"
        return "finished" if self.stop() is None else "stopped"

    def _starts(self, split: str, iteration: int, batches: int) -> Any:
        """Where the windows of one iteration begin: (batches, batch_size), the same for every back end."""
        size, length = self.config.batch_size, self.lengths[split.removeprefix("eval-")]
        drawn = starts(self.config.seed, iteration, split, batches * size, length, self.block_size)
        return drawn.reshape(batches, size)

    def _evaluate(self, split: str, iteration: int) -> float | None:
        """Mean loss over eval_iters batches, a few at a time so that a signal is heard; None after one."""
        batches, total = self._starts(f"eval-{split}", iteration, self.config.eval_iters), 0.0
        for some in np.split(batches, range(EVAL_CHUNK, len(batches), EVAL_CHUNK)):
            if self.stop() is not None:
                return None
            total += self.backend.evaluate(split, some) * len(some)
        return total / len(batches)

    def _evaluates(self, iteration: int) -> bool:
        return self.config.eval_interval > 0 and iteration % self.config.eval_interval == 0

    def _record(self, completions: list[Completion]) -> bool:
        """Keep finished iterations; False once a loss is no number (float16's overflows show in the norm)."""
        for done in completions:
            memory = self.backend.memory()
            mfu = self.recorder.iteration(done, self.rates.pop(done.iteration), memory)
            self.display.iteration(done, mfu["mfu"] if mfu["mfu"] is not None else mfu["mfu_measured"])
            if not math.isfinite(done.loss):
                self.recorder.event("diverged", done.iteration, loss=done.loss)
                self.display.say(f"iter {done.iteration}: loss is {done.loss}: training has diverged and stops here")
                return False
        self.recorder.flush_file()
        return True

    def _pause(self, iteration: int, start: int, last: bool) -> None:
        """Off the clock, with an empty queue: evaluate, save, write the records."""
        config, is_best = self.config, False
        if self._evaluates(iteration) or (last and config.eval_interval > 0 and self.stop() is None):
            begin = time.perf_counter()
            train_loss, val_loss = (self._evaluate(split, iteration) for split in ("train", "val"))
            if train_loss is not None and val_loss is not None:
                self.recorder.evaluation(iteration, train_loss, val_loss, time.perf_counter() - begin)
                self.display.evaluation(iteration, train_loss, val_loss)
                is_best = val_loss < self.best
                self.best = min(self.best, val_loss)
        self.recorder.event("pause", iteration, **self.facts())
        learnt = iteration > start or (is_best and config.init_from != "scratch")
        if self.save is not None and learnt and (last or self._evaluates(iteration)):
            self.save(self.best, is_best)
        self.recorder.flush()
