"""Sweeps under Hydra's own launchers and sweepers, in their own processes: what they return, record and exit with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fakes.support import ROOT

from nanogpt_mac.records.run import RunSummary
from nanogpt_mac.records.sweep import Sweep

FAKE = ROOT / "tests" / "fakes" / "sweep_train.py"
TEXT = "".join(f"{a} and {b} went up the hill.\n\n" for a in ["Jack", "Jill", "Tom", "Ann"] for b in "abcdefghij" * 20)
SMOKE = ["experiment=smoke", "data=text", "path=text.txt", "gemm_seconds=0", "wandb.mode=disabled", "sample_tokens=0"]
SHORT = [*SMOKE, "backend=cpu", "max_iters=2", "eval_interval=1", "eval_iters=1"]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"]


def swept(folder, program, *overrides, timeout=300):
    """Run a sweep in `folder`; (finished process, its records)."""
    (folder / "text.txt").write_text(TEXT)
    argv = [sys.executable, str(program), "-m", "hydra.sweep.dir=sweep", *overrides]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    place = folder / "sweep" / "sweep.json"
    return done, Sweep.load(place) if place.exists() else None


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(n, marks=pytest.mark.slow) for n in LAUNCHERS if n != "basic")]
)
def test_every_launcher_runs_every_member_in_its_own_folder(tmp_path, launcher):
    """A good one, one that diverges, a better one: the sweep goes on, and says what became of each."""
    done, sweep = swept(tmp_path, FAKE, *LAUNCHERS[launcher], "backend=cpu", "seed=2,13,1", timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [(m.number, m.state, m.code) for m in sweep.members] == [(0, "done", 0), (1, "diverged", 1), (2, "done", 0)]
    assert [m.objective for m in sweep.members] == [0.002, None, 0.001]
    assert [Path(m.folder).name for m in sweep.members] == ["0-cpu", "1-cpu", "2-cpu"]
    assert (sweep.best, sweep.complete, sweep.launcher, sweep.sweeper) == (2, True, launcher, "basic")
    alone = launcher == "basic"
    assert sweep.shared_machine is not alone
    assert RunSummary.load(tmp_path / "sweep/0-cpu/summary.json").shared_machine is not alone
    assert "2: backend=cpu seed=1: done, best_val_loss=0.001" in done.stdout
    assert "1: backend=cpu seed=13: DIVERGED (exit code 1)" in done.stdout
    assert "1 of 3 failed" in done.stderr
    assert "**Member 2 has the lowest" in (tmp_path / "sweep/sweep.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_smoke_model_trains_under_every_launcher(tmp_path, launcher):
    done, sweep = swept(tmp_path, ROOT / "train.py", *LAUNCHERS[launcher], *SHORT, "dtype=float32,float64")
    assert done.returncode == 2, done.stdout + done.stderr  # float64 is bad input, and nothing else went wrong
    good, bad = sweep.members
    summary = RunSummary.load(tmp_path / "sweep/0-cpu/summary.json")
    assert (good.state, good.objective, summary.shared_machine) == ("done", summary.best_val_loss, True)
    assert (tmp_path / "sweep/0-cpu/ckpt/last").is_dir()
    assert (bad.state, bad.code, bad.folder) == ("bad input", 2, None)


@pytest.mark.slow
def test_the_smoke_model_trains_under_optuna(tmp_path):
    done, sweep = swept(
        tmp_path, ROOT / "train.py", *OPTUNA, "hydra.sweeper.n_trials=2", *SHORT,
        "learning_rate=tag(log,interval(1e-4,1e-2))",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rates = [float(re.search(r"learning_rate=(\S+)", m.title)[1]) for m in sweep.members]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    best = min(sweep.members, key=lambda m: m.objective)
    results = (tmp_path / "sweep/optimization_results.yaml").read_text()
    assert sweep.best == best.number
    assert f"best_value: {best.objective}" in results


@pytest.mark.slow
def test_optuna_goes_on_after_a_member_that_failed_and_is_told_the_objective(tmp_path):
    done, sweep = swept(
        tmp_path, FAKE, *OPTUNA, "hydra.sweeper.n_trials=4", "backend=cpu", "seed=choice(1,13)",
        "learning_rate=choice(1e-3,1e-5)", timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(sweep.members) == 4
    assert {m.state for m in sweep.members} == {"done", "diverged"}
    assert done.stderr.count("Failed experiment: ") == sum(m.state == "diverged" for m in sweep.members)
    best = min(m.objective for m in sweep.members if m.state == "done")
    assert f"best_value: {best}" in (tmp_path / "sweep/optimization_results.yaml").read_text()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_optuna_ends_at_a_rate_of_failures_that_is_given_and_the_sweep_is_summed_up(tmp_path):
    done, sweep = swept(
        tmp_path, FAKE, *OPTUNA, "hydra.sweeper.n_trials=9", "hydra.sweeper.max_failure_rate=0", "backend=cpu",
        "seed=13", "learning_rate=choice(1e-3,1e-5)", timeout=60,
    )  # fmt: skip
    assert (done.returncode, len(sweep.members)) == (1, 1)
    assert done.stderr.endswith("sweep_train.py: hydra/sweeper=optuna: member 0: diverged\n")
    assert "0: learning_rate=" in done.stdout


@pytest.mark.slow
def test_optuna_finds_the_better_of_two_learning_rates_of_the_smoke_model(tmp_path):
    done, sweep = swept(
        tmp_path, ROOT / "train.py", *OPTUNA, "hydra.sweeper.n_trials=10", *SMOKE, "backend=cpu",
        "learning_rate=choice(1e-2,1e-6)", "warmup_iters=0", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning_rate: 0.01\n" in (tmp_path / "sweep/optimization_results.yaml").read_text()
    assert sweep.members[sweep.best].title.startswith("learning_rate=0.01 ")
    assert len(sweep.members) == 10


@pytest.mark.slow
def test_ray_runs_every_member(tmp_path):
    pytest.importorskip("ray", reason="needs pip install 'nanogpt-mac[ray]'")
    done, sweep = swept(
        tmp_path, ROOT / "train.py", "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", *SHORT,
        "dtype=float32,float64",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert [(m.state, m.code) for m in sweep.members] == [("done", 0), ("bad input", 2)]
    assert sweep.shared_machine


SIGNALS = [
    ("basic", signal.SIGINT, os.kill, 1),
    ("joblib", signal.SIGINT, os.killpg, 2),  # as a terminal's Ctrl-C: one worker of three has nothing to do
    pytest.param("joblib", signal.SIGTERM, os.kill, 2, marks=pytest.mark.slow),
    pytest.param("submitit_local", signal.SIGINT, os.killpg, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("launcher", "signum", "send", "members"), SIGNALS)
def test_a_signal_ends_all_members_well_under_every_launcher(tmp_path, launcher, signum, send, members):
    argv = [sys.executable, str(FAKE), "-m", "hydra.sweep.dir=sweep", *LAUNCHERS[launcher], "backend=cpu", "seed=100"]
    argv.append("batch_size=1,2")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("sweep/*-cpu/began"))) < members:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        send(process.pid, signum)
        assert process.wait(60) == 128 + signum, (tmp_path / "log").read_text()
    sweep = Sweep.load(tmp_path / "sweep/sweep.json")
    assert (sweep.signal, sweep.complete) == (signum.name, False)
    assert {m.state for m in sweep.members} == {"stopped"}
    states = [json.loads(p.read_text())["exit_state"] for p in sorted(tmp_path.glob("sweep/*/summary.json"))]
    assert states == ["stopped"] * members  # each was given the time to write it
    deadline = time.monotonic() + 30  # submitit's own processes take a second
    while [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_subdir_is_obeyed_and_bad_input_alone_is_exit_code_2(tmp_path):
    done, sweep = swept(
        tmp_path, FAKE, "backend=cpu", "batch_size=1,3", "hydra.sweep.subdir=b${batch_size}/x", timeout=60
    )
    assert done.returncode == 2
    assert [(m.state, m.folder and Path(m.folder).relative_to(tmp_path)) for m in sweep.members] == [
        ("done", Path("sweep/b1/x")), ("bad input", None),
    ]  # fmt: skip
    assert not (tmp_path / "sweep/b3/x").exists()


def test_a_member_is_given_its_config_composed(tmp_path):
    """A folder of own configs, an environment variable, and text that would not survive being composed again."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text(
        "# @package _global_\nlearning_rate: ${oc.env:RATE}\nrun_dir: own/${seed}\n"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    argv = [sys.executable, str(FAKE), "--config-dir", "mine", "-m", "hydra.sweep.dir=sweep", *LAUNCHERS["joblib"]]
    argv += ["backend=cpu", "experiment=own", "seed=1,2", "wandb.group=null"]
    argv.append('wandb.name=naïve ☃ (1), "x" ${seed}')
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "RATE": "1e-4"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    members = Sweep.load(tmp_path / "sweep/sweep.json").members
    assert [m.objective for m in members] == pytest.approx([1.001, 1.002])
    assert [Path(m.folder) for m in members] == [tmp_path / "own/1", tmp_path / "own/2"]


@pytest.mark.slow
def test_speeds_of_members_that_ran_side_by_side_make_none_the_best(tmp_path):
    given = ["backend=cpu", "seed=1,2", "objective=tokens_per_s"]
    done, sweep = swept(tmp_path, FAKE, *given, *LAUNCHERS["joblib"], timeout=60)
    assert done.returncode == 0
    assert [m.objective for m in sweep.members] == [100.0, 200.0]
    assert sweep.best is None
    assert "objective=tokens_per_s: hydra/launcher=joblib runs members side by side" in done.stderr
    assert "none can be called best" in done.stdout
    done, sweep = swept(tmp_path, FAKE, *given, timeout=60)
    assert (done.returncode, sweep.best, sweep.direction) == (0, 1, "maximize")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), [("lr_batch", ["hydra.sweeper.n_trials=2"]), ("machine", [])])
def test_the_examples_run(tmp_path, name, overrides):
    done, sweep = swept(tmp_path, FAKE, f"sweep={name}", "experiment=smoke", "backend=cpu", *overrides, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    keys = {o.split("=")[0] for m in sweep.members for o in m.overrides}
    assert keys >= ({"learning_rate", "batch_size"} if name == "lr_batch" else {"backend", "compile", "dtype"})
    assert len(sweep.members) == (2 if name == "lr_batch" else 4)
