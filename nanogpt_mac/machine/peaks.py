"""The best matmul rate that this machine has ever shown: a busy moment cannot lower it.

It is kept in the cache folder's peaks.json. A file that is damaged, or another program's, counts as absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanogpt_mac import files
from nanogpt_mac.records.base import cached, update
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.records.run import MatmulPeaks


def place() -> Path:
    return files.cache_folder("peaks.json")


def name(environment: Mapping[str, Any], framework: str, device: str, *rest: object) -> str:
    """What a rate is kept under: the chip, how much of it may be used, the framework's version, the device, and the
    `rest`, such as dtype and precision. `environment` is probe.environment()'s."""
    chip = [environment.get(key) for key in ("chip", "cpu_cores", "gpu", "gpu_cores")]
    threads = os.environ.get("OMP_NUM_THREADS"), getattr(os, "sched_getaffinity", lambda _: ())(0)
    version = (environment.get("versions") or {}).get(framework)
    return " ".join(str(part) for part in (*chip, threads[0], len(threads[1]), framework, version, device, *rest))


def of_run(
    environment: Mapping[str, Any],
    able: Capabilities,
    dtype: str,
    precision: str,
    settings: Mapping[str, Any],
) -> str:
    """The key of a training run's peak: `able` is its back end's, `settings` are all that this kind has of its own."""
    own = (f"{key}={value}" for key, value in sorted(settings.items()))
    return name(environment, able.framework, able.device, dtype, precision, *own)


def best(key: str) -> float | None:
    return cached(MatmulPeaks, place()).best.get(key)


def keep(key: str, flops_per_s: float) -> float:
    """The best rate under `key`, this one included. Where the cache folder cannot be written, this one is forgotten."""
    known = best(key) or 0.0
    if flops_per_s <= known:
        return known
    update(MatmulPeaks, place(), lambda found: found.with_one(key, flops_per_s))
    return max(flops_per_s, best(key) or 0.0)


class Peak:
    """A run's matmul peak, FLOP/s: `own`, what `measure` gave in this run, and `best`, what the machine can do.

    A run begins with what is remembered, so that nobody waits; what is measured at its end is remembered in turn.
    """

    def __init__(self, key: str, measure: Callable[[], float]) -> None:
        self.key, self._measure = key, measure
        self.own: float | None = None
        self.best = best(key)
        if self.best is None:
            self.again()

    def again(self) -> None:
        self.own = max(self.own or 0.0, self._measure())
        self.best = keep(self.key, self.own)
