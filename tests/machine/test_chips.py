"""chips.py against the research table (docs of the project: peaks to their printed digits) and against arithmetic."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from nanogpt_mac.machine import chips

# Name, GPU cores of the largest bin, float32 TFLOP/s and GB/s as the table prints them ("a-b": sources disagree).
TABLE = [
    ("Apple M1", 8, "2.62", "68"),
    ("Apple M1 Pro", 16, "5.31", "205"),
    ("Apple M1 Max", 32, "10.62", "410"),
    ("Apple M1 Ultra", 64, "21.2", "819"),
    ("Apple M2", 10, "3.58", "102"),
    ("Apple M2 Pro", 19, "6.80", "205"),
    ("Apple M2 Max", 38, "13.6", "410"),
    ("Apple M2 Ultra", 76, "27", "819"),
    ("Apple M3", 10, "3.6-4.1", "100"),
    ("Apple M3 Pro", 18, "6.4-7.4", "150"),
    ("Apple M3 Max", 40, "14.2", "400"),
    ("Apple M4", 10, "3.8-4.6", "120"),
    ("Apple M4 Pro", 20, "9.2", "273"),
    ("Apple M4 Max", 40, "18.4", "546"),
    ("Apple M5", 10, "4.0-5.7", "153"),
    ("Apple M5 Pro", 20, "11.4", "307"),
    ("Apple M5 Max", 40, "22.8", "614"),
]


def printed(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "cores", "teraflops", "gigabytes"), TABLE)
def test_the_table_is_reproduced_to_its_printed_digits(name, cores, teraflops, gigabytes):
    chip = chips.find(name, cores)
    assert chip.name == name
    assert chip.gpu_cores == cores
    assert printed(chip.bandwidth / 1e9, gigabytes) == gigabytes
    claims = [claim.flops for claim in chips.APPLE[name].claims]
    for figure in teraflops.split("-"):
        assert figure in {printed(claim / 1e12, figure) for claim in claims}
    if not chip.disputed:
        assert chip.peak_flops["float32"] == pytest.approx(float(teraflops) * 1e12, rel=0.01)


@pytest.mark.parametrize(
    ("name", "cores", "megahertz"),
    [
        ("Apple M1", 7, 1278),
        ("Apple M1 Max", 24, 1296),
        ("Apple M2 Pro", 16, 1398),
        ("Apple M3", 8, 1338),
        ("Apple M3 Max", 30, 1380),
        ("Apple M4 Pro", 16, 1578),
        ("Apple M4 Max", 32, 1578),
        ("Apple M5", 8, 1578),
        ("Apple M5 Max", 32, 1620),
    ],
)
def test_a_smaller_bin_is_scaled_by_its_own_cores(name, cores, megahertz):
    chip = chips.find(name, cores)
    assert chip.peak_flops["float32"] == pytest.approx(cores * 128 * 2 * megahertz * 1e6)
    if chip.float32_range:
        full = chips.find(name, chips.APPLE[name].cores)
        assert chip.float32_range[1] / full.float32_range[1] == pytest.approx(cores / full.gpu_cores)


def test_bandwidth_follows_the_bin():
    assert chips.find("Apple M4 Max", 40).bandwidth == 546e9
    assert chips.find("Apple M4 Max", 32).bandwidth == 410e9
    assert chips.find("Apple M4 Max", None).bandwidth is None
    assert chips.find("Apple M1", None).bandwidth == 68.3e9


@pytest.mark.parametrize(
    "brand",
    [
        "Apple M9",
        "Apple M4 Ultra",
        "apple m1",
        "Apple processor",  # what macOS 11 called the first M1
        "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GH200 480GB",
        "",
    ],
)
def test_an_unknown_chip_is_never_matched_to_a_similar_one(brand):
    assert chips.find(brand, 10) is None


@pytest.mark.parametrize("cores", [0, -1, 11, 76])
def test_cores_that_the_chip_does_not_come_with_are_no_chip(cores):
    assert chips.find("Apple M2", cores) is None


def test_without_the_core_count_there_is_no_peak():
    chip = chips.find("Apple M3 Pro", None)
    assert dict(chip.peak_flops) == {}
    assert chips.peak(chip, "float32") is None
    assert chip.float32_range is None


def test_disputed_chips_say_so_and_by_whom():
    disputed = {name for name, row in chips.APPLE.items() if chips.find(name, row.cores).disputed}
    assert disputed == {
        "Apple M3",
        "Apple M3 Pro",
        "Apple M4",
        "Apple M4 Pro",
        "Apple M4 Max",
        "Apple M5",
        "Apple M5 Pro",
        "Apple M5 Max",
    }
    m5 = chips.find("Apple M5", 10)
    assert m5.float32_range == (pytest.approx(4.04e12, rel=1e-3), 5.7e12)
    assert "5.7 TFLOP/s (huggingface.js#2033)" in m5.note
    assert "the first is used" in m5.note
    assert "matrix units" in m5.note
    assert chips.find("Apple M1", 8).note == ""


@pytest.mark.parametrize("name", [*chips.APPLE, *chips.NVIDIA])
def test_every_peak_has_a_source_with_a_link(name):
    chip = chips.find(name, chips.APPLE[name].cores if name in chips.APPLE else None)
    assert chip.peak_flops
    assert chip.sources
    assert all(chip.sources)
    assert len(chip.links) == len(chip.sources)
    for link in chip.links:
        assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,4}/[\w./-]+", link)


# Streaming multiprocessors, boost clock in GHz for the tensor cores, dense bfloat16/float16 FLOP an SM and cycle with
# float32 accumulation: the chips' architecture, from which the data sheets' figures must follow.
@pytest.mark.parametrize(
    ("name", "sms", "gigahertz", "flop_per_cycle", "dtype"),
    [
        ("Tesla T4", 40, 1.59, 1024, "float16"),
        ("NVIDIA A10", 72, 1.695, 1024, "bfloat16"),
        ("NVIDIA A100-SXM4-40GB", 108, 1.41, 2048, "bfloat16"),
        ("NVIDIA A100 80GB PCIe", 108, 1.41, 2048, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", 132, 1.83, 4096, "bfloat16"),
        ("NVIDIA H100 PCIe", 114, 1.62, 4096, "bfloat16"),
        ("NVIDIA H200", 132, 1.83, 4096, "bfloat16"),
        ("NVIDIA L4", 58, 2.04, 1024, "bfloat16"),
        ("NVIDIA L40S", 142, 2.52, 1024, "bfloat16"),
        ("NVIDIA GeForce RTX 3090", 82, 1.695, 512, "bfloat16"),
        ("NVIDIA GeForce RTX 4090", 128, 2.52, 512, "bfloat16"),
    ],
)
def test_nvidia_rates_follow_from_the_architecture(name, sms, gigahertz, flop_per_cycle, dtype):
    chip = chips.find(name, None)
    assert chip.peak_flops[dtype] == pytest.approx(sms * gigahertz * 1e9 * flop_per_cycle, rel=0.02)
    assert chip.peak_flops["float16"] == chip.peak_flops[dtype]
    if "tf32" in chip.peak_flops:
        assert chip.peak_flops["tf32"] == pytest.approx(chip.peak_flops[dtype] / 2, rel=0.02)


def test_peak_follows_the_matmul_precision_on_nvidia_alone():
    h200 = chips.find("NVIDIA H200", None)
    assert chips.peak(h200, "float32") == 67e12
    assert chips.peak(h200, "float32", "high") == chips.peak(h200, "float32", "medium") == 494.5e12
    assert chips.peak(h200, "bfloat16", "high") == 989.5e12
    t4 = chips.find("Tesla T4", None)
    assert chips.peak(t4, "float32", "high") == 8.1e12  # Turing has no TF32
    assert chips.peak(t4, "bfloat16") is None
    m1 = chips.find("Apple M1", 8)
    assert chips.peak(m1, "float32", "high") == chips.peak(m1, "float32") == chips.peak(m1, "float16")
    assert chips.peak(m1, "bfloat16") is None
    assert chips.peak(None, "float32") is None


def test_nanogpts_own_denominator():
    assert chips.find("NVIDIA A100-SXM4-40GB", None).peak_flops["bfloat16"] == chips.A100_BF16 == 312e12


def test_a_chip_goes_into_json():
    chip = chips.find("Apple M5 Pro", 16)
    assert json.loads(json.dumps(asdict(chip)))["peak_flops"] == {"float32": chip.peak_flops["float32"]}
