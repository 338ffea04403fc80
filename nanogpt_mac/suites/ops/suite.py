"""suite=ops: the plan, the child's part and the report, as suites/suite.py has them."""

from __future__ import annotations

import math
from dataclasses import asdict

from nanogpt_mac.config import BackendConfig, model_spec
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.machine import bandwidth, probe
from nanogpt_mac.records.bench import OpReading, OpsBench, Task
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.ops.rows import Row, all_rows
from nanogpt_mac.suites.suite import Measure, Plan, Suite, asked, row_seconds

CHUNK_BYTES = 12 << 30  # of one process, by all its rows: at full size some thirty of them
FEWEST_ROW_S = 0.02


class Ops(Suite):
    contents = "nanogpt_mac.suites.ops.contents"
    reading = OpReading
    document = OpsBench

    def plan(self, config: BenchConfig) -> Plan:
        if config.dtype != "float32":
            raise InputError(f"dtype={config.dtype}: suite=ops times float32; use dtypes=true for what others give")
        from nanogpt_mac.suites.ops.measured import Work

        sizes = asdict(model_spec(config))
        known = all_rows(GPTSpec(**sizes), config.batch_size, config.scale)
        rows = {name: known[name] for name in asked(config.rows, known, [row.family for row in known.values()])}
        found, missing = ways.here_for(config)
        rounds = config.rounds or (3 if config.scale == 1 else 1)
        work = Work(
            sizes=sizes,
            batch=config.batch_size,
            scale=config.scale,
            seed=config.seed,
            cache=config.cache,
            backend=asdict(config.backend) | {"name": "auto"},
            bandwidth=bandwidth.of_cpu(),
        )
        row_s = row_seconds(config, len(rows), len(found), rounds, most=max(config.scale, FEWEST_ROW_S))
        return Plan(found, _chunks(rows), rounds, row_s, missing, work.model_dump())

    def measuring(self, task: Task) -> Measure:
        from nanogpt_mac.suites.ops.measured import CITED, MEASURED, Measuring, Work

        work = Work.model_validate(task.work)
        rows = all_rows(GPTSpec(**work.sizes), work.batch, work.scale)  # type: ignore[arg-type]
        chip = probe.chip() if task.way.accelerator else None
        cited = chip.bandwidth if chip is not None else None
        arrays = ways.arrays(task.way, BenchConfig(backend=BackendConfig(**work.backend)))
        if task.way.accelerator:  # one whose bandwidth no table has has no floor
            return Measuring(task, arrays, rows, work, cited or math.inf, CITED)
        return Measuring(task, arrays, rows, work, work.bandwidth, MEASURED)


def _chunks(rows: dict[str, Row]) -> list[tuple[str, ...]]:
    chunks: list[list[str]] = []
    full = CHUNK_BYTES  # the first begins one
    for name, row in rows.items():
        full += row.input_bytes + row.output_bytes + row.gradient_bytes
        if full > CHUNK_BYTES:
            full = row.input_bytes + row.output_bytes + row.gradient_bytes
            chunks.append([])
        chunks[-1].append(name)
    return [tuple(chunk) for chunk in chunks]


SUITE = Ops()
