"""The Triton kernels against formulas in float64, and their masks against statistics.

Without an NVIDIA GPU Triton's interpreter runs them on the CPU, program by program.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fakes.kernels import CLOSE, DEVICE, GPU, close, drawn
from torch.nn import functional as F

from nanogpt_mac.gpt.spec import GPTSpec

with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined, and Triton's own
    pytest.importorskip("triton", minversion=None if GPU else "3.7")  # whose interpreter reads numpy's newer arrays
    from nanogpt_mac.gpt import triton_ops as ops
    from nanogpt_mac.gpt import triton_products as products

SPEC = GPTSpec(n_layer=2, n_head=2, n_embd=24, block_size=20, vocab_size=65, bias=True)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def seeds(*numbers):
    return torch.tensor(numbers, device=DEVICE)


def formula(qkv, n_head, keep=None):
    """Attention as it is written in the paper, in float64, with dropout's mask (B, nh, T, T) on the weights."""
    B, T, width = qkv.shape
    q, k, v = (t.view(B, T, n_head, -1).transpose(1, 2) for t in qkv.double().split(width // 3, dim=2))
    causal = torch.full((T, T), float("-inf"), dtype=torch.float64, device=qkv.device).triu(1)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal, -1)
    if keep is not None:
        weights = weights * keep
    return (weights @ v).transpose(1, 2).reshape(B, T, width // 3)


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("T", "nh", "hs"), [(70, 2, 20), (128, 1, 64), (1, 2, 16), (33, 1, 128)])
def test_attention_and_its_gradient_are_the_formulas(T, nh, hs, dtype):
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter takes bfloat16 in a product for integers")
    qkv, wanted = drawn(2, T, 3 * nh * hs, dtype=dtype), drawn(2, T, nh * hs, seed=1, dtype=dtype)
    y, _ = ops.attention(qkv, nh, 0.0, seeds(0), 0)
    expected = formula(qkv, nh)
    close(y, expected, CLOSE[dtype])
    (found,) = torch.autograd.grad(y, qkv, wanted)
    close(found, torch.autograd.grad(expected, qkv, wanted.double())[0].double(), CLOSE[dtype])
    assert y.dtype == found.dtype == dtype


def mask(B, T, nh, dropout, seed, site=0):
    """Where attention keeps a weight: with the identity for values, the weights themselves come out."""
    qkv = torch.zeros(B, T, 3, nh, T, device=DEVICE)
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[:, None]
    weights, _ = ops.attention(qkv.view(B, T, -1), nh, dropout, seeds(*[seed] * (site + 1)), site)
    return weights.view(B, T, nh, T).transpose(1, 2) > 0  # (B, nh, T, T)


def test_dropped_weights_are_dropped_in_the_backward_pass_too():
    B, T, nh, dropout = 2, 32, 2, 0.3
    keep = mask(B, T, nh, dropout, 17).double() / (1 - dropout)
    qkv, wanted = drawn(B, T, 3 * nh * T), drawn(B, T, nh * T, seed=1)
    y, _ = ops.attention(qkv, nh, dropout, seeds(17), 0)
    expected = formula(qkv, nh, keep)
    close(y, expected, 3e-6)
    close(*(torch.autograd.grad(z, qkv, wanted.to(z.dtype))[0] for z in (y, expected)), 3e-6)


def test_masks_drop_the_share_asked_for_and_depend_on_seed_head_and_row():
    seen = [mask(2, 64, 2, 0.2, seed).cpu().numpy() for seed in (1, 2, 2**32 - 1)]
    lower = np.tril_indices(64)
    flat = np.concatenate([one[b, h][lower][None] for one in seen for b in range(2) for h in range(2)])
    count = flat.size
    assert abs(flat.mean() - 0.8) < 5 * math.sqrt(0.16 / count)
    together = (~flat.astype(bool)).astype(float)
    pairs = together @ together.T / flat.shape[1]  # any two of the twelve drop the same by chance alone
    np.fill_diagonal(pairs, 0.04)
    assert np.abs(pairs - 0.04).max() < 5 * math.sqrt(0.04 / flat.shape[1])


def test_columns_of_a_mask_are_independent(monkeypatch):
    """Of two, and of three at equal distances, which a linear generator would tie."""
    rows, C, p = 20000, 48, 0.25
    few = ops._rows
    monkeypatch.setattr(ops, "_rows", lambda *given: few(*given) | {"ROWS": 4 if GPU else 1024})  # a program each
    total, _ = ops.add_norm(*row(rows, C), None, p, seeds(5), 0)
    dropped = (total == 0).double().cpu().numpy()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / dropped.size)
    pairs = dropped.T @ dropped / rows
    np.fill_diagonal(pairs, p * p)
    assert np.abs(pairs - p * p).max() < 5.5 * math.sqrt(p * p * (1 - p * p) / rows)
    for step in (1, 2, 5, 11):
        three = dropped[:, : -2 * step] * dropped[:, step:-step] * dropped[:, 2 * step :]
        assert np.abs(three.mean(0) - p**3).max() < 5 * math.sqrt(p**3 / rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("C", "T", "V"), [(24, 20, 65), (384, 7, 9)])
def test_the_embedding_with_its_norm_and_their_gradients_are_the_formulas(C, T, V, dropout, bias):
    """Of windows that have a token more than is read, and of fewer tokens than there are positions."""
    wte, wpe = drawn(V, C), drawn(20, C, seed=1)
    weight, offset = drawn(C, seed=2), drawn(C, seed=3) if bias else None
    idx = (torch.arange(3 * (T + 1), device=DEVICE) * 7 % V).view(3, T + 1)[:, :-1]
    given = weight, offset, torch.float32, dropout, seeds(3, 9), 1
    keep = ops.embed_norm(idx, torch.ones_like(wte), torch.zeros_like(wpe), *given)[0].double()
    assert (keep == 0).any() == (dropout > 0)
    found = ops.embed_norm(idx, wte, wpe, *given)
    total = (wte.double()[idx] + wpe.double()[:T]) * keep
    expected = total, F.layer_norm(total, (C,), weight.double(), offset.double() if bias else None, 1e-5)
    inputs = [wte, wpe, weight, *([offset] if bias else [])]
    for alone in (False, True):  # of both results, and of the norm alone
        sums = [torch.cos(normed).sum() + (0 if alone else torch.cos(3 * t).sum()) for t, normed in (found, expected)]
        pairs = zip(*(torch.autograd.grad(s, inputs, retain_graph=True) for s in sums), strict=True)
        for one, other in [*zip(found, expected, strict=True), *pairs]:
            close(one, other.double(), 3e-6)
    with pytest.raises(ValueError, match=f"{T} tokens have 2 positions"):
        ops.embed_norm(idx, wte, wpe[:2], *given)
    assert ops.embed_norm(idx, wte, wpe, weight, offset, torch.bfloat16, 0.0, seeds(0), 0)[1].dtype == torch.bfloat16


def test_what_is_no_token_has_no_loss():
    """Where torch would end the process: a hole in a corpus must not pass for a token."""
    wte, wpe, logits = drawn(9, 24), drawn(5, 24, seed=1), drawn(1, 4, 64)
    for token in (9, -1, 2**40):
        tokens = torch.tensor([[1, token, 2, 8]], device=DEVICE)
        both = ops.embed_norm(tokens, wte, wpe, wpe[0], None, torch.float32, 0.0, seeds(0), 0)
        for result in both:
            assert result.isnan().all(-1).tolist() == [[False, True, False, False]]
        loss, _ = ops.cross_entropy(logits, tokens, 9)
        assert loss.isnan()
        torch.autograd.grad([loss, both[0].sum()], (logits, wte, wpe))  # is reached: the process lives on


def row(rows, C):
    return torch.zeros(rows, C, device=DEVICE), torch.ones(rows, C, device=DEVICE), torch.ones(C, device=DEVICE)


@pytest.mark.parametrize(("dropout", "threshold"), [(0.0, 0), (0.25, 2**30), (0.75, -(2**30)), (1 - 2**-40, -1)])
def test_a_threshold_is_the_share_in_units_of_a_hash(dropout, threshold):
    assert ops._threshold(dropout) == threshold


# -- residual sum and layer norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [24, 384])
def test_sum_and_norm_and_their_gradients_are_the_formulas(C, dtype, dropout, bias):
    x, y = drawn(3, 7, C), drawn(3, 7, C, seed=1, dtype=dtype)
    weight, offset = drawn(C, seed=2), drawn(C, seed=3) if bias else None
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    keep = ops.add_norm(zeros, ones, weight, None, dropout, seeds(3, 9), 1)[0].double()  # 0 or 1 / (1 - dropout)
    assert (keep == 0).any() == (dropout > 0)
    found = ops.add_norm(x, y, weight, offset, dropout, seeds(3, 9), 1)
    total = x.double() + y.double() * keep
    expected = total, F.layer_norm(total, (C,), weight.double(), offset.double() if bias else None, 1e-5)
    for one, other, tolerance in zip(found, expected, (1e-6, CLOSE[dtype]), strict=True):
        close(one, other, tolerance)
    assert [t.dtype for t in found] == [torch.float32, dtype]
    wanted = drawn(3, 7, C, seed=4), drawn(3, 7, C, seed=5, dtype=dtype)
    inputs = [x, y, weight, *([offset] if bias else [])]
    gradients = torch.autograd.grad(found, inputs, wanted)
    exact = torch.autograd.grad(expected, inputs, [w.double() for w in wanted])
    for one, other in zip(gradients, exact, strict=True):
        close(one, other.double(), CLOSE[dtype])


def test_a_norm_whose_sum_is_not_used_has_the_same_gradients():
    x, y, weight = drawn(3, 7, 24), drawn(3, 7, 24, seed=1), drawn(24, seed=2)
    total, normed = ops.add_norm(x, y, weight, None, 0.2, seeds(3), 0)
    alone, with_sum = (torch.autograd.grad(s, (x, y, weight), retain_graph=True) for s in (
        torch.cos(normed).sum(), torch.cos(normed).sum() + 0 * total.sum()))  # fmt: skip
    for one, other in zip(alone, with_sum, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("V", "width"), [(65, 128), (9, 9), (5000, 5056)])
def test_cross_entropy_and_its_gradient_are_torchs(V, width, dtype):
    """Of logits with further columns, which count for nothing and have a gradient of zero."""
    logits = (drawn(2, 11, width, dtype=dtype).detach() * 9).requires_grad_()
    targets = (torch.arange(24, device=DEVICE) * 7 % V).view(2, 12)[:, 1:]
    mean, _ = ops.cross_entropy(logits, targets, V)
    (found,) = torch.autograd.grad(mean * 3, logits)
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide[..., :V].flatten(0, 1), targets.flatten())
    (exact,) = torch.autograd.grad(expected * 3, wide)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.dtype == dtype
    assert (found[..., V:] == 0).all()
    close(found, exact, {torch.bfloat16: 8e-3}.get(dtype, CLOSE[dtype]))  # an interpreter rounds to zero


def test_gelu_and_its_gradient_are_exact():
    x = torch.linspace(-9, 9, 3001, device=DEVICE).requires_grad_()
    y = ops.gelu(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = F.gelu(wide)
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    assert (y.double() - expected).abs().max() < 5e-7
    assert (found.double() - exact).abs().max() < 5e-7


# -- a product of float32 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("M", "K", "N"), [(128, 64, 64), (130, 33, 70), (1, 40, 3), (64, 2048, 48), (70, 1100, 65)])
def test_a_product_and_its_gradients_hold_what_float32_holds(M, K, N):
    """Of numbers that bfloat16 and TF32 do not hold, relative to the sum of the terms' sizes."""
    x, weight, grad = drawn(M, K), drawn(N, K, seed=1), drawn(M, N, seed=2)
    y = ops.product(x, weight.T)
    found = [y, *torch.autograd.grad(y, (x, weight), grad)]
    for result, (a, b) in zip(found, ((x, weight.T), (grad, weight), (grad.T, x)), strict=True):
        a, b = a.double(), b.double()
        assert result.is_contiguous()
        assert ((result.double() - a @ b).abs() / (a.abs() @ b.abs())).max() < 3e-7


@pytest.mark.parametrize(("M", "K", "N"), [(129, 70, 65), (1, 1, 1)])
def test_a_product_of_16_bits_is_rounded_once(M, K, N):
    a, b = drawn(M, K, dtype=torch.float16).detach(), drawn(K, N, seed=1, dtype=torch.float16).detach()
    y, expected = ops.product(a, b), a.double() @ b.double()
    assert y.dtype == torch.float16
    assert (
        (y.double() - expected).abs() <= 2**-11 * expected.abs() + 1e-6 * (a.double().abs() @ b.double().abs())
    ).all()


# -- sums by token, a transpose, AdamW --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "M", "C"), [(65, 999, 70), (3, 40, 384), (ops.FEW, 700, 16), (ops.FEW + 1, 700, 16)]
)
def test_sums_by_token_are_exact_and_always_the_same(tokens, M, C):
    """Of numbers that bfloat16 does not hold, relative to the sum of their sizes."""
    rows = drawn(2, M, C).detach()
    idx = torch.randint(tokens, (2, M + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, :-1]
    found, again = (ops._token_sums(idx, rows, tokens) for _ in range(2))
    zeros = torch.zeros(tokens, C, dtype=torch.float64, device=DEVICE)
    flat, wide = idx.flatten(), rows.flatten(0, 1).double()
    exact, sizes = zeros.index_add(0, flat, wide), zeros.index_add(0, flat, wide.abs())
    assert torch.equal(found, again)
    assert ((found.double() - exact).abs() <= 3e-7 * sizes).all()


@pytest.mark.parametrize(("M", "N"), [(1, 1), (33, 70), (128, 64)])
def test_a_transpose_is_a_copy(M, N):
    x = drawn(M, N).detach()
    y = ops.transposed(x)
    assert y.is_contiguous()
    assert torch.equal(y, x.T)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_adamw_is_torchs_in_float64(limit, betas):
    """Five updates of two parameters, one of which decays, their norm clipped; and one that a scaler forbids."""
    sizes, rates = (1504, 48), [1e-2, 3e-3, 2e-2, 1e-3, 1e-2]
    theirs = [torch.nn.Parameter(drawn(n, seed=n).detach().double()) for n in sizes]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, (0.2, 0.0), strict=True)]
    reference = torch.optim.AdamW(groups, betas=betas)
    flat = [torch.cat([p.detach().float() for p in theirs]), *torch.zeros(3, sum(sizes), device=DEVICE)]
    steps = torch.zeros((), device=DEVICE)
    for number, lr in enumerate(rates):
        gradients = [drawn(n, seed=100 * number + n).detach() for n in sizes]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.double()
        norm = torch.nn.utils.clip_grad_norm_(theirs, limit or math.inf)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        flat[1].copy_(torch.cat(gradients))
        given = sizes[0], torch.tensor(lr, device=DEVICE), steps.add_(1), norm.float()
        ops.adamw(flat, *given, None, betas, 0.2, limit, 1e-8)
        if number == 2:
            before = [t.clone() for t in flat]
            ops.adamw(flat, *given, torch.ones((), device=DEVICE), betas, 0.2, limit, 1e-8)
            assert all(torch.equal(one, other) for one, other in zip(flat, before, strict=True))
    states = [reference.state[p] for p in theirs]
    expected = theirs, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    for found, exact in zip((flat[0], *flat[2:]), expected, strict=True):
        close(found, torch.cat([t.detach() for t in exact]), 1e-6)


# -- as operators of torch, and in the model --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own, in opcheck
def test_torch_accepts_the_operators():
    """Their schemas, shapes without data, and what a compiler makes of them and of their gradients."""
    x, y, weight = drawn(2, 5, 16), drawn(2, 5, 16, seed=1), drawn(16, seed=2)
    for operator, given in (
        (ops.attention, (drawn(2, 5, 48), 1, 0.2, seeds(4), 0)),
        (ops.add_norm, (x, y, weight, None, 0.2, seeds(4), 0)),
        (ops.add_norm, (x, y, weight, drawn(16, seed=3), 0.0, seeds(4), 0)),
        (
            ops.embed_norm,
            (seeds([1, 2, 0], [3, 3, 4]), drawn(5, 16), x[0], weight, None, torch.float32, 0.2, seeds(4), 0),
        ),
        (ops.cross_entropy, (drawn(2, 3, 7), seeds([1, 2, 0], [3, 3, 4]), 5)),
        (products.weight_gradient, (drawn(7, 3).detach(), drawn(7, 5).detach())),
        (ops.gelu, (x,)),
        (ops.product, (drawn(5, 7), drawn(3, 7, seed=1).T)),
    ):
        torch.library.opcheck(operator, given, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("capability", "spec", "words"),
    [
        ((7, 5), SPEC, "capability 8.0"),
        ((9, 0), dataclasses.replace(SPEC, n_embd=260), "at most 128 channels"),
        ((9, 0), dataclasses.replace(SPEC, n_embd=8192, n_head=64), "at most 4096 channels"),
        ((9, 0), SPEC, None),
    ],
)
def test_what_they_cannot_compute_has_a_reason(capability, spec, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = ops.fault(spec)
    assert (reason is None) if words is None else (words in reason)
