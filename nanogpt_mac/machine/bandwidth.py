"""How fast this machine's CPU moves memory: measured, because no table has it for every machine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from nanogpt_mac.machine.cores import usable

BYTES = 256 << 20  # beyond every cache
TRIES = 4


def of_cpu() -> float:
    """Bytes/s: the best of a few copies and of a few readings, each by all cores at once."""
    import numpy as np

    threads = usable()
    source = np.ones(min(BYTES, psutil.virtual_memory().available // 8) // 4, np.float32)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for moved, work in ((2, lambda p: np.copyto(p[1], p[0])), (1, lambda p: p[0].max())):
            for _ in range(TRIES):
                began = time.perf_counter()
                list(pool.map(work, parts))
                best = max(best, moved * source.nbytes / (time.perf_counter() - began))
    return best
