"""Peak arithmetic rates and memory bandwidths of known chips, each peak with its source and a link. Pure data, no I/O.

Apple publishes no FLOPS. They follow from GPU cores x 128 ALUs x 2 (a fused multiply-add) x clock, so the clock is
what the sources give. From the M3 on they contradict one another by up to 40 %. Every claim is kept; the first one is
used (the top clock that the chip itself reports to `powermetrics`, if anybody published it), and the chip is marked as
disputed. On a disputed chip trust the matmul measured by gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

A100_BF16 = 312e12
"""FLOP/s of an A100 in bfloat16: the denominator of the MFU that nanoGPT itself prints on every chip."""

APPLE_FLOP_PER_CORE_CYCLE = 128 * 2  # 128 ALUs a GPU core (philipturner/metal-benchmarks), 2 FLOP a multiply-add


@dataclass(frozen=True)
class Chip:
    """One machine's accelerator."""

    name: str
    gpu_cores: int | None
    peak_flops: Mapping[str, float]
    """Dense FLOP/s of this machine's GPU by dtype ("float32", "bfloat16", "float16"; for NVIDIA also "tf32"); a dtype
    without a trustworthy figure is absent."""
    bandwidth: float | None
    """Of the memory, in bytes/s."""
    sources: tuple[str, ...]
    """Whose figures these are."""
    links: tuple[str, ...]
    """Where each of the sources can be read."""
    disputed: bool = False
    """Whether sources contradict one another by more than 3 %; `note` then says who claims what."""
    note: str = ""
    float32_range: tuple[float, float] | None = None
    """On a disputed chip the lowest and highest float32 claim in FLOP/s, scaled to this machine."""


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

    Apple: the name that `sysctl machdep.cpu.brand_string` gives ("Apple M4 Pro"). Its figures are scaled by
    `gpu_cores`; without them there are no peaks, and with more than the chip has the answer is None.
    NVIDIA: the device name of NVML or torch.cuda ("NVIDIA H200"); `gpu_cores` is not used.
    """
    brand = brand.strip()
    if brand in APPLE:
        return _apple(brand, APPLE[brand], gpu_cores)
    return NVIDIA.get(brand)


@dataclass(frozen=True)
class Claim:
    """`flops`: FLOP/s in float32 of a chip's largest bin, according to `source`."""

    flops: float
    source: str
    link: str


@dataclass(frozen=True)
class AppleRow:
    """One chip; its largest bin has `cores` GPU cores."""

    cores: int
    claims: tuple[Claim, ...]
    bandwidth: float | Mapping[int, float]
    """Bytes/s; by GPU cores where the bins differ."""
    half_as_single: bool = False
    """Whether float16 runs at the rate of float32 (philipturner/metal-benchmarks: M1, M2)."""
    remark: str = ""


def _apple(name: str, row: AppleRow, cores: int | None) -> Chip | None:
    if cores is not None and not 1 <= cores <= row.cores:
        return None
    claims = [claim.flops for claim in row.claims]
    low, high = min(claims), max(claims)
    disputed = high > 1.03 * low
    notes = [row.remark] if row.remark else []
    if disputed:
        listed = "; ".join(f"{claim.flops / 1e12:.3g} TFLOP/s ({claim.source})" for claim in row.claims)
        notes.append(f"sources disagree for {row.cores} GPU cores in float32: {listed}; the first is used")
    by_cores = row.bandwidth
    bandwidth = by_cores if isinstance(by_cores, float) else by_cores.get(cores or 0)
    peaks = {}
    float32_range = None
    if cores:
        share = cores / row.cores
        peaks["float32"] = claims[0] * share
        if row.half_as_single:
            peaks["float16"] = peaks["float32"]
        if disputed:
            float32_range = (low * share, high * share)
    sources, links = tuple(claim.source for claim in row.claims), tuple(claim.link for claim in row.claims)
    return Chip(name, cores, peaks, bandwidth, sources, links, disputed, ". ".join(notes), float32_range)


def _clock(cores: int, megahertz: float, source: str, link: str) -> Claim:
    """A claim about the highest clock of a GPU."""
    return Claim(cores * APPLE_FLOP_PER_CORE_CYCLE * megahertz * 1e6, f"{source}: {megahertz} MHz", link)


def _bench(cores: int, megahertz: float) -> Claim:
    source = "philipturner/metal-benchmarks README"
    return _clock(cores, megahertz, source, "https://github.com/philipturner/metal-benchmarks")


def _info(cores: int, what: str = "") -> Claim:
    return _clock(cores, 1380, f"philipturner/applegpuinfo{what}", "https://github.com/philipturner/applegpuinfo")


def _hmc(cores: int, megahertz: float, page: str, what: str = "") -> Claim:
    return _clock(cores, megahertz, f"hmc-tech.com{what}", f"https://hmc-tech.com/gpu/{page}")


def _hf(flops: float, pull: int, what: str = "") -> Claim:
    link = f"https://github.com/huggingface/huggingface.js/pull/{pull}"
    return Claim(flops, f"huggingface.js#{pull}{what}", link)


_ECLECTIC = (
    "https://eclecticlight.co/2025/01/22/"
    "m4-pro-full-on-when-cpu-and-gpu-draw-over-50-w-and-how-low-power-mode-changes-that/"
)
# https://tzakharko.github.io/apple-neural-accelerators-benchmark/: 1024 float16 FLOP a core and cycle; the ALUs do 256.
_M5 = "These are the ALUs; the M5's matrix units, which MLX uses below float32 and for TF32, are faster"

APPLE: Mapping[str, AppleRow] = {
    "Apple M1": AppleRow(8, (_bench(8, 1278),), 68.3e9, True),
    "Apple M1 Pro": AppleRow(16, (_bench(16, 1296),), 204.8e9, True),
    "Apple M1 Max": AppleRow(32, (_bench(32, 1296),), 409.6e9, True),
    "Apple M1 Ultra": AppleRow(64, (_bench(64, 1296),), 819.2e9, True),
    "Apple M2": AppleRow(10, (_bench(10, 1398),), 102.4e9, True),
    "Apple M2 Pro": AppleRow(19, (_bench(19, 1398),), 204.8e9, True),
    "Apple M2 Max": AppleRow(38, (_bench(38, 1398),), 409.6e9, True),
    "Apple M2 Ultra": AppleRow(76, (_bench(76, 1398),), 819.2e9, True),
    "Apple M3": AppleRow(
        10,
        (
            _clock(
                10,
                1338,
                "powermetrics of an M3 in philipturner/applegpuinfo#15",
                "https://github.com/philipturner/applegpuinfo/issues/15",
            ),
            _hmc(10, 1398, "apple_10_core_m3"),
            _hf(4.1e12, 1044),
        ),
        100e9,
    ),
    "Apple M3 Pro": AppleRow(
        18,
        (_info(18), _hmc(18, 1398, "apple-8-core-m4-fl-vs-apple-18-core-m3-pro"), _hf(7.4e12, 1044)),
        150e9,
    ),
    "Apple M3 Max": AppleRow(
        40,
        (
            _clock(
                40,
                1380,
                "powermetrics of an M3 Max in philipturner/applegpuinfo#4",
                "https://github.com/philipturner/applegpuinfo/issues/4",
            ),
            _hf(14.2e12, 1044),
            _hmc(40, 1398, "apple-32-core-m4-max-vs-apple-40-core-m3-max"),
        ),
        {30: 300e9, 40: 400e9},
    ),
    "Apple M3 Ultra": AppleRow(
        80,
        (_info(80, " for the M3 family"), _hf(21.3e12 / 60 * 80, 1304, ", 21.3 TFLOP/s at 60 cores")),
        819e9,
    ),
    "Apple M4": AppleRow(
        10,
        (
            _hmc(10, 1578, "apple-8-core-m4-fl-vs-apple-24-core-m1-max"),
            _hmc(10, 1470, "apple-10-core-m4-vs-apple-24-core-m1-max", ", an older page"),
            _hf(4.6e12, 1044),
        ),
        120e9,
    ),
    "Apple M4 Pro": AppleRow(
        20,
        (
            _clock(20, 1578, "powermetrics of an M4 Pro in eclecticlight.co, 2025-01-22", _ECLECTIC),
            _hf(9.2e12, 1044),
        ),
        273e9,
    ),
    "Apple M4 Max": AppleRow(
        40,
        (
            _clock(40, 1578, "the M4 Pro's clock, eclecticlight.co, 2025-01-22", _ECLECTIC),
            _hmc(40, 1678, "apple-32-core-m4-max-vs-apple-40-core-m3-max"),
            _hf(18.4e12, 1044),
        ),
        {32: 410e9, 40: 546e9},
    ),
    "Apple M5": AppleRow(
        10,
        (
            _clock(
                10,
                1578,
                "powermetrics of an M5 in michaelstinkerings.org, roofline analysis",
                "https://www.michaelstinkerings.org/apple-m5-gpu-roofline-analysis/",
            ),
            Claim(5.133e12, "cpu-monkey in GradientHQ/parallax#196", "https://github.com/GradientHQ/parallax/pull/196"),
            _hf(5.7e12, 2033),
        ),
        153e9,
        remark=_M5,
    ),
    "Apple M5 Pro": AppleRow(
        20,
        (
            _clock(
                20,
                1578,
                "the M5's clock, GradientHQ/parallax#449",
                "https://github.com/GradientHQ/parallax/pull/449",
            ),
            _hf(11.4e12, 2033),
        ),
        307e9,
        remark=_M5,
    ),
    "Apple M5 Max": AppleRow(
        40,
        (
            _clock(
                40,
                1620,
                "powermetrics of an M5 Max in feedback-assistant/reports#830",
                "https://github.com/feedback-assistant/reports/issues/830",
            ),
            _hf(22.8e12, 2033),
        ),
        {32: 460e9, 40: 614e9},
        remark=_M5,
    ),
}


def _nvidia(
    name: str,
    source: tuple[str, str],
    gigabytes: float,
    float32: float,
    tf32: float | None,
    bfloat16: float | None,
    float16: float,
) -> Chip:
    """`source`: title and link. Bandwidth in GB/s. Rates in TFLOP/s: float32 without tensor cores, the others dense on
    them with float32 accumulation."""
    teraflops = {"float32": float32, "tf32": tf32, "bfloat16": bfloat16, "float16": float16}
    peaks = {dtype: rate * 1e12 for dtype, rate in teraflops.items() if rate is not None}
    return Chip(name, None, peaks, gigabytes * 1e9, source[:1], source[1:])


_PDF = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center"
_T4 = "NVIDIA T4 data sheet", f"{_PDF}/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_A10 = "NVIDIA A10 data sheet", f"{_PDF}/a10/pdf/a10-datasheet.pdf"
_A100 = "NVIDIA A100 data sheet", f"{_PDF}/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_H100 = "NVIDIA H100 data sheet", "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306"
_H200 = "NVIDIA H200 product page", "https://www.nvidia.com/en-us/data-center/h200/"
_L4 = "NVIDIA L4 product page", "https://www.nvidia.com/en-us/data-center/l4/"
_L40S = "NVIDIA L40S data sheet", "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"
_GA102 = (
    "NVIDIA Ampere GA102 white paper",
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf",
)
_ADA = (
    "NVIDIA Ada white paper",
    "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
)

# The data sheets print most tensor rates with 2:4 sparsity; these are the dense ones, half of that.
NVIDIA: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _nvidia("Tesla T4", _T4, 320, 8.1, None, None, 65),
        _nvidia("NVIDIA A10", _A10, 600, 31.2, 62.5, 125, 125),
        _nvidia("NVIDIA A100-PCIE-40GB", _A100, 1555, 19.5, 156, 312, 312),
        _nvidia("NVIDIA A100-SXM4-40GB", _A100, 1555, 19.5, 156, 312, 312),
        _nvidia("NVIDIA A100 80GB PCIe", _A100, 1935, 19.5, 156, 312, 312),
        _nvidia("NVIDIA A100-SXM4-80GB", _A100, 2039, 19.5, 156, 312, 312),
        _nvidia("NVIDIA H100 PCIe", _H100, 2000, 51, 378, 756.5, 756.5),
        _nvidia("NVIDIA H100 80GB HBM3", _H100, 3350, 67, 494.5, 989.5, 989.5),
        _nvidia("NVIDIA H100 NVL", _H100, 3900, 60, 417.5, 835.5, 835.5),
        _nvidia("NVIDIA H200", _H200, 4800, 67, 494.5, 989.5, 989.5),
        _nvidia("NVIDIA H200 NVL", _H200, 4800, 60, 417.5, 835.5, 835.5),
        _nvidia("NVIDIA L4", _L4, 300, 30.3, 60, 121, 121),
        _nvidia("NVIDIA L40S", _L40S, 864, 91.6, 183, 362.05, 362.05),
        _nvidia("NVIDIA GeForce RTX 3090", _GA102, 936, 35.6, 35.6, 71, 71),
        _nvidia("NVIDIA GeForce RTX 4090", _ADA, 1008, 82.6, 82.6, 165.2, 165.2),
    )
}


# -- matrix products, as published ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """What a unit of `chip` does in matrix products, FLOP/s by dtype, and how that is known: "theoretical", "measured",
    or "by digest" (of a page that could not be read)."""

    chip: str
    what: str
    flops: Mapping[str, float]
    status: str
    source: str
    link: str
    peak_of_cpu: bool = False  # the most that this chip's CPU, with its matrix units, can do


_AMX = "philipturner/amx-benchmarks", "https://github.com/philipturner/amx-benchmarks"
_CORSIX = "corsix/amx, fma.md", "https://github.com/corsix/amx/blob/main/fma.md"
_SME = "tzakharko/m4-sme-exploration; arXiv 2409.18779", "https://github.com/tzakharko/m4-sme-exploration"
_KTH = "KTH, arXiv 2502.05317", "https://arxiv.org/abs/2502.05317"
_PYTORCH = "pytorch #198182", "https://github.com/pytorch/pytorch/issues/198182"
_SWIFT = 'Matt Gallagher, "Training an LLM in Swift", 2026', "https://www.cocoawithlove.com"


def _alike(flops: float) -> dict[str, float]:
    return dict.fromkeys(("float32", "bfloat16", "float16"), flops)


PRODUCTS = (
    Rate("Apple M1 Max", "AMX", {"float32": 3305e9, "float64": 826e9}, "theoretical", *_AMX, peak_of_cpu=True),
    Rate("Apple M1 Max", "AMX, best seen", {"float32": 2746e9, "float64": 700e9}, "measured", *_AMX),
    Rate("Apple M1 Max", "AMX instructions, 1 thread", {"float32": 1475e9, "float16": 2959e9}, "measured", *_CORSIX),
    Rate("Apple M1 Max", "AMX instructions, 2 threads", {"float32": 2957e9, "float16": 5916e9}, "measured", *_CORSIX),
    Rate(
        "Apple M1 Max", "AMX instructions, 6 threads", {"float32": 3119e9, "float16": 6263e9}, "measured", *_CORSIX,
        peak_of_cpu=True,
    ),
    Rate("Apple M1 Max", "NEON", {"float32": 801e9}, "theoretical", *_AMX),
    Rate("Apple M1 Max", "NEON, best seen", {"float32": 655e9}, "measured", *_AMX),
    Rate("Apple M4", "SME, performance cores", _alike(2000e9), "measured", *_SME),
    Rate("Apple M4", "SME, efficiency cores", {"float32": 360e9, "float64": 90e9}, "measured", *_SME),
    Rate(
        "Apple M4", "SME, both", _alike(2300e9), "measured", *_SME,
        peak_of_cpu=True,
    ),
    Rate("Apple M4", "GPU through MPS", {"float32": 2900e9}, "measured", *_KTH),
    Rate("Apple M4 Max", "GPU, MPSGraph from 512 on: 7800 to 12000", {"float32": 12000e9}, "measured", *_PYTORCH),
    Rate("Apple M4 Max", "GPU, torch's own Metal kernel: 1100 to 1400", {"float32": 1400e9}, "measured", *_PYTORCH),
    Rate("Apple M3 Max", "the Swift story's first: naive Swift", {"float32": 2.8e9}, "by digest", *_SWIFT),
    Rate("Apple M3 Max", "the Swift story's last: tiled Metal", {"float32": 1100e9}, "by digest", *_SWIFT),
)  # fmt: skip


def cpu_peak(brand: str, dtype: str) -> Rate | None:
    """The published peak of this chip's CPU in products of `dtype`; None where nobody has published one for it."""
    known = [rate for rate in PRODUCTS if rate.peak_of_cpu and rate.chip == brand.strip() and dtype in rate.flops]
    return max(known, key=lambda rate: rate.flops[dtype], default=None)
