"""Predictions against what is observed; the live trace, on the simulated device, against the one that it counts."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from fakes.support import CACHE

from nanogpt_mac.coverage import model_ops, page, verify
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.operators import table
from nanogpt_mac.operators.table import Kind
from nanogpt_mac.records.coverage import Observed, Prediction

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")

TOLD = {
    "phases": {"forward": {"linear": 9, "gelu": 2}, "backward": {"linear_backward": 9}},
    "waits": {"forward": 0, "backward": 0},
    "errors": {"geqrf": "no such operator"},
    "warnings": {"geqrf": "on the CPU"},
    "findings": {},
    "compiled": {"training": {"launches": 123, "buffers": 148}},
}


def altered(part, **values):
    made = json.loads(json.dumps(TOLD))
    made[part].update(values)
    return made


def judged(told, seen, no_prediction=None, failed=None):
    return {i.name: i for i in verify.compare(Observed(**told), Observed(**seen), no_prediction, failed or {})}


def test_equal_and_different():
    items = judged(TOLD, altered("phases"))
    assert len(items) == 7
    assert all(item.equal for item in items.values())
    items = judged(TOLD, altered("phases", forward={"linear": 9, "gelu": 3, "abs": 1}))
    assert [name for name, item in items.items() if not item.equal] == ["forward: operators that reach the device"]
    wrong = items["forward: operators that reach the device"]
    assert wrong.differences() == {"gelu": (2, 3), "abs": (None, 1)}
    made = verify.page("9.1.0", "mps", list(items.values()), "out.json")
    assert made.exit_code == 1
    assert [row.cells for row in made.sections[1].tables[0].rows] == [
        ["forward: operators that reach the device", "abs", "none", "1"],
        ["forward: operators that reach the device", "gelu", "2", "3"],
    ]
    assert made.data["items"][0]["predicted"] == {"linear": 9, "gelu": 2}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("phases", {"sampling": {"abs": 1}}),  # a phase that was not predicted
        ("waits", {"forward": 1}),
        ("errors", {"geqrf": "another text"}),
        ("warnings", {"geqrf": ""}),
        ("findings", {"gelu.out, missing, CPU kernel, forward": 1}),
        ("compiled", {"training": {"launches": 124, "buffers": 148}}),
    ],
)
def test_every_part_can_differ(part, value):
    items = judged(TOLD, altered(part, **value))
    assert [item.equal for item in items.values()].count(False) == 1


def test_what_is_not_known_is_never_equal():
    items = judged(TOLD, altered("compiled", training={"launches": None, "buffers": 148}))
    assert items["compiled training"].equal is None
    assert items["compiled training"].why == "not known: launches"
    items = judged(TOLD, altered("compiled", training={"launches": None, "buffers": 149}))
    assert items["compiled training"].equal is False
    gone = {key: value for key, value in TOLD.items() if key != "compiled"}
    items = judged(TOLD, gone, failed={"compiled": "no compiler"})
    assert items["of a compiled iteration"].equal is None
    assert verify.page("9.1.0", "mps", list(items.values()), "x").verdict == "1 of 7 could not be compared: no compiler"
    items = judged({}, TOLD, "no prediction for torch 9.1.0; made for 2.13.0")
    assert {item.equal for item in items.values()} == {None}
    assert verify.page("9.1.0", "mps", list(items.values()), "x").exit_code == 2


def test_predictions_are_of_one_torch_and_one_model(tmp_path, monkeypatch):
    asked = verify._asked(CoverageConfig())
    monkeypatch.setattr(verify, "PREDICTIONS", tmp_path)
    assert verify.predictions("9.1.0+cpu", asked) == (Observed(), "no prediction for torch 9.1.0; made for none")
    (tmp_path / "9.1.0.json").write_text(json.dumps({"release": "9.1.0", "asked": asked.model_dump(), **TOLD}))
    assert verify.predictions("9.1.0+cpu", asked)[0].waits == TOLD["waits"]
    assert verify.predictions("9.1.0.dev20260101", asked)[1].startswith("no prediction for torch 9.1.0.dev20260101")
    told, why = verify.predictions("9.1.0", asked.model_copy(update={"dtype": "bfloat16"}))
    assert (told, why) == (Observed(), "no prediction for this model; made for the default model, dtype and batch size")


def test_the_predictions_that_are_kept():
    """They are of the default config, of the torch that they are named after, and whole."""
    files = sorted(verify.PREDICTIONS.glob("*.json"))
    assert files
    for path in files:
        told = json.loads(path.read_text())
        assert told["asked"] == verify._asked(CoverageConfig()).model_dump(), path
        assert Prediction.load(path).document() == told  # nothing of it goes unread
        assert told["release"] == path.stem
        assert told["device"] == "simulated-mps"
        assert set(told["phases"]) == set(told["waits"]) == set(model_ops.PHASES)
        assert set(TOLD) <= set(told)
        assert "classes" not in told  # these are predicted on the spot
        assert told["phases"]["forward"]["linear"] == 4 * 6 + 1
        assert told["waits"]["forward"] == told["waits"]["backward"] == 0
        assert told["compiled"]["training"]["launches"] > 100
        missing = told["errors"].keys() - {"float64"}
        assert len(missing) >= 2
        assert all("pytorch/issues/141287" in told["errors"][op] for op in missing)
        assert told["warnings"].keys() == missing


def test_classes_of_every_kind(tables):
    made = {op: verify.expected_classes(entry) for op, entry in tables[0].entries.items()}
    assert made["beta"] == made["alpha"] == ("kernel",)
    assert made["epsilon"] == ("composite",)
    assert made["gamma"] == ("missing",)
    assert made["eta"] == ("composite",)  # missing, but the dispatcher has the wrapper of eta.out
    assert made["eta.out"] == ("missing",)
    assert made["embedding_renorm_"] == ("explicit fallback",)
    assert made["_slow_conv2d_forward"] == ("explicit fallback", "kernel")
    seen = {op: classes[0] for op, classes in made.items()}
    assert verify._classes(tables[0], seen, None, False)[0].equal is True
    wrong = verify._classes(tables[0], seen | {"beta": "missing"}, None, False)[0]
    assert (wrong.equal, wrong.differences()) == (False, {"beta": ("kernel", "missing")})
    unknown = replace(
        tables[0], entries=tables[0].entries | {"beta": replace(tables[0].entries["beta"], kind=Kind.UNKNOWN)}
    )
    assert verify._classes(unknown, seen | {"beta": "missing"}, None, False)[0].equal is True
    assert verify._classes(tables[0], None, "no device", False)[0].equal is None


def test_a_prediction_that_is_damaged_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "PREDICTIONS", tmp_path)
    (tmp_path / "9.1.0.json").write_text('{"release": "9.1.0", "waits": {"forward": "many"}}')
    told, why = verify.predictions("9.1.0", verify._asked(CoverageConfig()))
    assert told == Observed()
    assert why.startswith("the prediction is damaged: 9.1.0.json: ")


def test_the_file_to_write_is_checked_first(tmp_path):
    for name in (tmp_path, tmp_path / "nowhere" / "x.json"):
        with pytest.raises(InputError, match=r"^output=.*: use a file in a folder that exists"):
            page.writable("output", str(name))


@ON_LINUX
@pytest.mark.slow
def test_the_live_trace_is_the_predicted_one(monkeypatch, tmp_path):
    """The profile of the simulated device, read as on a Mac, has what the device itself counted, call by call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    made = table.load("installed")  # with the user's own cache, as the device's build; traces are made anew
    monkeypatch.setattr(model_ops, "load", lambda asked: made)
    monkeypatch.setattr(table.wheel, "cache_folder", lambda: tmp_path)
    predicted = model_ops.trace_model(TINY, "float32", made, live=False)
    live = model_ops.trace_model(TINY, "float32", made, live=True)
    assert (predicted.label, live.label, live.device) == ("predicted", "live", "simulated-mps")
    told = {
        name: {o: n for o, n in ops.items() if o not in predicted.no_tensors} for name, ops in predicted.phases.items()
    }
    assert live.phases == told
    assert live.waits == predicted.waits
    assert live.waits["forward"] == 0 < live.waits["evaluation"]
    assert live.phases["forward"]["linear"] == 5


@ON_LINUX
def test_a_mac_traces_itself(monkeypatch, tables):
    """There, by default, the live trace of the installed torch is taken, whatever torch is looked at."""
    asked = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(model_ops, "load", lambda asked: tables[0])
    monkeypatch.setattr(model_ops, "_ask", lambda task: asked.append(task) or {"label": "live"})
    with pytest.raises(TypeError, match="missing 3 required"):  # that answer is no trace: only the task is looked at
        model_ops.trace_model(TINY, "float32", tables[1])
    assert asked[0].live is True
    registered = set(asked[0].registered)
    assert {"alpha", "beta", "embedding_renorm_", "gamma"} <= registered  # kernels, fallbacks and what is missing
    assert registered.isdisjoint({"epsilon", "zeta.Scalar"})  # made of others


@ON_LINUX
def test_the_predictions_are_of_the_step_as_it_is(monkeypatch):
    """Calls do not depend on sizes. `mps_coverage.py verify=predict` makes them anew, under each torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    path = verify.PREDICTIONS / f"{torch.__version__.partition('+')[0]}.json"
    if not path.exists():
        pytest.skip(f"no prediction for torch {torch.__version__}")
    small = ModelConfig(n_embd=12, block_size=8)
    traced = model_ops.trace_model(small, "float32", table.load("installed"), live=False)
    assert traced.phases == json.loads(path.read_text())["phases"]


@pytest.mark.slow
@ON_LINUX
def test_the_whole_on_the_simulated_device(command, monkeypatch, tmp_path):
    """Every prediction holds there, and the JSON has all of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    done = command("mps_coverage.py", "verify=true", "output=out.json", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["device"] == "simulated-mps"
    assert all(item["equal"] for item in made["items"])
    assert len(made["items"]) == 14
    assert made["machine"]["platform"]
