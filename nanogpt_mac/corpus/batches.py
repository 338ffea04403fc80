"""Where each training window starts: a counter-based draw, the same on every machine and back end.

The draw for a step needs no history, so a resumed run sees the batches that the uninterrupted run would have
seen.
"""

import hashlib
from functools import lru_cache

import numpy as np

from nanogpt_mac.errors import InputError

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@lru_cache(maxsize=16)
def _stream(split: str) -> int:
    """A 64-bit key word for the name of a stream."""
    return int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "little")


def starts(seed: int, step: int, split: str, count: int, length: int, block_size: int) -> np.ndarray:
    """Index of the first token of each of `count` windows of `block_size + 1` tokens in a split of `length` tokens.

    Philox 4x64 is keyed by (seed, split); the step is the second word of its counter, so the 2**64 blocks of
    one step never reach those of the next. `split` is any name: different names give independent draws
    ("train" for training batches, another name for evaluating on the training split). Only `random_raw` is
    used, whose stream numpy guarantees across versions and platforms; each 64-bit word x becomes floor(x *
    span / 2**64) (Lemire's multiply-shift), whose bias is below span / 2**64.

    Returns int64 of shape (count,), each in [0, length - block_size - 1].
    Raises InputError if not even one window fits.
    """
    span = length - block_size
    if span < 1:
        raise InputError(
            f"model.block_size={block_size}: a window is block_size + 1 tokens and the {split} split of this "
            f"corpus has {length}; use at most {length - 1}"
        )
    key = np.array([seed % 2**64, _stream(split)], np.uint64)
    counter = np.array([0, step, 0, 0], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    # The upper 64 bits of the 128-bit product raw * span, from four 32-bit products.
    high, low = raw >> _HALF, raw & _LOW
    span_high, span_low = np.uint64(span >> 32), np.uint64(span & 0xFFFFFFFF)
    middle = high * span_low + (low * span_low >> _HALF)
    carry = low * span_high + (middle & _LOW)
    return (high * span_high + (middle >> _HALF) + (carry >> _HALF)).astype(np.int64)
