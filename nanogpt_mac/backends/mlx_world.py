"""Ranks by mx.distributed: a ring of sockets anywhere, JACCL between Macs with Thunderbolt 5, NCCL on CUDA."""

from __future__ import annotations

import os
import time
from typing import cast

import mlx.core as mx
import numpy as np

from nanogpt_mac.backends.world import TIMED, Ranks
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.ranks import Launched

VARIABLES = {"ring": "MLX_HOSTFILE", "jaccl": "MLX_IBV_DEVICES", "nccl": "NCCL_HOST_IP"}  # as mlx.launch sets them


class MLXWorld(Ranks):
    """A sum is part of an iteration's graph like any other operation."""

    @classmethod
    def join(cls, launched: Launched, device: str) -> MLXWorld:
        by = next((name for name, variable in VARIABLES.items() if os.environ.get(variable)), "any")
        if not mx.distributed.is_available(by):
            raise InputError(f"mlx.launch --backend {by}: this MLX is built without it; use --backend ring")
        try:
            group = mx.distributed.init(strict=True, backend=by)
        except RuntimeError as error:
            raise InputError(f"rank {launched.rank} cannot reach the others: {reason(error)}") from error
        return cls(group.rank(), group.size(), by)

    def gather(self, text: str) -> list[str]:
        data = np.frombuffer(text.encode(), np.uint8)
        lengths = np.array(mx.distributed.all_gather(mx.array([len(data)], mx.int32)))
        padded = np.zeros(max(1, lengths.max()), np.uint8)
        padded[: len(data)] = data
        rows = np.array(mx.distributed.all_gather(mx.array(padded)[None]))
        return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]

    def mean(self, value: float) -> float:
        total, asked = cast(list[float], mx.distributed.all_sum(mx.array([value, float(self.asked)])).tolist())
        self.heard(asked)
        return total / self.size

    def average(self, arrays: list[mx.array]) -> list[mx.array]:
        """The mean over ranks of each, all in one sum."""
        ends = np.cumsum([array.size for array in arrays]).tolist()
        flat = mx.distributed.all_sum(mx.concatenate([array.reshape(-1) for array in arrays])) / self.size
        parts = mx.split(flat, ends[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def sum_ms(self, count: int) -> list[float]:
        flat, times = mx.zeros(count), []
        mx.eval(flat)
        for _ in range(1 + TIMED):
            mx.eval(mx.distributed.all_sum(mx.zeros(1)))
            begin = time.perf_counter()
            mx.eval(mx.distributed.all_sum(flat))
            times.append((time.perf_counter() - begin) * 1e3)
        return times[1:]
