"""suite=gemm: the plan, the child's part and the report, as suites/suite.py has them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from pydantic import Field

from nanogpt_mac.backends import kinds
from nanogpt_mac.config import model_spec
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.machine import chips, gemm, peaks, probe
from nanogpt_mac.machine.cores import usable
from nanogpt_mac.records.base import Record
from nanogpt_mac.records.bench import Bench, GemmBench, GemmReading, State, Task, Way
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.suite import Measure, Plan, Suite, asked, row_seconds

SQUARES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PARTS = ("qkv", "MLP in", "MLP out", "head")  # of the model, as GPTSpec.matmul_shapes has them
PRECISION = "highest"
FEWEST_ROW_S = 0.02
BY_HAND = {  # by_hand.py has them; numpy is not loaded before a child needs it
    "python": "pure Python, in float64",
    "numpy-blocks": "numpy by blocks, without BLAS",
    "numpy": "numpy",
}


class Peak(Record):
    """What a unit could do at most in a dtype, FLOP/s, as published; `most` of the highest claim."""

    flops: float
    most: float
    source: str
    link: str


class Step(Record):
    """How a way is to be computed, beyond what it is."""

    settings: dict[str, Any] = Field(default_factory=dict)  # all of its kind's own
    product: str = ""
    threads: int = 0


class Work(Record):
    """What children and the report must know. Sizes (M, K, N) by row; peaks by dtype."""

    sizes: dict[str, tuple[str, int, int, int]]  # row -> dtype and (M, K, N)
    seed: int
    steps: dict[str, Step]
    gpu: dict[str, Peak]
    cpu: dict[str, Peak]

    def peak(self, way: Way, dtype: str) -> Peak | None:
        """Of the unit that `way` computes on; None where nobody has published one, and of a simulated device."""
        return None if way.simulated else (self.gpu if way.accelerator else self.cpu).get(dtype)

    def flops(self, row: str) -> int:
        return 2 * math.prod(self.sizes[row][1:])


class Gemm(Suite):
    contents = "nanogpt_mac.suites.gemm.contents"
    reading = GemmReading
    document = GemmBench

    def plan(self, config: BenchConfig) -> Plan:
        if config.dtype != "float32":
            raise InputError(
                f"dtype={config.dtype}: suite=gemm has float32 and both dtypes of 16 bits; use rows={config.dtype}"
            )
        known = _sizes(model_spec(config), config.batch_size)
        sizes = {row: known[row] for row in asked(config.rows, known, [next(iter(known))])}
        steps: dict[str, Step] = {}
        absent: dict[str, str] = {}
        found, missing = ways.here_for(config, further=lambda found: _ladder(config, found, steps, absent))
        by_dtype: dict[str, list[str]] = {}
        for row, (dtype, *_) in sizes.items():
            by_dtype.setdefault(dtype, []).append(row)
        rounds = config.rounds or 3
        row_s = max(FEWEST_ROW_S, row_seconds(config, len(sizes), len(found), rounds))
        work = Work(
            sizes=sizes,
            seed=config.seed,
            steps={way.name: steps[way.name] for way in found},
            gpu=_gpu_peaks(),
            cpu=_cpu_peaks(),
        )
        chunks = [tuple(rows) for rows in by_dtype.values()]
        return Plan(found, chunks, rounds, row_s, missing | absent, work.model_dump(mode="json"))

    def measuring(self, task: Task) -> Measure:
        from nanogpt_mac.suites.gemm.measured import Measuring

        return Measuring(task, Work.model_validate(task.work))

    def finished(self, bench: Bench) -> None:
        """The best of each device, dtype and precision is what a training's `mfu_measured` is held against."""
        assert isinstance(bench, GemmBench)
        assert bench.environment is not None
        environment, work = bench.environment.model_dump(), Work.model_validate(bench.work)
        known = {way.name: way for way in bench.ways if way.backend and not way.simulated}
        best: dict[str, float] = {}
        for reading in bench.readings:
            way, took = known.get(reading.way), reading.throughput
            if way is None or took is None or not took.min or reading.state is not State.OK:
                continue
            able, settings = kinds.KINDS[way.backend].on(way.device), work.steps[way.name].settings
            key = peaks.of_run(environment, able, work.sizes[reading.row][0], PRECISION, settings)
            best[key] = max(best.get(key, 0.0), work.flops(reading.row) / (1e-3 * took.min))
        for key, rate in best.items():
            peaks.keep(key, rate)


def _sizes(spec: GPTSpec, batch: int) -> dict[str, tuple[str, int, int, int]]:
    """Of every row, from few operations to many: what is slow stops where it must, and the rest is not tried."""
    shapes = {str(n): (n, n, n) for n in SQUARES}
    for part, (m, k, n) in zip(PARTS, spec.matmul_shapes(batch), strict=True):
        shapes[f"model {part} {m}x{k}x{n}"] = (m, k, n)
    ordered = sorted(shapes.items(), key=lambda item: math.prod(item[1]))
    return {f"{dtype} {name}": (dtype, *shape) for dtype in gemm.DTYPES for name, shape in ordered}


def _ladder(config: BenchConfig, found: ways.Ways, steps: dict[str, Step], absent: dict[str, str]) -> ways.Ways:
    """All ways, the CPU's first; `steps` gets how each is computed, `absent` why a rung is not here.

    What is compiled multiplies by the same product, so it takes part where it is asked for.
    """
    ladder = [Way(name=name, label=label) for name, label in BY_HAND.items()]
    for way in found.values():
        kind, given = kinds.KINDS[way.backend], kinds.own_settings(way.backend, asdict(config.backend))
        base = way.name.removesuffix("-eager")
        if not way.compiled:
            for threads in _fewer(kind.by_threads):
                label = f"{way.label}, {threads} thread{'s' if threads > 1 else ''}"
                ladder.append(way.model_copy(update={"name": f"{base}-{threads}", "label": label}))
                steps[ladder[-1].name] = Step(settings=given, threads=threads)
            for rung in kind.rungs:
                if way.device not in rung.devices:
                    continue
                name = f"{base}-{rung.name}"
                if reason := rung.missing():
                    absent[name] = reason
                    continue
                ladder.append(way.model_copy(update={"name": name, "label": f"{way.label}, {rung.label}"}))
                steps[name] = Step(settings=given | dict(rung.settings), product=rung.product)
        if not way.compiled or config.ways is not None or config.compile is True:
            ladder.append(way)
        steps[way.name] = Step(settings=given)
    steps.update({name: Step() for name in BY_HAND})
    ladder.sort(key=lambda way: (bool(way.backend), way.accelerator or way.simulated))
    return {way.name: way for way in ladder}


def _fewer(by_threads: bool) -> list[int]:
    """1, 2, 4, ...: below the number of cores that this process may use."""
    return [2**i for i in range(10) if 2**i < usable()] if by_threads else []


def _gpu_peaks() -> dict[str, Peak]:
    chip = probe.chip()
    if chip is None:
        return {}
    found = {}
    for dtype in gemm.DTYPES:
        if flops := chips.peak(chip, dtype, PRECISION):
            most = max(flops, (chip.float32_range or (0.0, 0.0))[1] if dtype == "float32" else 0.0)
            found[dtype] = Peak(flops=flops, most=most, source=chip.sources[0], link=chip.links[0])
    return found


def _cpu_peaks() -> dict[str, Peak]:
    brand, found = probe.apple_brand(), {}
    for dtype in gemm.DTYPES:
        if brand and (rate := chips.cpu_peak(brand, dtype)):
            flops, source = rate.flops[dtype], f"{rate.what}, {rate.status}: {rate.source}"
            found[dtype] = Peak(flops=flops, most=flops, source=source, link=rate.link)
    return found


SUITE = Gemm()
