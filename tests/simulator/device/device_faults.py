"""Each planted fault does what it says, in every form of the operator, and is gone afterwards."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from nanogpt_mac import simulator
from nanogpt_mac.errors import InputError

simulator.install()
X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="mps")


def test_missing() -> None:
    expected = F.gelu(X)
    with simulator.planted("gelu", "missing") as names:
        assert names == ["gelu", "gelu.out", "gelu_"]
        for call in (lambda: F.gelu(X), lambda: torch.ops.aten.gelu_(X.clone())):
            with pytest.raises(
                NotImplementedError, match=r"'aten::gelu\.out' is not currently implemented for the MPS"
            ):
                call()
        assert "[backend fallback]" in torch._C._dispatch_dump_table("aten::gelu.out").split("\nMPS:")[1].split("\n")[0]
    assert torch.equal(F.gelu(X), expected)


def test_fallback() -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught, simulator.planted("aten::mm", "fallback"):
            warnings.simplefilter("always")
            y = X @ X
    finally:
        torch.set_warn_always(False)
    assert y.tolist() == [[7, 10], [15, 22]]
    assert y.device.type == "mps"
    assert "'aten::mm' is not currently supported on the MPS backend" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X @ X


def test_hidden_copies() -> None:
    """No warning; a profiler sees copies to the host inside the native operator."""
    with (
        warnings.catch_warnings(),
        simulator.planted("add.Tensor", "hidden"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile,
    ):
        warnings.simplefilter("error")
        y = X + X
        z = X.clone().add_(X)
    assert y.tolist() == z.tolist() == [[2, 4], [6, 8]]
    assert y.device.type == "mps"
    parents = {e.cpu_parent.name for e in profile.events() if e.name == "aten::to" and e.cpu_parent}
    assert parents == {"aten::add", "aten::add_"}
    simulator.reset_counts()
    with simulator.planted("add.Tensor", "hidden"):
        X + X
    assert simulator.counts().waits == 3  # two inputs to the host, one result back
    simulator.reset_counts()
    X + X
    assert simulator.counts().waits == 0


def test_slow() -> None:
    simulator.reset_counts()
    with simulator.planted("mm", "slow", 30):
        X @ X
        X + X
    counts = simulator.counts()
    assert counts.device_ms == 30
    torch.mps.synchronize()
    assert simulator.counts().waited_ms > 0


def test_wrong() -> None:
    expected = X @ X
    with simulator.planted("mm", "wrong", 1.5):
        torch.testing.assert_close(X @ X, 1.5 * expected)
        out = torch.empty(0, device="mps")
        torch.mm(X, X, out=out)
        torch.testing.assert_close(out, 1.5 * expected)
    assert torch.equal(X @ X, expected)
    weight = torch.ones(3, device="mps")
    state = [torch.zeros(3, device="mps") for _ in range(3)]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    flags = {"amsgrad": False, "maximize": False}
    with simulator.planted("_fused_adamw_", "wrong", 2.0):  # returns nothing: what it writes is scaled
        torch._fused_adamw_(
            [weight], [state[0] + 1], [state[1]], [state[2]], [], [torch.ones((), device="mps")], **options, **flags
        )
    torch.testing.assert_close(weight, torch.full((3,), 1.8, device="mps"))


@pytest.mark.parametrize(
    ("op", "fault", "value", "text"),
    [
        ("no_such_operator", "missing", None, "MPS has no native kernel of that name"),
        ("mode", "missing", None, "MPS has no native kernel of that name"),
        ("layer_norm", "missing", None, "MPS has no native kernel of that name"),  # composite
        (
            "mm",
            "sluggish",
            None,
            "use one of fallback, missing, nowhere, hidden, announced, dtype_limit, shape_limit, slow",
        ),
        ("copy_", "hidden", None, "this fault itself copies by copy_"),
        ("mm", "slow", None, "slow and wrong take a value"),
        ("mm", "missing", 2.0, "slow and wrong take a value"),
    ],
)
def test_what_cannot_be_planted(op: str, fault, value, text: str) -> None:
    with pytest.raises(InputError, match=text), simulator.planted(op, fault, value):
        pass
