"""The learning rate."""

from __future__ import annotations

import math

from nanogpt_mac.config import Config


def learning_rate(config: Config, iteration: int) -> float:
    """nanoGPT's schedule: linear warm-up, cosine down to `min_lr` at `lr_decay_iters`, constant after."""
    if not config.decay_lr:
        return config.learning_rate
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if iteration > config.lr_decay_iters:
        return config.min_lr
    done = (iteration - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)
