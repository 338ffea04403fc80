"""What commit b774fa3 wrote, the last of schema 1, opens, goes on, resumes and reports."""

import json
import shutil

import pytest
from fakes.support import ROOT

from nanogpt_mac.records.plan import Parity, ParityState, Plan
from nanogpt_mac.records.run import Environment, EvaluationRow, IterationRow, Outcome, RunState, RunSummary, read_rows

FIXTURES = ROOT / "tests" / "fixtures" / "b774fa3"
RUNS = sorted(path.parent for path in FIXTURES.glob("**/summary.json"))
VARIANTS = {"cpu", "mlx", "mps"}


@pytest.fixture
def old(tmp_path):
    """A copy of the fixtures, as if they had been made in `tmp_path`."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True, symlinks=True)
    plan = tmp_path / "compare" / "plan.json"
    plan.write_text(plan.read_text().replace('"CWD"', json.dumps(str(tmp_path))))
    return tmp_path


def test_a_plan_and_its_gate_are_read():
    written = json.loads((FIXTURES / "compare/plan.json").read_text())
    plan = Plan.load(FIXTURES / "compare/plan.json")
    assert [variant.model_dump(include={"name", "label"}) for variant in plan.variants] == [
        {key: way[key] for key in ("name", "label")} for way in written["ways"]
    ]
    assert [list(run) for run in plan.order] == written["order"]
    for key in (
        "rounds",
        "iters",
        "warmup",
        "share",
        "expected_seconds",
        "seed",
        "budget_minutes",
        "cwd",
        "experiment",
    ):
        assert getattr(plan, key) == written[key]
    assert plan.asked.model_dump() == written["asked"]
    parity = Parity.load(FIXTURES / "compare/parity.json")
    assert {name: result.state for name, result in parity.variants.items()} == dict.fromkeys(VARIANTS, ParityState.PASS)
    checks = json.loads((FIXTURES / "compare/parity.json").read_text())["ways"]["cpu"]["checks"]
    assert [check.model_dump(by_alias=True) for check in parity.variants["cpu"].checks] == checks


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_every_run_is_read(folder):
    written = json.loads((folder / "summary.json").read_text())
    summary = RunSummary.load(folder / "summary.json")
    assert summary.times.model_dump(mode="json") == written["iter_ms"]
    assert summary.model.n_layer == 1
    counted = [r.iter_ms for r in read_rows(folder / "metrics.jsonl") if isinstance(r, IterationRow) and not r.left_out]
    assert len(counted) == summary.times.count > 0
    assert Environment.load(folder / "env.json").backend.backend == summary.backend
    if folder.name != "run":
        outcome = Outcome.load(folder / "outcome.json")
        assert (f"{outcome.round}-{outcome.variant}", outcome.state) == (folder.name, RunState.DONE)
        assert outcome.heat is None if outcome.round == "pilot" else outcome.heat.load > 0


@pytest.mark.slow
def test_a_comparison_that_was_interrupted_goes_on_and_reports(old, command):
    rounds = old / "compare" / "rounds"
    shutil.rmtree(rounds / "1-cpu")
    (rounds / "2-cpu" / "outcome.json").unlink()
    kept = {path: path.read_bytes() for path in rounds.glob("*/outcome.json")}
    done = command("compare.py", "run=compare", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stdout
    assert "parity: all pass" in done.stdout
    assert all(path.read_bytes() == text for path, text in kept.items())  # nothing else was run again
    for name in ("1-cpu", "2-cpu"):
        assert Outcome.load(rounds / name / "outcome.json").state == RunState.DONE
    comparison = json.loads((old / "compare/comparison.json").read_text())
    assert {(v["name"], v["state"], v["runs"]) for v in comparison["variants"]} == {(n, "ok", 3) for n in VARIANTS}
    assert "CPU eager" in (old / "compare/report.md").read_text()
    assert "<html" in (old / "compare/report.html").read_text()


def test_a_checkpoint_resumes(old, command):
    quick = ["sample_tokens=0", "gemm_seconds=0", "wandb.mode=disabled"]
    done = command("train.py", "init_from=resume", "run=run", "max_iters=15", "run_dir=more", *quick)
    assert done.returncode == 0, done.stderr
    summary = RunSummary.load(old / "more/summary.json")
    assert (summary.resumed_at, summary.max_iters, summary.model.n_embd) == (12, 15, 16)
    rows = [row for row in read_rows(old / "more/metrics.jsonl") if isinstance(row, IterationRow)]
    (before,) = (r for r in read_rows(old / "run/metrics.jsonl") if isinstance(r, EvaluationRow) and r.iter == 12)
    assert [row.iter for row in rows] == [12, 13, 14]
    assert rows[0].loss == pytest.approx(before.train_loss, abs=0.1)
