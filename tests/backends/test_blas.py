"""Whose BLAS MLX is lent: each in a process of its own, because it can be chosen once."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from nanogpt_mac.backends import blas
from nanogpt_mac.errors import InputError

ASK = """
import json, sys
from nanogpt_mac.backends import blas
blas.lend(sys.argv[1])
import mlx.core as mx
a, b = mx.arange(6.0).reshape(2, 3), mx.arange(12.0).reshape(3, 4)
wide = mx.ones((300, 300))
print(json.dumps([blas.taken(), (a @ b).tolist(), (b.T @ a.T).tolist(), mx.sum(wide @ wide).item()]))
"""
linux = pytest.mark.skipif(not blas.wanted(), reason="MLX's Linux CPU build alone is lent a BLAS")


@linux
@pytest.mark.parametrize(("asked", "taken"), [("auto", "torch"), ("scipy", "scipy"), ("own", "own")])
def test_the_product_is_right_whoever_computes_it(asked, taken):
    done = subprocess.run([sys.executable, "-c", ASK, asked], capture_output=True, text=True, check=True)
    found, product, other, large = json.loads(done.stdout)
    exact = np.arange(6.0).reshape(2, 3) @ np.arange(12.0).reshape(3, 4)
    assert found == taken
    np.testing.assert_array_equal(product, exact)
    np.testing.assert_array_equal(other, exact.T)
    assert large == 300**3


@pytest.fixture
def fresh(monkeypatch):
    """This process before MLX is loaded; nothing is really loaded. What would be is in the list."""
    loaded = []
    monkeypatch.setattr(blas, "_lent", {})
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(blas, "wanted", lambda: True)
    monkeypatch.setattr(blas, "_shim", lambda name, library, compiler: f"shim for {name}")

    class Library:
        def __init__(self, path, mode):
            loaded.append(str(path))

        def blas_found(self):
            return True

    monkeypatch.setattr(blas.ctypes, "CDLL", Library)
    return loaded


def without(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(blas, "find_spec", lambda name: None if name in packages else find(name))


@pytest.mark.parametrize(
    ("packages", "compiler", "taken"),
    [((), 1, "torch"), (("torch",), 1, "scipy"), (("torch", "scipy"), 1, "own"), (("torch",), 0, "own")],
)
def test_auto_takes_torchs_else_scipys_else_its_own(fresh, monkeypatch, packages, compiler, taken):
    without(monkeypatch, *packages)
    monkeypatch.setattr(blas.shutil, "which", lambda _: "cc" if compiler else None)
    monkeypatch.setattr(blas.Path, "glob", lambda self, pattern: iter([self / pattern]))
    blas.lend("auto")
    assert blas.taken() == taken
    assert fresh == ([f"shim for {taken}"] if taken != "own" else [])


def test_torchs_needs_no_compiler(fresh, monkeypatch):
    monkeypatch.setattr(blas.shutil, "which", lambda _: None)
    monkeypatch.setattr(blas.Path, "glob", lambda self, pattern: iter([self / pattern]))
    blas.lend("torch")
    assert len(fresh) == 1
    assert fresh[0].endswith("torch/lib/libtorch_cpu.so")
    with pytest.raises(InputError, match=r"backend\.blas=scipy: must be set before MLX is loaded"):
        blas.lend("scipy")


def test_what_is_asked_for_and_cannot_be_had_is_refused(fresh, monkeypatch):
    without(monkeypatch, "torch", "scipy")
    for name in ("torch", "scipy"):
        with pytest.raises(InputError, match=rf"backend\.blas={name}: there is no .*; use backend.blas=own"):
            blas.lend(name)
    monkeypatch.undo()


def test_any_other_mlx_keeps_its_own(fresh, monkeypatch):
    monkeypatch.setattr(blas, "wanted", lambda: False)
    blas.lend("auto")
    assert (blas.taken(), fresh) == ("own", [])


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"backend\.blas=scipy: false cannot build it: no message; use backend\.blas=own"
    ):
        blas._shim("scipy", tmp_path / "libopenblas.so", "false")
