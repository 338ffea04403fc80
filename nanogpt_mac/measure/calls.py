"""How long one call of a function takes: THE measuring core of the suites. It knows no framework.

Two figures: latency (one call, one wait) and throughput (calls queued behind each other, one wait), each the median of
batches with its interval. That a wait has waited is checked here; what was computed, the caller checks on `last`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanogpt_mac.garbage import uncollected
from nanogpt_mac.measure.times import order_interval, summary
from nanogpt_mac.records.run import Times

BATCH_S = 0.02  # calls are queued, twice as many each time, until a batch takes this long, or a tenth of its row's time
MOST_QUEUED = 4096
FEWEST = 5  # batches, unless they take PATIENCE times what a row may take
PATIENCE = 4.0
CLOSE = 0.02  # half of the interval, as a share of the median: then it is known
MOST_BATCHES = 200
TRIES = 3  # a wait that seems not to have waited is looked at again: another process may have had the core
UNWAITED = 0.25  # of a batch's time that reading its result may take beyond a second reading

Outputs = Sequence[Any]


class Device(Protocol):
    """What is asked of a framework: backends.arrays.Arrays has it."""

    def start(self, outputs: Outputs) -> None: ...

    def wait(self, outputs: Outputs) -> None: ...

    def peek(self, array: Any) -> float: ...


@dataclass(frozen=True)
class Measured:
    """Milliseconds a call. `last`: the outputs of the last call that was timed, which had the number `number`.

    `before` are those of the call before it, where more than one was to be kept: a result that stays the same cannot be
    right for both.
    """

    throughput: Times
    latency: Times
    last: Outputs
    number: int
    queued: int  # calls in a batch of `throughput`
    before: Outputs | None = None
    fault: str = ""  # why these are not the times of anything


def measure(
    call: Callable[[int], Outputs],
    device: Device,
    budget_s: float,
    keep: int = 1,
    most: int = MOST_QUEUED,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Times `call(0)`, `call(1)`, ...: each enqueues one call and returns its outputs.

    The caller has made a call before, so that nothing is compiled here. `keep` outputs are alive at once beside the
    one being made, and no more than `most` calls are queued: both are for the caller's memory. `budget_s` seconds are
    for both figures together; a call that takes longer is timed at least once.
    """
    timer = _Timer(call, device, keep, clock)
    batch_s = min(BATCH_S, budget_s / 10)
    with uncollected():
        latencies = timer.batches(1, clock() + budget_s / 2, budget_s / 2)
        queued, throughputs = 1, latencies
        fault = timer.unwaited(1)  # before more is queued behind it
        if not fault and min(latencies) < batch_s and most > 1:
            end = clock() + budget_s / 2
            queued, first = timer.grown(batch_s, most)
            throughputs = [s / queued for s in timer.batches(queued, end, budget_s / 2, first)]
            fault = timer.unwaited(queued)
    return Measured(_times(throughputs), _times(latencies), timer.last, timer.number, queued, timer.before, fault)


def once(call: Callable[[], Outputs], device: Device) -> float:
    """Seconds of one call and one wait."""
    with uncollected():
        return _Timer(lambda _: call(), device, 1, time.perf_counter).batch(1)


class _Timer:
    def __init__(self, call: Callable[[int], Outputs], device: Device, keep: int, clock: Callable[[], float]) -> None:
        self.call, self.device, self.keep, self.clock = call, device, max(keep, 1), clock
        self.last: Outputs = ()
        self.before: Outputs | None = None
        self.number = -1

    def batch(self, calls: int) -> float:
        """Seconds until so many calls are complete."""
        call, start, number = self.call, self.device.start, self.number
        kept: deque[Outputs] = deque(maxlen=self.keep)
        began = self.clock()
        for _ in range(calls):
            number += 1
            outputs = call(number)
            start(outputs)
            kept.append(outputs)
        self.device.wait([output for outputs in kept for output in outputs])
        took = self.clock() - began
        if self.keep > 1:
            self.before = kept[-2] if len(kept) > 1 else self.last or None
        self.last, self.number = kept[-1], number
        return took

    def grown(self, batch_s: float, most: int) -> tuple[int, float]:
        """How many calls make a batch of so many seconds, and those of the first that did."""
        calls = 1
        while True:
            calls = min(2 * calls, most)
            took = self.batch(calls)
            if took >= batch_s or calls == most:
                return calls, took

    def batches(self, calls: int, deadline: float, budget_s: float, first: float | None = None) -> list[float]:
        """Seconds of each batch: at least FEWEST, until their median is known or the time is up."""
        found = [self.batch(calls) if first is None else first]
        while len(found) < MOST_BATCHES:
            now = self.clock()
            if now >= deadline and (len(found) >= FEWEST or now + found[-1] > deadline + (PATIENCE - 1) * budget_s):
                break
            if _known(found):
                break
            found.append(self.batch(calls))
        return found

    def unwaited(self, calls: int) -> str:
        """What speaks against `wait`: a result that it says is complete, and that then takes long to be read."""
        self._peek()  # reading for the first time may compile something
        for _ in range(TRIES):
            took = self.batch(calls)
            before = self.clock()
            self._peek()
            first = self.clock()
            self._peek()
            again = self.clock() - first
            late = first - before - again
            if late <= UNWAITED * took + 1e-4:
                return ""
        return f"the clock was read without waiting: the result came {1e3 * late:.3g} ms after it"

    def _peek(self) -> None:
        """At the first output and at the last one, which may be complete at different times."""
        for output in dict.fromkeys((0, len(self.last) - 1)):
            self.device.peek(self.last[output])


def _known(found: Sequence[float]) -> bool:
    interval = order_interval(found)
    return interval is not None and (interval[1] - interval[0]) / 2 < CLOSE * sorted(found)[len(found) // 2]


def _times(seconds: Sequence[float]) -> Times:
    values = [1e3 * s for s in seconds]
    return summary(values, order_interval(values))
