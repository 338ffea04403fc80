"""Folders of a comparison that are half done, damaged or of other versions."""

import json
import shutil

import pytest
from fakes.comparisons import write_comparison

from nanogpt_mac.compare.collect import collect
from nanogpt_mac.errors import InputError
from nanogpt_mac.measure import stats

pytestmark = pytest.mark.xdist_group("collect")  # what its fixtures make is expensive: one worker makes it

CPU = {"name": "cpu", "label": "CPU eager", "ms": 100.0}
MLX = {"name": "mlx", "label": "MLX compiled", "compile": True, "ms": 80.0}
MPS = {"name": "mps", "label": "MPS eager", "ms": 90.0}


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    """The interval itself is tests/measure/test_stats.py's business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 100)
        yield


def test_every_state_of_completion(tmp_path):
    """From the first file to the last, something is collected, and nothing wins before it was timed."""
    for stop in range(0, 9):
        folder = write_comparison(tmp_path / str(stop), [CPU, MLX], 4, 12, 0.004, 1, stop_after=stop)
        found = collect(folder).document()
        assert found["complete"] is (stop >= 8)
        assert (found["verdict"]["fastest"] is None) is (stop == 0)
        assert ("not complete" in found["verdict"]["sentence"]) is (stop < 8)
        timed = {name for _, name in json.loads((folder / "plan.json").read_text())["order"][:stop]}
        assert {variant["name"] for variant in found["variants"] if variant["state"] == "waiting"} == {
            "cpu",
            "mlx",
        } - timed
        assert "failed" not in found["verdict"]["sentence"]  # it may yet


def test_a_plan_alone(tmp_path):
    folder = write_comparison(tmp_path / "c", [CPU], 1, 12, 0.0, 1, gate=False)
    shutil.rmtree(folder / "rounds")
    found = collect(folder).document()
    assert found["complete"] is False
    assert [variant["state"] for variant in found["variants"]] == ["waiting"]
    assert found["variants"][0]["times"] is None
    assert found["verdict"]["sentence"].startswith(
        "The comparison is not complete; so far: Nothing has been timed yet."
    )


def test_no_comparison_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"plan\.json") as refused:
            collect(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["plan.json", "parity.json", "rounds/1-cpu/summary.json", "rounds/1-cpu/env.json",
                                  "rounds/1-cpu/metrics.jsonl", "rounds/1-cpu/outcome.json",
                                  "rounds/1-cpu/.hydra/config.yaml", "fallbacks/mps.json"])  # fmt: skip
@pytest.mark.parametrize("how", ["gone", "half", "list", "binary"])
def test_any_damaged_file_is_one_line_and_leaves_the_rest(compared, name, how):
    def damage(folder):
        path = folder / name
        whole = path.read_bytes()
        path.unlink()
        if how != "gone":
            path.write_bytes({"half": whole[: len(whole) // 2], "list": b"[1, 2]", "binary": b"\xff\0"}[how])

    found, variants = compared([CPU, MPS], rounds=3, iters=14, damage=damage)
    assert variants["mps"]["runs"] == 3
    lines = found["warnings"] + variants["cpu"]["warnings"] + [str(f["reason"]) for f in variants["cpu"]["failed_runs"]]
    named = [line for line in lines if name.rsplit("/", 1)[-1] in line]
    if name.endswith("config.yaml") and how == "half":
        return  # the first half of it is YAML too
    unusual = how != "gone" or name not in ("parity.json", "rounds/1-cpu/outcome.json", "fallbacks/mps.json")
    assert len(named) == (1 if unusual else 0), lines
    if name == "parity.json" and how != "gone":  # a gate that cannot be read is never a pass
        assert found["verdict"]["fastest"] is None
        assert variants["mps"]["parity"] == "error"
    else:
        assert found["verdict"]["fastest"] == "mps"
    assert variants["cpu"]["runs"] == (2 if name.endswith("metrics.jsonl") else 3)


def test_a_diverged_run_does_not_count(compared):
    def diverge(folder):
        path = folder / "rounds/1-cpu/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"exit_state": "diverged"}))

    _, variants = compared([CPU], rounds=3, damage=diverge)
    assert variants["cpu"]["runs"] == 2
    assert variants["cpu"]["failed_runs"] == [
        {"round": 1, "state": "failed", "reason": "diverged: the loss is not a number"}
    ]


@pytest.mark.parametrize(("key", "value"), [("variants", 7), ("order", [[0], None]), ("rounds", "many"), ("seed", "x")])
def test_an_odd_plan_is_one_line_and_leaves_the_runs(compared, key, value):
    def damage(folder):
        path = folder / "plan.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    found, variants = compared([CPU, MPS], rounds=2, iters=14, damage=damage)
    assert variants["mps"]["runs"] == variants["cpu"]["runs"] == 2
    assert [line for line in found["warnings"] if line.startswith("plan.json: ") and key in line] == found["warnings"][
        :1
    ]


def test_a_newer_plan_is_read_for_what_is_known_of_it(compared):
    def newer(folder):
        path = folder / "plan.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99, "of_the_future": 1}))

    found, _ = compared([CPU], rounds=1, damage=newer)
    assert found["warnings"][0].startswith("plan.json has schema 99, newer than this program's 3")


@pytest.mark.parametrize("damage", [{"state": None}, {"state": "fine"}, {"state": ["pass"]}, 7, None])
def test_a_parity_that_cannot_be_read_is_never_a_pass(compared, damage):
    """A wrong variant whose entry is damaged must not win."""

    def damaged(folder):
        path = folder / "parity.json"
        parity = json.loads(path.read_text())
        if damage is None:
            del parity["variants"]["mlx"]
        else:
            parity["variants"]["mlx"] = parity["variants"]["mlx"] | damage if isinstance(damage, dict) else damage
        path.write_text(json.dumps(parity))

    found, variants = compared([CPU, MLX | {"parity": "fail"}], rounds=2, iters=14, damage=damaged)
    assert variants["mlx"]["parity"] == "error"
    assert found["verdict"]["fastest"] == ("cpu" if damage is None else None)


def test_a_round_of_other_work_is_not_pooled(compared):
    """A folder that was exchanged: its times are of something else."""

    def exchange(folder):
        for name in ("summary.json", "env.json"):
            path = folder / "rounds/0-cpu" / name
            document = json.loads(path.read_text())
            (document["backend"] if name == "env.json" else document)["batch_size"] = 1
            path.write_text(json.dumps(document))

    _, variants = compared([CPU, MPS], rounds=3, iters=14, damage=exchange)
    assert (variants["cpu"]["runs"], variants["cpu"]["same_work"]) == (2, True)
    assert variants["cpu"]["failed_runs"] == [{"round": 0, "state": "other_work", "reason": "batch_size=1, not 64"}]


def test_the_machine_is_of_any_run_that_tells(compared):
    found, _ = compared([CPU], rounds=2, iters=14, damage=lambda folder: (folder / "rounds/0-cpu/env.json").unlink())
    assert found["machine"]["name"] == "Apple M4 Pro"


def test_variants_that_shared_their_machine_are_not_ranked(compared):
    """Of a sweep over compare.py whose launcher ran several side by side."""

    def shared(folder):
        for path in folder.glob("rounds/*/summary.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"shared_machine": True}))

    found, variants = compared([CPU, MLX], damage=shared)
    assert not any(variant["ranked"] for variant in variants.values())
    assert found["verdict"]["fastest"] is None
    assert found["verdict"]["sentence"].startswith("No configuration can be called fastest.")
    assert any("other runs used this machine" in line for line in found["warnings"])
