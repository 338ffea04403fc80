"""What a back end does around the arithmetic: modes, events, memory. Devices that are not here are stood in for."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes.support import EACH_FRAMEWORK, FRAMEWORKS, options

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.backends.kinds import KINDS

frameworks = pytest.mark.parametrize("name", EACH_FRAMEWORK)


# What multiplies two matrices, by framework: module, function.
PRODUCTS = {
    "torch": ("torch", "mm"),
    "mlx": ("mlx.core", "matmul"),
    "jax": ("jax.numpy", "matmul"),
    "tinygrad": ("nanogpt_mac.backends.tinygrad_backend", "_product"),
}


class Accelerator:
    """torch.mps or torch.cuda, as far as a step needs it, over CPU tensors; `calls` is what was asked, in order."""

    def __init__(self):
        self.calls = []

    def Event(self):  # noqa: N802
        number = sum(call == "made" for call in self.calls)
        self.calls.append("made")
        return SimpleNamespace(
            record=lambda: self.calls.append(f"record {number}"),
            synchronize=lambda: self.calls.append(f"wait {number}"),
        )

    def synchronize(self):
        self.calls.append("synchronize")

    def manual_seed(self, seed):
        torch.manual_seed(seed)


def test_a_device_behind_the_host_is_waited_for_by_its_own_event(make, starts):
    plain, backend = make("cpu"), make("cpu")
    assert not backend.runs_ahead
    assert backend.device_name == "cpu"
    backend.accelerator = Accelerator()
    handles = [backend.step(starts(i), 1e-3) for i in range(2)]
    assert backend.accelerator.calls == ["made", "record 0", "made", "record 1"]  # a step waits for nothing
    assert [backend.wait(h) for h in handles] == [plain.wait(plain.step(starts(i), 1e-3)) for i in range(2)]
    assert backend.accelerator.calls[4:] == ["wait 0", "wait 1"]
    backend.synchronize()
    assert backend.accelerator.calls[6:] == ["synchronize"]
    plain.synchronize()


def test_what_a_copy_reads_lives_as_long_as_its_iteration_and_an_evaluations_no_longer(make, starts):
    """pytorch issue 189690: on MPS a copy that does not wait reads its source later."""
    backend = make("cpu")
    handle = backend.step(starts(0, 3), 1e-3)
    assert [source.tolist() for source in handle.sources] == [starts(0, 3).tolist()]
    assert backend.sources == []
    backend.evaluate("val", np.arange(8).reshape(2, 4))
    assert backend.sources == []


@frameworks
def test_a_step_trains_and_everything_else_looks(make, spec, starts, tokens, name):
    """Dropout is on in a step whatever came before it, and off in evaluation, logits and decoding."""
    dropping = dataclasses.replace(spec, dropout=0.3)
    clean, backend = make(name), make(name, spec=dropping)
    idx, val = tokens.windows("val", np.arange(3))[:, :-1], np.arange(8).reshape(2, 4)
    looks = {
        "evaluate": lambda b: b.evaluate("val", val),
        "logits": lambda b: b.logits(idx),
        "decode": lambda b: b.decode()(idx[0]),
        "gradients": lambda b: b.gradients(idx, idx)[0],
    }
    for name_of, look in looks.items():
        state = backend.state()
        trained = [backend.wait(backend.step(starts(0), 0.0))[0] for _ in range(2)]
        assert trained[0] != trained[1]  # two masks
        backend.restore(state)
        np.testing.assert_allclose(look(backend), look(clean), rtol=1e-5, err_msg=name_of)
        backend.restore(state)
        assert [backend.wait(backend.step(starts(0), 0.0))[0] for _ in range(2)] == trained  # the mode comes back


def test_without_dropout_gradients_are_those_of_torchs_training_graph(make, spec, tokens):
    """MLX has one graph for both: nothing is dropped where it is given no masks."""
    backend = make("cpu")
    window = tokens.windows("val", np.arange(3))
    backend.gradients(window[:, :-1], window[:, 1:])
    assert backend.model.training
    dropping = make("cpu", spec=dataclasses.replace(spec, dropout=0.3))
    dropping.gradients(window[:, :-1], window[:, 1:])
    assert not dropping.model.training


@frameworks
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_unscaled_and_leave_nothing_behind(make, starts, tokens, name, dtype):
    """Also in float16, whose loss is scaled by 65536; the next step is that of a back end that was not asked."""
    exact, backend, other = make(name), make(name, dtype=dtype), make(name, dtype=dtype)
    window = tokens.windows("val", np.arange(3))
    expected_loss, expected = exact.gradients(window[:, :-1], window[:, 1:])
    loss, grads = backend.gradients(window[:, :-1], window[:, 1:])
    assert loss == pytest.approx(expected_loss, abs=2e-3)
    for parameter, g in grads.items():
        assert np.linalg.norm(g - expected[parameter]) <= 0.02 * np.linalg.norm(expected[parameter]), parameter
    assert backend.wait(backend.step(starts(0), 1e-3)) == other.wait(other.step(starts(0), 1e-3))


@frameworks
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_evaluation_is_the_mean_loss_of_its_own_split(make, tokens, name, split):
    backend, windows = make(name), np.arange(12).reshape(3, 4) * 20
    expected = []
    for some in windows:
        window = tokens.windows(split, some)
        logits = torch.from_numpy(backend.logits(window[:, :-1])).double()
        targets = torch.from_numpy(window[:, 1:].astype(np.int64))
        expected.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    assert backend.evaluate(split, windows) == pytest.approx(np.mean(expected), rel=1e-5)


@frameworks
def test_a_back_end_begins_at_iteration_zero(make, starts, name):
    backend = make(name)
    assert backend.state().iteration == 0
    backend.step(starts(0), 1e-3)
    assert backend.state().iteration == 1


def test_torch_keeps_no_gradients_and_looks_without_them(make, starts):
    backend, graphs = make("cpu"), []
    backend.step(starts(0), 1e-3)
    assert all(p.grad is None for p in backend.parameters.values())
    loss = backend.loss
    backend.loss = lambda x, y: graphs.append(torch.is_grad_enabled()) or loss(x, y)
    backend.evaluate("val", np.arange(4).reshape(1, 4))
    assert graphs == [False]


@frameworks
def test_the_clip_is_torchs_where_gradients_are_tiny(make, starts, name):
    """clip_grad_norm_ divides by the norm plus 1e-6: a norm of some 1e-5 shows on which side that stands."""
    backend = make(name, grad_clip=1e-6)
    state = backend.state()
    for tensor in ("transformer.wte.weight", "transformer.ln_f.weight"):
        state.weights[tensor] *= np.float32(1e-4)
    backend.restore(state)
    _, norm = backend.wait(backend.step(starts(0), 0.0))
    moments = backend.state().exp_avg
    total = np.sqrt(sum(float((m.astype(np.float64) ** 2).sum()) for m in moments.values())) / 0.1
    assert 2e-6 < norm < 1e-4
    assert total == pytest.approx(1e-6 * norm / (norm + 1e-6), rel=1e-3)


@frameworks
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_are_of_unscaled_gradients_in_every_precision(make, starts, name, dtype):
    exact, backend = make(name), make(name, dtype=dtype)
    for i in range(3):
        expected, found = exact.wait(exact.step(starts(i), 1e-3)), backend.wait(backend.step(starts(i), 1e-3))
        assert found == pytest.approx(expected, rel=0.02)


@frameworks
def test_a_back_end_is_whole_before_anything_is_loaded(spec, tokens, name):
    state = kinds.create(spec, options(name), tokens).state()
    assert state.iteration == 0
    assert state.weights.keys() == spec.shapes().keys()


def test_an_iteration_that_an_error_ended_leaves_nothing(make, starts):
    backend, other = make("cpu"), make("cpu")
    step = backend.optimizer.step
    backend.optimizer.step = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        backend.step(starts(0), 1e-3)
    assert backend.sources
    backend.optimizer.step = step
    backend.recover()
    assert backend.sources == []
    assert all(p.grad is None for p in backend.parameters.values())
    backend.iteration = 0
    assert backend.wait(backend.step(starts(1), 1e-3)) == other.wait(other.step(starts(1), 1e-3))


@frameworks
def test_the_scale_grows_only_after_so_many_steps_without_an_overflow(make, starts, name):
    backend = make(name, dtype="float16")
    state = backend.state()
    state.scale_growth, state.loss_scale = 7, 2.0**40
    backend.restore(state)
    backend.wait(backend.step(starts(0), 1e-3))
    assert (backend.state().scale_growth, backend.state().loss_scale) == (0, 2.0**39)
    assert make(name).state().loss_scale == 65536.0  # of no use in float32, and kept for a run that goes on in float16


@frameworks
@pytest.mark.parametrize(("limit", "resident"), [(3600, ["train", "val"]), (3599, ["val"]), (399, [])])
def test_splits_up_to_the_limit_live_on_the_device(make, name, limit, resident):
    assert make(name, resident_tokens=limit).details["resident_data"] == resident


def test_windows_gathered_on_the_host_keep_their_shape(make, starts):
    gathered = make("mlx", resident_tokens=1)
    assert gathered._batch("train", starts(0, 3)).shape == (3, 4, 17)


def test_memory_is_the_device_allocators_where_it_has_one(make, monkeypatch):
    backend = make("cpu")
    assert backend.memory().keys() == {"current", "peak"}
    calls = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 11)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 22)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("cuda"))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 33)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 44)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("mps"))
    for device, expected in [("cuda", {"current": 11, "peak": 22}), ("mps", {"current": 33, "peak": 44})]:
        backend.device = SimpleNamespace(type=device)
        assert backend.memory() == expected
        backend.reset_peak_memory()
    assert calls == ["cuda", "mps"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (55, 66))
    backend.device = SimpleNamespace(type="cuda")
    assert backend.free_memory() == 55
    backend.accelerator = SimpleNamespace(empty_cache=lambda: calls.append("released"))
    backend.release_memory()
    assert calls.pop() == "released"
    backend.device = SimpleNamespace(type="cpu")
    backend.reset_peak_memory()
    assert calls == ["cuda", "mps"]


def test_mlx_says_what_it_runs_on_and_what_that_holds(make, starts):
    import mlx.core as mx

    backend = make("mlx")
    on_gpu = mx.default_device() != mx.Device(mx.cpu)
    assert backend.runs_ahead == on_gpu
    assert (backend.device_name == "cpu") == (not on_gpu)
    if not on_gpu:
        assert backend.memory()["current"] > 10 * mx.get_active_memory()  # the process's, libraries and all
    backend.capabilities = KINDS["mlx"].on("metal")
    assert backend.device_name == "metal"
    assert backend.runs_ahead
    backend.wait(backend.step(starts(0), 1e-3))
    assert backend.memory()["peak"] > 0
    assert backend.memory().keys() == {"current", "peak", "cache"}
    backend.synchronize()
    backend.reset_peak_memory()
    assert mx.get_peak_memory() < 1e6


def test_mlx_knows_one_device_from_another(make, monkeypatch):
    import mlx.core as mx

    cls = type(make("mlx"))
    for device, metal, expected in [(mx.cpu, True, "cpu"), (mx.gpu, True, "metal"), (mx.gpu, False, "cuda")]:
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        assert cls.device_of("mlx") == expected


@frameworks
def test_a_matrix_product_for_the_clock_leaves_the_run_alone(make, starts, monkeypatch, name):
    """Its random numbers are its own: the next step is that of a back end that was not asked for one."""
    backend, other = make(name), make(name)
    module, function = PRODUCTS[kinds.KINDS[name].framework]
    library = sys.modules[module]
    product, shapes = getattr(library, function), []
    monkeypatch.setattr(
        library, function, lambda a, b, **to: shapes.append((*a.shape, b.shape[1])) or product(a, b, **to)
    )
    backend.matmul((8, 16, 4), "float32")(3)
    assert shapes == [(8, 16, 4)] * (1 if name == "tinygrad" else 3)  # which replays it
    monkeypatch.undo()
    assert backend.free_memory() > 0
    backend.release_memory()
    assert backend.wait(backend.step(starts(0), 1e-3)) == other.wait(other.step(starts(0), 1e-3))


def test_torch_computes_in_the_precision_that_is_asked_for(make):
    for precision in ("high", "highest"):
        make("cpu", matmul_precision=precision)
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(("name", "function"), [("cpu", "torch.compile"), ("mlx", "mlx.core.compile")])
def test_only_what_is_to_be_compiled_is(make, starts, monkeypatch, name, function):
    compiled = []

    def compile_(f, **how):
        compiled.append(how)
        return f

    make(name)  # loads its modules, which may compile functions of their own
    monkeypatch.setattr(function, compile_)
    make(name).evaluate("train", np.zeros((1, 4), np.int64))
    assert compiled == []
    own = {"compile_mode": "max-autotune"} if name == "cpu" else {}
    backend = make(name, compile=True, **own)
    assert np.isfinite(backend.wait(backend.step(starts(0), 1e-3))[0])
    if name == "cpu":
        loss, both_passes = compiled
        assert loss == {"dynamic": False, "mode": "max-autotune"}
        assert both_passes["options"].pop("cpp_wrapper") == (sys.platform == "linux")
        assert both_passes == {"dynamic": False, "options": torch._inductor.list_mode_options("max-autotune")}
    else:
        # Step, one of several batches, what follows them, gradients, two losses, and the halves of each block.
        assert len(compiled) == 6 + 2 * backend.spec.n_layer


def test_a_device_without_a_fused_adamw_does_without(make, starts, monkeypatch):
    def refuses(*_, **__):
        raise NotImplementedError("Could not run 'aten::_fused_adamw_' with arguments from this device's backend")

    monkeypatch.setattr(torch, "_fused_adamw_", refuses)
    backend = make("cpu")
    assert backend.details["fused_adamw"] is False
    assert np.isfinite(backend.wait(backend.step(starts(0), 1e-3))[0])


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_the_one_that_the_records_name(make, fused):
    backend = make("cpu", fused_adamw=fused)
    assert backend.details["fused_adamw"] is fused
    assert bool(backend.optimizer.fused) is fused
    assert make("cpu", dtype="float16").details["fused_adamw"] is True  # which passes the overflow's trial


def test_one_sequence_is_decoded_at_a_time(make):
    for name in FRAMEWORKS:
        backend = make(name, tokens=Tokens(block_size=16))
        first, second = backend.decode(), backend.decode()
        a = first(np.array([1, 2, 3], np.int32))
        second(np.array([9], np.int32))
        np.testing.assert_allclose(a, backend.logits(np.array([[1, 2, 3]]))[0, -1], rtol=1e-4, atol=1e-6)
        b = first(np.array([4], np.int32))
        np.testing.assert_allclose(b, backend.logits(np.array([[1, 2, 3, 4]]))[0, -1], rtol=1e-4, atol=1e-6)
        del first, second
        third = backend.decode()  # may take what they leave behind
        c = third(np.array([5], np.int32))
        np.testing.assert_allclose(c, backend.logits(np.array([[5]]))[0, -1], rtol=1e-4, atol=1e-6)


def test_what_a_diverged_model_left_in_a_cache_is_forgotten(make):
    backend = make("cpu", tokens=Tokens(block_size=16))
    first = backend.decode()
    first(np.array([1, 2], np.int32))
    del first
    (kept,) = backend.spare
    kept.cache.layers.fill_(float("nan"))
    assert np.isfinite(backend.decode()(np.array([3], np.int32))).all()
    assert backend.spare == [kept]
