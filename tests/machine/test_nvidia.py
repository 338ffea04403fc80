"""What is asked of an NVIDIA GPU, with a module in NVML's place that keeps its manners."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from nanogpt_mac.backends import mlx_entry
from nanogpt_mac.machine import chips, nvml, probe
from nanogpt_mac.machine.energy import EnergyMeter


class FakeNvml(ModuleType):
    """Two H200s. Handles are valid after nvmlInit, as NVML has it."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.millijoules, self.capability = 5_000_000, [9, 0]
        self.refuses: set[str] = set()
        self.asked: list[object] = []

    def _check(self, name: str) -> None:
        if name in self.refuses:
            raise self.NVMLError("Not Supported")
        if not self.open:
            raise self.NVMLError("Uninitialized")

    def nvmlInit(self) -> None:  # noqa: N802
        if "nvmlInit" in self.refuses:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802
        self._check("index")
        if index > 1:
            raise self.NVMLError("Invalid Argument")
        self.asked.append(index)
        return f"handle {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802
        self._check("uuid")
        self.asked.append(uuid)
        return f"handle {uuid}"

    def nvmlDeviceGetName(self, handle: object) -> str:  # noqa: N802
        self._check("name")
        return "NVIDIA H200"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._check("driver")
        return "570.86.15"

    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> list[int]:  # noqa: N802
        self._check("capability")
        return self.capability

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> object:  # noqa: N802
        self._check("utilisation")
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:  # noqa: N802
        self._check("energy")
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(probe, "on_mac", lambda: False)
    yield fake
    assert fake.open <= 1  # which takes long, and so does an nvmlShutdown


def test_the_gpu_is_found_and_known(gpu):
    assert probe.chip() == chips.find("NVIDIA H200", None)
    assert probe.gpu_utilisation() == 0.87
    facts = probe.environment()
    assert facts["gpu"] == "NVIDIA H200"
    assert facts["gpu_driver"] == "570.86.15"
    assert facts["gpu_cores"] is None
    assert facts["problems"] == []


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("1", 1), ("1,0", 1), (" 1 ,0", 1), ("GPU-8f3e", "GPU-8f3e"), ("MIG-1", "MIG-1")]
)
def test_it_is_the_one_that_cuda_calls_device_0(gpu, monkeypatch, visible, asked):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with nvml.device() as (module, handle):
        assert module is gpu
        assert handle == f"handle {asked}"
    assert gpu.asked == [asked]


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "7"])
def test_a_hidden_gpu_is_none(gpu, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probe.chip() is None
    assert probe.gpu_utilisation() is None
    assert probe.environment()["gpu"] is None


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [([9, 0], None, mlx_entry.GRAPH_MB), ([9, 0], "700", "700"), ([8, 9], None, None), (None, None, None)],
)
def test_mlx_has_shorter_graphs_where_its_own_are_long(gpu, monkeypatch, capability, asked, expected):
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", asked or "")
    if asked is None:
        monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER")
    gpu.capability = capability
    gpu.refuses |= {"capability"} if capability is None else set()
    mlx_entry._shorten_graphs()
    assert os.environ.get("MLX_MAX_MB_PER_BUFFER") == expected


def test_no_driver_is_no_gpu(gpu):
    gpu.refuses.add("nvmlInit")
    assert probe.chip() is None
    meter = EnergyMeter()
    meter.start()
    assert meter.stop() is None
    assert meter.reason == "NVML: Driver Not Loaded"


def test_no_library_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(probe, "on_mac", lambda: False)
    assert probe.chip() is None
    meter = EnergyMeter()
    meter.start()
    assert meter.stop() is None
    assert meter.reason == "nvidia-ml-py is not installed"


def test_energy_of_the_gpu(gpu):
    meter = EnergyMeter()
    for joules in (700, 1.5):  # a meter can be used again
        meter.start()
        gpu.millijoules += int(joules * 1000)
        energy = meter.stop()
        assert 0 <= energy.seconds < 5
        assert (energy.joules, energy.gpu_joules, energy.cpu_joules) == (joules, joules, None)
        assert energy.source == "nvml"
        assert meter.reason is None


def test_a_gpu_without_an_energy_counter_says_so(gpu):
    gpu.refuses.add("energy")
    meter = EnergyMeter()
    meter.start()
    assert meter.stop() is None
    assert meter.reason == "NVML: Not Supported"
    gpu.refuses.clear()
    meter.start()  # the reason is of the last stretch
    gpu.millijoules += 1
    assert meter.stop() is not None
    assert meter.reason is None


def test_a_counter_that_goes_away_or_stands_still_is_no_energy(gpu):
    meter = EnergyMeter()
    meter.start()
    assert meter.stop() is None
    assert meter.reason == "the energy counters did not move"
    meter.start()
    gpu.refuses.add("energy")
    assert meter.stop() is None
    assert meter.reason == "NVML: Not Supported"


# ml-energy/zeus-apple-silicon: AppleEnergyMonitor.begin_window(key) / end_window(key) -> AppleEnergyMetrics in mJ, a
# field that the chip does not have being None; a wrong use is a RuntimeError (README and examples/python there).
def zeus(metrics: dict[str, int | None] | Exception, broken: Exception | None = None) -> ModuleType:
    class AppleEnergyMonitor:
        def __init__(self) -> None:
            self.windows: set[str] = set()
            if broken:
                raise broken

        def begin_window(self, key: str) -> None:
            if key in self.windows:
                raise RuntimeError("Measurement with specified key already exists")
            self.windows.add(key)

        def end_window(self, key: str) -> SimpleNamespace:
            self.windows.remove(key)
            if isinstance(metrics, Exception):
                raise metrics
            return SimpleNamespace(**{"cpu_total_mj": None, "gpu_mj": None, "ane_mj": None, "dram_mj": None} | metrics)

    module = ModuleType("zeus_apple_silicon")
    module.AppleEnergyMonitor = AppleEnergyMonitor
    return module


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(probe, "on_mac", lambda: True)
    return lambda module: monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)


def measured() -> tuple[dict[str, object] | None, str | None]:
    meter = EnergyMeter()
    meter.start()
    return meter.stop(), meter.reason


def test_energy_of_a_mac(mac):
    mac(zeus({"cpu_total_mj": 1500, "gpu_mj": 20_000, "ane_mj": 0, "dram_mj": 2500}))
    told, reason = measured()
    assert reason is None
    assert told.seconds >= 0
    assert told.joules == 24.0
    assert told.gpu_joules == 20.0
    assert told.cpu_joules == 1.5
    assert told.source == "zeus-apple-silicon"


def test_a_mac_without_a_dram_counter_is_told_without_it(mac):
    mac(zeus({"cpu_total_mj": 1500, "gpu_mj": 20_000, "ane_mj": 1}))
    assert measured()[0].joules == pytest.approx(21.501)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "zeus-apple-silicon is not installed"),
        (zeus({}, RuntimeError("no channels")), "zeus-apple-silicon: no channels"),
        (zeus(RuntimeError("lost")), "zeus-apple-silicon: lost"),
        (zeus({"cpu_total_mj": 3}), "this chip has no energy counters for its CPU and GPU"),
        (zeus({"cpu_total_mj": 0, "gpu_mj": 0}), "the energy counters did not move"),
    ],
)
def test_a_mac_that_does_not_tell_says_why(mac, module, reason):
    mac(module)
    assert measured() == (None, reason)


def test_stop_needs_start():
    with pytest.raises(RuntimeError, match=r"without start\(\)"):
        EnergyMeter().stop()
