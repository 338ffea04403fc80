"""suite=ops dtypes=true: the plan, the child's part and the report, as suites/suite.py has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from nanogpt_mac.backends import kinds
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.bench import DtypeBench, DtypeReading, Task, Way
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.ops.rows import Row, all_rows
from nanogpt_mac.suites.suite import Plan, Suite, asked

SMALLEST = 1e-9  # scale: every dimension at its least
LEFT_OUT = ("adamw",)  # written out of others


def operations() -> dict[str, Row]:
    """The smallest row of each operation, by the operation's name."""
    rows: dict[str, Row] = {}
    for row in all_rows(GPTSpec(1, 2, 32, 16, 32), 1, SMALLEST).values():
        known = rows.get(row.op)
        if row.op not in LEFT_OUT and not row.backward and (known is None or row.input_bytes < known.input_bytes):
            rows[row.op] = row
    return dict(sorted(rows.items()))


class Dtypes(Suite):
    contents = "nanogpt_mac.suites.dtypes.contents"
    reading = DtypeReading
    document = DtypeBench

    def plan(self, config: BenchConfig) -> Plan:
        if config.dtype != "float32":
            raise InputError(f"dtype={config.dtype}: dtypes=true has all of them; leave it out")
        from nanogpt_mac.suites.dtypes.probe import cells

        names = asked(config.rows, operations(), what="operation")
        found, missing = ways.here_for(config)
        if config.ways is None and config.compile == "auto":
            found = tuple(way for way in found if not way.compiled)  # a compiler's generated code is not the operation
        return Plan(found, cells(names), 1, 0.0, missing, {"seed": config.seed})

    def environment(self, way: Way) -> Mapping[str, str] | None:
        """Where what a device lacks is computed by the CPU, if asked: so that it can be counted."""
        falls_back = kinds.KINDS[way.backend].falls_back
        return os.environ | falls_back if falls_back else None

    def measuring(self, task: Task) -> Callable[[str], DtypeReading]:
        from nanogpt_mac.suites.dtypes.probe import Probing

        return Probing(task, ways.arrays(task.way, BenchConfig()), operations(), task.work["seed"])


SUITE = Dtypes()
