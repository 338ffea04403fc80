"""A step that takes our Triton kernels, and its parts, computed by Triton's interpreter on the CPU."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nanogpt_mac.backends.parts import NAMES
from nanogpt_mac.backends.torch_choices import Choices
from nanogpt_mac.gpt import torch_gpt

if torch.cuda.is_available():
    pytest.skip("Triton's interpreter and its compiler do not go together in a process", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined, and Triton's own
    pytest.importorskip("triton", minversion="3.7")  # whose interpreter reads numpy's newer arrays
    from nanogpt_mac.gpt import fused


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(Choices, "own_kernels", fused)
    monkeypatch.setattr(
        fused.ops, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1)
    )  # the interpreter runs one a time


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_its_iterations_are_torchs(make, spec, starts, monkeypatch, dtype):
    """Forward and backward pass, accumulation, float16's scaler, the norm, a clip that bites and AdamW."""
    plain = dataclasses.replace(spec, dropout=0.0, n_layer=1, bias=True)
    own = make("cpu", spec=plain, dtype=dtype, weight_decay=2.0)
    monkeypatch.setattr(Choices, "own_kernels", None)
    other = make("cpu", spec=plain, dtype=dtype, weight_decay=2.0)
    assert (own.optimizer.own is None, other.optimizer.own is None) == (False, True)
    close = {"float32": 2e-6, "float16": 3e-3}[dtype]
    for number in range(4):
        at, rate = starts(number, 2)[:, :2], 1e-3 * (number + 1)
        (loss, norm), expected = (backend.wait(backend.step(at, rate)) for backend in (own, other))
        assert norm > 1
        assert (loss, norm) == pytest.approx(expected, rel=close)
    for name, weight in own.state().weights.items():
        np.testing.assert_allclose(weight, other.state().weights[name], atol=10 * close)


def drawn_from(seed, loss):
    torch.manual_seed(seed)
    return float(loss())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        {"bias": True},
        *(pytest.param(c, marks=pytest.mark.slow) for c in ({}, {"gelu": "tanh"}, {"vocab_size": 128})),
    ],
    ids=str,
)
def test_the_chain_of_all_parts_is_the_models_loss(make, spec, starts, checkpointing, change):
    spec = dataclasses.replace(spec, dropout=0.2, **change)
    backend = make("cpu", spec=spec, checkpointing=checkpointing)
    parts, model = backend.parts(starts(0)[:, :1]), backend.model
    tokens, targets = parts.values["tokens"], parts.values["targets"]

    def own():
        return torch_gpt.mean_nats(fused.logits(model, tokens), targets).detach()

    trained = drawn_from(3, parts.loss)
    assert trained == pytest.approx(drawn_from(3, own), rel=1e-6)
    model.eval()
    evaluated = drawn_from(3, parts.loss)
    assert evaluated == pytest.approx(drawn_from(4, own), rel=1e-6)
    assert evaluated != pytest.approx(trained, rel=1e-3)
    model.own_logits = None  # and it is what torch's own kernels compute
    assert evaluated == pytest.approx(float(model.loss(tokens, targets).detach()), rel=1e-5)


@pytest.mark.parametrize("bias", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_parameter_is_of_one_part(make, spec, starts, dropout, bias):
    spec = dataclasses.replace(spec, dropout=dropout, bias=bias, n_layer=3)
    parts = make("cpu", spec=spec).parts(starts(0, 2)[:, :1]).parts
    owned = [parameter for part in parts.values() for parameter in part.parameters]
    assert sorted(owned) == sorted(spec.shapes())
    masks = {"dropout masks": 2} if dropout else {}
    assert {part.name: part.times for part in parts.values()} == {
        "batch": 1, **masks, "casts": 2, "embedding": 2, "attention": 6, "residual sums": 12, "MLP": 6,
        "head and loss": 2, "gradients": 2, "clip": 1, "optimizer": 1,
    }  # fmt: skip
    assert set(parts) <= set(NAMES)
    assert {n for n in spec.shapes() if n.startswith("transformer.h.0.ln_1.")} < set(parts["embedding"].parameters)
    assert "transformer.ln_f.weight" in parts["residual sums"].parameters
    assert "layer norm behind" in parts["residual sums"].note


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_give_gradients_of_what_they_own_and_leave_the_weights(make, spec, starts, compiled):
    backend = make("cpu", spec=dataclasses.replace(spec, dropout=0.2, n_layer=1), compile=compiled)
    before = backend.state().weights
    parts = backend.parts(starts(0)[:, :1])
    moving = {"embedding": 0, "attention": 1, "MLP": 1, "residual sums": 2, "head and loss": 2}
    for part in parts.parts.values():
        outputs = [part.forward(0), *([part.both(0)] if part.both else [])]
        assert all(np.isfinite(parts.peek(array)) for each in outputs for array in each)
        if part.both:
            places = 1 if part.name == "embedding" else part.times
            assert len(outputs[1]) == len(part.parameters) // places + moving[part.name]
    assert all((backend.state().weights[n] == w).all() for n, w in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_profiler_finds_the_parts_of_the_step(make, spec, starts, checkpointing):
    backend = make("cpu", spec=dataclasses.replace(spec, dropout=0.2, n_layer=1), checkpointing=checkpointing)
    at = starts(0)[:, :1]  # the interpreter takes its time
    found = backend.parts(at).inside(lambda: backend.wait(backend.step(at, 0.0)))
    assert set(found.parts) == set(backend.parts(at).parts)
    for part in ("embedding", "attention", "residual sums", "MLP", "head and loss"):
        assert min(found.parts[part]) > 0
    assert 0.8 * found.iteration_ms < sum(map(sum, found.parts.values())) <= found.iteration_ms
