import itertools
import math

import pytest

from nanogpt_mac.config import Config
from nanogpt_mac.train.schedule import learning_rate


def test_nanogpts_schedule_at_its_corners():
    config = Config()  # 1e-3 -> 1e-4, 100 of warm-up, 5000 of decay
    assert learning_rate(config, 0) == pytest.approx(1e-3 / 101)
    assert learning_rate(config, 99) == pytest.approx(1e-3 * 100 / 101)
    assert learning_rate(config, 100) == pytest.approx(1e-3)
    assert learning_rate(config, 2550) == pytest.approx(5.5e-4)
    assert learning_rate(config, 1325) == pytest.approx(1e-4 + 0.5 * (1 + math.cos(math.pi / 4)) * 9e-4)
    assert learning_rate(config, 5000) == pytest.approx(1e-4)
    assert learning_rate(config, 9000) == 1e-4
    assert learning_rate(Config(decay_lr=False), 3) == 1e-3


def test_the_rate_falls_from_its_highest_to_its_lowest_without_a_step():
    """Monotone, and no two neighbours further apart than the steepest slope of a cosine or of the warm-up."""
    config = Config(warmup_iters=7, lr_decay_iters=50, learning_rate=1e-2, min_lr=1e-3)
    rates = [learning_rate(config, i) for i in range(60)]
    assert max(rates) == rates[7] == pytest.approx(1e-2)
    assert rates[:8] == sorted(rates[:8])
    assert rates[7:] == sorted(rates[7:], reverse=True)
    steepest = 0.5 * math.pi / (50 - 7) * 9e-3
    assert all(a - b <= steepest * 1.001 for a, b in itertools.pairwise(rates[7:]))
    assert rates[50:] == pytest.approx([1e-3] * 10)
