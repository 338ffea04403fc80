"""The numpy reference against torch's autograd in float64, and both frameworks against it in float32."""

import numpy as np
import pytest
import torch
from fakes.support import FRAMEWORKS

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.nets import Feed, LMSpec, MLPSpec, Spec, drawn
from nanogpt_mac.backends.torch_nets import LM, MLP
from nanogpt_mac.records.bench import Way
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.nets.measured import distance
from nanogpt_mac.suites.nets.twin import Twin

SPECS: list[Spec] = [MLPSpec((30, 8, 8, 10)), LMSpec(2, 32, 4, 16, 23)]
ON_CPU = [name for name in FRAMEWORKS if kinds.KINDS[name].nets]


def data(spec: Spec, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    if isinstance(spec, MLPSpec):
        return rng.random((rows, spec.widths[0]), np.float32), rng.integers(0, 10, rows, np.int32)
    tokens = rng.integers(0, spec.vocab, (rows, spec.context + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("spec", SPECS)
def test_against_torch_in_float64(spec: Spec) -> None:
    inputs, targets = data(spec)
    weights = {name: values + np.float32(0.01) for name, values in drawn(spec, 1).items()}
    model = (MLP if isinstance(spec, MLPSpec) else LM)(spec).double()
    if isinstance(spec, LMSpec):
        model.positions = model.positions.double()
    model.load_state_dict({name: torch.from_numpy(values).double() for name, values in weights.items()})
    parameters = model.parameters()
    optimizer = (
        torch.optim.SGD(parameters, lr=spec.lr)
        if isinstance(spec, MLPSpec)
        else torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    )
    twin = Twin(spec, weights)
    for batch in (slice(0, 16), slice(16, 32), slice(32, 40)):
        rows = torch.from_numpy(inputs[batch])
        rows = rows.double() if isinstance(spec, MLPSpec) else rows.long()
        optimizer.zero_grad()
        logits = model(rows)
        classes = torch.from_numpy(targets[batch]).long().flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), classes)
        loss.backward()
        np.testing.assert_allclose(twin.logits(inputs[batch]), logits.detach().numpy(), rtol=1e-9, atol=1e-12)
        value, gradients = twin.gradients(inputs[batch], targets[batch])
        assert value == pytest.approx(loss.item(), rel=1e-12)
        assert distance({n: p.grad.numpy() for n, p in model.named_parameters()}, gradients) < 1e-10
        optimizer.step()
        twin.step(inputs[batch], targets[batch])
        assert distance({n: p.detach().numpy() for n, p in model.named_parameters()}, twin.weights) < 1e-10


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("placement", "sync"),
    [
        ("resident", "epoch"),
        pytest.param("resident", "batch", marks=pytest.mark.slow),
        pytest.param("per_batch", "batch", marks=pytest.mark.slow),
        ("per_batch", "epoch"),
    ],
)
def test_every_framework_reaches_its_weights(backend: str, spec: Spec, placement: str, sync: str) -> None:
    kind = kinds.KINDS[backend]
    device = kind.load().device_of(kind)
    arrays = ways.arrays(Way(name=backend, label="", backend=backend, device=device), BenchConfig())
    inputs, targets = data(spec)
    net = kind.load_nets()(arrays, spec, Feed(16, placement, sync), inputs, targets)
    weights, order = drawn(spec, 1), np.random.default_rng(0).permutation(40)
    twin = Twin(spec, weights)
    twin.epoch(inputs, targets, order, 16)
    for _ in range(2):  # the second time the optimizer must have forgotten the first
        net.load(weights)
        assert distance(net.weights(), weights) == 0
        arrays.wait(net.epoch(order))
        assert distance(net.weights(), twin.weights) < 1e-5
    logits = arrays.get(net.infer(net.put(inputs[:4])))
    np.testing.assert_allclose(logits, twin.logits(inputs[:4]), rtol=1e-3, atol=1e-4)


def test_parameters_are_as_many_as_mlx_examples_has() -> None:
    """12 blocks, 1024 wide, on PTB's 10,000 words: embedding and head, 12 d^2 a block, biases of two layers, norms."""
    spec, w = LMSpec(12, 1024, 16, 1024, 10_000), 1024
    found = sum(int(np.prod(shape)) for shape in spec.shapes.values())
    assert found == 10_000 * w + 12 * (12 * w * w + 5 * w + 4 * w) + 2 * w + 10_000 * w + 10_000


def test_rows_on_which_rounding_decides_are_left_out() -> None:
    spec = MLPSpec((4, 3, 2))
    weights = drawn(spec, 1)
    inputs = np.random.default_rng(0).random((20, 4), np.float32)
    first, bias = weights["layers.0.weight"], weights["layers.0.bias"]
    bias[0] = -float(first[0].astype(float) @ inputs[7].astype(float))  # row 7 has a ReLU at zero
    taken = Twin(spec, weights).clear_epoch(inputs, np.zeros(20, np.int32), np.arange(20), 20)
    assert set(range(20)) - set(taken.tolist()) == {7}


def test_what_rounding_may_do_to_a_relu_is_known() -> None:
    """A sign that float32 cannot tell moves the gradients that it reaches, by as much as is said, and no others."""
    spec = LMSpec(2, 32, 4, 16, 23)
    inputs, targets = data(spec, 8)
    weights = drawn(spec, 1)
    assert set(Twin(spec, weights).doubts(inputs, targets)) == set(weights)
    weights["blocks.1.linear1.weight"][3] = 0
    found, doubts = [], []
    for sign in (1, -1):
        weights["blocks.1.linear1.bias"][3] = sign * 1e-9
        found.append(Twin(spec, weights).gradients(inputs, targets)[1])
        doubts.append(Twin(spec, weights).doubts(inputs, targets))
    for name in weights:
        moved = distance({name: found[1][name]}, {name: found[0][name]})
        assert doubts[0][name] == pytest.approx(moved, rel=1e-3, abs=1e-6)
    assert doubts[0]["blocks.1.linear1.weight"] > 1e-2
    for name in ("head.weight", "ln.weight", "blocks.1.linear2.bias"):
        assert max(doubts[0][name], doubts[1][name]) < 1e-6
