"""Carries a plan out: parity gate, fallback detector, a pilot run of each variant, then the rounds. Resumable.

What has been done is what lies in the comparison's folder; everything that lies there whole is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from nanogpt_mac import child, cli
from nanogpt_mac.backends import kinds
from nanogpt_mac.compare import plan as plans
from nanogpt_mac.config import Config
from nanogpt_mac.machine import probe
from nanogpt_mac.measure.rounds import MANY, Cost, schedule
from nanogpt_mac.overrides import key_of, merged, quoted
from nanogpt_mac.records.plan import Variant
from nanogpt_mac.train import display
from nanogpt_mac.train.recorder import write_json

PILOT = "pilot"
PILOT_ITERS, PILOT_S = 40, 4.0  # whichever comes first
GEMM_S = 1.0  # spent on the measured peak, in the pilot run alone
EVAL_ITERS = 5  # batches of each evaluation in round 0, the same for every variant, so that their losses compare
FROM_CACHE = 0.2  # share of a cold compilation that one from torch's cache takes, roughly
REPORT_S = 15.0  # of the budget, for statistics and report
GIVEN_UP = 2  # failed runs of one variant, after which the rest of its runs are skipped
COOL = (None, "nominal")
HEAT_POLL_S = 5.0
OVERRUN, KEPT_ROUNDS = 1.1, 5  # beyond the budget by a tenth, rounds are cut off, but for so many


@dataclasses.dataclass
class Runner:
    """`say` shows a line. `folder` holds plan.json already."""

    folder: Path
    plan: dict[str, Any]
    configs: dict[str, Config]
    say: Callable[[str], None] = display.say

    def __post_init__(self) -> None:
        self.variants: dict[str, Variant] = {variant.name: variant for variant in plans.variants_of(self.plan)}
        self.begun = time.monotonic() - self._spent_before()

    def carry_out(self) -> None:
        """Everything that has not been done yet. What a variant cannot do is an outcome; this only raises when stopped."""
        self._forget_damaged()
        barred = self._gate()
        self._detect_fallbacks()
        self._pilots(barred)
        if self.plan["order"] is None:
            self._decide()
        self._rounds()
        for leftover in (self.folder / "cache", *self.folder.glob(".parity-*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _forget_damaged(self) -> None:
        """What an earlier session left but cannot be read any more is done again."""
        for path in sorted(self.folder.glob("rounds/*/outcome.json")):
            if not child.whole(path.parent):
                self.say(f"{path.parent.relative_to(self.folder)}: its records are damaged; it is run again")
                child.clear(path.parent)

    # -- before any timing --------------------------------------------------------------------------------------------

    def _gate(self) -> dict[str, str]:
        """Why variants may not be timed: they do not compute what the reference does, or that could not be found out."""
        if not self.plan["gate"]["parity"]:
            return {}
        from nanogpt_mac.parity import gate

        parity = gate.read(self.folder, self.variants)
        if parity is None:
            self.say(f"parity: {len(self.configs)} variants against float64 torch on the CPU")
            parity = gate.check(self.configs, self.folder)
        wrong = {name: found for name, found in parity["variants"].items() if found["state"] != "pass"}
        for name, found in wrong.items():
            self.say(f"parity: {self.variants[name].label}: {found['state'].upper()}: {found['reason']}")
        if not wrong:
            self.say(f"parity: all pass ({parity['seconds']:.0f} s)")
        if self.plan["gate"]["time_wrong"]:
            return {}
        how = {"fail": "failed the parity gate", "error": "parity could not be checked"}
        return {name: f"{how.get(found['state'], found['state'])}: {found['reason']}" for name, found in wrong.items()}

    def _detect_fallbacks(self) -> None:
        """What leaves the GPU, of MPS variants; one whose detector fails is timed all the same."""
        mps = [name for name, config in self.configs.items() if kinds.detects(config.backend.name)]
        for name in mps:
            path = self.folder / "fallbacks" / f"{name}.json"
            if path.exists():
                continue
            from nanogpt_mac.corpus import prepare
            from nanogpt_mac.fallbacks import detect as runtime
            from nanogpt_mac.train.source import open_source

            path.parent.mkdir(exist_ok=True)
            spec = open_source(self.configs[name], prepare(self.configs[name].data)).spec
            found = runtime.check(self.configs[name], spec)
            write_json(path, found)
            problems = [] if found["complete"] else [f"not everything could be seen: {found['why_incomplete'][0]}"]
            count = len(found["findings"])
            problems.insert(0, f"{count} operator{'s leave' if count != 1 else ' leaves'} the GPU")
            self.say(f"fallbacks: {self.variants[name].label}: {'; '.join(problems)}")

    # -- pilot runs ---------------------------------------------------------------------------------------------------

    def _pilots(self, barred: dict[str, str]) -> None:
        for name, variant in self.variants.items():
            if child.outcome(self._run_folder(PILOT, name)):
                continue
            if name in barred:
                self._skip(PILOT, name, barred[name])
                continue
            found = self._run_pilot(variant)
            if found["state"] == "done":
                summary = self._summary(PILOT, name)
                first = f"first {summary['first_iter_s']:.1f} s"
                self.say(f"pilot, {variant.label}: {summary['iter_ms']['median']:.4g} ms an iteration, {first}")
            else:
                self.say(f"pilot, {variant.label}: {found['state'].upper()}: {found['reason']}; not timed")

    def _run_pilot(self, variant: Variant) -> dict[str, Any]:
        """Twice where nothing could be counted: the machine slept, or its clock was set."""
        for _ in range(2):
            found = self._run(PILOT, variant, self._pilot_overrides(), self._pilot_limits())
            if found["state"] != "done" or self._summary(PILOT, variant.name)["iter_ms"]["median"]:
                return found
        return self._record(
            PILOT, variant.name, found | {"state": "failed", "reason": "none of its iterations could be counted"}
        )

    def _pilot_overrides(self) -> list[str]:
        given = self.plan["asked"]["iters"]
        iters = max(child.FEWEST_PILOT, min(PILOT_ITERS, given)) if given else PILOT_ITERS
        gemm = [] if self._names("gemm_seconds") else [f"gemm_seconds={GEMM_S}"]
        return [f"max_iters={iters}", "eval_interval=0", "timing_warmup=1", *gemm]

    def _pilot_limits(self) -> child.Limits:
        patience = self.plan["stall_seconds"]
        return child.Limits(patience, patience, 3 * patience, PILOT_S)

    def _decide(self) -> None:
        """Rounds, iterations and order, from what the pilot runs have shown; written to plan.json."""
        costs = {name: cost for name in self.variants if (cost := self._cost(name)) is not None}
        asked, warmup = self.plan["asked"], max(config.timing_warmup for config in self.configs.values())
        left = self.plan["budget_minutes"] * 60 - self._elapsed() - REPORT_S
        decided: dict[str, Any] = {"rounds": 0, "iters": {}, "warmup": {}, "share": {}, "order": []}
        if costs:
            made = schedule(costs, left, asked["rounds"], asked["iters"], warmup, self.plan["cooldown_seconds"])
            decided = {
                "rounds": made.count,
                "iters": made.iters,
                "warmup": made.warmup,
                "share": {name: len(numbers) / made.count for name, numbers in made.rounds.items()},
                "order": plans.order(made.rounds, self.plan["seed"]),
                "expected_seconds": made.seconds,
            }
            counts = ", ".join(f"{name} {n}" for name, n in made.iters.items())
            self.say(f"{made.count} rounds in a drawn order, of iterations: {counts}; {_minutes(made.seconds)} more")
            if made.seconds > max(left, 0) * OVERRUN and not (asked["rounds"] or asked["iters"]):
                self.say(
                    f"(longer than budget_minutes={self.plan['budget_minutes']:g}: fewer rounds would show nothing)"
                )
        self.plan |= decided
        plans.write(self.folder, self.plan)

    def _cost(self, name: str) -> Cost | None:
        """Seconds of a run to come, from the pilot run; None where that failed."""
        found = child.outcome(self._run_folder(PILOT, name))
        if not found or found["state"] != "done":
            return None
        summary = self._summary(PILOT, name)
        rows = (self._run_folder(PILOT, name) / "metrics.jsonl").read_text().splitlines()
        iterating = sum(row["iter_ms"] for row in map(json.loads, rows) if row["kind"] == "iteration") / 1e3
        # The least of them: after a busy moment runs would be too short for good; rounds can be cut off or added.
        iteration, first = summary["iter_ms"]["min"] / 1e3, summary["first_iter_s"]
        measured = next(iter(self.configs.values())).gemm_seconds if self._names("gemm_seconds") else GEMM_S
        cold = max(0.0, first - iteration)
        start = max(0.5, found["seconds"] - iterating - measured) + FROM_CACHE * cold
        batches = 2 * 2 * EVAL_ITERS / self.configs[name].gradient_accumulation_steps  # two evaluations of two splits
        compiled = summary["compile"] and kinds.recorded(summary["backend"], summary["device"]).compiles_evaluation
        return Cost(start, iteration, batches * iteration / 3 + (cold / 2 if compiled else 0.0))

    # -- the rounds ---------------------------------------------------------------------------------------------------

    def _rounds(self) -> None:
        failures = Counter[str]()
        for number, name in self.plan["order"]:  # those of an earlier session
            failures[name] += (child.outcome(self._run_folder(number, name)) or {}).get("state", "done") != "done"
        heat_left = self.plan["budget_minutes"] * 60 / 4
        position = -1
        while (position := position + 1) < len(self.plan["order"]) or self._extend(failures):
            number, name = self.plan["order"][position]
            if child.outcome(self._run_folder(number, name)):
                continue
            if self._over(number, position):
                return
            variant = self.variants[name]
            if failures[name] >= GIVEN_UP:
                self._skip(number, name, f"{failures[name]} runs of it had failed")
                continue
            heat = self._cool_down(heat_left)
            heat_left -= heat["waited_s"]
            found = self._run(number, variant, self._round_overrides(number, name), self._round_limits(name), heat)
            failures[name] += found["state"] != "done"
            self._tell(position, found)

    def _over(self, number: int, position: int) -> bool:
        """Whether time is up before another round is done; what is left of the order is then cut off, on record."""
        order, asked = self.plan["order"], self.plan["asked"]
        starts = position == 0 or order[position - 1][0] != number
        over = self._elapsed() + self._round_seconds() > OVERRUN * self.plan["budget_minutes"] * 60
        if not (starts and over and number >= KEPT_ROUNDS) or asked["rounds"] or asked["iters"]:
            return False
        self.say(f"time is up: {number} of {self.plan['rounds']} rounds were run")
        self.plan["cut"] = {"rounds": self.plan["rounds"], "reason": "budget_minutes was used up"}
        self.plan |= {"rounds": number, "order": order[:position]}
        plans.write(self.folder, self.plan)
        return True

    def _extend(self, failures: Counter[str]) -> bool:
        """Add a round where there is time for one more, the pilot runs having promised less; time alone decides."""
        order, asked, rounds = self.plan["order"], self.plan["asked"], self.plan["rounds"]
        left = self.plan["budget_minutes"] * 60 - self._elapsed() - REPORT_S
        if asked["rounds"] or not 2 <= rounds < MANY or left < self._round_seconds() or "cut" in self.plan:
            return False
        runs = Counter(name for _, name in order)
        due = [name for name, share in self.plan["share"].items() if runs[name] + 1 <= share * (rounds + 1) + 1e-9]
        again = [name for name in due if failures[name] < GIVEN_UP]
        if not again:
            return False
        self.say("there is time for another round")
        added = plans.order({name: [0] for name in again}, self.plan["seed"] + rounds)
        self.plan |= {"rounds": rounds + 1, "order": order + [[rounds, name] for _, name in added]}
        plans.write(self.folder, self.plan)
        return True

    def _round_seconds(self) -> float:
        """How long a round takes, going by those that are done; the first, which also evaluates, is left out."""
        ended = [
            (n, found) for n, name in self.plan["order"] if n and (found := child.outcome(self._run_folder(n, name)))
        ]
        seconds = sum(found["seconds"] + self.plan["cooldown_seconds"] for _, found in ended)
        return seconds / len({n for n, _ in ended}) if ended else 0.0

    def _round_overrides(self, number: int, name: str) -> list[str]:
        iters, warmup = self.plan["iters"][name], self.plan["warmup"][name]
        evaluation = [f"eval_interval={iters}", f"eval_iters={EVAL_ITERS}"] if number == 0 else ["eval_interval=0"]
        return [f"max_iters={iters}", f"timing_warmup={warmup}", "gemm_seconds=0", *evaluation]

    def _round_limits(self, name: str) -> child.Limits:
        """Several times what the pilot run took: a hang is told from a slow machine late rather than wrongly."""
        summary, took = self._summary(PILOT, name), child.outcome(self._run_folder(PILOT, name))
        assert took is not None
        iteration = summary["iter_ms"]["median"] / 1e3
        stall = 30 + 50 * iteration
        first = min(self.plan["stall_seconds"], 60 + 5 * took["seconds"])
        work = (self.plan["iters"][name] + 4 * EVAL_ITERS) * iteration
        return child.Limits(max(first, stall), max(first, stall), first + stall + 5 * work)

    def _cool_down(self, most: float) -> dict[str, Any]:
        """Pause, and on a hot Mac wait until it is not, within bounds; what was found, for the record."""
        time.sleep(self.plan["cooldown_seconds"])
        begun, before = time.monotonic(), probe.thermal_state()
        state, bound = before, min(most, self.plan["heat_wait_seconds"])
        while state not in COOL and time.monotonic() - begun < bound:
            time.sleep(HEAT_POLL_S)
            state = probe.thermal_state()
        waited = time.monotonic() - begun if before not in COOL else 0.0
        return {"before": before, "waited_s": waited, "at_start": state, "load": os.getloadavg()[0]}

    def _tell(self, position: int, found: dict[str, Any]) -> None:
        order, label = self.plan["order"], self.variants[found["variant"]].label
        title = f"[{position + 1}/{len(order)}] round {found['round']}, {label}"
        left = self._left(position + 1)
        if found["state"] == "done":
            timing = self._summary(found["round"], found["variant"])["iter_ms"]
            median = "nothing counted" if timing["median"] is None else f"{timing['median']:.4g} ms"
            self.say(f"{title}: {median} ({found['seconds']:.0f} s){left}")
        else:
            self.say(f"{title}: {found['state'].upper()}: {found['reason']}{left}")

    def _left(self, position: int) -> str:
        """How long the rest will take, scaled by how the runs so far compare with what the pilots promised."""
        order = self.plan["order"]
        ended = [found for n, name in order[:position] if (found := child.outcome(self._run_folder(n, name)))]
        if position == len(order) or not ended:
            return ""
        took = sum(found["seconds"] for found in ended) / len(ended) + self.plan["cooldown_seconds"]
        return f"; {_minutes(took * (len(order) - position))} left"

    # -- one run ------------------------------------------------------------------------------------------------------

    def _run(
        self,
        number: int | str,
        variant: Variant,
        overrides: list[str],
        limits: child.Limits,
        heat: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        folder = self._run_folder(number, variant.name)
        child.clear(folder)
        folder.mkdir(parents=True)
        fixed = ["checkpoint=false", "sample_tokens=0", "wandb.mode=disabled", quoted("run_dir", str(folder))]
        if any(f.name == "fallbacks" for f in dataclasses.fields(Config)):
            fixed.append("fallbacks=off")
        script = variant.script or str(cli.ROOT / "train.py")
        argv = [sys.executable, script, *merged(self.plan["overrides"], variant.overrides, overrides, fixed)]
        started = datetime.now().astimezone().isoformat(timespec="milliseconds")
        ending = child.supervise(argv, folder, self._environment(variant), limits, kinds.signs())
        if ending.state != "done":
            child.require_room(folder)
        if heat is not None:
            heat["after"] = probe.thermal_state()
        return self._record(number, variant.name, dataclasses.asdict(ending) | {"started": started, "heat": heat})

    def _environment(self, variant: Variant) -> dict[str, str]:
        """Compilers' caches belong to the variant: its pilot run compiles from cold, its rounds do not."""
        cache = self.folder / "cache" / variant.name
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        caches = kinds.caches(self.configs[variant.name].backend.name, cache)
        for folder in caches.values():
            Path(folder).mkdir(parents=True, exist_ok=True)
        environment |= caches
        return environment | {"PYTHONUNBUFFERED": "1"}

    def _skip(self, number: int | str, name: str, reason: str) -> None:
        started = datetime.now().astimezone().isoformat(timespec="milliseconds")
        folder = self._run_folder(number, name)
        child.clear(folder)
        folder.mkdir(parents=True)
        nothing = {"state": "skipped", "code": None, "reason": reason, "seconds": 0.0, "started": started, "heat": None}
        self._record(number, name, nothing)

    def _record(self, number: int | str, name: str, ending: dict[str, Any]) -> dict[str, Any]:
        document = {"variant": name, "round": number, **ending}
        write_json(self._run_folder(number, name) / "outcome.json", document)
        return document

    # -- small things -------------------------------------------------------------------------------------------------

    def _run_folder(self, number: int | str, name: str) -> Path:
        return self.folder / "rounds" / f"{number}-{name}"

    def _summary(self, number: int | str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._run_folder(number, name) / "summary.json").read_text())
        return found

    def _names(self, key: str) -> bool:
        """Whether the command line has named a key of train.py."""
        return any(key_of(override) == key for override in self.plan["overrides"])

    def _elapsed(self) -> float:
        return time.monotonic() - self.begun

    def _spent_before(self) -> float:
        """Seconds that sessions before this one have spent, by what they left behind."""
        seconds = 0.0
        documents = ("rounds/*/outcome.json", "fallbacks/*.json", "parity.json")
        for path in (path for pattern in documents for path in self.folder.glob(pattern)):
            try:
                seconds += float(json.loads(path.read_text()).get("seconds") or 0.0)
            except (OSError, ValueError, AttributeError):
                continue
        return seconds


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
