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
    close(fused.linear(layer, x), layer(x).double(), 1e-2 if GPU else 1e-6)
    with torch.autocast(DEVICE, torch.bfloat16):
        fused.linear(layer, x.bfloat16())
    assert calls == ([(10, 24)] if precision == "highest" else [])


@pytest.mark.parametrize(("wide", "bias"), [(40, False), (10, True)])
def test_a_linear_layer_and_its_gradients_are_what_is_written(wide, bias):
    """Of float32 where TF32 is allowed, by both ways in which the weight's gradient is taken."""
    torch.set_float32_matmul_precision("high")
    layer = torch.nn.Linear(24, wide, bias=bias, device=DEVICE)
    x, up = drawn(2, 5, 24), drawn(2, 5, wide, seed=1).detach()
    y = fused.linear(layer, x)
    found = torch.autograd.grad(y, (x, *layer.parameters()), up)
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = F.linear(*exact)
    close(y, expected, 1e-2 if GPU else 1e-6)
    for one, other in zip(found, torch.autograd.grad(expected, exact, up.double()), strict=True):
        assert one.shape == other.shape
        close(one, other, 1e-2 if GPU else 2e-6)


# -- as operators of torch, and in the model --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own, in opcheck
def test_torch_accepts_the_operators():
    """Their schemas, shapes without data, and what a compiler makes of them and of their gradients."""
    x, y, weight = drawn(2, 5, 16), drawn(2, 5, 16, seed=1), drawn(16, seed=2)
    for operator, given in (
        (fused.attention, (drawn(2, 5, 48), 1, 0.2, seeds(4), 0)),
        (fused.add_norm, (x, y, weight, None, 0.2, seeds(4), 0)),
        (fused.add_norm, (x, y, weight, drawn(16, seed=3), 0.0, seeds(4), 0)),
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


@pytest.mark.parametrize("change", [{}, {"bias": False}, {"gelu": "tanh"}])
def test_a_model_finds_its_kernels_prepared(change, monkeypatch):
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

    for name in [name for name in vars(fused.kernels) if name.endswith(("forward", "backward", "sums", "product"))]:
        monkeypatch.setattr(fused.kernels, name, Kernel(getattr(fused.kernels, name)))
    model = made(dropout=0.25, **change)
    idx = torch.arange(SPEC.block_size, device=DEVICE)[None]
    model.train()
    gradients(model, fused.logits, idx)
    fused.logits(model.eval(), idx)
    used = set(calls)
    calls.clear()
    fused.prepare(model.spec, torch.float32, idx.device)
    assert set(calls) == used


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo only hides it
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "highest"),
        (torch.float32, "high"),
        pytest.param(torch.float16, "highest", marks=pytest.mark.slow),
    ],
)
def test_blocks_share_what_is_compiled_of_one(dtype, precision):
    """And compute what is written: forward and gradients, in training with the same masks and in evaluation."""
    torch.set_float32_matmul_precision(precision)
    frames = []

    def seen(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pieces = fused.Pieces(*(torch.compile(piece, backend=seen, dynamic=False) for piece in fused.Pieces()))
    model = made(dropout=0.25, n_layer=4)
    idx = torch.arange(18, device=DEVICE).view(2, 9) * 7 % 64
    for training in (True, False):
        model.train(training)
        results = []
        for some in (fused.Pieces(), pieces):
            torch.manual_seed(4)
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                loss = fused.loss(model, some, idx, idx)
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    assert len(frames) == 5  # embedding and block, in training and in evaluation, and the loss of both


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
