"""How many rounds, and of how many iterations, fit into the time that is left, and in which order. Arithmetic alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

MANY, USUAL, GOOD, FEWEST = 40, 12, 6, 3  # rounds
LONGEST_S, LONG_S, USUAL_S, SHORT_S = 60.0, 10.0, 3.0, 1.0  # of iterations in one run
MOST_ITERS = 2000  # of one run: a records file stays small
COUNTED = 8  # iterations of one run, at least, that enter its median
COUNTED_SLOW = 4
SLOW_S = 0.5  # an iteration
WARMUP_SLOW = 1  # a second and more of work is no longer warmed up by repetition
EXPENSIVE = 2.0  # times the cheapest run: a variant whose runs take longer takes part in fewer rounds


@dataclass(frozen=True)
class Cost:
    """What the pilot run of one variant has shown, in seconds."""

    start_s: float  # of a run besides its iterations: the process, the corpus, a compilation from the cache
    iteration_s: float
    evaluation_s: float = 0.0  # the evaluations of round 0

    @property
    def slow(self) -> bool:
        return self.iteration_s >= SLOW_S


@dataclass(frozen=True)
class Schedule:
    rounds: dict[str, list[int]]  # variant -> the rounds that it takes part in
    iters: dict[str, int]
    warmup: dict[str, int]  # iterations after the first that are not counted
    seconds: float  # that all of it is expected to take

    @property
    def count(self) -> int:
        return max(max(numbers) for numbers in self.rounds.values()) + 1


def schedule(
    costs: dict[str, Cost],
    budget_s: float,
    rounds: int | None = None,
    iters: int | None = None,
    warmup: int = 5,
    pause_s: float = 0.0,
) -> Schedule:
    """Fill `budget_s` with runs of equal time for every variant, of `rounds` and `iters` where they are asked for.

    A comparison is as sure as it has rounds, because a process shares its fate among its iterations: so twelve rounds
    of three seconds of iterations are taken before longer ones, then fewer, then shorter ones. With much time, rounds
    get long first and then many. A slow variant takes part in fewer rounds, three at least, so that it costs no more
    than twice the time of the cheapest. What is asked for and does not fit becomes fewer rounds, down to three, and
    then fewer iterations. Where nothing fits, the smallest plan is made, which takes longer than the budget.
    """

    def plan(count: int, seconds: float) -> Schedule:
        return _plan(costs, count, seconds, iters, warmup, pause_s, spread=rounds is None)

    if rounds is not None or iters is not None:
        least, longest = (SHORT_S, LONGEST_S) if iters is None else (math.inf, 0.0)
        kept = min(rounds or FEWEST, FEWEST)
        for count in range(rounds or USUAL, kept - 1, -1):
            if plan(count, least).seconds <= budget_s:
                return _longest(partial(plan, count), budget_s, least, max(least, longest))
        longest = max((iters or 0) * cost.iteration_s for cost in costs.values())
        return _longest(partial(plan, kept), budget_s, 0.0, max(SHORT_S, longest))
    tiers = [
        (range(MANY, USUAL, -1), LONG_S),
        (range(USUAL, GOOD - 1, -1), USUAL_S),
        (range(GOOD, FEWEST, -1), SHORT_S),
    ]
    for counts, least in tiers:
        for count in counts:
            if plan(count, least).seconds <= budget_s:
                return _longest(partial(plan, count), budget_s, least, LONGEST_S)
    return plan(FEWEST, SHORT_S)


def _longest(plan: Callable[[float], Schedule], budget_s: float, low: float, high: float) -> Schedule:
    """The plan with the longest runs, of `low` to `high` seconds of iterations, that fits; of `low` where none does."""
    if low == high:
        return plan(low)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if plan(middle).seconds <= budget_s else (low, middle)
    return plan(low)


def _plan(
    costs: dict[str, Cost], count: int, seconds: float, iters: int | None, warmup: int, pause_s: float, spread: bool
) -> Schedule:
    """`count` rounds in which every variant iterates for `seconds`, or as long as its fewest iterations take, but never
    more than `iters`.
    """
    counts, warmups, run_s = {}, {}, {}
    for name, cost in costs.items():
        warmups[name] = min(warmup, WARMUP_SLOW) if cost.slow and iters is None else warmup
        most = iters or MOST_ITERS
        counts[name] = min(most, max(fewest(cost, warmups[name]), math.floor(min(most, seconds / cost.iteration_s))))
        run_s[name] = pause_s + cost.start_s + counts[name] * cost.iteration_s
    expensive_s = EXPENSIVE * min(run_s.values())
    rounds = {
        name: _spread(count, max(min(count, FEWEST), math.ceil(count * expensive_s / run_s[name])))
        if spread and run_s[name] > expensive_s
        else list(range(count))
        for name in costs
    }
    total = sum(len(rounds[name]) * run_s[name] + costs[name].evaluation_s for name in costs)
    return Schedule(rounds, counts, warmups, total)


def fewest(cost: Cost, warmup: int) -> int:
    """Iterations of a run, so that enough of them count: the first does not, nor the last, which has no queue."""
    return 1 + warmup + (COUNTED_SLOW if cost.slow else COUNTED) + 1


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rounds, evenly, the first among them: it has the evaluation."""
    return [k * count // wanted for k in range(wanted)]


def drawn_order(rounds: Mapping[str, Sequence[int]], seed: int) -> tuple[tuple[int, str], ...]:
    """(round, name) of every run: round by round, those that take part in it in a drawn order."""
    drawn = random.Random(f"order-{seed}")
    planned: list[tuple[int, str]] = []
    for number in range(max(max(numbers) for numbers in rounds.values()) + 1):
        taking_part = [name for name, numbers in rounds.items() if number in numbers]
        drawn.shuffle(taking_part)
        planned += [(number, name) for name in taking_part]
    return tuple(planned)
