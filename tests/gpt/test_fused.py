"""The model by our Triton kernels against the model by torch's own: loss, logits, gradients, and what is prepared.

Without an NVIDIA GPU Triton's interpreter runs them on the CPU, program by program.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes.kernels import CLOSE, DEVICE, GPU, close, drawn
from torch.nn import functional as F

from nanogpt_mac.backends.torch_adamw import AdamW
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.gpt.torch_gpt import GPT

with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined, and Triton's own
    pytest.importorskip("triton", minversion=None if GPU else "3.7")  # whose interpreter reads numpy's newer arrays
    from nanogpt_mac.gpt import fused
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


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_linear_layer_takes_it_at_full_precision_alone(precision, monkeypatch):
    torch.set_float32_matmul_precision(precision)
    calls = []
    monkeypatch.setattr(products, "product", lambda a, b: calls.append(a.shape) or a @ b)
    layer = torch.nn.Linear(24, 10, device=DEVICE)
    x = drawn(2, 5, 24)
    near = products.Near(*(p.detach() for p in layer.parameters()))
    close(fused.linear(layer, near, x), layer(x).double(), 1e-2 if GPU else 1e-6)
    fused.linear(layer, products.Near(*(p.bfloat16() for p in near)), x.bfloat16())
    assert calls == ([(10, 24)] if precision == "highest" else [])


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("wide", "bias"), [(40, False), (10, True)])
def test_a_linear_layer_and_its_gradients_are_what_is_written(wide, bias, dtype):
    """By both ways in which the weight's gradient is taken; of 16 bits a weight's gradient is not rounded to them."""
    torch.set_float32_matmul_precision("high")
    layer = torch.nn.Linear(24, wide, bias=bias, device=DEVICE)
    x, up = drawn(2, 5, 24, dtype=dtype), drawn(2, 5, wide, seed=1, dtype=dtype).detach()
    near = [p.detach().to(dtype) for p in layer.parameters()]
    y = fused.linear(layer, products.Near(F.pad(near[0], (0, 0, 0, 3)), *(F.pad(b, (0, 3)) for b in near[1:])), x)
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
        monkeypatch.setattr(ops, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*given, **named):
                kinds = [(v.dtype, v.data_ptr() % 16) if isinstance(v, torch.Tensor) else type(v) for v in given]
                calls.append((self.kernel.__name__, *kinds, *sorted((k, v) for k, v in named.items() if k.isupper())))
                self.kernel[grid](*given, **named)

            return run

    for name in [
        name for name in vars(ops.kernels) if name.endswith(("forward", "backward", "sums", "product", "transpose"))
    ]:
        monkeypatch.setattr(ops.kernels, name, Kernel(getattr(ops.kernels, name)))
    model = made(dropout=0.25, **change)
    window = torch.arange(SPEC.block_size + 1, device=DEVICE)[None]
    idx, targets = window[:, :-1], window[:, 1:]
    model.train()
    adamw = AdamW(dict(model.named_parameters()), (0.8, 0.95), 0.1, fused=True, own=ops.adamw)
    adamw.take(torch.autograd.grad(fused.loss(model, idx, targets), adamw.ordered))
    adamw.clip(1.0)
    adamw.step(1e-3)
    with torch.no_grad():
        fused.loss(model.eval(), idx, targets)
    used = set(calls)
    calls.clear()
    ops.prepare(model.spec, torch.float32, idx.device).result()
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
