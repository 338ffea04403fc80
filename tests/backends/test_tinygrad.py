"""What tinygrad does that no other framework here does, each held against what a training run needs."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fakes.support import ROOT, options

from nanogpt_mac.backends import kinds, tinygrad_entry
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.compare import levers
from nanogpt_mac.compare.variants import Machine
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec

here = pytest.mark.skipif(KINDS["tinygrad"].missing() is not None, reason=str(KINDS["tinygrad"].missing()))


@pytest.fixture
def small():
    """One layer: what tinygrad takes time for is the number of different kernels."""
    return GPTSpec(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=65)


@pytest.fixture
def replayed():
    backend = pytest.importorskip("nanogpt_mac.backends.tinygrad_backend", exc_type=ImportError)
    return lambda function, **context: backend.Replayed(function, True, context)


def put(*numbers):
    from tinygrad import Tensor

    return Tensor(np.array(numbers, np.float32)).realize()


@here
def test_a_weak_dtype_is_the_one_that_it_is_read_as():
    """tinygrad's own of what a number of Python's and integers give."""
    arrays = KINDS["tinygrad"].load_arrays()(KINDS["tinygrad"], "", False)
    made = arrays.op("leaky_relu").function(arrays.put(np.arange(3, dtype=np.int32)))
    assert arrays.dtype(made) == str(arrays.get(made).dtype)


# -- its traps --------------------------------------------------------------------------------------------------------


@here
def test_a_loss_read_late_is_its_own_iterations(make, small, starts):
    """A captured function returns the same buffers every time: what is read later would be the last call's."""
    at_once, late = make("tinygrad", spec=small, compile=True), make("tinygrad", spec=small, compile=True)
    expected = [at_once.wait(at_once.step(starts(i), 1e-3)) for i in range(5)]
    handles = [late.step(starts(i), 1e-3) for i in range(5)]
    assert [late.wait(handle) for handle in handles] == expected
    assert len({loss for loss, _ in expected}) == 5


@here
def test_that_trap_is_still_there(replayed):
    double = replayed(lambda x: (x * 2).realize())
    kept = [double(put(number)) for number in (1, 2, 3)]
    assert [made.item() for made in kept] == [6, 6, 6]


@here
def test_a_learning_rate_is_not_the_first_ones(make, small, starts):
    """As a Python number it would be captured; here each iteration has its own, and torch's weights come of them."""
    ours, torchs = make("tinygrad", spec=small, compile=True), make("cpu", spec=small)
    for i, lr in enumerate((1e-2, 0.0, 3e-3, 0.0)):
        before = ours.state().weights
        for backend in (ours, torchs):
            backend.wait(backend.step(starts(i), lr))
        after = ours.state().weights
        assert all((after[name] == w).all() for name, w in before.items()) is (lr == 0.0)
    for name, weights in torchs.state().weights.items():
        np.testing.assert_allclose(ours.state().weights[name], weights, atol=1e-5)


@here
def test_what_is_no_tensor_is_captured_for_each_of_its_values(replayed):
    scaled = replayed(lambda x, by, of: (x * by).realize() if of else x)
    assert [scaled(put(3), by, "all").item() for by in (2.0, 5.0, 2.0)] == [6, 15, 6]
    assert scaled(put(1, 2), 2.0, "all").tolist() == [2, 4]
    assert len(scaled.captured) == 3


@here
def test_dropout_after_the_capture_is_the_iterations_own(make, small, starts):
    """`Tensor.manual_seed` changes nothing that is captured; a key that goes in does."""
    from tinygrad import Tensor

    backend = make("tinygrad", spec=dataclasses.replace(small, dropout=0.3), compile=True)
    losses = [backend.wait(backend.step(starts(0), 0.0))[0] for _ in range(4)]
    assert len(set(losses)) == 4
    backend.iteration = 1
    Tensor.manual_seed(5)
    assert [backend.wait(backend.step(starts(0), 0.0))[0] for _ in range(3)] == losses[1:]


@here
def test_dropout_is_the_same_captured_or_not_and_drops_its_share(replayed):
    from tinygrad import Tensor

    from nanogpt_mac.gpt.tinygrad_gpt import dropout_masks

    spec = GPTSpec(1, 2, 32, 16, 65, dropout=0.3)
    draws = [Tensor(np.array([seed, 7, micro, 0], np.uint32)).realize() for seed, micro in ((1, 0), (2, 0), (1, 1))]
    captured = replayed(lambda draw: dropout_masks(spec, 8, 16, draw)[1].contiguous().realize())
    masks = [captured(draw).numpy().copy() for draw in draws]
    eager = [dropout_masks(spec, 8, 16, draw)[1].numpy() for draw in draws]
    assert all((a == b).all() for a, b in zip(masks, eager, strict=True))
    assert masks[0].shape == (8, 2, 16, 16)
    for mask in masks:
        assert abs(mask.mean() - 0.7) < 5 * (0.21 / mask.size) ** 0.5
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[a] == masks[b]).mean() - (0.49 + 0.09)) < 5 * (0.25 / masks[a].size) ** 0.5


@pytest.mark.slow
@here
def test_the_first_iteration_compiles_and_no_other(make, small, starts, monkeypatch):
    """TinyJit itself runs its first call, captures the second and replays the third: three that are not like others."""
    from tinygrad.device import Compiler

    new = dataclasses.replace(small, n_embd=44, vocab_size=71)  # kernels that no other test here has had compiled
    backend = make("tinygrad", spec=new, compile=True)
    traced, compiled = [], []
    loss, compile_cached = backend.model.loss, Compiler.compile_cached
    backend.model.loss = lambda *given: traced.append(given) or loss(*given)
    monkeypatch.setattr(Compiler, "compile_cached", lambda *given: compiled.append(given) or compile_cached(*given))
    for i in range(4):
        backend.wait(backend.step(starts(i, 2), 1e-3))
        if not i:
            first = len(compiled)
    assert len(traced) == 2  # of the first micro-batch, and of those that are added to it
    assert first > 0
    assert len(compiled) == first


@here
def test_the_search_for_kernels_belongs_to_the_first_call(replayed, monkeypatch):
    from tinygrad.codegen.opt import search

    searched, beam_search = [], search.beam_search
    monkeypatch.setattr(search, "beam_search", lambda *given, **more: searched.append(1) or beam_search(*given, **more))
    monkeypatch.setattr("tinygrad.helpers.NOOPT.value", 0)
    product = replayed(lambda a: (a.reshape(8, 8) @ a.reshape(8, 8)).realize(), BEAM=1)
    product(put(*range(64)))
    first = len(searched)
    assert first > 0
    product(put(*range(64)))
    assert len(searched) == first


def test_the_search_is_a_lever_of_a_gpu():
    backend = pytest.importorskip("nanogpt_mac.backends.tinygrad_backend", exc_type=ImportError)
    lever = next(lever for lever in backend.TinygradBackend.LEVERS if lever.key == "backend.beam")
    for device, beam, offered in (("metal", 0, True), ("cuda", 0, True), ("metal", 2, False), ("cpu", 0, False)):
        config = SimpleNamespace(backend=SimpleNamespace(beam=beam))
        assert bool(lever.when(KINDS["tinygrad"].on(device), config)) is offered


@pytest.mark.slow
@here
def test_with_dropout_the_chain_of_parts_is_the_models_own_training(make, small, starts):
    from nanogpt_mac.gpt.tinygrad_gpt import dropout_masks

    spec = dataclasses.replace(small, dropout=0.2)
    backend = make("tinygrad", spec=spec, compile=True)
    parts = backend.parts(starts(0))
    values = parts.values
    keep = dropout_masks(spec, 4, 16, values["key"])
    assert sorted(name for part in parts.parts.values() for name in part.parameters) == sorted(spec.shapes())
    before = backend.state().weights
    for part in parts.parts.values():
        outputs = [part.forward(0), *([part.both(0)] if part.both else [])]
        parts.wait([array for each in outputs for array in each])
        assert all(np.isfinite(parts.peek(each[0])) for each in outputs)
    assert all((backend.state().weights[name] == w).all() for name, w in before.items())
    found = parts.loss().item()
    assert found == pytest.approx(backend.model.loss(values["tokens"], values["targets"], keep).item(), rel=1e-5)
    assert found != pytest.approx(backend.model.loss(values["tokens"], values["targets"]).item(), rel=1e-3)


# -- what must be there -----------------------------------------------------------------------------------------------


def without(command, tmp_path):
    """A PATH on which every program is but `command`."""
    for folder in os.environ["PATH"].split(os.pathsep):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():  # noqa: PTH208, PTH112
            if not name.startswith(command) and not (tmp_path / name).is_symlink():
                (tmp_path / name).symlink_to(os.path.join(folder, name))  # noqa: PTH118
    return str(tmp_path)


@pytest.mark.slow
@here
@pytest.mark.skipif(sys.platform == "darwin", reason="on a Mac it computes on the GPU, without clang")
def test_without_clang_it_says_so_whatever_its_cache_holds(command, tmp_path):
    """Kernels of earlier runs would do until one is new, hours into a run."""
    (tmp_path / "bin").mkdir()
    bare = without("clang", tmp_path / "bin")
    for environment, words in (
        ({"PATH": bare}, "clang is not one, or not on PATH"),
        ({"CC": "gcc"}, "gcc is not one; unset CC, or set it to clang"),
    ):
        done = command("train.py", "backend=tinygrad", "experiment=smoke", "data=stand_in", **environment)
        assert done.returncode == 2
        assert done.stderr.startswith("train.py: backend=tinygrad: not available here: on a CPU tinygrad needs clang")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("platform", "machine", "environment", "device"),
    [
        ("darwin", "arm64", {}, "METAL"),
        ("darwin", "x86_64", {}, "CPU"),
        ("darwin", "arm64", {"NANOGPT_MAC_NO_GPU": "1"}, "CPU"),
        ("linux", "x86_64", {"DEV": "NV"}, "NV"),
    ],
)
def test_the_device_that_it_is_told_to_take(monkeypatch, platform, machine, environment, device):
    for name in ("DEV", "EMULATED_DTYPES", "NANOGPT_MAC_NO_GPU", "NANOGPT_MAC_TINYGRAD_CACHE", "CACHEDB"):
        monkeypatch.setenv(name, "")
    monkeypatch.delitem(sys.modules, "tinygrad", raising=False)  # or it would be told at once
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    for name, value in (environment | {"NANOGPT_MAC_TINYGRAD_CACHE": "/there"}).items():
        monkeypatch.setenv(name, value)
    KINDS["tinygrad"].prepare(options("tinygrad"))
    assert os.environ["DEV"] == device
    assert os.environ["CACHEDB"] == "/there/cache.db"


def test_auto_never_takes_it_by_itself_and_others_never_import_it():
    assert not KINDS["tinygrad"].rank
    program = (
        "import sys, numpy as np\n"
        "from fakes.support import options\n"
        "from nanogpt_mac.backends import kinds\n"
        "from nanogpt_mac.backends.base import Tokens\n"
        "from nanogpt_mac.gpt.spec import GPTSpec\n"
        "name = kinds.resolve('auto')\n"
        "backend = kinds.create(GPTSpec(1, 1, 8, 4, 65), options(name), Tokens(block_size=4))\n"
        "assert not any(module.split('.')[0] in ('tinygrad', 'jax') for module in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    # fakes.support asks every back end whether it is there, which must not import tinygrad either
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@here
def test_a_tinygrad_that_is_loaded_already_is_told_its_device(monkeypatch):
    from tinygrad import Device, helpers

    before = os.environ.get("DEV", "")
    monkeypatch.setenv("DEV", "PYTHON")
    KINDS["tinygrad"].prepare(options("tinygrad"))
    assert Device.DEFAULT == "PYTHON"
    monkeypatch.setenv("DEV", before)
    KINDS["tinygrad"].prepare(options("tinygrad"))
    assert tinygrad_entry._tinygrad_device() == Device.DEFAULT
    assert ("bfloat16" in helpers.EMULATED_DTYPES.value) is (Device.DEFAULT == "CPU")


@here
def test_a_device_that_cannot_be_opened_is_one_line(make, monkeypatch):
    from tinygrad import Device

    from nanogpt_mac.backends import tinygrad_backend

    class Gone(type(Device)):
        DEFAULT = "GONE"

    monkeypatch.setattr(tinygrad_backend, "Device", Gone())
    with pytest.raises(InputError, match=r"^DEV=GONE: tinygrad cannot open it: No module named .*; use DEV=CPU, or"):
        make("tinygrad")


@here
def test_checkpointing_is_refused_and_no_lever(make):
    with pytest.raises(InputError, match="checkpointing=true: backend=tinygrad has none; use checkpointing=false"):
        make("tinygrad", checkpointing=True)
    has = {name: KINDS[name].on("cpu") for name in ("cpu", "tinygrad")}
    machine = Machine({}, has)
    keys = {}
    for name in has:
        made = levers.variants(machine, [name], lambda base: Config())
        keys[name] = {variant.lever.key for variant in made if variant.lever}
    assert "checkpointing" in keys["cpu"] - keys["tinygrad"]


@here
def test_records_name_what_its_kernels_are_written_in(make):
    assert make("tinygrad").details["renderer"] in {"ClangRenderer", "MetalRenderer", "CUDARenderer", "PTXRenderer"}
    assert kinds.resolve_compile("auto", "tinygrad") is True
    assert KINDS["tinygrad"].variants == {True: "tinygrad", False: "tinygrad-eager"}


@here
def test_nothing_read_only_is_handed_over(make, small, starts, tokens, monkeypatch):
    """For CUDA tinygrad reads writable memory alone; on a CPU it would not say so."""
    from tinygrad import Tensor

    init, read_only = Tensor.__init__, []

    def seen(self, data=None, *given, **named):
        read_only.extend([data] if isinstance(data, np.ndarray) and not data.flags.writeable else [])
        init(self, data, *given, **named)

    for split in tokens.splits.values():
        split.setflags(write=False)  # as a memory map is
    backend = make("tinygrad", spec=small)
    state = backend.state()
    for tree in (state.weights, state.exp_avg, state.exp_avg_sq):
        for array in tree.values():
            array.setflags(write=False)
    monkeypatch.setattr(Tensor, "__init__", seen)
    make("tinygrad", spec=small).restore(state)
    assert not read_only
