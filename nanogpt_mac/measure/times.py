"""One distribution of iteration times in figures: the same function for a run, a variant and a chart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanogpt_mac.records.run import Times

FEWEST_FOR_INTERVAL = 6  # fewer values cannot bound a median at 95 %


def summary(values_ms: Sequence[float] | np.ndarray, ci95: tuple[float, float] | None = None) -> Times:
    """Median, mean, spread and count of `values_ms`; `ci95` is the interval of the median.

    Without any values all figures are None and the count is 0.
    """
    values = np.asarray(values_ms, dtype=float)
    if not len(values):
        return Times()
    p10, median, p90 = (float(p) for p in np.percentile(values, [10, 50, 90]))
    return Times(
        median=median,
        ci95=ci95,
        mean=float(values.mean()),
        min=float(values.min()),
        p10=p10,
        p90=p90,
        max=float(values.max()),
        count=len(values),
    )


def order_interval(values_ms: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """The median's 95 % interval from order statistics of one run's iterations; None for fewer than six.

    It leaves out as many values on either side as a fair coin's heads fall short of in 2.5 % of cases: what
    scipy.stats.quantile_test gives, without the second that importing scipy.stats takes at the end of every run.
    """
    values = np.sort(np.asarray(values_ms, dtype=float))
    if len(values) < FEWEST_FOR_INTERVAL:
        return None
    from scipy.special import bdtrik

    outside = int(bdtrik(0.025, len(values), 0.5))
    return float(values[outside]), float(values[len(values) - 1 - outside])
