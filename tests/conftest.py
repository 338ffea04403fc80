"""What several tests share: small models, a small corpus, the commands run as a user runs them."""

import os
import subprocess
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # two pools of threads on the same cores wait for each other most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# tinygrad's kernels as they come: optimizing and compiling one takes many times longer than running it here.
os.environ.setdefault("NOOPT", "1")
os.environ.setdefault("PARALLEL", "0")

import numpy as np
import pytest
from fakes.support import CACHE, ROOT, options
from fakes.warm import Warm

from nanogpt_mac import cli
from nanogpt_mac.backends import entry, here, kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.gpt.spec import GPTSpec

os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))  # one graph is compiled by many tests
# In the way of the file of that name: what one test's comparison finds must not decide in another what auto means.
(CACHE / "nanogpt-mac" / "comparisons.json").mkdir(parents=True, exist_ok=True)

if entry.gpu_left_out():  # as in every process that computes with MLX
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))

# Tests that run over all frameworks, and are slow in these: both compile for each of them, tinygrad in Python. What is
# left to them in every run: their own files, parity, and the sample that all of them draw.
LONG = {
    "tinygrad": ("backends/test_backends", "backends/test_devices", "parity/test_sizes", "gpt/test_huggingface"),
    "jax": ("suites/test_ops_rows", "suites/nets", "machine/test_gemm", "backends/test_devices", "train/test_session"),
}
PARITY = "parity/test_backends.py::test_"
LONG["tinygrad"] += *LONG["jax"], f"{PARITY}a_hundred_iterations", f"{PARITY}first_update"


# And what a compiler makes anew for a further dtype or for dropout: a minute where no cache has it yet.
AGAIN = (
    "is_off_in_evaluation[cpu-True]",
    "bit_for_bit_the_same[float16-mlx-True]",
    "bit_for_bit_the_same[bfloat16-mlx-True]",
    "bit_for_bit_the_same[float16-jax-True]",
    "bit_for_bit_the_same[bfloat16-jax-True]",
    "models_own_training[False-jax]",
    "leave_the_weights[float16-mlx-True]",
    "is_the_model[True-{'dtype': 'bfloat16'}-mlx-True]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.partition("@")[0].endswith(AGAIN):  # xdist names a group behind it
            item.add_marker(pytest.mark.slow)
        name = getattr(item, "callspec", None) and item.callspec.id
        for framework, files in LONG.items():
            if name and framework in name.split("-") and any(f"tests/{file}" in item.nodeid for file in files):
                item.add_marker(pytest.mark.slow)


def looked_once(look=here.look):
    """What this machine has: asked in a process that loads every framework, once for each environment."""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if not k.startswith("PYTEST")))
    if settings not in LOOKED:
        LOOKED[settings] = look()
    missing, has = LOOKED[settings]
    return dict(missing), dict(has)


LOOKED = {}
here.look = looked_once


@pytest.fixture
def spec():
    return GPTSpec(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65)


@pytest.fixture
def tokens():
    """Four thousand tokens with something to learn: a noisy walk through 65 symbols."""
    rng = np.random.default_rng(7)
    walk = np.cumsum(rng.integers(0, 3, 4000)) % 65
    return Tokens({"train": walk[:3600].astype(np.uint16), "val": walk[3600:].astype(np.uint16)}, 16)


@pytest.fixture
def make(spec, tokens):
    """A back end with the spec's weights, seed 1337, loaded."""

    def build(name="cpu", spec=spec, tokens=tokens, **given):
        backend = kinds.create(spec, options(name, **given), tokens)
        backend.load(spec.init_weights(1337))
        return backend

    return build


@pytest.fixture
def starts():
    """Window starts of iteration i: (accumulation, 4)."""

    def draw(i, accumulation=1):
        return np.random.default_rng(i).integers(0, 3500, (accumulation, 4))

    return draw


@pytest.fixture(scope="session")
def warm():
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def command(tmp_path, request):
    """Run a root script in an empty folder, as a user would; the finished process.

    It is forked from a process that has the imports behind it, unless it gets an environment of its own or is to be
    `fresh`.
    """

    def run(script, *overrides, timeout=120, fresh=False, **environment):
        path = str(ROOT / script)
        if not fresh and not environment:
            return request.getfixturevalue("warm").run([path, *overrides], tmp_path, timeout)
        argv, env = [sys.executable, path, *overrides], {**os.environ, **environment}
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture
def compose(tmp_path, monkeypatch, capsys):
    """Run the command line in this process with a task that only keeps the config; (exit code, config, stderr)."""

    def run(*overrides, command="config", task=None):
        kept = []

        def keep(config):
            kept.append(config)
            return 0

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        code = cli.main(command, task or keep)
        return code, kept[0] if kept else None, capsys.readouterr().err

    return run
