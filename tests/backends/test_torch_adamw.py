"""Our AdamW on flat buffers against torch's own, bit for bit, alone and under GradScaler.

Sizes are multiples of 16: in what is left over beyond a vector torch rounds otherwise, wherever that lies.
"""

import subprocess
import sys

import pytest
import torch

from nanogpt_mac.backends.torch_adamw import AdamW

BETAS, DECAY, RATES = (0.8, 0.95), 0.2, [1e-2, 3e-3, 2e-2]


def pair(fused):
    """The same parameters twice: (ours and its parameters), (torch's and its)."""
    drawn = [torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((4, 8), (16,), (2, 24))]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in drawn] for _ in range(2))
    groups = [{"params": [p for p in theirs if p.dim() >= 2]}]
    groups += [{"params": [p for p in theirs if p.dim() < 2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY, fused=fused)
    return (AdamW({str(i): p for i, p in enumerate(ours)}, BETAS, DECAY, fused), ours), (reference, theirs)


def gradients(step, parameters, scale=1.0):
    return [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + p.numel())) * scale for p in parameters
    ]


def set_gradients(parameters, drawn):
    for p, gradient in zip(parameters, drawn, strict=True):
        p.grad = gradient


def same(adamw, ours, reference, theirs):
    for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        state = reference.state[q]
        assert torch.equal(p, q)
        for moment, expected in zip(adamw.moments[str(number)], (state["exp_avg"], state["exp_avg_sq"]), strict=True):
            assert torch.equal(moment, expected)
        assert {steps.item() for steps in adamw.steps} == {state["step"].item()}


@pytest.mark.parametrize("fused", [True, False])
def test_three_steps_are_torchs_own(fused):
    (adamw, ours), (reference, theirs) = pair(fused)
    for step, lr in enumerate(RATES):
        adamw.take(gradients(step, adamw.ordered))
        adamw.step(lr)
        set_gradients(theirs, gradients(step, theirs))
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    same(adamw, ours, reference, theirs)


def test_copies_are_by_name_and_no_part_of_what_they_copy():
    """Odd sizes, so that there are gaps between them, and vectors before matrices, which are moved behind."""
    parameters = {str(n): torch.nn.Parameter(torch.randn(size)) for n, size in enumerate([(3,), (5, 7), (17,), (2, 3)])}
    adamw = AdamW(parameters, BETAS, DECAY, fused=True)
    adamw.take([torch.randn(p.shape) for p in adamw.ordered])
    adamw.step(1e-2)
    expected = [{n: p.detach().clone() for n, p in parameters.items()}]
    expected += [{n: adamw.moments[n][i].clone() for n in parameters} for i in range(2)]
    copies = adamw.copies()
    adamw.step(1e-2)
    for copied, tree in zip(copies, expected, strict=True):
        assert {n: a.tolist() for n, a in copied.items()} == {n: t.tolist() for n, t in tree.items()}
        assert all(a.flags.c_contiguous and a.flags.writeable for a in copied.values())


def test_the_norm_of_a_large_model_is_right():
    """In one call torch adds the squares one after the other: 2e-4 too little for so many."""
    adamw = AdamW({"0": torch.nn.Parameter(torch.zeros(2500, 2001))}, BETAS, DECAY, fused=True)
    drawn = torch.randn(2500, 2001, generator=torch.Generator().manual_seed(0))
    adamw.take([drawn])
    assert adamw.clip(0.0).item() == pytest.approx(drawn.double().norm().item(), rel=3e-6)


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_accumulated_gradients_are_clipped_as_torch_does(limit):
    (adamw, _), (_, theirs) = pair(True)
    first, second = gradients(0, adamw.ordered), gradients(1, adamw.ordered)
    adamw.take(first)
    adamw.take(second, add=True)
    set_gradients(theirs, [a + b for a, b in zip(gradients(0, theirs), gradients(1, theirs), strict=True)])
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit or float("inf"))
    torch.testing.assert_close(adamw.clip(limit), expected)
    adamw.take(first)  # what was clipped is not added to
    adamw.take(second, add=True)
    adamw.clip(limit)
    clipped = sorted(torch.cat([p.grad.flatten() for p in theirs]).tolist())
    assert sorted(adamw.gradients[adamw.gradients != 0].tolist()) == pytest.approx(clipped, rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("overflow", [True, False])
def test_a_scaler_unscales_and_leaves_out_what_overflowed(fused, overflow):
    (adamw, ours), (reference, theirs) = pair(fused)
    scalers = [torch.amp.GradScaler("cpu", 8.0) for _ in range(2)]
    for step, lr in enumerate(RATES):
        for scaler, parameters in zip(scalers, (adamw.ordered, theirs), strict=True):
            scaler.scale(torch.ones(()))  # makes its scale
            drawn = gradients(step, parameters, scaler.get_scale())
            if overflow and step == 2:
                drawn[0][0, 0] = float("inf")
            if parameters is theirs:
                set_gradients(theirs, drawn)
            else:
                adamw.take(drawn)
        scalers[0].unscale_(adamw)
        scalers[0].step(adamw, lr)
        for group in reference.param_groups:
            group["lr"] = lr
        scalers[1].unscale_(reference)
        scalers[1].step(reference)
        for scaler in scalers:
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == (4.0 if overflow else 8.0)
    same(adamw, ours, reference, theirs)
    assert adamw.steps[0].item() == 3.0 - overflow


@pytest.mark.slow
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
