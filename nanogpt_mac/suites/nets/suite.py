"""What suite=mlp and suite=lm share: the plan, what children know, the report, CSV in the original's columns."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import asdict
from typing import Any, Self

from nanogpt_mac.config import BackendConfig
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.base import Record
from nanogpt_mac.records.bench import Bench, NetBench, NetReading, State, Way
from nanogpt_mac.suites import suite
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.nets.measured import Settings
from nanogpt_mac.suites.suite import Plan, row_seconds

MOST_ROW_S = 60.0

Chunks = list[tuple[str, ...]]


class Work(Record):
    """What the children of both must know; each suite adds its own. `data` says what is trained on."""

    data: str
    epochs: int
    placement: str
    sync: str
    seed: int
    backend: dict[str, Any]  # settings of back ends

    @classmethod
    def of(cls, config: BenchConfig, **own: Any) -> Self:
        given = {key: getattr(config, key) for key in ("epochs", "placement", "sync", "seed")}
        return cls(**given, backend=asdict(config.backend) | {"name": "auto"}, **own)

    @property
    def settings(self) -> Settings:
        return Settings(self.epochs, self.placement, self.sync, self.seed)

    @property
    def config(self) -> BenchConfig:
        return BenchConfig(backend=BackendConfig(**self.backend))


class Nets(suite.Suite):
    contents = "nanogpt_mac.suites.nets.contents"
    reading = NetReading
    document = NetBench

    def files(self, bench: Bench) -> dict[str, str]:
        """One file a way and kind: seconds, in richiksc's columns, after them what they are of."""
        assert isinstance(bench, NetBench)
        found: dict[str, str] = {}
        for way in bench.ways:
            right = [r for r in bench.readings if r.way == way.name and r.state is State.OK]
            trained = [r for r in right if r.epochs_s]
            asked_for = [r for r in right if r.calls and r.calls.median]
            data = str(bench.work.get("data", ""))
            most = max((len(r.epochs_s) for r in trained), default=0)
            columns = [*(f"epoch_{i}" for i in range(most)), "batch_size", "avg", "iter_total", "network", "data"]
            lines: list[list[object]] = []
            for r in trained:
                blanks = [""] * (most - len(r.epochs_s))
                mean, network = statistics.fmean(r.epochs_s), r.row.split()[0]
                lines.append([*r.epochs_s, *blanks, r.batch, mean, r.run_s, network, data])
            if lines:
                found[f"training-{way.name}.csv"] = _csv(columns, lines)
            if asked_for:
                rows = [[r.calls.median / 1e3, r.row.split()[0], data] for r in asked_for if r.calls and r.calls.median]
                found[f"inference-{way.name}.csv"] = _csv(["iter_total", "network", "data"], rows)
        return found


def plan(config: BenchConfig, found: tuple[Way, ...], missing: dict[str, str], chunks: Chunks, work: Work) -> Plan:
    rounds = config.rounds or 5
    row_s = row_seconds(config, sum(map(len, chunks)), len(found), rounds, most=MOST_ROW_S)
    return Plan(found, chunks, rounds, row_s, missing, work.model_dump())


def _csv(columns: list[str], lines: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])
    return text.getvalue()


def asked(config: BenchConfig, chunks: tuple[tuple[str, ...], ...]) -> Chunks:
    """The rows of `chunks` whose names have `config.rows` in them, or at their end where that is a number."""
    if config.dtype != "float32":
        raise InputError(f"dtype={config.dtype}: suite={config.suite} trains in float32; leave it out")
    if config.rows is None:
        return list(chunks)
    names = [name for chunk in chunks for name in chunk]
    wanted = suite.asked(config.rows, names, names[:3], ends=True)
    return [left for chunk in chunks if (left := tuple(name for name in chunk if name in wanted))]
