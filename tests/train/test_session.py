"""Whole runs of train.py and sample.py, in processes of their own, as a user starts them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from fakes.support import EACH_FRAMEWORK, FRAMEWORKS, ROOT, options

from nanogpt_mac import cli
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.errors import InputError
from nanogpt_mac.train import checkpoint, session

TEXT = "".join(f"{a} and {b} went up the hill.\n\n" for a in ["Jack", "Jill", "Tom", "Ann"] for b in "abcdefghij" * 20)
SMOKE = ["experiment=smoke", "data=text", "path=text.txt", "gemm_seconds=0.05"]
QUIET = [*SMOKE, "wandb.mode=disabled", "sample_tokens=0"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def rows(run, kind="iteration"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.mark.parametrize("name", EACH_FRAMEWORK)
def test_one_run_leaves_every_record(command, text, name):
    done = command("train.py", *SMOKE, f"backend={name}", "gemm_seconds=1")
    assert done.returncode == 0, done.stderr
    (run,) = (text / "runs").glob(f"*/*-{name}*")
    assert run.name.endswith(f"-{name}-compile" if KINDS[name].compiled_by_default else f"-{name}")

    config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    assert (config["model"]["n_layer"], config["data"]["name"]) == (2, "text")
    assert f"backend={name}" in yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    environment = json.loads((run / "env.json").read_text())
    assert environment["versions"]["torch"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["exit_state"], summary["corpus"]) == ("finished", "text")
    assert summary["process"]["user"] > 0.1
    if summary["errors"]:  # a machine so busy that its measured matmul was slower than the model's own
        (error,) = summary["errors"]
        assert error.startswith("mfu_measured would be above 1")
    else:
        assert 0 < summary["mfu_measured"] < 1
    iterations, evaluations = rows(run), rows(run, "evaluation")
    assert [row["iter"] for row in iterations] == list(range(20))
    assert [row["iter"] for row in evaluations] == [0, 10, 20]
    keys = {"loss", "lr", "grad_norm", "iter_ms", "dispatch_ms", "tokens_per_s", "memory"}
    keys |= {"mfu", "mfu_measured", "mfu_a100"}
    assert all(keys <= row.keys() for row in iterations)
    assert summary["val_loss"] == evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert (run / "sample.txt").read_text() in done.stdout
    assert (run / "ckpt" / "best" / "state.json").exists()

    lines = re.findall(r"^iter (\d+): loss (\d\.\d{4}), time (\d+\.\d\d)ms, mfu (\S+)$", done.stdout, re.MULTILINE)
    assert [int(line[0]) for line in lines] == [0, 5, 10, 15]
    assert lines[1][1] == f"{iterations[5]['loss']:.4f}"
    assert re.search(r"^step 10: train loss \d\.\d{4}, val loss \d\.\d{4}$", done.stdout, re.MULTILINE)

    check_wandb(run, iterations, evaluations)


def inside(monkeypatch, folder, *overrides):
    """A run in this process; its exit code."""
    monkeypatch.chdir(folder)
    return session.run(cli.compose([*SMOKE, "backend=cpu", "sample_tokens=0", "checkpoint=false", *overrides]))


def test_what_wandb_refuses_behind_the_first_iteration_leaves_nothing(monkeypatch, text):
    class RefusedError(Exception):
        pass

    def refuse(**asked):
        assert (text / "run/metrics.jsonl").exists()
        raise RefusedError("not today")

    fake = SimpleNamespace(init=refuse, errors=SimpleNamespace(Error=RefusedError), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(InputError, match=r"^wandb.mode=offline: not today; without"):
        inside(monkeypatch, text, "run_dir=run", "wandb.mode=offline")
    assert not (text / "run").exists()


def test_a_peak_is_measured_once_at_the_start_and_again_at_every_end(monkeypatch, text, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
    rates = iter([5e15, 4e15, 3e15, 6e15])
    asked = []

    def measured(device, dtype, shapes, seconds):
        rows_so_far = sorted(text.glob("run*/metrics.jsonl"))
        asked.append(len(rows_so_far[-1].read_text().splitlines()) if rows_so_far else None)
        return SimpleNamespace(flops_per_s=next(rates))

    monkeypatch.setattr(session.gemm, "measure", measured)
    peaks = []
    for number in range(3):
        assert inside(monkeypatch, text, f"run_dir=run{number}", "wandb.mode=disabled", "max_iters=4") == 0
        peaks.append(json.loads((text / f"run{number}/summary.json").read_text())["mfu_denominators"])
    assert [(peak["mfu_measured"], peak["measured_here"]) for peak in peaks] == [
        (5e15, 5e15),
        (5e15, 3e15),
        (6e15, 6e15),
    ]
    assert asked[0] is None
    assert all(asked[1:])  # behind the iterations
    (said,) = re.findall("mfu_measured is doubtful.*", capsys.readouterr().out)
    assert "3000000 GFLOP/s, less than 80% of the 5000000" in said
    assert json.loads((text / "run1/summary.json").read_text())["warnings"] == [said]


def check_wandb(run, iterations, evaluations):
    """wandb's own reader finds the same numbers in its own offline file."""
    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    wandb = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(wandb, capture_output=True, text=True, check=True)
    history = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            history.setdefault(record["history"]["item"]["_step"], {}).update(record["history"]["item"])
    for row in iterations:
        logged = history[row["iter"]]
        for key in ("loss", "lr", "grad_norm"):
            assert logged[f"train/{key}"] == pytest.approx(row[key], rel=1e-12)
        for key in ("iter_ms", "dispatch_ms", "tokens_per_s", "mfu", "mfu_measured", "mfu_a100"):
            if row[key] is None:  # wandb has no null: a figure that is not known is not logged
                assert f"perf/{key}" not in logged
            else:
                assert logged[f"perf/{key}"] == pytest.approx(row[key], rel=1e-12)
    for row in evaluations:
        assert history[row["iter"]]["val/loss"] == pytest.approx(row["val_loss"], rel=1e-12)


@pytest.mark.parametrize("name", EACH_FRAMEWORK)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(command, text, name):
    """A hundred iterations with dropout, one of them in two halves."""
    recipe = [*QUIET, f"backend={name}", "compile=auto", "model.dropout=0.2", "max_iters=100"]
    recipe += ["lr_decay_iters=100", "eval_interval=50", "run_dir={}"]
    *recipe, folder = recipe
    assert command("train.py", *recipe, folder.format("whole")).returncode == 0
    assert command("train.py", *recipe, "max_iters=50", folder.format("half")).returncode == 0
    resume = ["init_from=resume", "run=half", "max_iters=100", folder.format("rest")]
    done = command("train.py", *resume)
    assert done.returncode == 0, done.stderr
    whole, rest = rows(text / "whole"), rows(text / "rest")
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[50:]]
    assert [row["lr"] for row in rest] == [row["lr"] for row in whole[50:]]
    for name in checkpoint.FILES:
        assert (text / "rest/ckpt/last" / name).read_bytes() == (text / "whole/ckpt/last" / name).read_bytes()
    assert rows(text / "rest", "evaluation")[-1]["val_loss"] == rows(text / "whole", "evaluation")[-1]["val_loss"]


@pytest.mark.slow  # by commands; tests/backends has it within a process
def test_a_run_goes_through_all_frameworks_and_back(command, text):
    ring = [*FRAMEWORKS, FRAMEWORKS[0]]
    last = 20 * len(ring)
    recipe = [*QUIET, f"lr_decay_iters={last}", "eval_interval=20"]
    assert command("train.py", *recipe, f"backend={ring[0]}", f"max_iters={last}", "run_dir=whole").returncode == 0
    for number, backend in enumerate(ring):
        resume = ["init_from=resume", f"run={number - 1}"] if number else recipe
        own = [f"backend={backend}", f"max_iters={20 * (number + 1)}", f"run_dir={number}"]
        done = command("train.py", *resume, *own)
        assert done.returncode == 0, done.stderr
        assert json.loads((text / f"{number}/summary.json").read_text())["backend"] == backend
    expected, found = rows(text / "whole")[-1], rows(text / f"{number}")[-1]
    assert found["iter"] == expected["iter"] == last - 1
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-3)


def test_what_cannot_be_resumed_is_said_in_one_line(command, text):
    assert command("train.py", *QUIET, "backend=cpu", "run_dir=a").returncode == 0
    (text / "other.txt").write_text(TEXT.replace("hill", "road"))
    for overrides, line in [
        (["max_iters=20"], "max_iters=20: run=a is already at iteration 20; give max_iters above 20"),
        (["max_iters=30", "model.n_layer=3"], "model.n_layer=3: a has 2, and weights keep their sizes; use 2"),
        (["max_iters=30", "path=nowhere.txt"], "data.path=nowhere.txt: "),
        (["max_iters=30", "path=other.txt"], "data=text: .* was trained on other text"),
        (["max_iters=30", "experiment=quick"], "experiment=quick: a resumed run keeps its recipe"),
    ]:
        done = command("train.py", "init_from=resume", "run=a", "backend=cpu", *overrides)
        assert done.returncode == 2
        assert re.fullmatch(rf"train\.py: {line}.*\n", done.stderr), done.stderr
    assert not (text / "runs").exists()


def start(text, *overrides):
    """A long run under way, past its first checkpoint."""
    argv = [sys.executable, str(ROOT / "train.py"), *QUIET, "backend=cpu", "max_iters=100000", "eval_interval=10"]
    process = subprocess.Popen(
        [*argv, "run_dir=run", *overrides], cwd=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while not (text / "run/ckpt/last").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_a_checkpoint_and_a_summary(command, text, signum, code):
    process = start(text)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    summary = json.loads((text / "run/summary.json").read_text())
    assert (summary["exit_state"], summary["signal"]) == ("stopped", signum.name)
    _, state, _ = checkpoint.load(checkpoint.find(str(text / "run")))
    assert state.iteration == rows(text / "run")[-1]["iter"] + 1
    resume = ["init_from=resume", "run=run", f"max_iters={state.iteration + 3}", "run_dir=rest"]
    assert command("train.py", *resume).returncode == 0
    assert [row["iter"] for row in rows(text / "rest")] == [state.iteration + i for i in range(3)]


def kill_at_random(text, times, seed):
    """Kill a checkpointing run again and again; `last` and `best` must load every time. Yields the state of `last`."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        process = start(text, "eval_interval=1", "eval_iters=1", "batch_size=1", "model.n_embd=256")
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        (text / "run").rename(text / "killed")
        checkpoint.load(checkpoint.find(str(text / "killed"), "best"))
        yield checkpoint.load(checkpoint.find(str(text / "killed")))[1]
        shutil.rmtree(text / "killed")


def test_kills_leave_a_readable_checkpoint(command, text):
    for number, state in enumerate(kill_at_random(text, 2, seed=0)):
        assert state.iteration > 0
        if number == 1:
            done = command("train.py", "init_from=resume", "run=killed", f"max_iters={state.iteration + 2}")
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_hundred_kills(text):
    """Every checkpoint loads, and goes on in this process (a process each would take an hour)."""
    from nanogpt_mac.backends import kinds
    from nanogpt_mac.backends.base import Tokens

    data = np.random.default_rng(0).integers(0, 20, 1000).astype(np.uint16)
    iterations = set()
    for state in kill_at_random(text, 200, seed=1):
        iterations.add(state.iteration)
        spec = checkpoint.load(text / "killed/ckpt/last")[0]
        backend = kinds.create(spec, options("cpu"), Tokens({"train": data}, spec.block_size))
        backend.restore(state)
        loss, _ = backend.wait(backend.step(np.array([[1, 2]]), 1e-3))
        assert np.isfinite(loss)
    assert len(iterations) > 5  # the kills came at different moments


@pytest.mark.slow
def test_a_sweep_runs_every_member_and_reports_the_failed_one(command, text):
    done = command("train.py", "-m", *QUIET, "backend=cpu,mps,mlx", "dtype=float32,float64", timeout=180)
    (sweep,) = (text / "runs").glob("*/*-sweep")
    assert done.returncode == 2, done.stdout + done.stderr
    assert sorted(p.name for p in sweep.glob("[!.]*")) == [
        "0-cpu", "4-mlx-compile", "multirun.yaml", "sweep.json", "sweep.md",
    ]  # fmt: skip
    report = done.stdout.split("== sweep\n")[-1].splitlines()
    assert len(report) == 6 + 2  # the best, and where it all lies
    assert re.fullmatch(r"0: .*backend=cpu dtype=float32: done, best_val_loss=\d\.\d+", report[0])
    assert re.fullmatch(r"1: .*backend=cpu dtype=float64: bad input \(exit code 2\)", report[1])
    assert re.fullmatch(r"4: .*backend=mlx dtype=float32: done, best_val_loss=\d\.\d+", report[4])
    assert "4 of 6 failed" in done.stderr
    assert json.loads((sweep / "0-cpu/summary.json").read_text())["exit_state"] == "finished"


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(command, text):
    overrides = ["backend=cpu", "learning_rate=1e30", "grad_clip=0", "warmup_iters=0", "run_dir=run", "max_iters=60"]
    done = command("train.py", *QUIET, *overrides, "decay_lr=false", "eval_interval=1", "weight_decay=1e9")
    assert done.returncode == 1, done.stdout
    assert "training has diverged" in done.stdout
    assert json.loads((text / "run/summary.json").read_text())["exit_state"] == "diverged"


def test_a_reader_that_leaves_and_a_poor_terminal_do_not_end_a_run(text):
    (text / "text.txt").write_text(TEXT.replace("hill", "hïll ☃"), encoding="utf-8")
    argv = [sys.executable, str(ROOT / "train.py"), *SMOKE, "backend=cpu", "wandb.mode=disabled", "run_dir=run"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(argv, cwd=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    assert json.loads((text / "run/summary.json").read_text())["exit_state"] == "finished"
    assert len((text / "run/sample.txt").read_text(encoding="utf-8")) == 60


def test_hydra_run_dir_is_obeyed_and_a_run_is_never_overwritten(command, text):
    overrides = [*QUIET, "backend=cpu", "hydra.run.dir=here"]
    assert command("train.py", *overrides).returncode == 0
    before = (text / "here/metrics.jsonl").read_text()
    done = command("train.py", *overrides)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (text / "here/metrics.jsonl").read_text() == before


def test_sample_streams_the_same_text_from_every_back_end(command, text):
    assert command("train.py", *QUIET, "backend=cpu", "run_dir=run", "max_iters=60").returncode == 0
    sample = ["run=run", "prompt=Jack", "max_new_tokens=80", "seed=3", "num_samples=2"]
    outputs = {}
    for name in FRAMEWORKS:
        done = command("sample.py", *sample, f"backend={name}")
        assert done.returncode == 0, done.stderr
        outputs[name] = done.stdout
        assert re.search(rf"tokens/s on {name if name == 'cpu' else '(cpu|metal|cuda)'}", done.stderr)
    assert len(set(outputs.values())) == 1
    first, second = outputs["cpu"].split("\n---------------\n")
    assert first.startswith("Jack")
    assert second.startswith("Jack")
    assert first != second
    assert len(first) == 4 + 80 + 1
    (text / "prompt.txt").write_text("Tom and")
    done = command("sample.py", "run=run", "checkpoint=best", "prompt=FILE:prompt.txt", "temperature=0", "top_k=null")
    assert done.stdout.startswith("Tom and")
    assert len(done.stdout) == 7 + 500 + 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["run=nowhere"], "run=nowhere: there is no such folder"),
        (["run=."], r"run=\.: holds no checkpoint"),
        (["run=.", "temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["run=.", "top_k=0"], "top_k=0: must be at least 1"),
        (["run=.", "checkpoint=first"], "checkpoint=first: use last or best"),
    ],
)
def test_sample_answers_mistakes_in_one_line(command, text, overrides, line):
    done = command("sample.py", "backend=cpu", *overrides)
    assert done.returncode == 2
    assert re.fullmatch(rf"sample\.py: {line}.*\n", done.stderr), done.stderr


def test_a_terminal_gets_a_progress_bar(text):
    """Through a pseudo-terminal: the bar, with figures, and no nanoGPT lines."""
    argv = [sys.executable, str(ROOT / "train.py"), *QUIET, "backend=cpu", "run_dir=run", "max_iters=400"]
    main, child = os.openpty()
    process = subprocess.Popen(argv, cwd=text, stdout=child, stderr=child, env={**os.environ, "COLUMNS": "160"})
    os.close(child)
    output = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(main)
    assert process.wait() == 0
    shown = output.decode()
    assert re.search(r"iter \d+/400", shown)
    assert re.search(r"loss \d\.\d{4}  \d+\.\d ms  mfu", shown)
    assert "ETA" in shown
    assert "iter 10: loss" not in shown
