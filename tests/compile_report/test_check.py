"""The compile report: small functions with planted faults, this model as a dry run, suspects, and the known figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from fakes.support import ROOT
from pydantic import TypeAdapter

from nanogpt_mac import simulator
from nanogpt_mac.compile_report import check as compiled
from nanogpt_mac.compile_report import suspects
from nanogpt_mac.compile_report.checked import CheckedReport
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.records.compiled import CacheCounts
from nanogpt_mac.records.fallbacks import Fallbacks

pytestmark = pytest.mark.xdist_group("compiled")  # what its fixtures make is expensive: one worker makes it

CASES = ROOT / "tests" / "fakes" / "compiled_cases.py"
SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=64, block_size=16, dropout=0.1)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")


@pytest.fixture(autouse=True)
def cache():
    """The simulated device is built once for all tests: here the cache folder is the user's own."""


def child(cache: Path, *arguments: str) -> dict:
    """What compiled_cases.py prints."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTORCH_", "NANOGPT_MAC_", "PYTEST_"))}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(CASES), *arguments]
    result = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    return child(tmp_path_factory.mktemp("inductor"))


def read(document: dict) -> CheckedReport:
    """A report as `check` has it, of one that a child printed."""
    about = {"label": "live", "model": asdict(SMALL), "dtype": "float32", "batch_size": 2}
    return TypeAdapter(CheckedReport).validate_python(about | document)


@pytest.fixture(scope="session")
def report():
    """This model, one layer of it."""
    return compiled.check(SMALL, "float32", 2, warm=False)


@pytest.fixture(scope="session")
def small(report):
    """The same as it is written."""
    return report.document()


def of_launches(report):
    """A marked iteration's launches, as the simulated device records them: three sizes, and each one by itself."""
    rows = report["iterations"]["training"]["kernels"]
    made = []
    for row in rows:
        threads, group = ([*sizes, 1, 1][:3] for sizes in (row["threads"], row["group"] or row["threads"]))
        made += [[row["name"], threads, group, row["bytes"] // row["count"]]] * row["count"]
    return sorted(made)


# -- planted faults ---------------------------------------------------------------------------------------------------


@on_linux
def test_a_clean_function_has_nothing_to_report(cases):
    report = cases["executed"]["report"]
    assert (report["dynamo_graphs"], report["graph_breaks"], report["recompilations"]) == (1, [], [])
    assert report["unknown"] == []
    training = report["iterations"]["training"]
    assert (training["compilations"], training["aten"], training["matrix_products"]) == (0, [], 3)
    assert [graph["runs"] for graph in report["graphs"]] == [{"training": 1}, {"training": 1}]
    line = 1 + CASES.read_text().splitlines().index("    return F.layer_norm(F.gelu(x @ w), (w.shape[1],)).sum()")
    assert all(row["lines"] == [f"{CASES.name}:{line}"] for row in training["kernels"])


@on_linux
def test_launches_are_those_that_the_device_counts(cases):
    launches = cases["executed"]["launches"]
    assert len(launches) == 3
    assert of_launches(cases["executed"]["report"]) == sorted(launches)


@on_linux
def test_watching_changes_no_result_and_leaves_nothing_behind(cases):
    assert cases["executed"]["same_value"]
    assert cases["executed"]["same_grad"]
    assert cases["restored"]


@on_linux
def test_a_dry_run_launches_the_same_and_runs_nothing(cases):
    dry, executed = (cases[name]["report"]["iterations"]["training"] for name in ("dry", "executed"))
    assert cases["dry"]["launches"] == []
    assert "recorded in a dry run" in cases["dry"]["after"]
    for part in ("kernels", "externs", "aten"):
        assert [row | {"ms_each": None} for row in executed[part]] == dry[part]


@on_linux
def test_kernels_are_timed_by_the_device(cases):
    """0.7 ms a kernel is what the simulated device was told to take."""
    training = cases["executed"]["report"]["iterations"]["training"]
    for row in (*training["kernels"], *training["externs"]):
        assert row["ms_each"] == pytest.approx(0.7, abs=0.1)


@on_linux
def test_operators_that_inductor_leaves_to_aten_are_listed(cases):
    rows = cases["fallbacks"]["iterations"]["training"]["aten"]
    assert sorted((row["name"], row["count"]) for row in rows) == [("aten.cumsum", 1), ("aten.sort.stable", 1)]


@on_linux
def test_a_graph_break_has_its_reason_and_line(cases):
    [row] = cases["broken"]["graph_breaks"]
    assert row["line"] == f"{CASES.name}:{cases['break_line']}"
    assert row["reason"].startswith("Call to `torch._dynamo.graph_break()`")
    assert (row["count"], cases["broken"]["dynamo_graphs"]) == (1, 2)


@on_linux
def test_a_recompilation_has_its_guard(cases):
    rows = cases["recompiled"]["recompilations"]
    assert [row["expected"] for row in rows] == [False, False]
    assert "expected 5, actual 7" in rows[0]["reason"]
    assert "expected 7, actual 9" in rows[1]["reason"]
    assert cases["recompiled"]["iterations"]["training"]["compilations"] == 0
    assert cases["unsteady"]["iterations"]["training"]["compilations"] == 1


@on_linux
def test_caches_are_counted(cases):
    cold, warm = cases["executed"]["report"]["cache"], cases["dry"]["report"]["cache"]
    assert cold["fx_graph"] == {"hits": 0, "misses": 2, "bypasses": 0}
    assert warm["fx_graph"] == {"hits": 2, "misses": 0, "bypasses": 0}
    assert (cold["aot_autograd"]["misses"], warm["aot_autograd"]["hits"]) == (1, 1)


@on_linux
@pytest.mark.parametrize(
    ("case", "doubt", "lost"),
    [
        ("no_records", "compilations", ["compile", "recompilations"]),
        ("no_counters", "counters", ["cache", "dynamo_graphs", "graph_breaks"]),
        ("no_modules", "graphs", ["graphs", "kernels_generated"]),
        ("hook_missed", "graphs", ["graphs", "kernels_generated"]),
    ],
)
def test_what_a_torch_does_not_tell_is_null_and_named(cases, case, doubt, lost):
    report = cases[case]
    assert any(line.startswith(f"{doubt}: ") for line in report["unknown"])
    assert [key for key in lost if report[key] is not None] == []
    assert report["iterations"]["training"]["launches"] == 1
    shown = compiled.lines(read(report))
    assert any("unknown" in line for line in shown)
    assert any(line.startswith(f"not known: {doubt}") for line in shown)
    assert compiled.sections(read(report))
    attention = next(row for row in report["suspects"] if row["name"] == "attention as plain math")
    assert attention["status"] == ("unknown" if doubt == "graphs" else "absent")


@on_linux
def test_a_break_that_was_not_logged_is_still_counted(cases):
    [row] = cases["no_log"]["graph_breaks"]
    assert (row["line"], row["count"]) == (None, 1)
    assert "graph_break" in row["reason"]


@on_linux
def test_one_watch_at_a_time(cases):
    assert "one watch() at a time" in cases["nested"]


# -- this model -------------------------------------------------------------------------------------------------------


def matrix_products(layers: int) -> int:
    """Of forward and backward: each of 4 L + 1 linear layers three times, 2 L in attention three times."""
    return 3 * (4 * layers + 1) + 3 * 2 * layers


@pytest.mark.slow
@on_linux
def test_this_model_compiles_whole(small):
    assert (small["label"], small["device"], small["executed"]) == ("dry run", simulator.DEVICE_NAME, False)
    assert (small["dynamo_graphs"], small["graph_breaks"], small["unknown"]) == (2, [], [])
    [own] = small["recompilations"]
    assert (own["expected"], own["phase"]) == (True, "evaluation")
    training, evaluation = small["iterations"]["training"], small["iterations"]["evaluation"]
    assert training["matrix_products"] == matrix_products(1)
    assert evaluation["matrix_products"] == 4 + 1
    assert training["compilations"] == evaluation["compilations"] == 0
    assert training["launches"] == training["pointwise"] + training["reduction"]
    assert {row["name"]: (row["count"], row["kind"]) for row in evaluation["aten"]} == {
        "aten._scaled_dot_product_attention_math_for_mps": (1, "native")
    }
    assert sum(row["count"] for row in training["aten"] if row["name"] == "aten.linear_backward") == 4 + 1
    assert {row["kind"] for row in training["aten"]} <= {"native", "composite"}
    assert small["compile"]["seconds"] > 0
    assert small["cache"]["fx_graph"] == {"hits": 0, "misses": 3, "bypasses": 0}


@pytest.mark.slow
@on_linux
def test_suspects_of_this_model(small):
    """Whether the loop is serial is asked of the header of the torch that is installed, as the report does."""
    rows = {row["name"]: row for row in small["suspects"]}
    assert {row["status"] for row in rows.values()} <= {"suspect", "absent"}  # confirmed takes a Mac
    welford = rows["serial Welford"]
    kernels = small["iterations"]["training"]["kernels"]
    using = sum(r["count"] for r in kernels if any(d.startswith("welford") for d in r["does"]))
    serial = suspects.welford_is_serial("threadgroup_welford_combine")
    assert using == 2 * SMALL.n_layer + 1
    assert (welford["status"], welford["count"]) == (("suspect", using) if serial else ("absent", 0))
    if serial:
        loops = using * (2 * SMALL.block_size * SMALL.n_embd) * SMALL.n_embd
        assert f"{loops:.2g} loop iterations" in welford["evidence"]
    assert rows["attention as plain math"]["evidence"].startswith("6 batched matrix products and 2 launches")
    assert rows["atomic adds"]["status"] == "suspect"
    assert rows["buffers from Python"]["count"] == small["iterations"]["training"]["buffers"] > 0


@pytest.mark.slow
@on_linux
def test_the_report_reads_as_tables(report):
    titles = [title for title, _, _ in compiled.sections(report)]
    assert titles[0] == "What may make it slow"
    for title, headings, rows in compiled.sections(report):
        assert rows, title
        assert {len(row) for row in rows} == {len(headings)}, title
        assert all(isinstance(cell, str) for row in rows for cell in row), title
    assert "1 layers, 2 heads, 64 channels" in compiled.lines(report)[0]


@pytest.mark.slow
@on_linux
def test_the_report_is_read_back_as_it_was_written(report, small):
    written = json.loads(json.dumps(small))
    assert written == small
    assert read(written) == report
    assert [key for key in ("label", "model", "warm") if key not in written] == []
    fallbacks = {"backend": "mps", "compile": True, "dtype": "float32", "batch_size": 2, "complete": True}
    kept = Fallbacks.parse(fallbacks | {"gradient_accumulation_steps": 1, "compile_report": written}, "fallbacks.json")
    assert kept.compile_report.iterations["training"].launches == small["iterations"]["training"]["launches"]
    assert set(small) - set(kept.document()["compile_report"]) == {"label", "model", "dtype", "batch_size", "warm"}


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    with pytest.raises(InputError, match=r"^model\.n_embd=30: model\.n_head=4 does not divide it"):
        compiled.check(ModelConfig(n_embd=30, n_head=4), "float32", 2)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(InputError, match=r"^compiled=true: compiling this model for MPS failed: exit code 1$"):
        compiled.check(SMALL, "float32", 2)


# -- slow -------------------------------------------------------------------------------------------------------------

# A reading of the same code by other means: fake tensors, without this device, for a model without an optimizer, in
# torch 2.13. There the backward of a linear layer was two products; on MPS it is one ATen operator, so that the
# gradients of the tied embedding are added by a launch of their own, where one product could take the other's sum.
# Its model looked positions up, which took three launches more than the slice of their table that the twins take. The
# gigabytes are this report's own: packed attention passes over less than torch's did there (4.5, 13.1, 14.2, 26.3), and
# its masks are drawn where they are used.
KNOWN = {
    "2 layers": (ModelConfig(n_layer=2, dropout=0.0), 64, (49, 20, 29), 39, 4.25),
    "6 layers": (ModelConfig(dropout=0.0), 64, (121, 52, 69), 111, 12.46),
    "6 layers, dropout": (ModelConfig(dropout=0.2), 64, (121, 52, 69), 111, 13.07),
    "12 layers": (
        ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, vocab_size=50304),
        4, (203, 101, 102), 219, 25.78,
    ),
}  # fmt: skip


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_full_size(name):
    import torch

    if not torch.__version__.startswith("2.13."):
        pytest.skip("the figures are torch 2.13's")
    model, batch_size, (launches, pointwise, reduction), products, gigabytes = KNOWN[name]
    report = compiled.check(model, "float32", batch_size, warm=False).document()
    training = report["iterations"]["training"]
    assert report["unknown"] == []
    assert (training["launches"], training["pointwise"]) == (launches + 1 - 3, pointwise + 1 - 3)
    assert training["reduction"] == reduction
    assert training["matrix_products"] == products == matrix_products(model.n_layer)
    assert training["metal_bytes"] / 1e9 == pytest.approx(gigabytes, abs=0.05)
    welford = next(row for row in report["suspects"] if row["name"] == "serial Welford")
    rows = batch_size * model.block_size
    assert welford["count"] == 2 * model.n_layer + 1
    assert f"{welford['count'] * math.prod((rows, model.n_embd, model.n_embd)):.2g} loop" in welford["evidence"]


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch", "left"),
    [
        ("serial Welford", suspects.TWO_STEP, 0),
        ("serial Welford", suspects.eager("layer_norm"), 0),
        ("odd reduction groups", suspects.UNSPLIT, 2),  # those over the 65 symbols
        ("reduction in few threadgroups", suspects.eager("cross_entropy"), 0),
        ("attention as plain math", suspects.EAGER_ATTENTION, 0),
        ("atomic adds", suspects.eager("embedding"), 0),
        ("error buffers", suspects.OWN_HEADERS, 0),
    ],
)
def test_the_other_arm_of_an_ab_is_without_the_suspect(tmp_path, name, patch, left):
    """The suggested patches do what they say to the generated code, at full width."""
    task = {"model": asdict(ModelConfig(n_layer=1)), "dtype": "float32", "batch_size": 64}

    def count(patch):
        (tmp_path / "cache").mkdir()
        report = child(tmp_path / "cache", patch, json.dumps(task))
        shutil.rmtree(tmp_path / "cache")
        return next(row for row in report["suspects"] if row["name"] == name)["count"]

    assert count("0") > count(patch) == left


@pytest.mark.slow
@on_linux
@pytest.mark.slow
def test_what_a_mac_does_runs_here_too(tmp_path, small):
    """Kernels executed and timed: the launches of the dry run, and no suspect confirmed by a simulated clock."""
    task = {"model": asdict(SMALL), "dtype": "float32", "batch_size": 2, "execute": True}
    report = child(tmp_path, "0", json.dumps(task))
    training, dry = report["iterations"]["training"], small["iterations"]["training"]
    assert training["ms"] > 0
    assert all(row["ms_each"] is not None for part in ("kernels", "externs", "aten") for row in training[part])
    for part in ("kernels", "externs"):
        assert [row | {"ms_each": None} for row in training[part]] == dry[part]
    assert {row["status"] for row in report["suspects"]} <= {"suspect", "absent"}
    for _, headings, rows in compiled.sections(read(report)):
        assert {len(row) for row in rows} == {len(headings)}


@on_linux
@pytest.mark.slow
def test_a_second_process_finds_the_cache():
    report = compiled.check(SMALL, "bfloat16", 2)
    assert report.warm.cache["fx_graph"] == CacheCounts(hits=3, misses=0, bypasses=0)
    assert 0 < report.warm.compile.seconds < report.compile.seconds
    assert "a second process, from the cache" in "".join(compiled.lines(report))
    assert "bfloat16" in str(report.iterations["training"].externs)


@on_linux
@pytest.mark.slow
def test_a_suggested_command_runs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} lazy dogs\n" for i in range(900)))
    small = f"experiment=smoke max_iters=2 run_dir={tmp_path / 'run'} data=text data.path={text} data.dir={tmp_path}"
    line = suspects.command(suspects.TWO_STEP).replace("max_iters=60", small)
    env = os.environ | {simulator.VARIABLE: "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_state"] == "finished"
