"""The training loop: nanoGPT's, from top to bottom, for every back end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from nanogpt_mac.backends.base import Backend, Tokens
from nanogpt_mac.config import Config
from nanogpt_mac.corpus.batches import starts
from nanogpt_mac.machine import probe
from nanogpt_mac.records.run import ExitState
from nanogpt_mac.train.clock import Clock, Completion
from nanogpt_mac.train.recorder import Recorder
from nanogpt_mac.train.schedule import learning_rate


@dataclass
class Loop:
    """One run, ready to go. Within `saving()` a checkpoint is written, which `complete(best_val_loss, is_best)` ends;
    `stop` gives the signal that asks for the end, None while there is none; `best` is the lowest validation loss yet.
    """

    config: Config
    backend: Backend
    tokens: Tokens
    recorder: Recorder
    saving: Callable[[], AbstractContextManager[Callable[[float, bool], None]]] | None = None
    stop: Callable[[], int | None] = lambda: None
    best: float = math.inf

    def train(self, start: int) -> ExitState:
        """Run iterations from `start` to max_iters; how it ended."""
        config, backend = self.config, self.backend
        clock = Clock(backend.wait, config.sync, config.log_interval, config.timing_warmup, backend.runs_ahead)

        # One turn more than there are iterations: evaluations come before an iteration, so the last turn is only that.
        for iteration in range(start, config.max_iters + 1):
            last = iteration == config.max_iters or self.stop() is not None
            overdue = backend.world.size == 1 and self.recorder.overdue()  # else others would be further by then

            # Once in a while, and at the end: evaluate and save. The clock is stopped first, and what is still under
            # way recorded, so that none of it enters an iteration's time, and a loss that diverged is never saved.
            if last or self._evaluates(iteration) or overdue:
                if not self._record(clock.drain()):
                    return ExitState.DIVERGED
                self._pause(iteration, start, last)
            if last:
                break

            # One whole iteration, enqueued: forward, backward, clip, AdamW. `submit` does not wait for it but for the
            # one before, and returns what has completed meanwhile: none at first, then one a turn.
            batches = backend.world.share(self._starts("train", iteration, config.gradient_accumulation_steps))
            done = clock.submit(iteration, partial(backend.step, batches, learning_rate(config, iteration)))
            if not self._record(done):
                return ExitState.DIVERGED
            if iteration == start and (held := backend.iteration_bytes()) is not None:
                self.recorder.event("iteration_memory", iteration, bytes=held)
                if backend.runs_ahead and backend.world.mean(held > backend.free_memory()):
                    self.recorder.event("one_in_flight", iteration, bytes=held)
                    clock.in_turn()
        return ExitState.FINISHED if self.stop() is None else ExitState.STOPPED

    def _record(self, completions: list[Completion]) -> bool:
        """Keep finished iterations; False once a loss is not a number (float16's overflows show in the norm)."""
        for done in completions:
            # The iteration is not the one just submitted; its rate follows from its number, so none is kept for it.
            self.recorder.iteration(done, learning_rate(self.config, done.iteration), self.backend.memory())
            if not math.isfinite(done.loss):
                self.recorder.event("diverged", done.iteration, loss=done.loss)
                return False
        self.recorder.tick()
        return True

    def _pause(self, iteration: int, start: int, last: bool) -> None:
        """Off the clock, with an empty queue: evaluate, save, write the records."""
        with self.backend.world.patience():
            self._paused(iteration, start, last)

    def _paused(self, iteration: int, start: int, last: bool) -> None:
        # The disk is at work while the device evaluates; a checkpoint of what was loaded is only kept where it is best.
        config, is_best, learnt = self.config, False, iteration > start
        due = (last or self._evaluates(iteration)) and (learnt or config.init_from != "scratch")
        with self.saving() if self.saving is not None and due else nullcontext() as complete:
            if self._evaluates(iteration) or (last and config.eval_interval > 0 and self.stop() is None):
                begin = time.perf_counter()
                train_loss, val_loss = (self._evaluate(split, iteration) for split in ("train", "val"))
                if train_loss is not None and val_loss is not None:
                    self.recorder.evaluation(iteration, train_loss, val_loss, time.perf_counter() - begin)
                    is_best = val_loss < self.best
                    self.best = min(self.best, val_loss)
            self.recorder.event("pause", iteration, **_machine_facts())
            if complete is not None and (learnt or is_best):
                complete(self.best, is_best)
        self.recorder.flush()

    def _evaluate(self, split: str, iteration: int) -> float | None:
        """Mean loss over eval_iters batches, a few at a time so that a signal is heard; None after one."""
        batches, total = self._starts(split, iteration, self.config.eval_iters, stream=f"eval-{split}"), 0.0
        world = self.backend.world
        chunk = world.size * self.backend.eval_chunk
        for some in np.split(batches, range(chunk, len(batches), chunk)):
            if self.stop() is not None:
                return None
            mine = some[world.rank :: world.size]
            total += world.mean(self.backend.evaluate(split, mine) * len(mine) if len(mine) else 0.0) * world.size
        return total / len(batches)

    def _starts(self, split: str, iteration: int, batches: int, stream: str = "train") -> np.ndarray:
        """Where the windows of one iteration begin: int64 (batches, batch_size), the same for every back end.

        `stream` keeps what is drawn for training and for each evaluation apart.
        """
        size, length = self.config.batch_size, len(self.tokens.splits[split])
        drawn = starts(self.config.seed, iteration, stream, batches * size, length, self.tokens.block_size)
        return drawn.reshape(batches, size)

    def _evaluates(self, iteration: int) -> bool:
        return self.config.eval_interval > 0 and iteration % self.config.eval_interval == 0


def _machine_facts() -> dict[str, str | float | None]:
    return {
        "power_source": probe.power_source(),
        "thermal_state": probe.thermal_state(),
        "gpu_utilisation": probe.gpu_utilisation(),
    }
