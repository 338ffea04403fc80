"""The Triton kernels against formulas in float64, their masks against statistics, and the model that takes them.

Without an NVIDIA GPU Triton's interpreter runs them on the CPU, program by program.
"""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined, and Triton's own
    pytest.importorskip("triton", minversion=None if GPU else "3.7")  # whose interpreter reads numpy's newer arrays
    from nanogpt_mac.gpt import fused

CLOSE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SPEC = GPTSpec(n_layer=2, n_head=2, n_embd=24, block_size=20, vocab_size=65, bias=True)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


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


def close(found, expected, tolerance):
    scale = expected.abs().max()
    assert scale > 0
    assert ((found.double() - expected).abs().max() / scale).item() < tolerance


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("T", "nh", "hs"), [(70, 2, 20), (128, 1, 64), (1, 2, 16), (33, 1, 128)])
def test_attention_and_its_gradient_are_the_formulas(T, nh, hs, dtype):
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter takes bfloat16 in a product for integers")
    qkv, wanted = drawn(2, T, 3 * nh * hs, dtype=dtype), drawn(2, T, nh * hs, seed=1, dtype=dtype)
    y, _ = fused.attention(qkv, nh, 0.0, seeds(0), 0)
    expected = formula(qkv, nh)
    close(y, expected, CLOSE[dtype])
    (found,) = torch.autograd.grad(y, qkv, wanted)
    close(found, torch.autograd.grad(expected, qkv, wanted.double())[0].double(), CLOSE[dtype])
    assert y.dtype == found.dtype == dtype


def mask(B, T, nh, dropout, seed, site=0):
    """Where attention keeps a weight: with the identity for values, the weights themselves come out."""
    qkv = torch.zeros(B, T, 3, nh, T, device=DEVICE)
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[:, None]
    weights, _ = fused.attention(qkv.view(B, T, -1), nh, dropout, seeds(*[seed] * (site + 1)), site)
    return weights.view(B, T, nh, T).transpose(1, 2) > 0  # (B, nh, T, T)


def test_dropped_weights_are_dropped_in_the_backward_pass_too():
    B, T, nh, dropout = 2, 32, 2, 0.3
    keep = mask(B, T, nh, dropout, 17).double() / (1 - dropout)
    qkv, wanted = drawn(B, T, 3 * nh * T), drawn(B, T, nh * T, seed=1)
    y, _ = fused.attention(qkv, nh, dropout, seeds(17), 0)
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
    few = fused._rows
    monkeypatch.setattr(fused, "_rows", lambda *given: few(*given) | {"ROWS": 4 if GPU else 1024})  # a program each
    total, _ = fused.add_norm(*row(rows, C), None, p, seeds(5), 0)
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
    keep = fused.embed_norm(idx, torch.ones_like(wte), torch.zeros_like(wpe), *given)[0].double()
    assert (keep == 0).any() == (dropout > 0)
    found = fused.embed_norm(idx, wte, wpe, *given)
    total = (wte.double()[idx] + wpe.double()[:T]) * keep
    expected = total, F.layer_norm(total, (C,), weight.double(), offset.double() if bias else None, 1e-5)
    inputs = [wte, wpe, weight, *([offset] if bias else [])]
    for wanted in (lambda t: torch.cos(3 * t).sum(), lambda t: (t * 0).sum()):  # of both results, and of the norm alone
        sums = [torch.cos(normed).sum() + wanted(sum_) for sum_, normed in (found, expected)]
        pairs = zip(*(torch.autograd.grad(s, inputs, retain_graph=True) for s in sums), strict=True)
        for one, other in [*zip(found, expected, strict=True), *pairs]:
            close(one, other.double(), 3e-6)
    with pytest.raises(ValueError, match=f"{T} tokens have 2 positions"):
        fused.embed_norm(idx, wte, wpe[:2], *given)
    assert fused.embed_norm(idx, wte, wpe, weight, offset, torch.bfloat16, 0.0, seeds(0), 0)[1].dtype == torch.bfloat16


def test_what_is_no_token_has_no_loss():
    """Where torch would end the process: a hole in a corpus must not pass for a token."""
    wte, wpe, logits = drawn(9, 24), drawn(5, 24, seed=1), drawn(1, 4, 64)
    for token in (9, -1, 2**40):
        tokens = torch.tensor([[1, token, 2, 8]], device=DEVICE)
        both = fused.embed_norm(tokens, wte, wpe, wpe[0], None, torch.float32, 0.0, seeds(0), 0)
        for result in both:
            assert result.isnan().all(-1).tolist() == [[False, True, False, False]]
        assert fused.cross_entropy(logits, tokens, 9)[0].isnan()


def row(rows, C):
    return torch.zeros(rows, C, device=DEVICE), torch.ones(rows, C, device=DEVICE), torch.ones(C, device=DEVICE)


@pytest.mark.parametrize(("dropout", "threshold"), [(0.0, 0), (0.25, 2**30), (0.75, -(2**30)), (1 - 2**-40, -1)])
def test_a_threshold_is_the_share_in_units_of_a_hash(dropout, threshold):
    assert fused._threshold(dropout) == threshold


# -- residual sum and layer norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [24, 384])
def test_sum_and_norm_and_their_gradients_are_the_formulas(C, dtype, dropout, bias):
    x, y = drawn(3, 7, C), drawn(3, 7, C, seed=1, dtype=dtype)
    weight, offset = drawn(C, seed=2), drawn(C, seed=3) if bias else None
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    keep = fused.add_norm(zeros, ones, weight, None, dropout, seeds(3, 9), 1)[0].double()  # 0 or 1 / (1 - dropout)
    assert (keep == 0).any() == (dropout > 0)
    found = fused.add_norm(x, y, weight, offset, dropout, seeds(3, 9), 1)
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
    total, normed = fused.add_norm(x, y, weight, None, 0.2, seeds(3), 0)
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
    mean, _ = fused.cross_entropy(logits, targets, V)
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
    y = fused.gelu(x)
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
    y = fused.product(x, weight.T)
    found = [y, *torch.autograd.grad(y, (x, weight), grad)]
    for result, (a, b) in zip(found, ((x, weight.T), (grad, weight), (grad.T, x)), strict=True):
        a, b = a.double(), b.double()
        assert result.is_contiguous()
        assert ((result.double() - a @ b).abs() / (a.abs() @ b.abs())).max() < 3e-7


@pytest.mark.parametrize(("M", "K", "N"), [(129, 70, 65), (1, 1, 1)])
def test_a_product_of_16_bits_is_rounded_once(M, K, N):
    a, b = drawn(M, K, dtype=torch.float16).detach(), drawn(K, N, seed=1, dtype=torch.float16).detach()
    y, expected = fused.product(a, b), a.double() @ b.double()
    assert y.dtype == torch.float16
    assert (
        (y.double() - expected).abs() <= 2**-11 * expected.abs() + 1e-6 * (a.double().abs() @ b.double().abs())
    ).all()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_linear_layer_takes_it_at_full_precision_alone(precision, monkeypatch):
    torch.set_float32_matmul_precision(precision)
    calls = []
    monkeypatch.setattr(fused, "product", lambda a, b: calls.append(a.shape) or a @ b)
    layer = torch.nn.Linear(24, 10, device=DEVICE)
    x = drawn(2, 5, 24)
    near = fused.Near(*(p.detach() for p in layer.parameters()))
    close(fused.linear(layer, near, x), layer(x).double(), 1e-2 if GPU else 1e-6)
    fused.linear(layer, fused.Near(*(p.bfloat16() for p in near)), x.bfloat16())
    assert calls == ([(10, 24)] if precision == "highest" else [])


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("wide", "bias"), [(40, False), (10, True)])
def test_a_linear_layer_and_its_gradients_are_what_is_written(wide, bias, dtype):
    """By both ways in which the weight's gradient is taken; of 16 bits a weight's gradient is not rounded to them."""
    torch.set_float32_matmul_precision("high")
    layer = torch.nn.Linear(24, wide, bias=bias, device=DEVICE)
    x, up = drawn(2, 5, 24, dtype=dtype), drawn(2, 5, wide, seed=1, dtype=dtype).detach()
    near = [p.detach().to(dtype) for p in layer.parameters()]
    y = fused.linear(layer, fused.Near(F.pad(near[0], (0, 0, 0, 3)), *(F.pad(b, (0, 3)) for b in near[1:])), x)
    assert (y[..., wide:] == 0).all()
    dx, *of_layer = torch.autograd.grad(y[..., :wide], (x, *layer.parameters()), up)
    exact = [t.detach().double().requires_grad_() for t in (x, *near)]
    expected = F.linear(*exact)
    tolerance = CLOSE[dtype] if dtype != torch.float32 or not GPU else 1e-2
    close(y[..., :wide], expected, tolerance)
    of_x, *of_numbers = torch.autograd.grad(expected, exact, up.double())
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    close(dx, of_x, tolerance)
    for one, other in zip(of_layer, of_numbers, strict=True):
        assert (one.shape, one.dtype) == (other.shape, torch.float32)
        close(one, other, tolerance if dtype == torch.float32 else 3e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("M", "C"), [(128, 32), (70, 24), (1, 40)])
def test_two_layers_with_gelu_and_their_gradients_are_the_formulas(M, C, dtype, bias):
    torch.set_float32_matmul_precision("high")
    x, up = drawn(M, C, dtype=dtype), drawn(M, C, seed=1, dtype=dtype).detach()
    own = [drawn(4 * C, C, seed=2), drawn(4 * C, seed=3), drawn(C, 4 * C, seed=4), drawn(C, seed=5)][
        :: 1 if bias else 2
    ]
    near = [p.detach().to(dtype) / 4 for p in own]
    halves = [fused.Near(*near[i : i + 1 + bias]) for i in range(0, len(near), 1 + bias)]
    padded = own if bias else [own[0], None, own[1], None]
    y = fused.MLP.apply(x, *padded, halves, True)
    dx, *of_own = torch.autograd.grad(y, (x, *own), up)
    exact = [t.detach().double().requires_grad_() for t in (x, *near)]
    first, second = (exact[1:][i : i + 1 + bias] for i in range(0, len(near), 1 + bias))
    expected = F.linear(F.gelu(F.linear(exact[0], *first)), *second)
    of_x, *of_near = torch.autograd.grad(expected, exact, up.double())
    tolerance = 1e-2 if GPU and dtype == torch.float32 else CLOSE[dtype] * 2
    for one, other in zip((y, dx, *of_own), (expected, of_x, *of_near), strict=True):
        close(one, other, tolerance)
    assert [t.dtype for t in (y, dx, *of_own)] == [dtype, dtype, *[torch.float32] * len(own)]
    kept, alone = (fused.linear_gelu(x.detach(), near[0], halves[0].bias, keep) for keep in (True, False))
    assert torch.equal(kept[1], alone[1])
    assert alone[0].numel() == 0


# -- as operators of torch, and in the model --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own, in opcheck
def test_torch_accepts_the_operators():
    """Their schemas, shapes without data, and what a compiler makes of them and of their gradients."""
    x, y, weight = drawn(2, 5, 16), drawn(2, 5, 16, seed=1), drawn(16, seed=2)
    for operator, given in (
        (fused.attention, (drawn(2, 5, 48), 1, 0.2, seeds(4), 0)),
        (fused.add_norm, (x, y, weight, None, 0.2, seeds(4), 0)),
        (fused.add_norm, (x, y, weight, drawn(16, seed=3), 0.0, seeds(4), 0)),
        (
            fused.embed_norm,
            (seeds([1, 2, 0], [3, 3, 4]), drawn(5, 16), x[0], weight, None, torch.float32, 0.2, seeds(4), 0),
        ),
        (fused.cross_entropy, (drawn(2, 3, 7), seeds([1, 2, 0], [3, 3, 4]), 5)),
        (fused.weight_gradient, (drawn(7, 3).detach(), drawn(7, 5).detach())),
        (fused.linear_gelu, (drawn(5, 16).detach(), drawn(9, 16).detach(), drawn(9).detach(), True)),
        (fused.gelu, (x,)),
        (fused.product, (drawn(5, 7), drawn(3, 7, seed=1).T)),
    ):
        torch.library.opcheck(operator, given, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{}, {"bias": False}, {"gelu": "tanh"}, {"vocab_size": 64}])
def test_the_model_computes_the_same(change):
    model = made(**change)
    idx = torch.arange(18, device=DEVICE).view(2, 9) * 7 % 64
    for training in (False, True):
        model.train(training)
        expected = model(idx)
        close(fused.logits(model, idx), expected.double(), 1e-6)
        close(fused.logits(model, idx, last=True), expected[:, -1:].double(), 1e-6)
    for one, other in zip(*(gradients(model, logits, idx) for logits in (fused.logits, GPT.forward)), strict=True):
        close(one, other.double(), 1e-5)


def test_dropout_is_the_same_where_activations_are_computed_anew():
    model, again = made(dropout=0.3), made(dropout=0.3)
    again.checkpointing = True
    idx = torch.arange(18, device=DEVICE).view(2, 9)
    for one, other in zip(*(gradients(m, fused.logits, idx) for m in (model, again)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(fused.logits(model, idx), fused.logits(model, idx))  # the next masks are others


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("change", [{}, {"bias": False}, {"gelu": "tanh"}])
def test_a_model_finds_its_kernels_prepared(change, precision, monkeypatch):
    torch.set_float32_matmul_precision(precision)
    calls = []
    if not GPU:  # the interpreter runs one program at a time
        monkeypatch.setattr(fused, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*given, **named):
                kinds = [given_.dtype if isinstance(given_, torch.Tensor) else type(given_) for given_ in given]
                calls.append((self.kernel.__name__, *kinds, *sorted((k, v) for k, v in named.items() if k.isupper())))
                self.kernel[grid](*given, **named)

            return run

    for name in [
        name for name in vars(fused.kernels) if name.endswith(("forward", "backward", "sums", "product", "gelu"))
    ]:
        monkeypatch.setattr(fused.kernels, name, Kernel(getattr(fused.kernels, name)))
    model = made(dropout=0.25, **change)
    idx = torch.arange(SPEC.block_size, device=DEVICE)[None]
    model.train()
    torch.autograd.grad(fused.loss(model, idx, idx), list(model.parameters()))
    with torch.no_grad():
        fused.loss(model.eval(), idx, idx)
    used = set(calls)
    calls.clear()
    fused.prepare(model.spec, torch.float32, idx.device)
    assert set(calls) == used


@pytest.mark.parametrize("change", [{}, {"bias": False}, {"vocab_size": 64}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_its_loss_and_gradients_are_the_models(dtype, change):
    model, idx = made(**change), torch.arange(20, device=DEVICE).view(2, 10) * 7 % 64
    results = []
    for loss in (fused.loss, GPT.loss):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            mean = loss(model, idx[:, :-1], idx[:, 1:])
        results.append([mean, *torch.autograd.grad(mean * 64, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        close(one, other.double(), 1e-5 if dtype == torch.float32 else 2e-2)


def made(**change):
    spec = dataclasses.replace(SPEC, **change)
    model = GPT(spec).to(DEVICE)
    weights = spec.init_weights(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]) * 3)
    return model


def gradients(model, logits, idx):
    torch.manual_seed(8)
    loss = F.cross_entropy(logits(model, idx).flatten(0, 1), idx.flatten())
    return torch.autograd.grad(loss, list(model.parameters()))


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
    reason = fused.fault(spec)
    assert (reason is None) if words is None else (words in reason)
