"""When an iteration is complete, and how long it took.

A device runs behind the host, so the moment at which `step` returns says nothing. The clock is read when the device
has finished: with the default policy one iteration late, while the next is already enqueued, so that the device's
queue is never drained for the sake of timing. `iter_ms` is the interval between two completions.

    host    enqueue 1 | enqueue 2 |  wait for 1  | enqueue 3 |  wait for 2  | enqueue 4 | ...
    device            |---- iteration 1 ---------|---- iteration 2 ---------|---- iteration 3 ----
    clock                                        ^                          ^
                                                 '------- iter_ms of 2 -----'
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nanogpt_mac.records.run import LeftOut

ASLEEP_NS = 1_000_000_000  # the wall clock gained this much on the monotonic one, which stops in sleep


@dataclass(frozen=True)
class Completion:
    """One finished iteration. `left_out` says why its time enters no statistic; None when it does.

    Restart and drain occur under the completion policy alone.
    """

    iteration: int
    loss: float
    grad_norm: float
    iter_ms: float
    dispatch_ms: float  # host time to enqueue
    left_out: LeftOut | None


class Clock:
    """Runs steps and times their completions under one of three policies.

    completion: wait for iteration i once i+1 is enqueued. iteration: wait for each at once. interval: wait for every
    `interval`-th and share the time out evenly. On a device that does not run behind the host (`ahead` false: a CPU)
    a step is complete when it returns, and each is timed at once.
    """

    def __init__(
        self,
        wait: Callable[[Any], tuple[float, float]],
        policy: str = "completion",
        interval: int = 1,
        warmup: int = 0,
        ahead: bool = True,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._wait, self._now, self._wall = wait, now_ns, wall_ns
        self._lag = {"completion": 1, "iteration": 0, "interval": interval - 1}[policy] if ahead else 0
        self._pipelined = policy == "completion" and ahead
        self._together = policy == "interval" and ahead
        self._warmup = warmup
        self._queue: deque[tuple[int, Any, float]] = deque()
        self._completed = 0
        self._last: tuple[int, int] | None = None  # monotonic and wall time of the last completion; None in a pause
        self._restarted = False

    def submit(self, iteration: int, step: Callable[[], Any]) -> list[Completion]:
        """Enqueue one iteration; return those that completed meanwhile, oldest first."""
        if self._last is None:
            self._last, self._restarted = (self._now(), self._wall()), True
        begin = self._now()
        handle = step()
        self._queue.append((iteration, handle, (self._now() - begin) / 1e6))
        if self._completed == 0:  # the first compiles; let nothing run beside it
            first = self._collect(len(self._queue))
            self._restarted = True
            return first
        if len(self._queue) <= self._lag:
            return []
        return self._collect(len(self._queue) if self._together else len(self._queue) - self._lag)

    def in_turn(self) -> None:
        """From now on wait for each iteration before the next, as under the policy iteration."""
        self._lag, self._pipelined, self._together = 0, False, False

    def drain(self) -> list[Completion]:
        """Wait for all that is enqueued and stop the clock until the next `submit`."""
        done = self._collect(len(self._queue))
        self._last = None
        return [replace(d, left_out=d.left_out or LeftOut.DRAIN) for d in done] if self._pipelined else done

    def _collect(self, count: int) -> list[Completion]:
        if not count:
            return []
        share = count if self._together else 1
        done: list[Completion] = []
        for _ in range(0, count, share):
            items = [self._queue.popleft() for _ in range(share)]
            last = self._wait(items[-1][1])
            now, wall = self._now(), self._wall()
            assert self._last is not None
            elapsed, slept = now - self._last[0], wall - self._last[1] - (now - self._last[0]) > ASLEEP_NS
            self._last = now, wall
            for iteration, handle, dispatch_ms in items:
                loss, norm = last if handle is items[-1][1] else self._wait(handle)
                why = self._left_out(slept)
                done.append(Completion(iteration, loss, norm, elapsed / share / 1e6, dispatch_ms, why))
                self._completed += 1
            self._restarted = False
        return done

    def _left_out(self, slept: bool) -> LeftOut | None:
        if self._completed == 0:
            return LeftOut.FIRST
        if slept:
            return LeftOut.SLEPT
        if self._completed <= self._warmup:
            return LeftOut.WARMUP
        return LeftOut.RESTART if self._restarted and self._pipelined else None
