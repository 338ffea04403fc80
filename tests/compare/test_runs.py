"""One run's folder: whole, of other versions, with files missing or damaged."""

import json
import math
import os
import shutil

import pytest
from fakes.comparisons import LINUX, write_comparison

from nanogpt_mac.compare.leaderboard import load_run
from nanogpt_mac.compare.runs import read
from nanogpt_mac.errors import InputError

CPU = {"name": "cpu", "label": "CPU eager", "ms": 100.0}


@pytest.fixture
def run_folder(tmp_path):
    return write_comparison(tmp_path / "c", [CPU], 1, 40, 0.0, 1, machine=LINUX, pilot=False) / "rounds/0-cpu"


def times_of(summary):
    """Schema 1 called them iter_ms."""
    return summary.get("times") or summary["iter_ms"]


def test_load_run(run_folder):
    (run_folder / "outcome.json").unlink()  # train.py writes none
    found = load_run(run_folder)
    summary = json.loads((run_folder / "summary.json").read_text())
    variant, expected = found.variant, times_of(summary)
    assert (variant.state, variant.label, variant.backend) == ("ok", "CPU eager", "cpu")
    assert list(variant.times.ci95) == expected.pop("ci95")
    assert variant.times.model_dump(exclude={"ci95"}) == pytest.approx(expected)
    assert variant.tokens_per_s == pytest.approx(summary["tokens_per_s"])
    assert variant.mfu_a100 == pytest.approx(summary["mfu_a100"])
    assert variant.recipe.iters == 40
    assert variant.warnings == ()
    assert found.work.batch_size == 64
    assert found.machine.name == "AMD EPYC"
    assert found.problems == []


def test_load_run_without_its_summary(run_folder):
    """A run that was killed: facts come from env.json, times from the rows."""
    whole = load_run(run_folder)
    for name in ("summary.json", "outcome.json"):
        (run_folder / name).unlink()
    with (run_folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"kind": "iterat')  # killed while it wrote
    found = load_run(run_folder)
    assert (found.variant.state, found.problems) == ("partial", ["summary.json is missing"])
    assert found.variant.median == whole.variant.median
    assert found.variant.first_iter_s == whole.variant.first_iter_s
    assert found.work.key() == whole.work.key()
    assert found.work.flops_per_iter == whole.work.flops_per_iter


def test_load_run_of_a_newer_version(run_folder):
    path = run_folder / "summary.json"
    summary = json.loads(path.read_text())
    summary |= {"schema": 99, "model": summary["model"] | {"experts": 8}, "times": times_of(summary)}
    path.write_text(json.dumps(summary))
    found = load_run(run_folder)
    assert [problem for problem in found.problems if "schema 99, newer" in problem] == found.problems
    assert found.variant.times.count == 34
    assert found.work.sizes()["experts"] == 8
    assert found.variant.roofline is None  # nobody here knows such a model's floor


def test_load_run_with_one_file_alone(run_folder, tmp_path):
    for name in ("summary.json", "metrics.jsonl", "env.json", ".hydra/config.yaml"):
        alone = tmp_path / name.strip(".").replace("/", "-")
        (alone / name).parent.mkdir(parents=True)
        shutil.copy(run_folder / name, alone / name)
        found = load_run(alone)
        assert found.variant.state in ("ok", "partial", "failed")
        assert len(found.problems) >= 2
    assert load_run(tmp_path / "metrics.jsonl").variant.label == "metrics.jsonl"  # nobody says which back end it was


def test_a_round_of_a_wrong_variant_is_wrong_by_itself_too(tmp_path):
    folder = write_comparison(tmp_path / "c", [CPU | {"parity": "fail"}], 1, 12, 0.0, 1) / "rounds/0-cpu"
    found = load_run(folder).variant
    assert (found.state, found.parity) == ("wrong", "fail")
    assert found.reason == "failed parity: gradients: 0.03, allowed 0.001"


def test_a_loss_that_is_not_finite_is_kept_by_name(run_folder):
    path = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "iteration":
            row["loss"] = "nan"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_run(run_folder)
    assert found.problems == []
    assert all(math.isnan(loss) for loss in found.variant.series[0].loss)


def test_no_run_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"train\.py") as refused:
            load_run(folder)
        assert "\n" not in str(refused.value)


# -- what is there and cannot be so -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes", "line"), [
    ("summary.json", {"flops_per_iter": -1.0}, "flops_per_iter=-1.0"),
    ("summary.json", {"exit_state": 7}, "exit_state=7"),
    ("summary.json", {"errors": "text"}, "errors='text'"),
    ("summary.json", {"mfu_denominators": {"mfu_a100": -312e12}}, "mfu_denominators.mfu_a100=-312"),
    ("summary.json", {"peak_memory": 10**400}, "peak_memory="),
    ("env.json", {"memory_bytes": "much"}, "memory_bytes='much'"),
    ("env.json", {"backend": {"backend": "cpu"}}, "has no backend.device"),
    ("outcome.json", {"state": "fine"}, "state='fine'"),
])  # fmt: skip
def test_a_document_that_cannot_be_so_is_one_line_and_absent(run_folder, name, changes, line):
    path = run_folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    found = load_run(run_folder)
    (problem,) = found.problems
    assert problem.startswith(f"{name}: ")
    assert line in problem
    assert found.variant.times.count == 34  # the rest stands
    assert found.work.batch_size == 64


def test_a_model_without_end_takes_no_time(run_folder):
    (run_folder / "summary.json").unlink()
    path = run_folder / "env.json"
    env = json.loads(path.read_text())
    env["backend"]["model"]["n_layer"] = 10**9
    path.write_text(json.dumps(env))
    assert any("model.n_layer=1000000000" in problem for problem in load_run(run_folder).problems)


@pytest.mark.parametrize("changes", [{"left_out": True}, {"iter": "inf"}, {"iter_ms": 1e308}, {"iter_ms": -5},
                                     {"iter_ms": None}, {"kind": "dream"}])  # fmt: skip
def test_a_damaged_row_makes_the_rows_absent(run_folder, changes):
    path = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(i for i, row in enumerate(rows) if row["kind"] == "iteration" and row["iter"] == 10)
    rows[number] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_run(run_folder)
    assert [problem.split(":")[0] for problem in found.problems] == [f"metrics.jsonl, line {number + 1}"]
    assert found.variant.times is None


def test_lost_rows_are_noticed(run_folder):
    """Cut at the end of a line, every line that is left can be read."""
    path = run_folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    assert any("but summary.json counted 34" in problem for problem in load_run(run_folder).problems)


@pytest.mark.parametrize(("name", "text"), [
    (".hydra/config.yaml", 100_000 * "["),  # libyaml would end the process
    ("summary.json", 100_000 * "["),
    ("metrics.jsonl", 100_000 * '{"a":'),
    ("env.json", "1" + 5000 * "0"),
])  # fmt: skip
def test_a_file_without_end_is_one_line(run_folder, name, text):
    (run_folder / name).write_text(text)
    named = [problem for problem in load_run(run_folder).problems if name.rsplit("/", 1)[-1] in problem]
    assert len(named) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
def test_what_is_not_a_file_is_not_waited_for(run_folder, make):
    for name in ("env.json", "metrics.jsonl"):
        (run_folder / name).unlink()
        make(run_folder / name)
    assert {problem.split(" ")[0].strip(":") for problem in load_run(run_folder).problems} == {
        "env.json", "metrics.jsonl",
    }  # fmt: skip


@pytest.mark.slow
def test_a_real_run(command, tmp_path):
    """train.py's own folder, of today's format."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question:\n" * 200)
    how = ["backend=cpu", "data=text", "data.path=text.txt", "wandb.mode=disabled", "checkpoint=false", "run_dir=run"]
    few = ["sample_tokens=0", "gemm_seconds=0.1"]
    done = command("train.py", "experiment=smoke", *how, *few, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    found = load_run(tmp_path / "run")
    variant, expected = found.variant, times_of(summary)
    expected.pop("ci95")
    assert variant.times.model_dump(exclude={"ci95"}) == pytest.approx(expected)
    for key in ("mfu_measured", "first_iter_s", "compile_s", "first_eval_s"):
        assert getattr(variant, key) == pytest.approx(summary[key])
    assert variant.evaluations[-1].val_loss == summary["val_loss"]
    assert found.work.flops_per_iter == summary["flops_per_iter"]
    assert found.work.stand_in is False
    assert found.problems == []
    assert math.isfinite(read(tmp_path / "run").ends()[-1])
