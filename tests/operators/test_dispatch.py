"""The dispatcher's table for MPS as torch prints it, and the registrations by hand that a torch has in force."""

import pytest

from nanogpt_mac.operators import by_hand, dispatch
from nanogpt_mac.operators.dispatch import Dispatch

AROUND = "CPU: registered at RegisterCPU.cpp:1 [kernel]\n{}Meta: registered at x.py:2 [kernel]\n"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("MPS: registered at aten/RegisterMPS_0.cpp:3 [kernel]", Dispatch.KERNEL),
        ("MPS: registered at aten/src/ATen/mps/MPSFallback.mm:93 [backend fallback]", Dispatch.MISSING),
        ("MPS: registered at aten/src/ATen/mps/MPSFallback.mm:75 [kernel]", Dispatch.BY_HAND),
        ("MPS: registered at RegisterCompositeImplicitAutograd.cpp:5 [math kernel]", Dispatch.COMPOSITE),
        ("MPS: registered at RegisterComposite.cpp:6 [default backend kernel]", Dispatch.COMPOSITE),
        ("MPS: fallthrough registered at somewhere:7", Dispatch.UNKNOWN),
        ("", Dispatch.MISSING),  # no row: nothing is registered, not even a fallback
    ],
)
def test_every_row(monkeypatch, row, found):
    import torch

    asked = []
    text = AROUND.format(f"{row}\n" if row else "")
    monkeypatch.setattr(torch._C, "_dispatch_dump_table", lambda op: asked.append(op) or text)
    assert dispatch.dispatch_of("mm.out") is dispatch.dispatch_of("mine::mm") is found
    assert asked == ["aten::mm.out", "mine::mm"]


def test_the_torch_at_hand_has_no_mps_kernel_and_knows_its_operators():
    assert dispatch.dispatch_of("no_such_operator") is Dispatch.UNKNOWN
    assert dispatch.dispatch_of("_pdist_forward") is Dispatch.MISSING  # on a Mac as well
    assert dispatch.dispatch_of("matmul") in (Dispatch.COMPOSITE, Dispatch.KERNEL)


def test_a_registration_by_hand_stands_until_its_operator_has_a_kernel():
    assert set(by_hand.in_force(set())) == {row.op for row in by_hand.LIST}
    newer = by_hand.in_force({"_linalg_svd", "_linalg_svd.U"})
    assert set(newer) == {row.op for row in by_hand.LIST} - {"linalg_svd", "linalg_svd.U"}
    assert {"embedding_renorm_", "_slow_conv2d_forward"} < set(newer)
    assert [op for op, row in newer.items() if row.raises] == ["_slow_conv2d_forward"]
    assert "embedding_renorm_" not in by_hand.in_force({"embedding_renorm_"})
