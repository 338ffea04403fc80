"""The one test that every back end must pass: the same numbers from the same weights and batches."""

import math

import numpy as np
import pytest
import torch
from fakes.support import EACH_VARIANT

from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT

variants = pytest.mark.parametrize(("name", "compiled"), EACH_VARIANT)


def float64(spec):
    """The reference: torch in double precision, eager, on the CPU."""
    model = GPT(spec).double()
    model.load_state_dict({n: torch.from_numpy(w) for n, w in spec.init_weights(1337).items()})
    return model


@torch.no_grad()
def exact_logits(model, x):
    """The forward pass without the model's own final cast to float32."""
    t = model.transformer
    h = t["wte"](x) + t["wpe"](torch.arange(x.shape[1]))
    for block in t["h"]:
        h = block(h)
    return torch.nn.functional.linear(t["ln_f"](h), t["wte"].weight).numpy()


@pytest.fixture
def batch(spec, tokens):
    window = tokens.windows("train", np.arange(0, 800, 200))
    return window[:, :-1], window[:, 1:]


@variants
def test_logits_loss_and_gradients_are_those_of_float64(make, spec, batch, name, compiled):
    idx, targets = batch
    model, backend = float64(spec), make(name, compile=compiled)
    x, y = (torch.from_numpy(a.astype(np.int64)) for a in batch)
    assert np.abs(backend.logits(idx) - exact_logits(model, x)).max() < 1e-4

    reference = torch.nn.functional.cross_entropy(model(x).view(-1, 65), y.reshape(-1))
    model.loss(x, y).backward()
    loss, grads = backend.gradients(idx, targets)
    assert loss == pytest.approx(reference.item(), abs=1e-4)
    assert grads.keys() == spec.shapes().keys()
    for parameter, p in model.named_parameters():
        expected = p.grad.numpy()
        assert np.linalg.norm(grads[parameter] - expected) < 1e-4 * np.linalg.norm(expected), parameter


@variants
def test_no_token_sees_a_later_one(make, batch, name, compiled):
    idx, _ = batch
    backend = make(name, compile=compiled)
    before = backend.logits(idx)
    for t in (1, 7, 15):
        changed = idx.copy()
        changed[:, t] = (changed[:, t] + 11) % 65
        after = backend.logits(changed)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=(0, 2)) > 1e-6).all()


@variants
def test_a_hundred_iterations_end_at_the_same_loss(make, starts, name, compiled):
    """Clip, decay groups, bias correction, schedule and accumulation, against torch's own eager AdamW."""
    losses = {}
    for variant in (("cpu", False), (name, compiled)):
        backend = make(variant[0], compile=variant[1])
        rates = [1e-3 * min(1, (i + 1) / 10) for i in range(100)]
        losses[variant] = [backend.wait(backend.step(starts(i, 2), lr))[0] for i, lr in enumerate(rates)]
    ours, reference = losses[name, compiled], losses["cpu", False]
    assert reference[-1] < reference[0] - 1
    assert np.abs(np.array(ours) - reference).max() < 2e-3


def adamw_by_hand(weights, grads, lr, step, decay=0.1, betas=(0.9, 0.99)):
    """One AdamW step from zero moments repeated with the same gradient, in float64 (Loshchilov and Hutter)."""
    m = v = 0.0
    w = weights.astype(np.float64)
    for t in range(1, step + 1):
        m = betas[0] * m + (1 - betas[0]) * grads
        v = betas[1] * v + (1 - betas[1]) * grads**2
        w = w * (1 - lr * (decay if w.ndim >= 2 else 0.0))
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8)
    return w


@variants
@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_first_update_is_adamw_after_the_clip(make, spec, tokens, starts, name, compiled, clip):
    backend = make(name, compile=compiled, grad_clip=clip)
    window = tokens.windows("train", starts(0)[0])
    _, grads = backend.gradients(window[:, :-1], window[:, 1:])
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    _, reported = backend.wait(backend.step(starts(0), 1e-2))
    assert reported == pytest.approx(norm, rel=1e-4)
    scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    assert clip == 0.0 or scale < 1.0
    state = backend.state()
    for parameter, start in spec.init_weights(1337).items():
        expected = adamw_by_hand(start, grads[parameter].astype(np.float64) * scale, 1e-2, 1)
        assert np.linalg.norm(state.weights[parameter] - expected) < 1e-4 * np.linalg.norm(expected - start), parameter


@variants
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_twins_agree_with_biases_and_either_gelu(make, tokens, name, compiled, gelu):
    spec = GPTSpec(2, 4, 32, 16, 65, bias=True, gelu=gelu)
    rng = np.random.default_rng(0)
    weights = {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in spec.shapes().items()}
    idx = tokens.windows("val", np.arange(3))[:, :-1]
    logits = {}
    for variant in (("cpu", False), (name, compiled)):
        backend = make(variant[0], compile=variant[1], spec=spec)
        backend.load(weights)
        logits[variant] = backend.logits(idx)
    np.testing.assert_allclose(logits[name, compiled], logits["cpu", False], atol=1e-4, rtol=1e-4)


RECIPES = {
    "quick": (GPTSpec(4, 4, 128, 64, 65), 12),
    "shakespeare_char": (GPTSpec(6, 6, 384, 256, 65), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@variants
def test_parity_at_full_size(make, name, compiled, recipe):
    """The figures of the README: run with -s to read them."""
    spec, batch = RECIPES[recipe]
    rng = np.random.default_rng(0)
    walk = (np.cumsum(rng.integers(0, 3, 40_000)) % 65).astype(np.uint16)
    tokens = Tokens({"train": walk, "val": walk}, spec.block_size)
    window = tokens.windows("train", rng.integers(0, 39_000, batch))
    model = float64(spec)
    x, y = (torch.from_numpy(a.astype(np.int64)) for a in (window[:, :-1], window[:, 1:]))
    loss = model.loss(x, y)
    loss.backward()

    backend = make(name, spec=spec, tokens=tokens, compile=compiled)
    logits = np.abs(backend.logits(window[:, :-1]) - exact_logits(model, x)).max()
    ours, grads = backend.gradients(window[:, :-1], window[:, 1:])
    exact = {n: p.grad.numpy() for n, p in model.named_parameters()}
    worst = max(np.linalg.norm(grads[n] - g) / np.linalg.norm(g) for n, g in exact.items())
    how = "compiled" if compiled else "eager"
    print(f"\n{recipe}, {backend.device_name} {name} {how}: logits {logits:.1e}, gradients {worst:.1e}", end=" ")
    print(f"loss {abs(ours - loss.item()):.1e}", end=" ")
    assert logits < 1e-4
    assert worst < 1e-4

    reference = make("cpu", spec=spec, tokens=tokens)
    windows = [rng.integers(0, 39_000, (1, batch)) for _ in range(100)]
    final = [
        b.wait([b.step(w, 1e-3 * min(1, (i + 1) / 10)) for i, w in enumerate(windows)][-1])[0]
        for b in (backend, reference)
    ]
    print(f"loss after 100: {final[0]:.6f} against {final[1]:.6f}")
    assert abs(final[0] - final[1]) < 2e-3
