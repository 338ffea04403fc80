"""How fast, how sure, and how steady: pure functions over iteration times.

Iterations of one process share its fate (memory layout, clocks, neighbours), so they are correlated, and the process
is what counts as one measurement: a *round* is one process's kept iterations. Intervals are made from rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from nanogpt_mac.records.figures import Drift, Outliers, Ratio, Steadiness

CONFIDENCE = 0.99  # of one ratio's interval, up to four variants
FAMILY_ERROR = 0.05  # chance, at most, that equal variants are called different anywhere in one comparison
MIN_ROUNDS_FOR_MEDIAN = 5  # the range of fewer round medians cannot bound the median at 95 %
THROTTLED_PERCENT = 3.0
OUTLIER_MADS = 5.0
RESAMPLES = 2000
MOST_DRAWS = 500  # from one round; more only takes longer, because rounds vary more than a median of 500 does
MAD_TO_SIGMA = 1.4826  # of a normal distribution
FEW_TO_TELL = 20  # fewer times of a round may repeat by chance

Times = np.ndarray  # iteration times of one round, ms, in their order


# -- how long an iteration takes --------------------------------------------------------------------------------------


def median_interval(rounds: Sequence[Times], confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Bootstrap interval of the median over rounds: rounds are drawn with replacement, then iterations within each.

    scipy.stats.bootstrap resamples one level only. The percentiles are widened for few rounds (Hesterberg 2015,
    "expanded percentile": the tail is Phi(-t sqrt(n / (n - 1))) with Student's t of n - 1 degrees), because n rounds
    resampled vary by (n - 1) / n of what they should. None below five rounds: no resampling of four can reach 95 %.
    Rounds without any times do not count.
    """
    rounds = [times for times in rounds if len(times)]
    n = len(rounds)
    if n < MIN_ROUNDS_FOR_MEDIAN:
        return None
    rng = np.random.default_rng(seed)
    # Each round as its quantile function: drawing an iteration is a uniform number, whatever the round's length.
    ordered = [np.sort(r) for r in rounds]
    lengths = np.array([len(r) for r in ordered])
    draws = np.minimum(lengths, MOST_DRAWS)
    table = np.zeros((n, lengths.max()))
    for row, values in zip(table, ordered, strict=True):
        row[: len(values)] = values
    medians = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, n, n)
        which = np.repeat(drawn, draws[drawn])
        medians[i] = np.median(table[which, (rng.random(len(which)) * lengths[which]).astype(np.intp)])
    tail = stats.norm.cdf(-stats.t.ppf((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


# -- which variant is faster ----------------------------------------------------------------------------------------------


def confidence_for(variants: int) -> float:
    """Confidence of each ratio's interval so that comparing so many equal `variants` errs in at most 5 % of cases.

    The fastest is chosen from the data, so what counts is every pair. 0.99 each holds the 5 % up to four variants (4.6 %
    by simulation, in the tests); beyond, Bonferroni over all pairs, which errs in about 3 %.
    """
    pairs = variants * (variants - 1) / 2
    return CONFIDENCE if variants <= 4 else 1 - FAMILY_ERROR / pairs


def paired_ratio(times: Mapping[int, float], base: Mapping[int, float], confidence: float = CONFIDENCE) -> Ratio | None:
    """How many times as long as `base`: round -> median ms of each; only rounds that both have are used.

    The value is the geometric mean of the rounds' ratios, the interval Student's t on their logarithms: a percentile
    bootstrap of 8 pairs that says 99 % holds 94. `tie` when the interval contains 1; with fewer than two pairs there
    is no interval, and `ci` and `tie` are None. None without a common round.
    """
    common = sorted(times.keys() & base.keys())
    if not common:
        return None
    pairs = np.array([times[r] / base[r] for r in common])
    logs = np.log(pairs)
    mean = float(logs.mean())
    interval, tie = None, None
    if len(common) > 1:
        half = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
        interval = _exp(mean - half), _exp(mean + half)
        tie = bool(interval[0] <= 1 <= interval[1])
    return Ratio(
        value=math.exp(mean),
        ci=interval,
        confidence=confidence,
        tie=tie,
        pairs=tuple(float(p) for p in pairs),
        rounds=tuple(common),
    )


def _exp(x: float) -> float:
    return math.exp(min(max(x, -700.0), 700.0))  # two rounds that disagree bound nothing; a float must hold that


def power(rounds: int, noise: float, effect: float = 0.03, confidence: float = CONFIDENCE) -> float:
    """Chance that a variant slower by `effect` is called slower after `rounds` rounds.

    `noise`: log standard deviation of one variant's round medians, less what all variants of a round share; a pair
    varies by sqrt(2) of it.
    """
    if rounds < 2:
        return 0.0
    if noise <= 0:
        return 1.0
    shift = math.log1p(effect) * math.sqrt(rounds) / (noise * math.sqrt(2))
    critical = stats.t.ppf((1 + confidence) / 2, rounds - 1)
    return float(stats.nct.sf(critical, rounds - 1, shift))


def detectable(noise: float, rounds: int, wanted: float = 0.9, confidence: float = CONFIDENCE) -> float | None:
    """The smallest slowdown (0.03 = 3 %) that `rounds` rounds find with probability `wanted`; None below two."""
    if rounds < 2:
        return None
    if noise <= 0:
        return 0.0
    low, high = 0.0, 0.01
    while power(rounds, noise, high, confidence) < wanted and high < 1e6:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(rounds, noise, middle, confidence) >= wanted else (middle, high)
    return high


def round_noise(medians: Sequence[float]) -> float | None:
    """Log standard deviation of round medians; None below three."""
    return float(np.log(medians).std(ddof=1)) if len(medians) > 2 else None


# -- how steady -------------------------------------------------------------------------------------------------------


def slope_percent(values: Times) -> float | None:
    """Theil-Sen slope over the values' order, as percent from the first to the last; None below four values.

    Long series are cut into fifty blocks, each its median: the slopes of all pairs would not fit in memory.
    """
    if len(values) < 4:
        return None
    blocks = _blocks(values, 50)
    slope, intercept, _, _ = stats.theilslopes(blocks)
    first = intercept
    return float(100 * slope * (len(blocks) - 1) / first) if first > 0 else None


def _blocks(values: Times, count: int) -> np.ndarray:
    return np.array([np.median(part) for part in np.array_split(values, min(count, len(values)))])


def drift(rounds: Mapping[int, Times]) -> Drift | None:
    """Slowing down within rounds and from the first round to the last, in percent; None without a round of 4 times.

    within_percent: median over the rounds of each one's slope. between_percent: slope over the rounds' medians.
    throttled: one of them is above 3 % and clear at 99 %: within, Student's t over the rounds' slopes (below three
    rounds, Kendall's tau over ten blocks of each); between, Kendall's tau over the rounds, which needs six.
    """
    filled = {r: times for r, times in sorted(rounds.items()) if len(times)}
    slopes = [s for times in filled.values() if (s := slope_percent(times)) is not None]
    if not slopes:
        return None
    within = float(np.median(slopes))
    medians = np.array([np.median(times) for times in filled.values()])
    between = slope_percent(medians)
    if len(slopes) > 2:
        clear_within = stats.ttest_1samp(slopes, 0, alternative="greater").pvalue < 0.01 if np.ptp(slopes) else True
    else:
        clear_within = all(_rises(_blocks(times, 10)) for times in filled.values())
    throttled_within = within > THROTTLED_PERCENT and bool(clear_within)
    throttled_between = between is not None and between > THROTTLED_PERCENT and _rises(medians)
    return Drift(within_percent=within, between_percent=between, throttled=throttled_within or throttled_between)


def _rises(values: np.ndarray) -> bool:
    if len(values) < 4 or not np.ptp(values):
        return False
    tau = stats.kendalltau(np.arange(len(values)), values)
    return bool(tau.statistic > 0 and tau.pvalue < 0.01)


def outlier_limit(times: Times) -> float:
    """Above this an iteration of the round is an outlier: median + 5 MAD (as a standard deviation), at least +1 %."""
    median = float(np.median(times))
    mad = MAD_TO_SIGMA * float(np.median(np.abs(times - median)))
    return median + max(OUTLIER_MADS * mad, 0.01 * median)


def outliers(rounds: Sequence[Times]) -> Outliers | None:
    """Slow iterations, each held against its own round. They are counted and shown and stay in every statistic."""
    filled = [r for r in rounds if len(r)]
    if not filled:
        return None
    beyond = np.concatenate([r[r > outlier_limit(r)] for r in filled])
    total = sum(len(r) for r in filled)
    return Outliers(
        count=len(beyond),
        share=len(beyond) / total,
        worst_ms=float(max(r.max() for r in filled)),
        definition=f"above the round's median + {OUTLIER_MADS:g} MAD (scaled to a standard deviation) and 1 %",
    )


# -- figures to judge times by ----------------------------------------------------------------------------------------


def steadiness(rounds: Mapping[int, Times]) -> Steadiness | None:
    """What speaks for and against these times (round -> ms); None without any."""
    filled = [times for _, times in sorted(rounds.items()) if len(times)]
    wild = outliers(filled)
    if wild is None:
        return None
    noise = round_noise([float(np.median(times)) for times in filled])
    slow = [s for times in filled if (s := _slow_start(times)) is not None]
    return Steadiness(
        rounds=len(filled),
        noise=noise,
        detectable=None if noise is None else detectable(noise, len(filled)),
        iterations=float(np.median([len(times) for times in filled])),
        seconds=float(np.median([times.sum() / 1e3 for times in filled])),
        slow_start=float(np.median(slow)) if slow else None,
        outliers=wild,
        coarse=any(len(times) >= FEW_TO_TELL and len(np.unique(times)) < len(times) / 2 for times in filled),
    )


def _slow_start(times: Times) -> float | None:
    head = max(len(times) // 10, 3)
    return float(np.median(times[:head]) / np.median(times[head:]) - 1) if len(times) >= 2 * head else None
