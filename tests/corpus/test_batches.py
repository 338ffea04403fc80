"""Where windows start: range, independence, uniformity, and the numbers themselves."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from nanogpt_mac.corpus import starts
from nanogpt_mac.errors import InputError

MASK = 2**64 - 1


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """One block of Philox4x64-10, from its paper (Salmon et al., SC 2011), in plain Python."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & MASK, (a >> 64) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def reference(seed: int, step: int, split: str, count: int, span: int) -> list[int]:
    key = (seed, int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "little"))
    raw: list[int] = []
    block = 0
    while len(raw) < count:
        block += 1  # numpy adds one before it draws
        raw += philox(key, [block, step, 0, 0])
    return [(x * span) >> 64 for x in raw[:count]]


@pytest.mark.parametrize(
    ("seed", "step", "split", "count", "length", "block_size"),
    [
        (1337, 0, "train", 64, 1_003_854, 256),
        (1337, 4999, "val", 12, 111_540, 64),
        (0, 600_000, "train", 7, 9_035_582_198, 1024),
        (2**63 + 11, 2**40, "another", 5, 2**45, 1),
    ],
)
def test_equals_philox_and_exact_integers(
    seed: int, step: int, split: str, count: int, length: int, block_size: int
) -> None:
    drawn = starts(seed, step, split, count, length, block_size)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == reference(seed, step, split, count, length - block_size)


def test_pinned() -> None:
    """These very batches were trained on: a change here makes old runs unrepeatable."""
    assert starts(1337, 0, "train", 4, 1_003_854, 256).tolist() == PINNED_TRAIN
    assert starts(1337, 1, "val", 4, 111_540, 256).tolist() == PINNED_VAL


PINNED_TRAIN = [363882, 753720, 803728, 87612]
PINNED_VAL = [76387, 15619, 38180, 72842]


def test_every_window_fits_and_every_start_is_reached() -> None:
    drawn = starts(3, 9, "train", 20_000, 40, 30)
    assert set(drawn.tolist()) == set(range(10))  # 30 + 1 tokens from 9 end with the last of the 40
    assert starts(3, 9, "train", 5, 31, 30).tolist() == [0] * 5


@pytest.mark.parametrize("length", [0, 30])
def test_no_window_fits(length: int) -> None:
    with pytest.raises(InputError, match=r"model\.block_size=30: .* val split .* has"):
        starts(3, 9, "val", 5, length, 30)


def test_uniform() -> None:
    span = 997
    drawn = np.concatenate([starts(5, step, "train", 64, span + 8, 8) for step in range(3000)])
    counts = np.bincount(drawn, minlength=span)
    assert len(counts) == span
    assert 1e-3 < stats.chisquare(counts).pvalue < 1 - 1e-3


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert starts(5, 2, "val", 100, 10**6, 64)[:17].tolist() == starts(5, 2, "val", 17, 10**6, 64).tolist()


def test_streams_are_independent() -> None:
    length = 2**50  # so long that two independent draws do not meet by chance
    streams = [
        starts(seed, step, split, 4000, length, 1)
        for seed in (1, 2)
        for step in (0, 1, 2)
        for split in ("train", "val")
    ]
    assert len(np.unique(np.concatenate(streams))) == len(streams) * 4000
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


def test_every_bit_of_the_draw_counts() -> None:
    """A split so long that the product's lowest bits show, and seeds below 0 and above 64 bits."""
    span = 2**62 + 12_345
    assert starts(7, 3, "train", 200, span + 5, 5).tolist() == reference(7, 3, "train", 200, span)
    assert starts(-1, 3, "val", 5, 1000, 8).tolist() == reference(2**64 - 1, 3, "val", 5, 992)
    assert starts(2**64 + 3, 3, "val", 5, 1000, 8).tolist() == reference(3, 3, "val", 5, 992)


def test_the_longest_window_that_fits_is_named() -> None:
    with pytest.raises(InputError, match="this corpus has 30; use at most 29"):
        starts(3, 9, "val", 5, 30, 30)
