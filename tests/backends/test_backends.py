"""What a back end promises beyond the arithmetic: precision, state, data, sampling."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from fakes.support import EACH_FRAMEWORK, EACH_VARIANT, FRAMEWORKS, MARKS, VARIANTS

from nanogpt_mac.backends import base, blas, kinds
from nanogpt_mac.backends.base import Tokens, step_seed
from nanogpt_mac.backends.generate import draw, generate
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec

frameworks = pytest.mark.parametrize("name", EACH_FRAMEWORK)


@pytest.fixture
def dropout_spec(spec):
    return dataclasses.replace(spec, dropout=0.2)


def run(backend, starts, first, last, accumulation=1):
    return [backend.wait(backend.step(starts(i, accumulation), 1e-3)) for i in range(first, last)]


def same(a, b):
    """Two training states, bit for bit."""
    trees = ((a.weights, b.weights), (a.exp_avg, b.exp_avg), (a.exp_avg_sq, b.exp_avg_sq))
    return all((x[n] == y[n]).all() for x, y in trees for n in x) and a.optimizer_steps == b.optimizer_steps


ANY_ORDER = "a GPU adds gradients in whatever order they come, but for our own kernels"


# Not torch compiled: Inductor's embedding gradient adds atomically from several threads, in any order. What JAX and
# tinygrad do operation by operation takes a while.
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        pytest.param(*v, marks=pytest.mark.slow if v == ("jax", False) else MARKS.get(v, ()))
        for v in VARIANTS
        if v[0] in FRAMEWORKS and v != ("cpu", True)
    ],
)
@pytest.mark.parametrize("dtype", base.DTYPES)
def test_resumed_training_is_bit_for_bit_the_same(make, dropout_spec, starts, name, compiled, dtype):
    whole, part, resumed = (make(name, spec=dropout_spec, compile=compiled, dtype=dtype) for _ in range(3))
    if whole.runs_ahead and getattr(whole, "own", None) is None:
        pytest.skip(ANY_ORDER)
    expected = run(whole, starts, 0, 12)
    run(part, starts, 0, 7)
    resumed.restore(part.state())
    assert run(resumed, starts, 7, 12) == expected[7:]
    assert same(resumed.state(), whole.state())


@pytest.mark.slow
@frameworks
def test_a_run_goes_on_from_any_of_its_iterations_bit_for_bit(make, dropout_spec, starts, name):
    """A hundred runs are taken up again, one after each iteration. With -s it says how many were as the whole one."""
    how = {"spec": dropout_spec, "compile": kinds.KINDS[name].compiled_by_default}
    whole, resumed = make(name, **how), make(name, **how)
    if whole.runs_ahead and getattr(whole, "own", None) is None:
        pytest.skip(ANY_ORDER)
    states, losses = [whole.state()], []
    for i in range(100):
        losses += run(whole, starts, i, i + 1)
        states.append(whole.state())
    good = 0
    for i in range(100):
        resumed.restore(states[i])
        good += run(resumed, starts, i, i + 1) == [losses[i]] and same(resumed.state(), states[i + 1])
    print(f"\n{name}: {good} of 100 are the whole run")
    assert good == 100


@frameworks
def test_state_is_a_copy_that_later_steps_do_not_touch(make, starts, name):
    backend = make(name)
    run(backend, starts, 0, 2)
    state = backend.state()
    before = copy.deepcopy(state)
    other = make(name)
    other.restore(state)
    run(other, starts, 2, 4)
    run(backend, starts, 2, 4)
    assert same(state, before)


def test_a_state_crosses_all_frameworks_and_comes_back(make, spec, starts):
    """Through each of them, ten iterations in each, and back into the first: as if that had done them all."""
    ring = [*FRAMEWORKS, FRAMEWORKS[0]]
    assert len(ring) > 2
    reference = run(make(ring[0]), starts, 0, 10 * len(ring))
    state = None
    for i, name in enumerate(ring):
        backend = make(name, compile=kinds.KINDS[name].compiled_by_default)
        if state:
            backend.restore(state)
        assert backend.iteration == 10 * i
        losses = run(backend, starts, 10 * i, 10 * (i + 1))
        state = backend.state()
        assert losses[-1][0] == pytest.approx(reference[10 * (i + 1) - 1][0], abs=2e-3), name


@pytest.mark.parametrize(("name", "compiled"), EACH_VARIANT)
def test_dropout_differs_by_iteration_and_is_off_in_evaluation(make, dropout_spec, starts, name, compiled):
    backend = make(name, spec=dataclasses.replace(dropout_spec, n_layer=1), compile=compiled)  # half to compile
    same_batch = [backend.wait(backend.step(starts(0), 0.0))[0] for _ in range(4)]  # lr 0: only the mask differs
    assert len(set(same_batch)) == 4
    val = np.arange(8).reshape(2, 4)
    assert backend.evaluate("val", val) == backend.evaluate("val", val)
    idx = np.arange(16)[None] % 65
    np.testing.assert_array_equal(backend.logits(idx), backend.logits(idx))


@frameworks
def test_dropout_keeps_the_expectation(make, spec, tokens, name):
    """The mean loss over many masks is near the loss of the mean: a wrong scale would move it by far more."""
    light = dataclasses.replace(spec, dropout=0.05)
    backend, clean = make(name, spec=light), make(name)
    window = np.zeros((1, 4), np.int64)
    dropped = np.mean([backend.wait(backend.step(window, 0.0))[0] for _ in range(40)])
    assert dropped == pytest.approx(clean.wait(clean.step(window, 0.0))[0], abs=0.02)


@frameworks
def test_accumulation_is_the_mean_over_micro_batches(make, starts, tokens, name):
    """Two micro-batches of 4 are one batch of 8."""
    two, one = make(name), make(name)
    windows = starts(0, 2)
    a = two.wait(two.step(windows, 1e-3))
    b = one.wait(one.step(windows.reshape(1, 8), 1e-3))
    assert a == pytest.approx(b, rel=1e-5)
    for n, w in two.state().weights.items():
        np.testing.assert_allclose(w, one.state().weights[n], atol=2e-6)


@frameworks
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.01)])
def test_lower_precision_follows_float32_with_float32_masters(make, starts, name, dtype, tolerance):
    full, low = make(name), make(name, dtype=dtype)
    a, b = run(full, starts, 0, 40), run(low, starts, 0, 40)
    assert np.abs(np.array(a)[:, 0] - np.array(b)[:, 0]).max() < tolerance
    assert a != b
    assert {w.dtype for w in low.state().weights.values()} == {np.dtype(np.float32)}


def test_bfloat16_logits_of_the_twins_agree(make, tokens):
    """All round the same products: closer to each other than either is to float32 would be chance."""
    idx = tokens.windows("val", np.arange(4))[:, :-1]
    logits = {n: make(n, dtype="bfloat16").logits(idx) for n in FRAMEWORKS}
    exact = make("cpu").logits(idx)
    error = np.abs(logits["cpu"] - exact).max()
    assert 0 < error < 0.01
    assert all(np.abs(ours - logits["cpu"]).max() < 2 * error for ours in logits.values())


@frameworks
def test_float16_overflow_leaves_the_update_out_and_halves_the_scale(make, starts, name):
    backend = make(name, dtype="float16")
    state = backend.state()
    assert state.loss_scale == 65536.0
    state.loss_scale = 2.0**40  # every gradient overflows
    backend.restore(state)
    _, norm = backend.wait(backend.step(starts(0), 1e-3))
    after = backend.state()
    assert not np.isfinite(norm)
    assert (after.loss_scale, after.optimizer_steps, after.iteration) == (2.0**39, 0, 1)
    assert all((after.weights[n] == w).all() and not after.exp_avg[n].any() for n, w in state.weights.items())


@frameworks
def test_float16_scale_doubles_after_the_growth_interval(make, starts, name):
    backend = make(name, dtype="float16")
    state = backend.state()
    state.scale_growth, state.loss_scale = base.GROWTH_INTERVAL - 1, 1024.0
    backend.restore(state)
    backend.wait(backend.step(starts(0), 1e-3))
    after = backend.state()
    assert (after.loss_scale, after.scale_growth, after.optimizer_steps) == (2048.0, 0, 1)


@frameworks
def test_a_corpus_too_large_for_the_device_gives_the_same_batches(make, starts, name):
    resident = run(make(name), starts, 0, 3)
    gathered = make(name, resident_tokens=10)
    assert gathered.details["resident_data"] == []
    assert run(gathered, starts, 0, 3) == resident


@frameworks
def test_evaluation_is_the_mean_over_batches(make, tokens, name):
    backend, windows = make(name), np.arange(12).reshape(3, 4) * 20
    singles = [backend.evaluate("val", windows[i : i + 1]) for i in range(3)]
    assert backend.evaluate("val", windows) == pytest.approx(np.mean(singles), rel=1e-6)


@frameworks
def test_cached_generation_is_uncached_generation(make, spec, name):
    """Greedy text past block_size, against nanoGPT's way: the last block_size tokens, whole, for every token."""
    backend = make(name)
    rng = np.random.default_rng(0)
    backend.load(
        {n: (w + 0.1 * rng.standard_normal(w.shape)).astype(np.float32) for n, w in backend.state().weights.items()}
    )
    tokens, expected = [3, 5], [3, 5]
    tokens += list(generate(backend, spec, [3, 5], 30, temperature=0.0))
    for _ in range(30):
        window = np.array([expected[-spec.block_size :]])
        expected.append(int(backend.logits(window)[0, -1].argmax()))
    assert tokens == expected
    assert len(set(tokens)) > 3


def test_the_same_seed_draws_the_same_text_on_all_frameworks(make, spec):
    texts = [list(generate(make(n), spec, [1], 40, 0.9, 20, seed=5)) for n in FRAMEWORKS]
    assert all(text == texts[0] for text in texts)
    assert texts[0] != list(generate(make("cpu"), spec, [1], 40, 0.9, 20, seed=6))


def test_draw_follows_the_softmax_of_the_top_k():
    scores = np.array([0.0, 1.0, 2.0, 3.0, -5.0])
    uniforms = (np.arange(20000) + 0.5) / 20000
    for temperature, k in [(1.0, None), (0.5, 3), (2.0, 2)]:
        drawn = np.bincount([draw(scores, temperature, k, u) for u in uniforms], minlength=5) / 20000
        kept = torch.topk(torch.from_numpy(scores), k or 5)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept.indices] = torch.softmax(kept.values / temperature, 0)
        np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert draw(scores, 0.0, None, 0.99) == 3
    assert draw(scores, 1.0, None, np.nextafter(1.0, 0.0)) == 4


def test_padding_is_never_drawn(make, spec):
    drawn = list(generate(make("cpu"), spec, [1], 200, 5.0, None, seed=1, symbols=4))
    assert max(drawn) < 4


def test_step_seeds_do_not_repeat():
    seeds = {step_seed(seed, i) for seed in range(20) for i in range(1000)}
    assert len(seeds) == 20000
    assert all(0 <= s < 2**63 for s in seeds)


def test_an_empty_prompt_is_refused(make, spec):
    with pytest.raises(InputError, match="prompt"):
        next(generate(make("cpu"), spec, [], 1))


def test_windows_are_contiguous_text():
    tokens = Tokens({"train": np.arange(100, dtype=np.uint16)}, 4)
    np.testing.assert_array_equal(tokens.windows("train", np.array([0, 95])), [range(5), range(95, 100)])


def test_fused_adamw_is_used_and_can_be_switched_off(make, starts):
    fused, loop = make("cpu"), make("cpu", fused_adamw=False)
    assert (fused.details["fused_adamw"], loop.details["fused_adamw"]) == (True, False)
    run(fused, starts, 0, 5), run(loop, starts, 0, 5)
    for n, w in fused.state().weights.items():
        np.testing.assert_allclose(w, loop.state().weights[n], atol=1e-6)


@pytest.mark.parametrize(("key", "words"), [("own_kernels", "cpu has none"), ("cuda_graph", "cpu has none")])
def test_what_an_nvidia_gpu_alone_has_is_refused_elsewhere(make, key, words):
    with pytest.raises(InputError, match=rf"backend\.{key}=true: {words}; use null or false"):
        make("cpu", **{key: True})
    assert make("cpu", **{key: False}).details[key] is False


def test_a_fused_adamw_that_ignores_overflows_is_not_used_for_float16(make, starts, monkeypatch):
    """As torch's was on MPS until 2026: found_inf has no effect. The loop over tensors takes its place."""
    real = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, found_inf, **keys: real(*args, found_inf=None, **keys))
    assert make("cpu").details["fused_adamw"]
    backend = make("cpu", dtype="float16")
    assert not backend.details["fused_adamw"]
    with pytest.raises(InputError, match=r"backend\.fused_adamw=true: .* after a float16 overflow"):
        make("cpu", dtype="float16", fused_adamw=True)
    monkeypatch.undo()
    state = backend.state()
    state.loss_scale = 2.0**40
    backend.restore(state)
    backend.wait(backend.step(starts(0), 1e-3))
    assert all((backend.state().weights[n] == w).all() for n, w in state.weights.items())


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_mlx_reads_the_precision_once_and_says_so(make, precision):
    make("mlx", matmul_precision="highest")
    if precision == "high":
        with pytest.raises(InputError, match="matmul_precision=high"):
            make("mlx", matmul_precision="high")
    other = "torch" if blas.taken() == "scipy" else "scipy"
    with pytest.raises(InputError, match=rf"backend\.blas={other}: must be set before MLX is loaded"):
        make("mlx", blas=other)


def test_tiny_models_work(make, tokens):
    spec = GPTSpec(1, 1, 1, 1, 65)
    for name in FRAMEWORKS:
        backend = make(name, spec=spec, tokens=Tokens(tokens.splits, 1))
        loss, _ = backend.wait(backend.step(np.array([[0, 1]]), 1e-3))
        assert 3 < loss < 5
