"""What statistics over rounds say: ratios, drift, outliers, and how far times can be trusted."""

from __future__ import annotations

from nanogpt_mac.records.base import Amount, Count, Record


class Ratio(Record):
    """How many times as long one variant takes as another, over the rounds that both have."""

    value: float  # geometric mean of `pairs`
    ci: tuple[float, float] | None = None  # of `confidence`; None for a single pair
    confidence: float
    tie: bool | None = None  # whether `ci` contains 1
    pairs: tuple[float, ...]  # each round's ratio, in the order of `rounds`
    rounds: tuple[int, ...]


class Drift(Record):
    """Slowing down, in per cent; below 0 it became faster."""

    within_percent: float  # from a round's first iteration to its last
    between_percent: float | None = None  # from the first round to the last
    throttled: bool


class Outliers(Record):
    """Iterations far above their own round's median. They stay in every statistic."""

    count: Count
    share: float  # of all iterations, 0..1
    worst_ms: Amount
    definition: str


class Steadiness(Record):
    """Figures that say whether times can be believed; the reader judges which is a reason for doubt."""

    rounds: Count
    noise: float | None = None  # log standard deviation of the rounds' medians
    detectable: float | None = None  # the smallest slowdown (0.03 = 3 %) that so many rounds find at this noise
    iterations: float  # of a round, the median round's
    seconds: float  # that a round's iterations take, the median round's
    slow_start: float | None = None  # how much slower the first tenth is than the rest, the median round's
    outliers: Outliers
    coarse: bool  # more than half of a round's times are duplicates: the clock does not tell them apart
