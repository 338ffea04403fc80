"""One distribution in figures, against numpy and scipy."""

import numpy as np
import pytest
from scipy.stats import quantile_test

from nanogpt_mac.measure import times


def test_a_summary_is_numpys():
    values = np.random.default_rng(0).lognormal(size=37)
    found = times.summary(values, (1.0, 2.0))
    assert found.count == 37
    assert (found.min, found.max, found.mean) == (values.min(), values.max(), values.mean())
    ordered = np.sort(values)  # a percentile lies at (n - 1) p: 3.6, 18 and 32.4
    assert found.p10 == pytest.approx(ordered[3] + 0.6 * (ordered[4] - ordered[3]))
    assert found.median == ordered[18]
    assert found.p90 == pytest.approx(ordered[32] + 0.4 * (ordered[33] - ordered[32]))
    assert tuple(found.ci95) == (1.0, 2.0)


def test_without_values_there_are_no_figures():
    found = times.summary([])
    assert (found.count, found.median, found.mean, found.p90, found.ci95) == (0, None, None, None, None)


@pytest.mark.parametrize("count", [6, 7, 8, 9, 25, 100, 101, 999])
def test_the_interval_is_scipys(count):
    values = np.random.default_rng(count).lognormal(size=count)
    expected = quantile_test(values, q=1.0, p=0.5).confidence_interval(0.95)
    assert times.order_interval(list(values)) == (expected.low, expected.high)


def test_five_values_bound_nothing():
    assert times.order_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
