"""Training on the device: gradients, optimizers, autocast, loss scaling, and a GPT that follows the CPU bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanogpt_mac import simulator

simulator.install()


class Block(nn.Module):
    def __init__(self, width: int, fused_attention: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.fused_attention = fused_attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        if self.fused_attention:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / (width // 2) ** 0.5
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallGPT(nn.Module):
    def __init__(self, fused_attention: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(17, 32), nn.Embedding(16, 32)
        self.blocks = nn.Sequential(Block(32, fused_attention), Block(32, fused_attention))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 17, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(device: str, fused_attention: bool, steps: int = 20, dtype: torch.dtype | None = None) -> list[float]:
    torch.manual_seed(0)
    model = SmallGPT(fused_attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(17, (4, 17), generator=generator).to(device)
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_manual_attention_is_bit_equal_to_the_cpu() -> None:
    assert train("mps", False) == train("cpu", False)


def test_fused_attention_follows_the_cpu() -> None:
    """The device takes the math path where the CPU has a fused kernel: another order of the same sums."""
    mps, cpu = train("mps", True), train("cpu", True)
    assert max(abs(a - b) for a, b in zip(mps, cpu, strict=True)) < 2e-6
    assert mps[-1] < mps[0] - 0.05


def test_bf16_autocast_follows_the_cpu() -> None:
    mps, cpu = train("mps", True, dtype=torch.bfloat16), train("cpu", True, dtype=torch.bfloat16)
    assert max(abs(a - b) for a, b in zip(mps, cpu, strict=True)) < 3e-2
    assert mps != train("mps", True)


def test_linear_stays_whole_and_attention_follows_the_mps_rule() -> None:
    simulator.reset_counts()
    train("mps", True, steps=1)
    calls = simulator.operators()
    assert calls["aten::linear"] == 9
    assert calls["aten::linear_backward"] == 9
    assert "aten::addmm" not in calls
    assert "aten::_scaled_dot_product_attention_math_for_mps" not in calls  # gradients: plain math
    assert calls["aten::_softmax"] == 2
    assert simulator.operators("fallback") == simulator.operators("refused") == {}

    q = torch.randn(1, 2, 8, 4, device="mps")
    simulator.reset_counts()
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert simulator.operators() == {"aten::_scaled_dot_product_attention_math_for_mps": 1}
    c = q.cpu()
    torch.testing.assert_close(y.cpu(), F.scaled_dot_product_attention(c, c, c, is_causal=True))
    simulator.reset_counts()
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert "aten::_scaled_dot_product_attention_math_for_mps" not in simulator.operators()
    mask = torch.ones(8, 8, dtype=torch.bool, device="mps").tril()
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, attn_mask=mask), y)


OPTIMIZERS = [
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.AdamW, {"foreach": False}),
    (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.SGD, {"fused": True, "lr": 0.1, "momentum": 0.9}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda v: str(v))
def test_optimizers_follow_the_cpu(kind: type[torch.optim.Optimizer], options: dict) -> None:
    torch.manual_seed(0)
    reference = nn.Linear(8, 8)
    model = copy.deepcopy(reference).to("mps")
    pairs = [(reference, kind(reference.parameters(), **options)), (model, kind(model.parameters(), **options))]
    for _ in range(5):
        x = torch.randn(3, 8)
        for module, optimizer in pairs:
            optimizer.zero_grad()
            module(x.to(module.weight.device)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight.cpu(), reference.weight, rtol=1e-6, atol=1e-7)


def test_defaults_of_foreach_and_fused() -> None:
    from torch.utils._foreach_utils import (
        _get_foreach_kernels_supported_devices,
        _get_fused_kernels_supported_devices,
    )

    assert "mps" in _get_fused_kernels_supported_devices()
    assert "mps" not in _get_foreach_kernels_supported_devices()


def test_autocast_dtypes() -> None:
    layer = nn.Linear(4, 4, device="mps")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("mps", dtype=dtype):
            assert torch.is_autocast_enabled("mps")
            y = layer(torch.ones(2, 4, device="mps"))
            assert y.dtype == dtype
            assert F.layer_norm(y, (4,)).dtype in (dtype, torch.float32)
        y.float().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
    with pytest.warns(UserWarning, match="In MPS autocast, but the target dtype is not supported"):
        torch.autocast("mps", dtype=torch.float64)


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("mps", init_scale=128.0, growth_interval=1)
    layer = nn.Linear(4, 4, device="mps")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(2, 4, device="mps")).sum() * factor).backward()
        scaler.unscale_(optimizer)
        if factor == 1.0:
            torch.testing.assert_close(layer.weight.grad, torch.full((4, 4), 2.0, device="mps"))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 128.0  # doubled, then halved by the overflow, whose step is skipped
    torch.testing.assert_close(before - layer.weight.detach(), torch.full((4, 4), 0.2, device="mps"))


def test_convolution_pooling_recurrence_and_checkpointing() -> None:
    torch.manual_seed(0)
    convolution = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 2)
    )
    image = torch.randn(2, 3, 8, 8)
    for module, x in (
        (convolution, image),
        (nn.LSTM(4, 4), torch.randn(3, 1, 4)),
        (nn.GRU(4, 4), torch.randn(3, 1, 4)),
    ):
        results = []
        for device in ("cpu", "mps"):
            m = copy.deepcopy(module).to(device)
            y = m(x.to(device))
            y = y if isinstance(y, torch.Tensor) else y[0]
            y.square().sum().backward()
            results.append([y.detach().cpu(), *(p.grad.cpu() for p in m.parameters())])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(4, 4, device="mps")
    x = torch.ones(2, 4, device="mps", requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
