"""What the JAX back end alone has to see to: one compiled step, its seeds, its devices, and the plugins for a Mac."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fakes.support import options

from nanogpt_mac.backends import base, jax_entry, kinds
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.errors import InputError

here = pytest.mark.skipif(KINDS["jax"].missing() is not None, reason=f"backend=jax: {KINDS['jax'].missing()}")


@pytest.fixture
def plugins(monkeypatch):
    """Let these distributions be installed that call themselves plugins of JAX; what is set for them is undone."""
    read = ("JAX_PLATFORMS", "JAX_CPU_ENABLE_ASYNC_DISPATCH", "XLA_PYTHON_CLIENT_PREALLOCATE")
    for name in (*read, "MLX_ENABLE_TF32", "METALJAX_MATMUL_PRECISION"):
        monkeypatch.setenv(name, "")

    def install(**versions):
        found = [
            SimpleNamespace(dist=SimpleNamespace(name=n.replace("_", "-"), version=v)) for n, v in versions.items()
        ]
        monkeypatch.setattr(jax_entry, "entry_points", lambda group: found if group == "jax_plugins" else [])

    return install


# -- a step -----------------------------------------------------------------------------------------------------------


@here
def test_an_iteration_is_one_executable_whatever_its_number_rate_and_seed(make, spec, starts):
    backend = make("jax", compile=True, spec=dataclasses.replace(spec, dropout=0.1))
    for i in range(5):
        backend.wait(backend.step(starts(i), 1e-3 * (i + 1)))
    assert backend._step._cache_size() == 1
    backend.restore(backend.state())
    backend.wait(backend.step(starts(5), 1e-3))
    assert backend._step._cache_size() == 1


@here
def test_a_step_overwrites_the_state_that_it_is_given_and_nothing_of_the_callers(make, spec, starts):
    weights = spec.init_weights(3)
    kept = {name: w.copy() for name, w in weights.items()}
    backend = make("jax", compile=True)
    backend.load(weights)
    given = backend.trained["weights"]
    for i in range(2):
        backend.wait(backend.step(starts(i), 1e-2))
    assert all(array.is_deleted() for array in given.values())
    assert all((weights[name] == w).all() for name, w in kept.items())


@pytest.mark.slow
@here
def test_compiled_and_op_by_op_are_the_same_but_for_rounding(make, spec, starts):
    dropping = dataclasses.replace(spec, dropout=0.2)
    losses = []
    for compiled in (True, False):
        backend = make("jax", compile=compiled, spec=dropping)
        losses.append([backend.wait(backend.step(starts(i, 2), 1e-3)) for i in range(4)])
    np.testing.assert_allclose(*losses, rtol=1e-5)  # the same masks, too


@here
def test_every_bit_of_a_seed_makes_another_mask(make, spec, starts, monkeypatch):
    """63 bits: as one number they do not fit JAX's integers, and half of them would be lost."""
    backend = make("jax", compile=True, spec=dataclasses.replace(spec, dropout=0.3))
    losses = []
    for seed in (0, 1, 1 << 31, 1 << 32, 1 << 62):
        monkeypatch.setattr(base, "step_seed", lambda *_, seed=seed: seed)
        losses.append(backend.wait(backend.step(starts(0), 0.0))[0])
    assert len(set(losses)) == 5


@here
def test_masks_of_micro_batches_differ(make, spec, starts):
    backend = make("jax", compile=True, spec=dataclasses.replace(spec, dropout=0.3))
    twice = np.concatenate([starts(0), starts(0)])
    state = backend.state()
    alone = backend.wait(backend.step(starts(0), 0.0))
    backend.restore(state)
    assert backend.wait(backend.step(twice, 0.0))[0] != pytest.approx(alone[0], rel=1e-6)


@here
def test_the_precision_of_products_is_jaxs_own(make, tokens):
    idx = tokens.windows("val", np.arange(2))[:, :-1]
    for precision, name in (("highest", "HIGHEST"), ("high", "HIGH"), ("medium", "DEFAULT")):
        backend = make("jax", compile=True, matmul_precision=precision)
        program = backend._logits.lower(backend.trained["weights"], idx.astype(np.int32)).as_text()
        assert program.count("dot_general") > 5
        assert (f"precision = [{name}, {name}]" in program) or name == "DEFAULT"
        assert ("precision = [HIGH" in program) == (name != "DEFAULT")


@here
def test_evaluations_of_both_splits_are_one_executable(make):
    backend = make("jax", compile=True)
    for split in ("train", "val"):
        backend.evaluate(split, np.arange(8).reshape(2, 4))
    assert backend._val_loss._cache_size() == 1


@here
def test_memory_is_the_device_allocators_where_it_counts(make, monkeypatch):
    backend = make("jax")
    monkeypatch.setattr(base, "resident_memory", lambda: {"current": 3, "peak": 4})
    assert backend.memory() == {"current": 3, "peak": 4}
    counted = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 1, "peak_bytes_in_use": 2, "bytes_limit": 9})
    backend.place = counted
    assert backend.memory() == {"current": 1, "peak": 2}
    assert backend.free_memory() == 8


# -- devices ----------------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize(
    ("platform", "device"), [("cpu", "cpu"), ("gpu", "cuda"), ("mps", "jax-mps"), ("metal", "metaljax"), ("tpu", "tpu")]
)
def test_a_platform_of_jax_is_a_device_of_ours(plugins, monkeypatch, request, platform, device):
    import jax

    from nanogpt_mac.backends import jax_backend

    plugins(jax_mps="0.11.1", metaljax="0.11.9")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert jax_backend.taken({}) == device
    assert KINDS["jax"].on(device).framework == "jax"
    other = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(InputError, match=f"backend.jax_device={other}: JAX has taken {device} in this process; start"):
        jax_backend.taken({"jax_device": other})
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", f"{other},cpu")
    request.addfinalizer(lambda: jax.config.update("jax_platforms", before))
    with pytest.raises(InputError, match=f"backend.jax_device={other}: JAX finds none here; use auto or {device}"):
        jax_backend.taken({"jax_device": other})


@here
def test_a_platform_that_jax_cannot_start_is_one_line(monkeypatch):
    import jax

    from nanogpt_mac.backends import jax_backend

    def broken():
        raise AssertionError  # without a word, as JAX's own of JAX_PLATFORMS=cuda where there is no CUDA

    monkeypatch.setattr(jax, "default_backend", broken)
    with pytest.raises(InputError, match=r"^JAX_PLATFORMS=.*: JAX cannot start it: AssertionError; unset it$"):
        jax_backend.taken({})


@here
def test_looking_around_does_not_start_a_plugin(plugins, monkeypatch):
    import jax

    from nanogpt_mac.backends.jax_backend import JaxBackend

    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("it was started"))
    plugins(jax_mps="0.11.1")
    KINDS["jax"].prepare(options("jax"))
    assert JaxBackend.device_of(KINDS["jax"]) == "jax-mps"


@pytest.mark.parametrize(
    ("installed", "asked", "platform"),
    [
        ({}, "auto", ""),  # JAX's own choice
        ({}, "cpu", "cpu"),
        ({}, "cuda", "cuda,cpu"),
        ({"jax_mps": "1"}, "auto", "mps,cpu"),
        ({"metaljax": "1"}, "auto", "metal,cpu"),
        ({"jax_mps": "1", "metaljax": "1"}, "auto", "mps,cpu"),
        ({"jax_mps": "1", "metaljax": "1"}, "metaljax", "metal,cpu"),
        ({"jax_mps": "1"}, "cpu", "cpu"),
    ],
)
def test_a_plugin_is_found_without_importing_jax(plugins, installed, asked, platform):
    plugins(**installed)
    KINDS["jax"].prepare(options("jax", jax_device=asked))
    assert os.environ["JAX_PLATFORMS"] == platform
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert os.environ["MLX_ENABLE_TF32"] == ("0" if platform.startswith("m") else "")


def test_a_gpu_that_is_left_out_is_left_out_of_jax_too(plugins, monkeypatch):
    plugins(jax_mps="1")
    monkeypatch.setenv("NANOGPT_MAC_NO_GPU", "1")
    KINDS["jax"].prepare(options("jax"))
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_less_than_full_precision_lets_a_plugin_use_what_is_faster(plugins):
    plugins(metaljax="1")
    KINDS["jax"].prepare(options("jax", matmul_precision="high"))
    assert (os.environ["MLX_ENABLE_TF32"], os.environ["METALJAX_MATMUL_PRECISION"]) == ("1", "default")


def test_what_cannot_be_had_is_one_line(plugins, monkeypatch):
    plugins()
    with pytest.raises(InputError, match=r"^backend.jax_device=metaljax: not installed; use auto, or pip install"):
        KINDS["jax"].prepare(options("jax", jax_device="metaljax"))
    monkeypatch.setattr("nanogpt_mac.backends.base.find_spec", lambda name: object())
    assert KINDS["jax"].missing() is None
    plugins(jax_metal="0.1.1")
    assert KINDS["jax"].missing() == (
        "jax-metal 0.1.1 is given up and breaks every JAX since 0.5.1 (jax issue 26968): uninstall it; "
        "jax-mps or metaljax takes its place"
    )


def test_plugins_are_named_with_their_versions_in_the_records(plugins, monkeypatch):
    monkeypatch.setattr(jax_entry, "find_spec", lambda name: object())
    plugins(jax_mps="0.11.1")
    assert {"jax", "jaxlib", "jax-mps"} <= set(kinds.frameworks())


@here
def test_a_run_on_a_plugin_names_it(make, plugins, monkeypatch):
    import jax

    plugins(jax_mps="0.11.1")
    monkeypatch.setattr(jax, "default_backend", lambda: "mps")
    backend = make("jax")
    assert (backend.device_name, backend.details["plugin"]) == ("jax-mps", "jax-mps 0.11.1")
    assert not backend.runs_ahead


def test_auto_never_takes_it_by_itself(monkeypatch):
    assert KINDS["jax"].rank == {}


@pytest.mark.slow
def test_a_run_of_another_back_end_does_not_import_it(tmp_path):
    code = """
import sys
from nanogpt_mac import cli
from nanogpt_mac.train import session
code = cli.main("config", session.run)
print([name for name in ("jax", "jaxlib") if name in sys.modules], code)
"""
    recipe = ["experiment=smoke", "data=stand_in", "backend=cpu", "max_iters=2", "wandb.mode=disabled", "run_dir=run"]
    argv = [sys.executable, "-c", code, *recipe, "gemm_seconds=0.01", "sample_tokens=0"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    versions = json.loads((tmp_path / "run/env.json").read_text())["versions"]
    assert "jax" in versions  # None where it is not installed
