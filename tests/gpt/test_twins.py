"""The twins against the formulas in float64 (the parity gate's reference): every length, every mode, with a cache."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.parity import reference

BLOCK = 12
SPEC = GPTSpec(n_layer=2, n_head=4, n_embd=32, block_size=BLOCK, vocab_size=23, bias=True)
NEARLY_NO_DROPOUT = 1e-12  # takes the code path of dropout and drops nothing: 1 - p is 1 in float32
jax_here = pytest.mark.skipif(KINDS["jax"].missing() is not None, reason=f"JAX: {KINDS['jax'].missing()}")
twins = pytest.mark.parametrize("twin", ["torch", "mlx", pytest.param("jax", marks=jax_here)])


def at_each(length):
    """Every length with every twin; JAX compiles anew for each, so most of its take a while."""
    rest = [n for n in range(1, BLOCK + 1) if n not in (1, 2, 7, BLOCK)]
    combined = [pytest.param(t, n) for t in ("torch", "mlx") for n in range(1, BLOCK + 1)]
    combined += [pytest.param("jax", n, marks=jax_here) for n in (1, 2, 7, BLOCK)]
    combined += [pytest.param("jax", n, marks=(jax_here, pytest.mark.slow)) for n in rest]
    return pytest.mark.parametrize(("twin", length), combined)


gelus = pytest.mark.parametrize("gelu", ["exact", "tanh"])


def drawn(spec, seed=3):
    """Weights under which attention is far from uniform, and biases and norms are not 0 and 1."""
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * (0.4 if len(s) > 1 else 0.7)).astype(np.float32) for n, s in shapes(spec)}


def shapes(spec):
    return spec.shapes().items()


def torch_twin(spec, weights, training):
    from nanogpt_mac.gpt.torch_gpt import GPT, KVCache

    model = GPT(spec).train(training)
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})

    def logits(idx, cache=None):
        with torch.no_grad():
            return model(torch.from_numpy(idx), cache).numpy()

    def loss(idx, targets):
        return model.loss(torch.from_numpy(idx), torch.from_numpy(targets)).item()

    return logits, loss, partial(KVCache, spec, torch.device("cpu"), torch.float32, 2)


def mlx_twin(spec, weights, training):
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    from nanogpt_mac.gpt.mlx_gpt import GPT, KVCache, dropout_masks

    model = GPT(spec).train(training)
    model.update(tree_unflatten([(n, mx.array(w)) for n, w in weights.items()]))

    keys = iter(mx.random.split(mx.random.key(0), 100))

    def keep(idx):
        return dropout_masks(spec, *idx.shape, next(keys)) if training and spec.dropout else None

    def logits(idx, cache=None):
        return np.array(model(mx.array(idx), cache, keep(idx)))

    def loss(idx, targets):
        return model.loss(mx.array(idx), mx.array(targets), keep(idx)).item()

    return logits, loss, KVCache


def jax_twin(spec, weights, training):
    import jax
    import jax.numpy as jnp

    from nanogpt_mac.gpt.jax_gpt import GPT, KVCache, dropout_masks

    model, w = GPT(spec), {n: jnp.asarray(array) for n, array in weights.items()}
    keys = iter(jax.random.key_data(jax.random.split(jax.random.key(0), 100)))
    masks = jax.jit(dropout_masks, static_argnums=(0, 1, 2))

    def keep(idx):
        return masks(spec, *idx.shape, next(keys)) if training and spec.dropout else None

    whole, mean = jax.jit(lambda w, idx, keep: model(w, idx, keep=keep)), jax.jit(model.loss)

    @jax.jit
    def cached(w, idx, layers, length):
        cache = KVCache()
        cache.layers, cache.length = dict(layers), length
        return model(w, idx, cache), cache.layers, cache.length

    def logits(idx, cache=None):
        if cache is None:
            return np.array(whole(w, idx, keep(idx)))
        made, cache.layers, cache.length = cached(w, idx, cache.layers, jnp.asarray(cache.length))
        return np.array(made)

    def loss(idx, targets):
        return float(mean(w, idx, targets, keep(idx)))

    return logits, loss, KVCache


@pytest.fixture
def build(twin):
    """(logits, loss, what makes a cache) of a twin in evaluation or training mode, and its weights."""

    def made(spec, training=False):
        weights = drawn(spec)
        return *{"torch": torch_twin, "mlx": mlx_twin, "jax": jax_twin}[twin](spec, weights, training), weights

    return made


def exact(spec, weights, idx):
    return reference.logits(reference.tensors(weights), spec, torch.from_numpy(idx)).detach().numpy()


def draw_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, SPEC.vocab_size, shape)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@twins
@gelus
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_loss_are_those_of_the_formulas(build, gelu, bias):
    spec = dataclasses.replace(SPEC, gelu=gelu, bias=bias)
    logits, loss, _, weights = build(spec)
    idx, targets = draw_tokens(3, BLOCK), draw_tokens(3, BLOCK, seed=1)
    ours, expected = logits(idx), exact(spec, weights, idx)
    assert ours.dtype == np.float32
    close(ours, expected)
    nats = reference.cross_entropies(torch.from_numpy(expected), torch.from_numpy(targets)).mean().item()
    assert loss(idx, targets) == pytest.approx(nats, rel=1e-5)


@at_each("length")
@pytest.mark.parametrize("dropout", [0.0, NEARLY_NO_DROPOUT])
def test_no_token_sees_a_later_one_at_any_length(build, length, dropout):
    """In training mode; with dropout MLX's attention is another piece of code."""
    logits, _, _, weights = build(dataclasses.replace(SPEC, dropout=dropout), training=True)
    whole = draw_tokens(2, BLOCK)
    expected = exact(SPEC, weights, whole)
    ours = logits(whole[:, :length])
    close(ours, expected[:, :length])  # what follows a prefix is of no matter to it
    for t in range(1, length):
        changed = whole[:, :length].copy()
        changed[:, t] = (changed[:, t] + 1) % SPEC.vocab_size
        after = logits(changed)
        np.testing.assert_array_equal(after[:, :t], ours[:, :t])
        assert (np.abs(after[:, t:] - ours[:, t:]).max(axis=(0, 2)) > 1e-4).all()


@at_each("first")
def test_decoding_with_a_cache_is_the_whole_window_at_every_length(build, first):
    """`first` tokens at once, then one at a time; without a cache, and with it, in two sequences that share nothing."""
    logits, _, cache_of, weights = build(SPEC)
    idx = draw_tokens(2, BLOCK)
    expected, cache, other = exact(SPEC, weights, idx), cache_of(), cache_of()
    close(logits(idx[:, :first], cache), expected[:, :first])
    assert cache.length == first
    logits(draw_tokens(2, 3, seed=5), other)
    for t in range(first, BLOCK):
        close(logits(idx[:, t : t + 1], cache), expected[:, t : t + 1])
    assert (cache.length, other.length) == (BLOCK, 3)


@twins
def test_dropout_is_where_nanogpt_has_it_and_scales_what_it_keeps(build):
    """Off in evaluation; in training each pass differs, and the mean over many is the loss without dropout."""
    spec = dataclasses.replace(SPEC, dropout=0.2)
    idx, targets = draw_tokens(4, BLOCK), draw_tokens(4, BLOCK, seed=1)
    logits, loss, _, weights = build(spec)
    close(logits(idx), exact(spec, weights, idx))
    _, loss, _, _ = build(spec, training=True)
    assert len({loss(idx, targets) for _ in range(5)}) == 5


def packed(q, k, v):
    """What attention with dropout takes, (B, T, 3, nh, hs), of three arrays (B, nh, T, hs)."""
    import mlx.core as mx

    return mx.array(np.stack([q, k, v]).transpose(1, 3, 0, 2, 4))


def test_mlx_drops_attention_weights_and_scales_what_it_keeps():
    """Its own piece of code: with values that are the identity, what comes out is the weights themselves."""
    import mlx.core as mx

    from nanogpt_mac.gpt.mlx_gpt import dropout_masks, dropped_attention, scaled_dot_product_attention

    rng = np.random.default_rng(0)
    T, p = 64, 0.25
    q, k = (rng.standard_normal((2, 3, T, T)).astype(np.float32) for _ in range(2))
    v = np.broadcast_to(np.eye(T, dtype=np.float32), (2, 3, T, T))
    scores = torch.from_numpy(q) @ torch.from_numpy(k).mT / T**0.5
    exact = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1).numpy()
    inputs, causal = packed(q, k, v), mx.where(mx.tri(T, dtype=mx.bool_), 0.0, -mx.inf)
    spec = GPTSpec(n_layer=1, n_head=3, n_embd=3, block_size=T, vocab_size=2, dropout=p)
    keep = dropout_masks(spec, 2, T, mx.random.key(1))[1]
    dropped = np.array(dropped_attention(inputs, causal, keep, p))
    kept = dropped != 0
    seen = exact > 1e-6
    assert not kept[exact == 0].any()
    assert kept[seen].mean() == pytest.approx(1 - p, abs=0.02)
    np.testing.assert_allclose(dropped[kept], exact[kept] / (1 - p), rtol=1e-4)
    whole = np.array(scaled_dot_product_attention(*(mx.array(array) for array in (q, k, v)), "causal"))
    np.testing.assert_allclose(whole, exact, atol=1e-6)
    seen = mx.zeros((T, T))
    every = np.array(dropped_attention(inputs, seen, mx.ones((2, 3, T, T), mx.bool_), 1e-12))
    np.testing.assert_allclose(every, scores.softmax(-1).numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("dtype", "off"), [("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_mlxs_gradient_of_attention_with_dropout_is_exact(dtype, off):
    """Written by hand: against float64 autograd with the same masks."""
    import mlx.core as mx

    from nanogpt_mac.gpt.mlx_gpt import dropped_attention
    from nanogpt_mac.gpt.spec import keeping

    rng, shape, p = np.random.default_rng(3), (2, 3, 48, 16), 0.3
    kind = getattr(torch, dtype)
    q, k, v, up = (torch.from_numpy(rng.standard_normal(shape)).to(kind).double() for _ in range(4))
    keep = rng.random((2, 3, 48, 48)) < 1 - p
    inputs = [array.requires_grad_() for array in (q, k, v)]
    scores = (inputs[0] @ inputs[1].mT / 16**0.5).masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
    y = (scores.softmax(-1) * torch.from_numpy(keep) * (65536 / keeping(p))) @ inputs[2]
    expected = torch.autograd.grad(y, inputs, up)

    given = packed(*(array.detach().numpy() for array in inputs)).astype(getattr(mx, dtype))
    weights = mx.array(up.numpy()).astype(given.dtype)
    mask = mx.where(mx.tri(48, dtype=mx.bool_), 0.0, -mx.inf).astype(given.dtype)
    ours = lambda given: dropped_attention(given, mask, mx.array(keep), p)  # noqa: E731
    (value,), (gradient,) = mx.vjp(ours, [given], [weights])
    assert (value.dtype, gradient.dtype, gradient.shape) == (given.dtype, given.dtype, given.shape)
    found = np.array(gradient.astype(mx.float32)).transpose(2, 0, 3, 1, 4)
    np.testing.assert_allclose(np.array(value.astype(mx.float32)), y.detach(), rtol=off, atol=off)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=off * float(other.abs().max()))


def test_mlx_uses_its_fused_attention_where_nothing_is_dropped(monkeypatch):
    """It is what makes MLX fast, and what the report's times are of."""
    import mlx.core as mx

    from nanogpt_mac.gpt.mlx_gpt import dropped_attention, scaled_dot_product_attention

    calls, fused = [], mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *a, **k: calls.append(k["mask"]) or fused(*a, **k)
    )
    x, seen = mx.ones((1, 1, 4, 8)), mx.zeros((4, 4))
    for mask in ("causal", None):
        mx.eval(scaled_dot_product_attention(x, x, x, mask))
    mx.eval(dropped_attention(packed(x, x, x), seen, mx.ones((1, 1, 4, 4), mx.bool_), 0.1))
    assert calls == ["causal", None]


def test_mlx_draws_every_mask_at_once_and_none_depends_on_another():
    """The shape of each site, the share kept, and no two sites or keys alike."""
    import mlx.core as mx

    from nanogpt_mac.gpt.mlx_gpt import dropout_masks

    spec = dataclasses.replace(SPEC, dropout=0.3, n_layer=2)
    masks = [np.array(mask) for mask in dropout_masks(spec, 50, BLOCK, mx.random.key(7))]
    rows, weights = (50, BLOCK, 32), (50, 4, BLOCK, BLOCK)
    assert [mask.shape for mask in masks] == [rows, weights, rows, rows, weights, rows, rows]
    for mask in masks:
        assert mask.dtype == bool
        assert mask.mean() == pytest.approx(0.7, abs=0.015)
    agree = [(a == b).mean() for a, b in zip(masks[2:4], (masks[5], masks[6]), strict=True)]
    other = np.array(dropout_masks(spec, 50, BLOCK, mx.random.key(8))[0])
    assert [*agree, (masks[0] == other).mean()] == pytest.approx([0.58] * 3, abs=0.02)  # 0.7^2 + 0.3^2


def test_mlxs_own_erf_and_gelu_are_the_functions_and_their_gradient():
    import mlx.core as mx

    from nanogpt_mac.gpt import mlx_gpt

    x = torch.linspace(-9, 9, 4001, dtype=torch.float64, requires_grad=True)
    exact = torch.nn.functional.gelu(x)
    (slope,) = torch.autograd.grad(exact.sum(), x)
    ours = mx.array(x.detach().numpy().astype(np.float32))
    np.testing.assert_allclose(np.array(mlx_gpt.erf(ours)), torch.erf(x).detach(), rtol=0, atol=4e-7)
    value, (gradient,) = mx.vjp(lambda x: mlx_gpt.gelu(x, "none"), [ours], [mx.ones(4001)])
    np.testing.assert_allclose(np.array(value[0]), exact.detach(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.array(gradient), slope, rtol=0, atol=1e-6)
    for kind, unit in (("bfloat16", 2**-8), ("float16", 2**-11)):  # computed in float32, so off by what is rounded last
        half = x.detach().to(getattr(torch, kind)).double().requires_grad_()
        exact = torch.nn.functional.gelu(half)
        (slope,) = torch.autograd.grad(exact.sum(), half)
        given, ones = (
            mx.array(array).astype(getattr(mx, kind)) for array in (half.detach().float().numpy(), np.ones(4001))
        )
        value, (gradient,) = mx.vjp(lambda x: mlx_gpt.gelu(x, "none"), [given], [ones])
        assert (value[0].dtype, gradient.dtype) == (given.dtype, given.dtype)
        for one, other in ((value[0], exact), (gradient, slope)):
            np.testing.assert_allclose(np.array(one.astype(mx.float32)), other.detach(), rtol=1.1 * unit, atol=2e-6)


@jax_here
def test_jax_drops_attention_weights_and_draws_every_mask_at_once():
    """With values that are the identity, what comes out is the weights themselves; no two sites or keys are alike."""
    import jax.numpy as jnp

    from nanogpt_mac.gpt.jax_gpt import GPT, dropout_masks

    rng, T, p = np.random.default_rng(0), 64, 0.25
    q, k = (rng.standard_normal((2, 3, T, T)).astype(np.float32) for _ in range(2))
    v = np.broadcast_to(np.eye(T, dtype=np.float32), (2, 3, T, T))
    scores = torch.from_numpy(q) @ torch.from_numpy(k).mT / T**0.5
    exact = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1).numpy()
    spec = GPTSpec(n_layer=2, n_head=3, n_embd=3, block_size=T, vocab_size=2, dropout=p)
    masks = [np.array(mask) for mask in dropout_masks(spec, 2, T, jnp.array([5, 1], jnp.uint32))]
    rows, weights = (2, T, 3), (2, 3, T, T)
    assert [mask.shape for mask in masks] == [rows, weights, rows, rows, weights, rows, rows]
    dropped = np.array(GPT(spec).scaled_dot_product_attention(q, k, v, jnp.tri(T, dtype=bool), jnp.asarray(masks[1])))
    np.testing.assert_allclose(dropped, np.where(masks[1], exact / (1 - p), 0), rtol=1e-4, atol=1e-7)
    other = np.array(dropout_masks(spec, 2, T, jnp.array([5, 2], jnp.uint32))[1])
    for mask in (masks[1], masks[4]):
        assert mask.mean() == pytest.approx(1 - p, abs=0.02)
    agree = [(masks[1] == masks[4]).mean(), (masks[1] == other).mean(), (masks[1][0] == masks[1][1]).mean()]
    assert agree == pytest.approx([0.625] * 3, abs=0.02)  # 0.75^2 + 0.25^2
