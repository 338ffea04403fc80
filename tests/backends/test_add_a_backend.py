"""docs/add-a-backend.md, followed: a NumPy back end works everywhere, and nothing but its own file knows it."""

import json
import os
import tomllib

import numpy as np
import pytest
from fakes import numpy_backend
from fakes.support import ROOT

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.generate import generate
from nanogpt_mac.errors import InputError


@pytest.fixture
def numpy(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "numpy", numpy_backend.KIND)
    return "numpy"


def install(folder, entries):
    """What pip leaves of a package with these entry points."""
    place = folder / "nanogpt_mac_numpy-1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: nanogpt-mac-numpy\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (place / "entry_points.txt").write_text("\n".join(["[nanogpt_mac.backends]", *lines, ""]))
    return os.pathsep.join([str(folder), str(ROOT / "tests/fakes"), str(ROOT)])


@pytest.fixture
def installed(tmp_path):
    """PYTHONPATH where the page's own example of a pyproject.toml is installed."""
    page = (ROOT / "docs/add-a-backend.md").read_text()
    project = tomllib.loads(page.split("```toml\n")[1].split("```")[0])["project"]
    return install(tmp_path / "site", project["entry-points"]["nanogpt_mac.backends"])


def test_it_is_as_short_as_the_page_says():
    assert len((ROOT / "tests/fakes/numpy_backend.py").read_text().splitlines()) < 150


def test_it_computes_what_torch_computes(make, numpy, tokens, starts):
    ours, torchs = make(numpy), make("cpu")
    window = tokens.windows("val", np.arange(4))
    x, y = window[:, :-1], window[:, 1:]
    np.testing.assert_allclose(ours.logits(x), torchs.logits(x), atol=1e-5)
    (loss, grads), (expected, theirs) = ours.gradients(x, y), torchs.gradients(x, y)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert all(np.linalg.norm(grads[n] - g) < 1e-4 * np.linalg.norm(g) for n, g in theirs.items())
    for i in range(10):
        steps = [backend.wait(backend.step(starts(i, 2), 1e-3)) for backend in (ours, torchs)]
        assert steps[0] == pytest.approx(steps[1], abs=1e-4)
    assert ours.evaluate("val", np.arange(8).reshape(2, 4)) == pytest.approx(
        torchs.evaluate("val", np.arange(8).reshape(2, 4)), abs=1e-4
    )


def test_it_resumes_another_back_ends_run_and_samples(make, numpy, spec, starts):
    torchs, ours = make("cpu"), make(numpy)
    for i in range(5):
        torchs.wait(torchs.step(starts(i), 1e-3))
    ours.restore(torchs.state())
    assert ours.state().iteration == 5
    for backend in (ours, torchs):
        backend.step(starts(5), 1e-3)
    for name, weights in torchs.state().weights.items():
        np.testing.assert_allclose(ours.state().weights[name], weights, atol=1e-5)
    assert list(generate(ours, spec, [1], 30, 0.9, 20)) == list(generate(torchs, spec, [1], 30, 0.9, 20))


def test_what_it_does_not_have_is_one_line(make, numpy):
    with pytest.raises(InputError, match="use dtype=float32"):
        make(numpy, dtype="bfloat16")
    with pytest.raises(InputError, match="compile=true: backend=numpy has no compiler; use compile=false"):
        kinds.resolve_compile(True, numpy)
    assert kinds.resolve_compile("auto", numpy) is False


def test_it_trains_samples_and_resumes_from_the_command_line(command, tmp_path, installed):
    own = ["backend=numpy", "experiment=smoke", "data=stand_in", "wandb.mode=disabled", "gemm_seconds=0.05"]
    done = command("train.py", *own, "run_dir=first", PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "first/summary.json").read_text())
    assert (summary["backend"], summary["device"], summary["compile"]) == ("numpy", "cpu", False)
    assert summary["capabilities"]["framework"] == "numpy"
    assert summary["val_loss"] < 4.1
    assert (tmp_path / "first/sample.txt").stat().st_size > 50
    done = command("train.py", "init_from=resume", "run=first", "run_dir=more", "max_iters=22", PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "more/summary.json").read_text())["resumed_at"] == 20


def test_one_that_cannot_be_loaded_says_why(command, tmp_path):
    broken = install(tmp_path / "site", {"abacus": "no_such_module:KIND"})
    done = command("train.py", "backend=abacus", PYTHONPATH=broken)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "train.py: backend=abacus: not available here: its entry point no_such_module:KIND cannot"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_it_passes_the_gate_and_shows_up_in_a_comparison(command, tmp_path, installed):
    work = ["experiment=smoke", "data=stand_in", "variants=[cpu,numpy]", "rounds=1", "iters=10", "run_dir=made"]
    done = command("compare.py", *work, timeout=600, PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    comparison = json.loads((tmp_path / "made/comparison.json").read_text())
    found = {v["name"]: (v["label"], v["state"], v["parity"]) for v in comparison["variants"]}
    assert found == {"cpu": ("CPU eager", "ok", "pass"), "numpy": ("NumPy", "ok", "pass")}
    assert "NumPy" in (tmp_path / "made/report.md").read_text()
