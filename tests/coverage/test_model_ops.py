"""The operators of a training step, predicted on the simulated MPS device."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from fakes.support import CACHE

from nanogpt_mac.coverage import model_ops
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.run import run
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.operators import table
from nanogpt_mac.operators.table import Kind

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8)
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")


@pytest.fixture
def built(monkeypatch, tmp_path):
    """The user's own cache for the device, which takes a while to build; this test's own for all else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    monkeypatch.setattr(table.wheel, "cache_folder", lambda: tmp_path)


def without(made, *ops, kind=Kind.MISSING_CPU):
    entries = made.entries | {op: replace(made.entries[op], kind=kind) for op in ops}
    return replace(made, entries=entries)


def predicted(made, model=TINY, dtype="float32"):
    try:
        return model_ops.trace_model(model, dtype, made)
    except model_ops.NoTrace as reason:
        pytest.skip(str(reason))


@ON_LINUX
@pytest.mark.usefixtures("built")
def test_the_operators_of_a_step(monkeypatch):
    """Two layers of nanoGPT, counted by hand from the model's text, for a torch that lacks gelu and nothing else."""
    made = without(table.load("installed"), "gelu", "gelu.out")
    traced = predicted(made)
    assert (traced.label, traced.device, traced.stopped) == ("predicted", "simulated-mps", None)
    forward, backward = traced.phases["forward"], traced.phases["backward"]
    assert forward["linear"] == backward["linear_backward"] == 4 * 2 + 1
    assert forward["native_layer_norm"] == backward["native_layer_norm_backward"] == 2 * 2 + 1
    assert forward["nll_loss_forward"] == backward["nll_loss_backward"] == 1
    assert forward["index_select"] == backward["embedding_dense_backward"] == 1
    assert backward["gelu_backward"] == 2
    assert traced.phases["optimizer"]["_fused_adamw_"] == 2
    assert "linalg_vector_norm" in traced.phases["clip"]
    assert "bernoulli_.float" in forward  # dropout, in training alone
    assert "bernoulli_.float" not in traced.phases["evaluation"]
    assert "linear" in traced.phases["sampling"]

    calls = traced.calls()
    assert [op for op in calls if not made.entries[op].runs] == ["gelu.out"]  # as torch's own warning names it
    assert calls["gelu.out"] == {"forward": 2, "evaluation": 2, "sampling": 2}
    assert [op for op in calls if made.entries[op].kind is Kind.COMPOSITE] == ["copy_"]

    monkeypatch.setattr(model_ops, "_ask", lambda task: pytest.fail("traced again"))
    assert predicted(made) == traced  # from the cache
    (kept,) = (table.wheel.cache_folder() / "traces").iterdir()
    kept.write_text(kept.read_text()[:-100])
    with pytest.raises(pytest.fail.Exception, match="traced again"):
        predicted(made)
    with pytest.raises(pytest.fail.Exception, match="traced again"):
        predicted(made, dtype="bfloat16")


@pytest.mark.slow
@ON_LINUX
@pytest.mark.usefixtures("built")
def test_an_operator_that_is_composite_in_the_other_torch():
    """It is followed into its parts."""
    made = without(table.load("installed"), "linear", kind=Kind.COMPOSITE)
    calls = predicted(made).calls()
    assert "linear" not in calls
    assert "mm" in calls or "addmm" in calls
    assert all(made.entries[op].runs for op in calls)


@pytest.mark.slow
@ON_LINUX
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_do_not_change_the_operators(dtype, monkeypatch):
    """The traced model is narrow and short; the model as it is calls the same operators as often."""
    made = table.load("installed")
    narrow = predicted(made, ModelConfig(), dtype)
    task = model_ops.task_of(ModelConfig(), dtype, made, made)
    program = (
        "import json, sys; from nanogpt_mac.coverage import model_ops_child as trace;"
        "trace._LENGTH, trace._HEAD, trace._BATCH = 256, 64, 4;"
        "print(json.dumps(trace._trace(trace.Task.model_validate_json(sys.stdin.read())).phases))"
    )
    environment = os.environ | {"PYTORCH_ENABLE_MPS_FALLBACK": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program], input=task.model_dump_json(), capture_output=True, text=True, env=environment
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == narrow.phases


def test_a_machine_that_cannot_trace_cannot_tell(monkeypatch, capsys, wheels):
    """Exit code 2 and the reason, with the counts still there: never a table that looks complete."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(CoverageConfig(torch=str(wheels[0]))) == 2
    printed = capsys.readouterr().out
    assert "Cannot tell which operators this model calls: MPS needs a Mac, or Linux to simulate it" in printed
    assert "structured delegate" in printed
    assert "Operators of this model" not in printed


@ON_LINUX
def test_a_child_that_fails_is_a_reason(monkeypatch, tmp_path, tables):
    monkeypatch.setattr(model_ops, "load", lambda asked: tables[0])
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2\necho 'no compiler here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(model_ops.NoTrace, match=r"tracing on the simulated MPS device failed: no compiler here"):
        model_ops.trace_model(TINY, "float32", tables[0])
    assert not list((table.wheel.cache_folder() / "traces").glob("*"))
