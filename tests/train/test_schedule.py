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
