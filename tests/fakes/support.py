"""Constants and helpers that several tests share."""

import os
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanogpt_mac.backends import kinds
from nanogpt_mac.config import Config, backend_options

ROOT = Path(__file__).resolve().parents[2]
# Of this program, in place of the user's own: nothing that a test measures may be remembered there. It stays, for the
# simulated device, which takes a minute to compile.
CACHE = Path(tempfile.gettempdir(), f"nanogpt-mac-tests-{os.getuid()}")

# Every variant of computing the model that this machine has: (back end, compiled).
AVAILABLE = kinds.available()
VARIANTS = [(n, compiled) for n in AVAILABLE for compiled in ((False, True) if kinds.KINDS[n].compiler else (False,))]
FRAMEWORKS = sorted({kinds.KINDS[n].framework: n for n in AVAILABLE}.values())  # one back end of each: cpu is torch's


def _absent():
    """A back end of each framework that is registered and not here, with the mark that skips its tests."""
    here = {kinds.KINDS[n].framework for n in AVAILABLE}
    for name in {kind.framework: name for name, kind in kinds.KINDS.items() if kind.framework not in here}.values():
        yield name, pytest.mark.skip(reason=f"backend={name}: {kinds.missing(name)}")


# As parameters of a test: what Inductor or tinygrad compiles goes to one worker, which compiles each graph once.
# Without its replay tinygrad does the same work, but plans it anew for every iteration, which takes seconds; without
# jax.jit JAX traces anew, and compiles every operation of every shape.
MARKS = {
    ("cpu", True): pytest.mark.xdist_group("inductor"),
    ("tinygrad", True): pytest.mark.xdist_group("tinygrad"),
    ("tinygrad", False): pytest.mark.slow,
    ("jax", False): pytest.mark.slow,
}
EACH_VARIANT = [pytest.param(*v, marks=MARKS[v]) if v in MARKS else v for v in VARIANTS]
EACH_VARIANT += [pytest.param(name, False, marks=mark) for name, mark in _absent()]
EACH_FRAMEWORK = [pytest.param(n, marks=pytest.mark.xdist_group(n)) if n == "tinygrad" else n for n in FRAMEWORKS]
EACH_FRAMEWORK += [*(pytest.param(name, marks=mark) for name, mark in _absent())]
# Of them those that say what an iteration consists of; none is imported before it is told what it reads but once.
WITH_PARTS = [n for n in FRAMEWORKS if find_spec(f"nanogpt_mac.backends.{kinds.KINDS[n].framework}_parts")]


def options(name="cpu", **given):
    """BackendOptions with the config's defaults but for what is `given`, settings of the back end's own included.

    Of JAX and tinygrad a test gets the compiled variant unless it says otherwise: the other compiles or plans every
    operation anew.
    """
    given = {"compile": name in ("jax", "tinygrad"), **given}
    own = kinds.own_settings(name, given)
    rest = {key: value for key, value in given.items() if key not in own}
    return replace(backend_options(Config(), name), settings=own, **rest)


def prepared(folder: Path) -> list[Path]:
    """Everything in a data folder but the lock files, which stay."""
    return [place for place in folder.iterdir() if place.suffix != ".lock"]
