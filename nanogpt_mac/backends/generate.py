"""Drawing text from any back end: the logits are the device's, the draw is made here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nanogpt_mac.backends.base import Backend
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec


def generate(
    backend: Backend,
    spec: GPTSpec,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1337,
    symbols: int | None = None,
) -> Iterator[int]:
    """Yield tokens that continue `prompt`, drawn as nanoGPT draws them.

    The draw is made here from the logits with a generator of its own, so that the same seed gives the same text on
    every back end up to rounding. `temperature` 0 takes the likeliest token; only the first `symbols` ids are drawn
    (a vocabulary may be padded). Beyond `block_size` the window slides and, positions being learnt and absolute, is
    computed anew for each token.
    """
    if not prompt:
        raise InputError("prompt='': must hold at least one token")
    rng = np.random.Generator(np.random.Philox(key=seed))
    tokens, decoder, fed = list(prompt), backend.decode(), 0
    for _ in range(max_new_tokens):
        if len(tokens) > spec.block_size:
            decoder, fed = backend.decode(), len(tokens) - spec.block_size
        scores = decoder(np.array(tokens[fed:], np.int32))[:symbols].astype(np.float64)
        fed = len(tokens)
        token = draw(scores, temperature, top_k, rng.random())
        tokens.append(token)
        yield token


def draw(scores: np.ndarray, temperature: float, top_k: int | None, uniform: float) -> int:
    """One token from float64 logits (V,) by inverting the cumulative softmax at `uniform` in [0, 1)."""
    if temperature == 0.0:
        return int(scores.argmax())
    scores = (scores - scores.max()) / temperature
    if top_k is not None and top_k < len(scores):
        scores = np.where(scores < np.partition(scores, -top_k)[-top_k], -np.inf, scores)
    cumulative = np.cumsum(np.exp(scores))
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(scores) - 1)
