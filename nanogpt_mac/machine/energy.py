"""Energy of a stretch of a run, where it can be read without root."""

from __future__ import annotations

import time
from typing import Any

from nanogpt_mac.machine import nvml, probe
from nanogpt_mac.records.run import Energy

SAMPLE = "nanogpt-mac"
Parts = tuple[float, float, float | None, str]  # joules in all, of the GPU, of the CPU where known; who counted


class EnergyMeter:
    """`start()`, then `stop()`, which returns the energy in between, or None with the cause in `reason`.

    It counts the whole machine (macOS) or the whole GPU (NVIDIA), other programs included. macOS: zeus-apple-silicon,
    which reads the counters behind `powermetrics`; `joules` is CPU + GPU + Neural Engine (what powermetrics calls
    combined power) + DRAM where the chip has that counter. Display, disk and power supply are not in it. NVIDIA: the
    board's energy counter, Volta and later, refreshed every 20 to 100 ms.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._monitor: Any = None
        self._started: float | None = None
        self._millijoules: int | None = None

    def start(self) -> None:
        self.reason = None
        if probe.on_mac():
            self._start_apple()
        else:
            self._millijoules = self._nvml_counter()
        self._started = time.monotonic()

    def stop(self) -> Energy | None:
        if self._started is None:
            raise RuntimeError("EnergyMeter.stop() without start()")
        seconds = time.monotonic() - self._started
        self._started = None
        if self.reason:
            return None
        parts = self._stop_apple() if probe.on_mac() else self._stop_nvml()
        if parts is None:
            return None
        joules, gpu, cpu, source = parts
        if joules <= 0:
            self.reason = "the energy counters did not move"
            return None
        return Energy(joules=joules, gpu_joules=gpu, cpu_joules=cpu, seconds=seconds, source=source)

    def _start_apple(self) -> None:
        try:
            from zeus_apple_silicon import AppleEnergyMonitor
        except ImportError:
            self.reason = "zeus-apple-silicon is not installed"
            return
        try:
            self._monitor = AppleEnergyMonitor()
            self._monitor.begin_window(SAMPLE)
        except RuntimeError as error:  # nanobind's translation of the library's std::runtime_error
            self.reason = f"zeus-apple-silicon: {error}"

    def _stop_apple(self) -> Parts | None:
        try:
            metrics = self._monitor.end_window(SAMPLE)
        except RuntimeError as error:
            self.reason = f"zeus-apple-silicon: {error}"
            return None
        # Millijoules, or None for a counter that this chip does not have (the library's README).
        rails = (metrics.cpu_total_mj, metrics.gpu_mj, metrics.ane_mj, metrics.dram_mj)
        cpu, gpu, _, _ = joules = [None if rail is None else rail / 1000 for rail in rails]
        if cpu is None or gpu is None:
            self.reason = "this chip has no energy counters for its CPU and GPU"
            return None
        return sum(rail for rail in joules if rail is not None), gpu, cpu, "zeus-apple-silicon"

    def _nvml_counter(self) -> int | None:
        """Millijoules since the driver was loaded."""
        try:
            with nvml.device() as (pynvml, handle):
                return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except nvml.NvmlError as error:
            self.reason = str(error)
            return None

    def _stop_nvml(self) -> Parts | None:
        after = self._nvml_counter()
        if after is None or self._millijoules is None:
            return None
        joules = (after - self._millijoules) / 1000
        return joules, joules, None, "nvml"
