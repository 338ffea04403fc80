"""The other processes of a run: which rank this one is, and means over all ranks. Alone, it does nothing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` has no time for it
    import numpy as np

    from nanogpt_mac.ranks import Launched

SETTLING = 5  # iterations in which something may still be compiled or recorded
TIMED = 5  # sums over all ranks, of which the median counts
# Bytes of gradients that are summed together while a backward pass goes on, as DDP has it: each sum costs a constant,
# so many small ones take longer, and of a few large ones the last begins late.
BUCKET = 25 << 20


@dataclass
class World:
    """All ranks of a run. Every method but `share` is called by all ranks, in the same order.

    A rank that is asked to end (`asked`) cannot stop by itself: the others would wait for it. What it was asked goes
    round with the loss of an iteration or evaluation, after which all know it (`agreed`) and end together.
    """

    rank: int = 0
    size: int = 1
    by: str = ""  # what carries a sum: gloo, nccl, ring
    survives: bool = False  # whether what a rank has learnt is whole after a sum that failed
    asked: bool = False
    agreed: bool = False
    turns: int = 0  # begun and ended
    begun: int = 0  # iterations
    busy: int = 0  # with what may take long
    bucket: float = BUCKET
    unmeasured: str = ""  # why `finish` cannot say how long it took
    under_way: list[Any] = field(default_factory=list)  # sums that have begun
    waited_ms: list[float] = field(default_factory=list)  # of an iteration each: nothing but waiting for the others

    def share(self, batches: np.ndarray) -> np.ndarray:
        """Of one iteration's batches (accumulation, batch), those of this rank."""
        self.begun, self.turns = self.begun + 1, self.turns + 1
        count = len(batches) // self.size
        return batches[self.rank * count : (self.rank + 1) * count]

    def gather(self, text: str) -> list[str]:
        """The text of every rank, by rank."""
        return [text]

    def mean(self, value: float) -> float:
        """Of the ranks' values; it spreads `asked` too."""
        return value

    def heard(self, asked: float, waited_ms: float = math.nan) -> None:
        """What has come round with an iteration or an evaluation: how many were asked to end; `finish`'s time."""
        self.agreed = self.agreed or asked > 0
        self.turns += 1
        if not math.isnan(waited_ms):
            self.waited_ms.append(waited_ms)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Within, this rank may take long, and the others with it."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    def progress(self) -> tuple[int, bool]:
        """How far this rank has come, and whether it may take long now: the first iterations compile."""
        return self.turns, self.busy > 0 or self.begun <= SETTLING

    def device(self) -> str:
        """Of a device that no two ranks may share, a name that is its own; empty where they may."""
        return ""

    def sum_ms(self, count: int) -> list[float]:
        """Times of summing `count` float32 over all ranks, with nothing beside it."""
        return []

    def alone_ms(self, count: int) -> float | None:
        times = self.sum_ms(count)
        return median(times) if times else None

    def close(self) -> None:
        """No further sum will be asked for."""


class Ranks(World, ABC):
    """Several, as a Kind's `world` names them. How arrays become means over them is between it and its back end."""

    @classmethod
    @abstractmethod
    def join(cls, launched: Launched, device: str) -> Ranks:
        """What a launcher has started this process in, once all others are there too. InputError: they are not."""
