"""One run's folder: whole, of other versions, with files missing, damaged or false."""

import json
import math
import os
import shutil

import pytest
import yaml
from fakes.comparisons import LINUX, write_comparison

from nanogpt_mac.compare.results.collect import load_run
from nanogpt_mac.compare.results.runs import number, parsed, read, work_key
from nanogpt_mac.errors import InputError

CPU = {"name": "cpu", "label": "CPU eager", "ms": 100.0}


@pytest.fixture
def run_folder(tmp_path):
    return write_comparison(tmp_path / "c", [CPU], 1, 40, 0.0, 1, machine=LINUX, pilot=False) / "rounds/0-cpu"


def test_load_run(run_folder):
    (run_folder / "outcome.json").unlink()  # train.py writes none
    found = load_run(run_folder)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert (found["state"], found["label"], found["backend"]) == ("ok", "CPU eager", "cpu")
    assert found["iter_ms"].pop("ci95") == summary["iter_ms"].pop("ci95")
    assert found["iter_ms"] == pytest.approx(summary["iter_ms"])
    assert found["tokens_per_s"] == pytest.approx(summary["tokens_per_s"])
    assert found["mfu_a100"] == pytest.approx(summary["mfu_a100"])
    assert found["work"]["batch_size"] == 64
    assert found["machine"]["name"] == "AMD EPYC"
    assert found["recipe"]["iters"] == 40
    assert found["warnings"] == []
    assert found["problems"] == []


def test_load_run_without_its_summary(run_folder):
    """A run that was killed: facts come from env.json, times from the rows."""
    whole = load_run(run_folder)
    for name in ("summary.json", "outcome.json"):
        (run_folder / name).unlink()
    found = load_run(run_folder)
    assert (found["state"], found["problems"]) == ("partial", ["summary.json is missing"])
    assert found["iter_ms"]["median"] == whole["iter_ms"]["median"]
    assert found["first_iter_s"] == whole["first_iter_s"]
    assert work_key(found["work"]) == work_key(whole["work"])
    assert found["work"]["flops_per_iter"] == whole["work"]["flops_per_iter"]


def test_load_run_of_other_versions(run_folder):
    path = run_folder / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"schema": 99, "model": {"n_layer": 3, "experts": 8}, "iter_ms": "nan"}))
    found = load_run(run_folder)
    assert any("schema 99" in problem for problem in found["problems"])
    assert found["iter_ms"]["count"] == 34
    assert found["roofline"] is None
    old = {key: summary[key] for key in ("backend", "exit_state")}  # before there was a schema
    path.write_text(json.dumps(old))
    (run_folder / "env.json").unlink()
    (run_folder / ".hydra/config.yaml").write_text(yaml.safe_dump({"batch_size": 64}))
    found = load_run(run_folder)
    assert found["state"] == "ok"
    assert found["work"]["model"] is None
    assert found["machine"]["name"] is None
    assert found["tokens_per_s"] is None


def test_load_run_with_one_file_alone(run_folder, tmp_path):
    for name in ("summary.json", "metrics.jsonl", "env.json", ".hydra/config.yaml"):
        alone = tmp_path / name.strip(".").replace("/", "-")
        (alone / name).parent.mkdir(parents=True)
        shutil.copy(run_folder / name, alone / name)
        found = load_run(alone)
        assert found["state"] in ("ok", "partial", "failed")
        assert len(found["problems"]) >= 2
    rows = tmp_path / "metrics.jsonl" / "metrics.jsonl"
    rows.write_text(
        '{"kind": "iteration", "iter": 3, "loss": "nan", "iter_ms": 5}\nnonsense\n{"kind": "dream"}\n[]\n7\n'
    )
    found = load_run(rows.parent)
    assert found["iter_ms"]["median"] == 5
    assert "metrics.jsonl: 4 of 5 lines cannot be read" in found["problems"]
    assert found["series"][0]["loss"] == [None]


def test_a_round_of_a_wrong_variant_is_wrong_by_itself_too(tmp_path):
    folder = write_comparison(tmp_path / "c", [CPU | {"parity": "fail"}], 1, 12, 0.0, 1) / "rounds/0-cpu"
    found = load_run(folder)
    assert (found["state"], found["parity"]) == ("wrong", "fail")
    assert found["reason"] == "failed parity: gradients: 0.03, allowed 0.001"


def test_eager_is_only_said_where_it_is_known(run_folder):
    for name in ("summary.json", "env.json"):
        (run_folder / name).unlink()
    assert load_run(run_folder)["label"] == "CPU eager"  # the config says compile=false
    path = run_folder / ".hydra/config.yaml"
    path.write_text(yaml.dump(yaml.safe_load(path.read_text()) | {"compile": "auto"}))
    assert load_run(run_folder)["label"] == "CPU"


def test_no_run_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"train\.py") as refused:
            load_run(folder)
        assert "\n" not in str(refused.value)


# -- what is there and cannot be so -----------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "5", "", [], [[1]], {}, {"a": [None]}, "\ud800"]


def leaves(document, before=()):
    for key, value in document.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from leaves(value, (*before, key))


def test_whatever_a_field_holds_it_is_read(run_folder):
    """Every field of every file in turn, with several odd values; ten thousand more were tried by hand."""
    (run_folder / "outcome.json").write_text(json.dumps({"state": "done", "heat": {"after": "nominal"}, "seconds": 5}))
    tried = 0
    for name in ("summary.json", "env.json", "outcome.json", ".hydra/config.yaml"):
        path = run_folder / name
        whole = path.read_text()
        for i, place in enumerate(leaves(yaml.safe_load(whole))):
            for value in (ODD[i % len(ODD)], ODD[(7 * i + 3) % len(ODD)]):
                document = yaml.safe_load(whole)
                holder = document
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = value
                path.write_text(yaml.dump(document) if name.endswith("yaml") else json.dumps(document))
                found = load_run(run_folder)
                assert found["iter_ms"]["count"] == 34, (name, place, value)
                json.dumps(found, allow_nan=False)
                tried += 1
        path.write_text(whole)
    assert tried > 250


def test_a_field_that_cannot_be_so_is_named_and_not_used(run_folder):
    path = run_folder / "summary.json"
    summary = json.loads(path.read_text())
    changes = {"flops_per_iter": -1.0, "peak_memory": "5 GB", "batch_size": True, "energy": [1], "exit_state": 7}
    path.write_text(json.dumps(summary | changes | {"mfu_denominators": {"mfu_a100": -312e12}}))
    found = load_run(run_folder)
    assert len(found["problems"]) == 6
    assert "summary.json: flops_per_iter cannot be -1.0" in found["problems"]
    assert "summary.json: mfu_denominators.mfu_a100 cannot be -312000000000000.0" in found["problems"]
    assert (found["peak_memory"], found["energy"], found["mfu_a100"]) == (None, None, None)
    assert found["work"]["batch_size"] == 64  # env.json has it too


@pytest.mark.parametrize(("name", "text", "said"), [
    (".hydra/config.yaml", 100_000 * "[", "config.yaml cannot be read"),  # libyaml would end the process
    (".hydra/config.yaml", "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join(9 * [f'*a{i}'])}]\n"
                                                     for i in range(9)) + "compile: *a9\n", "compile cannot be"),
    ("summary.json", 100_000 * "[", "summary.json cannot be read"),
    ("metrics.jsonl", 100_000 * '{"a":', "1 of 1 lines cannot be read"),
])  # fmt: skip
def test_a_file_without_end_is_named(run_folder, name, text, said):
    (run_folder / name).write_text(text)
    assert said in " ".join(load_run(run_folder)["problems"])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
def test_what_is_no_file_is_not_waited_for(run_folder, make):
    for name in ("env.json", "metrics.jsonl"):
        (run_folder / name).unlink()
        make(run_folder / name)
    problems = load_run(run_folder)["problems"]
    assert {"env.json cannot be read", "metrics.jsonl cannot be read"} <= set(problems)


@pytest.mark.parametrize("value", [1e308, 7, True, "text", {}])
def test_errors_that_are_no_list(run_folder, value):
    path = run_folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"errors": value}))
    assert load_run(run_folder)["problems"] == [f"summary.json: errors cannot be {value!r}"]


def test_a_size_without_end_in_the_config(run_folder):
    for name in ("summary.json", "env.json"):
        (run_folder / name).unlink()
    path = run_folder / ".hydra/config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.dump(config | {"model": config["model"] | {"block_size": 10**400}}))
    assert load_run(run_folder)["work"]["block_size"] is None


def test_a_model_without_end_takes_no_time(run_folder):
    (run_folder / "summary.json").unlink()
    path = run_folder / "env.json"
    env = json.loads(path.read_text())
    env["backend"]["model"]["n_layer"] = 10**9
    path.write_text(json.dumps(env))
    assert "env.json: model.n_layer cannot be 1000000000" in load_run(run_folder)["problems"]


def test_rows_that_cannot_be_so_are_counted(run_folder):
    path = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = [row for row in rows if row["kind"] == "iteration"]
    times[0]["left_out"] = True  # the first iteration must not become one that counts
    times[10]["iter"] = float("inf")
    times[11]["iter_ms"] = 1e308
    times[12]["iter_ms"] = -5
    times[13]["iter_ms"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_run(run_folder)
    assert found["iter_ms"]["count"] == 30
    assert found["iter_ms"]["max"] < 200
    assert f"metrics.jsonl: 4 of {len(rows)} lines cannot be read" in found["problems"]
    assert "metrics.jsonl: 30 timed iterations, but summary.json counted 34" in found["problems"]


def test_lost_rows_are_noticed(run_folder):
    """Cut at the end of a line, every line that is left can be read."""
    path = run_folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    assert any("but summary.json counted 34" in problem for problem in load_run(run_folder)["problems"])


def test_numbers_that_are_none():
    for value in (True, "5", None, [], 10**400, float("nan"), float("-inf")):
        assert number(value) is None
    assert parsed("[NaN, -Infinity, 5, 1.5, 1e400]") == [None, None, 5, 1.5, None]
    assert parsed("1" + 5000 * "0") is None
    with pytest.raises(ValueError, match="deeply"):
        parsed(100_000 * "[")


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
    assert found["iter_ms"].pop("ci95") == summary["iter_ms"].pop("ci95")
    assert found["iter_ms"] == pytest.approx(summary["iter_ms"])
    assert {key: found[key] for key in ("mfu_measured", "first_iter_s", "compile_s", "first_eval_s")} == pytest.approx(
        {key: summary[key] for key in ("mfu_measured", "first_iter_s", "compile_s", "first_eval_s")}
    )
    assert [row["val_loss"] for row in found["evaluations"]][-1] == summary["val_loss"]
    assert found["work"]["flops_per_iter"] == summary["flops_per_iter"]
    assert found["work"]["stand_in"] is False
    assert found["problems"] == []
    assert math.isfinite(read(tmp_path / "run").seconds()[-1])
