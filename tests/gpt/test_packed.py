"""Attention and the residual sum in few kernels against the formulas in float64, and their masks against statistics."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nanogpt_mac.gpt import packed
from nanogpt_mac.gpt.packed import add_scaled, gelu, packed_attention
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT

B, T, NH, HS = 3, 7, 2, 5
SPEC = GPTSpec(n_layer=2, n_head=NH, n_embd=8, block_size=T, vocab_size=11, bias=True)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def causal(length):
    return torch.full((length, length), float("-inf")).triu(1)


def formula(qkv, keep):
    """Attention as it is written in the paper, in float64, with dropout's mask (B nh T T) on the weights."""
    q, k, v = (t.view(B, T, NH, HS).transpose(1, 2) for t in qkv.double().split(NH * HS, dim=2))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HS) + causal(T).double(), -1)
    if keep is not None:
        weights = weights * keep.double().view(weights.shape)
    return (weights @ v).transpose(1, 2).reshape(B, T, NH * HS)


@pytest.fixture
def compiled(monkeypatch):
    """The functions as they are traced for a CPU, run as they are."""
    monkeypatch.setattr(packed, "_compiled_for_a_cpu", lambda x: True)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("way", [None, "compiled"])
def test_attention_and_its_gradient_are_the_formulas(way, dropping, dtype, close, request):
    if way:
        request.getfixturevalue(way)
    qkv, wanted = drawn(B, T, 3 * NH * HS, dtype=dtype), drawn(B, T, NH * HS, seed=1)
    keep = (torch.rand(B * NH * T * T, generator=torch.Generator().manual_seed(2)) > 0.3) / 0.7 if dropping else None
    y, expected = packed_attention(qkv, NH, causal(T).to(dtype), keep), formula(qkv, keep)
    assert y.dtype == dtype
    gradients = [torch.autograd.grad((out * wanted).sum(), qkv)[0].double() for out in (y, expected)]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=close * expected.abs().max().item())
    torch.testing.assert_close(*gradients, rtol=0, atol=close * gradients[1].abs().max().item())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 5e-7), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_gelu_and_its_slope_are_the_formulas(compiled, dtype, close):
    x = torch.cat([torch.linspace(-30, 30, 60_001), torch.tensor([0.0, -0.0, 1e-30, float("inf")])]).to(dtype)
    x = x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = gelu(x, "none"), torch.nn.functional.gelu(exact)
    slopes = [torch.autograd.grad(out.sum(), of)[0].double()[:-1] for out, of in ((y, x), (expected, exact))]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=close, atol=close)
    torch.testing.assert_close(*slopes, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_sum_and_its_gradients(dtype):
    x, y, keep = drawn(4, 6), drawn(4, 6, seed=1, dtype=dtype), drawn(4, 6, seed=2).detach()
    out = add_scaled(x, y, keep)
    torch.testing.assert_close(out, x + y * keep)
    dx, dy = torch.autograd.grad((out * keep).sum(), (x, y))
    torch.testing.assert_close(dx, keep)
    torch.testing.assert_close(dy, (keep * keep).to(dtype))


def model(few_kernels, spec=SPEC):
    rng = np.random.default_rng(3)
    made = GPT(spec, few_kernels).train()
    made.load_state_dict(
        {n: torch.tensor(0.4 * rng.standard_normal(s), dtype=torch.float32) for n, s in spec.shapes().items()}
    )
    return made


def test_the_model_is_the_same_without_dropout():
    idx, targets = (torch.randint(11, (B, T), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    plain, few = (model(kernels) for kernels in ("never", "training"))
    losses = [m.loss(idx, targets) for m in (plain, few)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (plain, few), strict=True)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hashed", [False, True])
def test_masks_drop_their_share_and_keep_the_mean(hashed, monkeypatch):
    spec = dataclasses.replace(SPEC, dropout=0.3)
    torch.manual_seed(0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: hashed)  # on a CPU, masks are then a hash
    masks = model("training", spec)._few(400, T).keep
    shapes = [(400, T, 8)] + [(400, NH, T, T), (400, T, 8), (400, T, 8)] * 2
    assert [tuple(mask.shape) for mask in masks] == shapes
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        share = (mask == 0).double().mean().item()
        assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / mask.numel())
        dropped = (mask == 0).double().flatten() - 0.3
        for distance in (1, 2, T, 8, 64):  # none depends on another
            together = (dropped[distance:] * dropped[:-distance]).mean().item()
            assert abs(together) < 4 * 0.3 * 0.7 / math.sqrt(len(dropped) - distance)
    flat = [mask.flatten()[:20000] for mask in masks]
    assert not any(torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i] if a.shape == b.shape)


@pytest.mark.parametrize("few_kernels", ["always", "training"])
def test_nothing_is_dropped_in_evaluation(few_kernels):
    made = model(few_kernels, dataclasses.replace(SPEC, dropout=0.5))
    idx = torch.randint(11, (B, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (made(idx) != made(idx)).any()
        torch.testing.assert_close(made.eval()(idx), model("never").eval()(idx))
