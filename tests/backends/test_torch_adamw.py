"""Our AdamW against torch's own, bit for bit, alone and under GradScaler."""

import subprocess
import sys

import pytest
import torch

from nanogpt_mac.backends.torch_adamw import AdamW

BETAS, DECAY, RATES = (0.8, 0.95), 0.2, [1e-2, 3e-3, 2e-2]


def pair(fused):
    """The same parameters twice: (ours and its parameters), (torch's and its)."""
    drawn = [torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((3, 4), (5,), (2, 2))]
    ours, theirs = ([w.clone().requires_grad_() for w in drawn] for _ in range(2))
    groups = [{"params": [p for p in theirs if p.dim() >= 2]}]
    groups += [{"params": [p for p in theirs if p.dim() < 2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY, fused=fused)
    return (AdamW(ours, BETAS, DECAY, fused), ours), (reference, theirs)


def set_gradients(step, *parameters, scale=1.0):
    for each in parameters:
        for number, p in enumerate(each):
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number))
            p.grad = None if (step, number) == (1, 2) else drawn * scale  # one has no gradient once


@pytest.mark.parametrize("fused", [True, None])
def test_three_steps_are_torchs_own(fused):
    (adamw, ours), (reference, theirs) = pair(fused)
    for step, lr in enumerate(RATES):
        set_gradients(step, ours, theirs)
        adamw.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        state = reference.state[q]
        assert torch.equal(p, q)
        assert torch.equal(adamw.exp_avg[p], state["exp_avg"])
        assert torch.equal(adamw.exp_avg_sq[p], state["exp_avg_sq"])
        assert adamw.steps[p].item() == state["step"].item()


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("overflow", [True, False])
def test_a_scaler_unscales_and_leaves_out_what_overflowed(fused, overflow):
    (adamw, ours), (reference, theirs) = pair(fused)
    scalers = [torch.amp.GradScaler("cpu", 8.0) for _ in range(2)]
    for step, lr in enumerate(RATES):
        for scaler, parameters in zip(scalers, (ours, theirs), strict=True):
            scaler.scale(torch.ones(()))  # makes its scale
            set_gradients(step, parameters, scale=scaler.get_scale())
            if overflow and step == 2:
                parameters[0].grad[0, 0] = float("inf")
        scalers[0].unscale_(adamw)
        scalers[0].step(adamw, lr)
        for group in reference.param_groups:
            group["lr"] = lr
        scalers[1].unscale_(reference)
        scalers[1].step(reference)
        for scaler in scalers:
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == (4.0 if overflow else 8.0)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert {s.item() for s in adamw.steps.values()} == {3.0 - overflow, 2.0 - overflow}


def test_gradients_are_freed():
    (adamw, ours), _ = pair(True)
    set_gradients(0, ours)
    adamw.zero_grad()
    assert all(p.grad is None for p in ours)


def test_an_eager_step_imports_no_compiler():
    code = """if True:
        import sys, numpy as np
        from fakes.support import options
        from nanogpt_mac.backends import kinds
        from nanogpt_mac.backends.base import Tokens
        from nanogpt_mac.gpt.spec import GPTSpec
        spec, text = GPTSpec(1, 1, 4, 4, 65), np.arange(60, dtype=np.uint16)
        for dtype in ("float32", "float16"):
            backend = kinds.create(spec, options("cpu", dtype=dtype), Tokens({"train": text, "val": text}, 4))
            backend.load(spec.init_weights(0))
            backend.wait(backend.step(np.zeros((1, 2), np.int64), 1e-3))
        assert "torch._dynamo" not in sys.modules
    """
    paths = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=paths)
