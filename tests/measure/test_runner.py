"""The runner measures any program that iterates; its failures are in tests/compare/test_runner.py."""

import json
import os
import sys
from dataclasses import dataclass

from nanogpt_mac.measure.rounds import Cost
from nanogpt_mac.measure.runner import Runner, Shown
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.plan import Measurement
from nanogpt_mac.records.run import Outcome

PROGRAM = """
import json, os, pathlib, sys
folder, iters = pathlib.Path(sys.argv[1]), int(sys.argv[2])
row = json.dumps({"kind": "iteration"}) + "\\n"
(folder / "metrics.jsonl").write_text(row * iters)
(folder / "summary.json").write_text(json.dumps({"seconds": float(os.environ["SECONDS"]), "iters": iters}))
"""


@dataclass(frozen=True)
class Sums:
    """A job that is no training and has records of its own."""

    label: str
    seconds: float
    warmup: int = 1

    def command(self, task):
        return [sys.executable, "-c", PROGRAM, str(task.folder), str(task.iters)]

    def environment(self, task):
        return os.environ | {"SECONDS": str(self.seconds)}

    def signs(self):
        return {}

    def shown(self, folder):
        written = json.loads((folder / "summary.json").read_text())
        if "seconds" not in written:
            raise DamagedError("summary.json: has no seconds")
        return Shown(written["seconds"], written["seconds"], written["seconds"])

    def cost(self, folder, seconds):
        return Cost(0.1, self.shown(folder).median)


def test_jobs_of_any_kind_are_measured_and_go_on(tmp_path):
    plan = Measurement(asked={"rounds": 2, "iters": 9}, seed=1, budget_minutes=1, stall_seconds=60)
    jobs = {"a": Sums("A", 0.001), "b": Sums("B", 0.002), "c": Sums("C", 0.001)}
    said = []
    runner = Runner(tmp_path, plan, jobs, said.append)
    runner.measure({"c": "it is not wanted"})
    made = sorted(path.name for path in (tmp_path / "rounds").iterdir())
    assert made == ["0-a", "0-b", "1-a", "1-b", "pilot-a", "pilot-b", "pilot-c"]
    assert Outcome.load(tmp_path / "rounds/pilot-c/outcome.json").reason == "it is not wanted"
    assert runner.results[1, "b"] == Shown(0.002, 0.002, 0.002)
    assert "pilot, B: 2 ms an iteration, first 0.0 s" in said
    (tmp_path / "rounds/1-b/summary.json").write_text("{}")
    again = Runner(tmp_path, Measurement.load(tmp_path / "plan.json"), jobs, said.append)
    assert said[-1] == "rounds/1-b: its records are damaged: summary.json: has no seconds; it is run again"
    assert (1, "b") not in again.outcomes
    again.measure({})
    assert again.results == runner.results
