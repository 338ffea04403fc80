"""Carries a comparison out: parity gate, fallback detector, then pilot run and rounds of each variant. Resumable."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt_mac import composed, ranks
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Kind
from nanogpt_mac.compare import explain
from nanogpt_mac.config import Config
from nanogpt_mac.files import write_json
from nanogpt_mac.machine import probe
from nanogpt_mac.measure.rounds import Cost
from nanogpt_mac.measure.runner import PILOT, Runner, Shown, Task
from nanogpt_mac.overrides import key_of, merged
from nanogpt_mac.parity import gate
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.plan import ParityState, Plan, Spent, Variant
from nanogpt_mac.records.run import IterationRow, RunSummary, read_rows
from nanogpt_mac.train import display

GEMM_S = 1.0  # spent on the measured peak, in the pilot run alone
GATE_S, GATE_SHARE = 300.0, 1 / 3  # that one variant's check may take, of the budget: a lever must not eat the others'
EVAL_ITERS = 5  # batches of each evaluation in round 0, the same for every variant, so that their losses compare
EVALUATIONS = 2 * 2  # in round 0: before the first iteration and after the last, of both splits
FORWARD = 1 / 3  # of an iteration's time, roughly
FROM_CACHE = 0.2  # share of a cold compilation that one from torch's cache takes, roughly
EVALUATION_GRAPH = 0.5  # of a cold compilation that compiling evaluation as well takes, roughly
LEAST_START_S = 0.5
KEEP_NOTHING = ("checkpoint=false", "sample_tokens=0", "wandb.mode=disabled", "fallbacks=off")
NOT_TIMED = {ParityState.FAIL: "failed the parity gate", ParityState.ERROR: "parity could not be checked"}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Training:
    """One variant as a job (`measure.runner.Job`): every run is a train.py, which is given its config composed."""

    variant: Variant
    config: Config
    common: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.variant.label

    @property
    def kind(self) -> Kind:
        name = self.config.backend.name
        return kinds.KINDS[kinds.resolve(name) if name == "auto" else name]

    @property
    def warmup(self) -> int:
        return self.config.timing_warmup

    def command(self, task: Task) -> list[str]:
        sizes: dict[str, Any] = {
            "max_iters": task.iters,
            "timing_warmup": task.warmup,
            "eval_interval": 0,
            "gemm_seconds": 0,
        }
        if task.round == PILOT:
            sizes["gemm_seconds"] = self._gemm_s()
        elif task.round == 0:
            sizes |= {"eval_interval": task.iters, "eval_iters": EVAL_ITERS}
        spelt = [f"{key}={value}" for key, value in sizes.items()]
        fixed = [*KEEP_NOTHING, f"run_dir={task.folder}"]
        config = replace(
            self.config,
            **sizes,
            checkpoint=False,
            sample_tokens=0,
            wandb=replace(self.config.wandb, mode="disabled"),
            fallbacks="off",
            run_dir=str(task.folder),
            given=merged(self.common, self.variant.overrides, spelt, fixed),
        )
        script = self.variant.script or str(ROOT / "train.py")
        starts = ranks.command(self.kind.launcher, n) if (n := self.variant.ranks) > 1 else [sys.executable]
        return [*starts, script, *composed.write(task.folder / "composed.json", config)]

    def environment(self, task: Task) -> dict[str, str]:
        """Compilers' caches belong to the variant: its pilot run compiles from cold, its rounds do not."""
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        for name, place in self.kind.caches.items():
            folder = task.cache / place
            folder.mkdir(parents=True, exist_ok=True)
            environment[name] = str(folder)
        return environment | {"PYTHONUNBUFFERED": "1"}

    def signs(self) -> dict[str, re.Pattern[str]]:
        return kinds.signs()

    def shown(self, folder: Path) -> Shown:
        summary = RunSummary.load(folder / "summary.json")
        counted = [row.iter_ms for row in _iterations(folder) if row.left_out is None]
        times = summary.times
        if len(counted) != times.count or not all(ms > 0 for ms in counted):
            raise DamagedError(f"metrics.jsonl: {len(counted)} iterations are counted, in summary.json {times.count}")
        if summary.first_iter_s is None:
            raise DamagedError("summary.json: has no first_iter_s")
        median, least = (None if ms is None else ms / 1e3 for ms in (times.median, times.min))
        return Shown(summary.first_iter_s, median, least)

    def cost(self, folder: Path, seconds: float) -> Cost:
        shown, summary = self.shown(folder), RunSummary.load(folder / "summary.json")
        assert shown.least is not None  # a pilot run in which nothing was counted has failed
        iteration = shown.least  # after a busy moment runs would be too short for good; rounds can be cut off or added
        iterating = sum(row.iter_ms for row in _iterations(folder)) / 1e3
        cold = max(0.0, shown.first - iteration)
        start = max(LEAST_START_S, seconds - iterating - self._gemm_s()) + FROM_CACHE * cold
        batches = EVALUATIONS * EVAL_ITERS / self.config.gradient_accumulation_steps
        able = summary.capabilities or kinds.recorded(summary.backend, summary.device)
        graph = EVALUATION_GRAPH * cold if summary.compile and able.compiles_evaluation else 0.0
        return Cost(start, iteration, batches * FORWARD * iteration + graph)

    def _gemm_s(self) -> float:
        """Seconds that the pilot run spends on the measured peak: those of the command line, where it names them."""
        named = any(key_of(override) == "gemm_seconds" for override in self.common)
        return self.config.gemm_seconds if named else GEMM_S


def _iterations(folder: Path) -> Iterator[IterationRow]:
    return (row for row in read_rows(folder / "metrics.jsonl") if isinstance(row, IterationRow))


class ComparisonRunner(Runner):
    """Carries out the plan of a comparison; `folder` holds plan.json already, `say` shows a line."""

    plan: Plan
    jobs: Mapping[str, Training]

    def __init__(
        self, folder: Path, plan: Plan, configs: Mapping[str, Config], say: Callable[[str], None] = display.say
    ) -> None:
        jobs = {v.name: Training(v, configs[v.name], plan.overrides) for v in plan.variants}
        super().__init__(folder, plan, jobs, say, probe.thermal_state, _spent_before(folder) + explain.seconds(plan))

    def carry_out(self) -> None:
        """Everything that has not been done. What a variant cannot do is an outcome; this only raises when stopped."""
        barred = self._gate()
        self._detect_fallbacks()
        self.measure(barred)
        for leftover in self.folder.glob(".parity-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _gate(self) -> dict[str, str]:
        """Why variants may not be timed: they compute something else than the reference, or nobody could tell."""
        if not self.plan.gate.parity:
            return {}
        alone = {name: job for name, job in self.jobs.items() if job.variant.ranks == 1}
        parity = gate.read(self.folder, alone)
        if parity is None:
            self.say(f"parity: {len(alone)} variants against float64 torch on the CPU")
            limit = max(GATE_S, self.plan.budget_minutes * 60 * GATE_SHARE)
            parity = gate.check({name: job.config for name, job in alone.items()}, self.folder, limit)
        of = {name: parity.variants[job.variant.alone or name] for name, job in self.jobs.items()}
        wrong = {name: result for name, result in of.items() if result.state != ParityState.PASS}
        for name, result in wrong.items():
            self.say(f"parity: {self.jobs[name].label}: {result.state.upper()}: {result.reason}")
        if not wrong:
            self.say(f"parity: all pass ({parity.seconds:.0f} s)")
        if self.plan.gate.time_wrong:
            return {}
        return {name: f"{NOT_TIMED.get(r.state, r.state)}: {r.reason}" for name, r in wrong.items()}

    def _detect_fallbacks(self) -> None:
        """What leaves the GPU, of variants that can be asked; one whose detector fails is timed all the same."""
        for name, job in self.jobs.items():
            path = self.folder / "fallbacks" / f"{name}.json"
            asked = any(device.detector for device in job.kind.devices) and job.variant.ranks == 1
            if path.exists() or not asked:
                continue
            from nanogpt_mac.corpus import prepare
            from nanogpt_mac.fallbacks import detect
            from nanogpt_mac.train.source import open_source

            path.parent.mkdir(exist_ok=True)
            found = detect.check(job.config, open_source(job.config, prepare(job.config.data)).spec)
            write_json(path, found.document())
            count = len(found.findings)
            problems = [f"{count} operator{'s leave' if count != 1 else ' leaves'} the GPU"]
            if not found.complete:
                problems.append(f"not everything could be seen: {found.why_incomplete[0]}")
            self.say(f"fallbacks: {job.label}: {'; '.join(problems)}")


def _spent_before(folder: Path) -> float:
    """Seconds that earlier sessions spent before timing anything, by what they left behind."""
    seconds = 0.0
    for path in (folder / "parity.json", *folder.glob("fallbacks/*.json")):
        try:
            seconds += Spent.load(path).seconds
        except (DamagedError, FileNotFoundError):
            continue
    return seconds
