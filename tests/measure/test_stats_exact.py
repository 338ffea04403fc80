"""Statistics at their edges: series whose figures can be worked out on paper, on both sides of every limit."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from nanogpt_mac.measure import stats


def rising(percent, count=40, start=100.0):
    """A straight line that ends `percent` above its start."""
    return start * (1 + percent / 100 * np.arange(count) / (count - 1))


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [5, 9, 20])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_percentiles_are_widened_as_hesterberg_says(rounds, confidence, monkeypatch):
    """The tail: a t interval of standard error sqrt(n / (n - 1)) times the bootstrap's, in normal quantiles."""
    asked = []
    quantile = np.quantile
    monkeypatch.setattr(np, "quantile", lambda values, q: asked.append(q) or quantile(values, q))
    low, high = stats.median_interval([np.full(10, 100.0 + i) for i in range(rounds)], confidence)
    half = scipy_stats.t.isf((1 - confidence) / 2, rounds - 1) * math.sqrt(rounds / (rounds - 1))
    assert asked[0] == pytest.approx([scipy_stats.norm.sf(half), scipy_stats.norm.cdf(half)])
    assert 100 <= low < 100 + (rounds - 1) / 2 < high <= 99 + rounds


def test_every_round_is_drawn():
    """Of two kinds of rounds neither is left out: the median of a resample is now one, now the other, now between."""
    low, high = stats.median_interval([np.full(3, 1.0), *(np.full(3, 2.0) for _ in range(4))], 0.9999)
    assert (low, high) == (1.0, 2.0)  # the first
    low, high = stats.median_interval([*(np.full(3, 2.0) for _ in range(4)), np.full(3, 3.0)], 0.9999)
    assert (low, high) == (2.0, 3.0)  # the last


@pytest.mark.parametrize(("variants", "pairs"), [(5, 10), (6, 15), (12, 66)])
def test_more_than_four_variants_share_the_error_over_all_pairs(variants, pairs):
    assert stats.confidence_for(4) == stats.confidence_for(2) == 0.99
    assert stats.confidence_for(variants) == pytest.approx(1 - 0.05 / pairs)
    assert pairs == math.comb(variants, 2)


# -- power ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "noise"), [(2, 0.0005), (3, 0.003), (4, 0.008)])
def test_power_of_few_rounds_is_what_a_simulation_finds(rounds, noise):
    pairs = np.random.default_rng(rounds).normal(math.log(1.03), noise * math.sqrt(2), (40_000, rounds))
    t = pairs.mean(1) / (pairs.std(1, ddof=1) / math.sqrt(rounds))
    found = (t > scipy_stats.t.ppf(0.995, rounds - 1)).mean()
    assert 0.1 < found < 0.98
    assert stats.power(rounds, noise) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize(("rounds", "noise"), [(2, 0.001), (3, 0.02), (8, 0.01), (8, 0.3)])
def test_what_is_detectable_is_found_with_just_that_probability(rounds, noise):
    assert stats.power(rounds, noise, stats.detectable(noise, rounds)) == pytest.approx(0.9, abs=1e-6)


def test_noise_is_the_standard_deviation_of_logarithms():
    assert stats.round_noise([1.0, math.e, math.e**2]) == pytest.approx(1.0)
    assert stats.round_noise([1.0, 2.0]) is None


def test_wild_rounds_are_still_numbers():
    pairs = {0: 1e-300, 1: 1e300}
    low, high = stats.paired_ratio(pairs, {0: 1.0, 1: 1.0}).ci
    assert 0 < low < 1e-300
    assert 1e300 < high < math.inf


# -- drift ------------------------------------------------------------------------------------------------------------


def test_slope_is_exact_on_a_line():
    assert stats.slope_percent(np.array([100.0, 101.0, 102.0, 103.0])) == pytest.approx(3.0)
    assert stats.slope_percent(np.array([0.5, 0.505, 0.51, 0.515])) == pytest.approx(3.0)  # times below 1 ms
    assert stats.slope_percent(np.array([0.0, 1.0, 2.0, 3.0])) is None  # no share of nothing
    assert stats.slope_percent(np.array([0.0, 0.4, 0.9, 1.5])) is None  # the line begins below zero
    assert stats.slope_percent(100.0 + np.arange(100)) == pytest.approx(100 * 98 / 100.5)  # fifty blocks of two


@pytest.mark.parametrize(("percent", "throttled"), [(2.5, False), (3.5, True)])
def test_three_percent_are_throttling(percent, throttled):
    within = stats.drift(dict.fromkeys(range(5), rising(percent)))
    assert within.throttled is throttled
    assert within.within_percent == pytest.approx(percent)
    between = stats.drift({i: np.full(20, level) for i, level in enumerate(rising(percent, 8))})
    assert between.throttled is throttled
    assert between.between_percent == pytest.approx(percent)


@pytest.mark.parametrize(("spread", "clear"), [(1.2, True), (1.3, False)])
def test_slopes_of_three_rounds_are_held_against_zero_by_students_t(spread, clear):
    """t = 5 sqrt(3) / spread of two degrees: 7.2 and 6.7, and 1 % lies at 6.96."""
    found = stats.drift({i: rising(5 + s) for i, s in enumerate((-spread, 0.0, spread))})
    assert found.within_percent == pytest.approx(5)
    assert found.throttled is clear


def test_two_rounds_are_held_against_chance_one_by_one():
    apart = {i: rising(p) for i, p in enumerate((4.0, 60.0))}  # each rises, and two slopes this far apart say nothing
    assert stats.drift(apart).throttled is True
    assert stats.drift(apart | {2: rising(20.0)}).throttled is False  # Student's t over three slopes
    waves = 100 + 5 * np.cos(np.arange(40) * np.pi / 10)
    assert stats.drift({0: rising(40.0), 1: waves}).throttled is False


def test_a_rise_is_one_way_and_not_by_chance():
    assert stats._rises(np.arange(10.0)) is True
    assert stats._rises(np.full(10, 5.0)) is False
    assert stats._rises(np.array([9.0, 10, 8, 7, 6, 5, 4, 3, 2, 1])) is False
    assert stats._rises(np.arange(4.0)) is False  # one of 24 orders


# -- outliers and doubts ----------------------------------------------------------------------------------------------


def test_an_outlier_is_five_deviations_and_a_percent_away():
    times = np.array([98.0, 99, 99, 100, 100, 100, 101, 101, 102])
    assert stats.outlier_limit(times) == pytest.approx(100 + 5 * 1.4826)  # MAD 1
    assert stats.outlier_limit(np.full(9, 200.0)) == pytest.approx(202.0)
    at_the_limit = np.array([100.0] * 9 + [101.0])
    assert stats.outlier_limit(at_the_limit) == 101.0
    assert stats.outliers([at_the_limit]).count == 0


def steady(count=40, ms=100.0):
    """Times that all differ, by less than anything says."""
    return ms * (1 + 1e-6 * np.arange(count))


def judged(*rounds):
    return stats.steadiness(dict(enumerate(np.asarray(times, float) for times in rounds)))


def test_a_round_is_as_long_as_the_median_round():
    found = judged(steady(4), [], steady(10, 50.0), steady(12, 250.0))
    assert (found.rounds, found.iterations) == (3, 10.0)
    assert found.seconds == pytest.approx(0.5, rel=1e-4)
    assert stats.steadiness({0: np.array([])}) is None


def test_noise_says_what_can_still_be_found():
    medians = np.exp(0.05 * np.array([-1.0, 0.0, 1.0, 0.0, -1.0, 1.0]) / np.sqrt(0.8))
    found = judged(*(m * steady(41) for m in medians))
    assert found.noise == pytest.approx(0.05)
    assert found.detectable == pytest.approx(stats.detectable(0.05, 6))
    assert (judged(steady(), steady()).noise, judged(steady(), steady()).detectable) == (None, None)


def test_a_slow_start_is_the_first_tenth_and_three_at_least():
    def start(count):
        return stats._slow_start(np.arange(1.0, count + 1))

    assert start(5) is None
    assert start(6) == pytest.approx(2 / 5 - 1)  # three of six
    assert start(20) == pytest.approx(2 / 12 - 1)
    assert start(45) == pytest.approx(2.5 / 25 - 1)  # four
    assert start(50) == pytest.approx(3 / 28 - 1)  # five
    slow = steady(60) * np.where(np.arange(60) < 6, 1.25, 1.0)
    assert judged(slow, steady(60), slow).slow_start == pytest.approx(0.25, rel=1e-3)
    assert judged(steady(5)).slow_start is None


def test_outliers_are_a_share_of_all_times():
    times = steady(100)
    times[20:80:10] = 300.0
    found = judged(times, steady(20)).outliers
    assert (found.count, found.share, found.worst_ms) == (6, 6 / 120, 300.0)


@pytest.mark.parametrize(
    ("count", "different", "coarse"), [(20, 9, True), (20, 10, False), (20, 15, False), (19, 5, False), (60, 25, True)]
)
def test_a_clock_is_coarse_where_more_than_half_of_the_times_repeat(count, different, coarse):
    times = np.resize(steady(different), count)
    assert judged(steady(), times).coarse is coarse
