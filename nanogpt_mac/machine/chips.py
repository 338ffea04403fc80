"""Peak arithmetic rates and memory bandwidths of known chips, each with its source. Pure data, no I/O.

Apple publishes no FLOPS. They follow from GPU cores x 128 ALUs x 2 (a fused multiply-add) x clock, so the clock is
what the sources give. From the M3 on they contradict one another by up to 40 %: every claim is kept, the first one is
used (where there is one, the top clock that the chip itself reports to `powermetrics`), and the chip is marked as
disputed. On a disputed chip the matmul measured by gemm.py is the figure to trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

A100_BF16 = 312e12
"""FLOP/s of an A100 in bfloat16: the denominator of the MFU that nanoGPT itself prints on every chip."""

APPLE_FLOP_PER_CORE_CYCLE = 128 * 2  # 128 ALUs a GPU core (philipturner/metal-benchmarks), 2 FLOP a multiply-add


@dataclass(frozen=True)
class Chip:
    """One machine's accelerator.

    `peak_flops` maps a dtype ("float32", "bfloat16", "float16"; for NVIDIA also "tf32") to dense FLOP/s of this
    machine's GPU; a dtype without a trustworthy figure is absent. `bandwidth` is in bytes/s. `disputed`: sources
    contradict one another by more than 3 %; `float32_range` then holds the lowest and highest float32 claim in
    FLOP/s, scaled to this machine, and `note` says who claims what.
    """

    name: str
    gpu_cores: int | None
    peak_flops: Mapping[str, float]
    bandwidth: float | None
    sources: tuple[str, ...]
    disputed: bool = False
    note: str = ""
    float32_range: tuple[float, float] | None = None


def peak(chip: Chip | None, dtype: str, matmul_precision: str = "highest") -> float | None:
    """Peak FLOP/s of `chip` for matmuls at `dtype`, or None when it is not known.

    `matmul_precision` is torch's: below "highest", NVIDIA's tensor cores do float32 matmuls in TF32.
    """
    if chip is None:
        return None
    if dtype == "float32" and matmul_precision != "highest" and "tf32" in chip.peak_flops:
        return chip.peak_flops["tf32"]
    return chip.peak_flops.get(dtype)


def find(brand: str, gpu_cores: int | None) -> Chip | None:
    """The chip called `brand`, or None: an unknown name is never matched to a similar one.

    Apple: the name that `sysctl machdep.cpu.brand_string` gives ("Apple M4 Pro"); its figures are scaled by
    `gpu_cores`, of which None leaves the peaks out and more than the chip has gives None.
    NVIDIA: the device name of NVML or torch.cuda ("NVIDIA H200"); `gpu_cores` is not used.
    """
    brand = brand.strip()
    if brand in APPLE:
        return _apple(brand, APPLE[brand], gpu_cores)
    return NVIDIA.get(brand)


@dataclass(frozen=True)
class AppleRow:
    """`claims`: source -> FLOP/s in float32 of the largest bin, which has `cores` GPU cores."""

    cores: int
    claims: Mapping[str, float]
    bandwidth: float | Mapping[int, float]  # bytes/s; by GPU cores where the bins differ
    half_as_single: bool = False  # float16 runs at the rate of float32 (philipturner/metal-benchmarks: M1, M2)
    remark: str = ""


def _apple(name: str, row: AppleRow, cores: int | None) -> Chip | None:
    if cores is not None and not 1 <= cores <= row.cores:
        return None
    low, high = min(row.claims.values()), max(row.claims.values())
    disputed = high > 1.03 * low
    notes = [row.remark] if row.remark else []
    if disputed:
        listed = "; ".join(f"{claim / 1e12:.3g} TFLOP/s ({source})" for source, claim in row.claims.items())
        notes.append(f"sources disagree for {row.cores} GPU cores in float32: {listed}; the first is used")
    by_cores = row.bandwidth
    bandwidth = by_cores if isinstance(by_cores, float) else by_cores.get(cores or 0)
    peaks = {}
    float32_range = None
    if cores:
        share = cores / row.cores
        peaks["float32"] = next(iter(row.claims.values())) * share
        if row.half_as_single:
            peaks["float16"] = peaks["float32"]
        if disputed:
            float32_range = (low * share, high * share)
    return Chip(name, cores, peaks, bandwidth, tuple(row.claims), disputed, ". ".join(notes), float32_range)


def _clock(cores: int, megahertz: float) -> float:
    return cores * APPLE_FLOP_PER_CORE_CYCLE * megahertz * 1e6


# Who says what. Clocks are the highest GPU state in MHz.
_BENCH = "philipturner/metal-benchmarks README: {} MHz"
_INFO = "philipturner/applegpuinfo: {} MHz"
_HMC = "hmc-tech.com: {} MHz"
_HF = "huggingface.js#{}"
# tzakharko.github.io, apple-neural-accelerators-benchmark: 1024 float16 FLOP a core and cycle where the ALUs do 256.
_M5 = "These are the ALUs; the M5's matrix units, which MLX uses below float32 and for TF32, are faster"

APPLE: Mapping[str, AppleRow] = {
    "Apple M1": AppleRow(8, {_BENCH.format(1278): _clock(8, 1278)}, 68.3e9, True),
    "Apple M1 Pro": AppleRow(16, {_BENCH.format(1296): _clock(16, 1296)}, 204.8e9, True),
    "Apple M1 Max": AppleRow(32, {_BENCH.format(1296): _clock(32, 1296)}, 409.6e9, True),
    "Apple M1 Ultra": AppleRow(64, {_BENCH.format(1296): _clock(64, 1296)}, 819.2e9, True),
    "Apple M2": AppleRow(10, {_BENCH.format(1398): _clock(10, 1398)}, 102.4e9, True),
    "Apple M2 Pro": AppleRow(19, {_BENCH.format(1398): _clock(19, 1398)}, 204.8e9, True),
    "Apple M2 Max": AppleRow(38, {_BENCH.format(1398): _clock(38, 1398)}, 409.6e9, True),
    "Apple M2 Ultra": AppleRow(76, {_BENCH.format(1398): _clock(76, 1398)}, 819.2e9, True),
    "Apple M3": AppleRow(
        10,
        {
            "powermetrics of an M3 in philipturner/applegpuinfo#15: 1338 MHz": _clock(10, 1338),
            _HMC.format(1398): _clock(10, 1398),
            _HF.format(1044): 4.1e12,
        },
        100e9,
    ),
    "Apple M3 Pro": AppleRow(
        18,
        {
            _INFO.format(1380): _clock(18, 1380),
            _HMC.format(1398): _clock(18, 1398),
            _HF.format(1044): 7.4e12,
        },
        150e9,
    ),
    "Apple M3 Max": AppleRow(
        40,
        {
            "powermetrics of an M3 Max in philipturner/applegpuinfo#4: 1380 MHz": _clock(40, 1380),
            _HF.format(1044): 14.2e12,
            _HMC.format(1398): _clock(40, 1398),
        },
        {30: 300e9, 40: 400e9},
    ),
    "Apple M3 Ultra": AppleRow(
        80,
        {
            _INFO.format(1380) + " for the M3 family": _clock(80, 1380),
            _HF.format(1304) + ", 21.3 TFLOP/s at 60 cores": 21.3e12 / 60 * 80,
        },
        819e9,
    ),
    "Apple M4": AppleRow(
        10,
        {
            _HMC.format(1578): _clock(10, 1578),
            _HMC.format(1470) + ", an older page": _clock(10, 1470),
            _HF.format(1044): 4.6e12,
        },
        120e9,
    ),
    "Apple M4 Pro": AppleRow(
        20,
        {
            "powermetrics of an M4 Pro in eclecticlight.co, 2025-01-22: 1578 MHz": _clock(20, 1578),
            _HF.format(1044): 9.2e12,
        },
        273e9,
    ),
    "Apple M4 Max": AppleRow(
        40,
        {
            "the M4 Pro's clock, eclecticlight.co, 2025-01-22: 1578 MHz": _clock(40, 1578),
            _HMC.format(1678): _clock(40, 1678),
            _HF.format(1044): 18.4e12,
        },
        {32: 410e9, 40: 546e9},
    ),
    "Apple M5": AppleRow(
        10,
        {
            "powermetrics of an M5 in michaelstinkerings.org, roofline analysis: 1578 MHz": _clock(10, 1578),
            "cpu-monkey in GradientHQ/parallax#196": 5.133e12,
            _HF.format(2033): 5.7e12,
        },
        153e9,
        remark=_M5,
    ),
    "Apple M5 Pro": AppleRow(
        20,
        {
            "the M5's clock, GradientHQ/parallax#449: 1578 MHz": _clock(20, 1578),
            _HF.format(2033): 11.4e12,
        },
        307e9,
        remark=_M5,
    ),
    "Apple M5 Max": AppleRow(
        40,
        {
            "powermetrics of an M5 Max in feedback-assistant/reports#830: 1620 MHz": _clock(40, 1620),
            _HF.format(2033): 22.8e12,
        },
        {32: 460e9, 40: 614e9},
        remark=_M5,
    ),
}


def _nvidia(
    name: str,
    source: str,
    gigabytes: float,
    float32: float,
    tf32: float | None,
    bfloat16: float | None,
    float16: float,
) -> Chip:
    """Rates in TFLOP/s: float32 without tensor cores, the others dense on them with float32 accumulation."""
    teraflops = {"float32": float32, "tf32": tf32, "bfloat16": bfloat16, "float16": float16}
    peaks = {dtype: rate * 1e12 for dtype, rate in teraflops.items() if rate is not None}
    return Chip(name, None, peaks, gigabytes * 1e9, (source,))


_A100 = "NVIDIA A100 data sheet"
_H100 = "NVIDIA H100 data sheet"
_H200 = "NVIDIA H200 data sheet"
_GA102 = "NVIDIA Ampere GA102 white paper"
_ADA = "NVIDIA Ada white paper"

# The data sheets print most tensor rates with 2:4 sparsity; these are the dense ones, half of that.
NVIDIA: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _nvidia("Tesla T4", "NVIDIA T4 data sheet", 320, 8.1, None, None, 65),
        _nvidia("NVIDIA A10", "NVIDIA A10 data sheet", 600, 31.2, 62.5, 125, 125),
        _nvidia("NVIDIA A100-PCIE-40GB", _A100, 1555, 19.5, 156, 312, 312),
        _nvidia("NVIDIA A100-SXM4-40GB", _A100, 1555, 19.5, 156, 312, 312),
        _nvidia("NVIDIA A100 80GB PCIe", _A100, 1935, 19.5, 156, 312, 312),
        _nvidia("NVIDIA A100-SXM4-80GB", _A100, 2039, 19.5, 156, 312, 312),
        _nvidia("NVIDIA H100 PCIe", _H100, 2000, 51, 378, 756.5, 756.5),
        _nvidia("NVIDIA H100 80GB HBM3", _H100, 3350, 67, 494.5, 989.5, 989.5),
        _nvidia("NVIDIA H100 NVL", _H100, 3900, 60, 417.5, 835.5, 835.5),
        _nvidia("NVIDIA H200", _H200, 4800, 67, 494.5, 989.5, 989.5),
        _nvidia("NVIDIA H200 NVL", _H200, 4800, 60, 417.5, 835.5, 835.5),
        _nvidia("NVIDIA L4", "NVIDIA L4 data sheet", 300, 30.3, 60, 121, 121),
        _nvidia("NVIDIA L40S", "NVIDIA L40S data sheet", 864, 91.6, 183, 362.05, 362.05),
        _nvidia("NVIDIA GeForce RTX 3090", _GA102, 936, 35.6, 35.6, 71, 71),
        _nvidia("NVIDIA GeForce RTX 4090", _ADA, 1008, 82.6, 82.6, 165.2, 165.2),
    )
}
