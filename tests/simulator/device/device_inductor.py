"""torch.compile on the device: Inductor's own Metal kernels, executed, against eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanogpt_mac import simulator

simulator.install()
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile has warnings of its own

TARGETS = torch.randint(17, (64,), generator=torch.Generator().manual_seed(0)).to("mps")
CASES = {
    "gelu": (lambda x: F.gelu(x), (4, 32)),
    "reductions": (
        lambda x, w, b, y: (
            F.softmax(F.layer_norm(x, (160,), w, b), -1)
            + x.amax(-1, keepdim=True) * x.argmax(-1, keepdim=True)
            + y.var(-1).sum()  # longer than a threadgroup
        ),
        (6, 160),
        (160,),
        (160,),
        (3, 1500),
    ),
    "cross entropy": (lambda x: F.cross_entropy(x, TARGETS), (64, 17)),
    "embedding": (lambda x: F.embedding(TARGETS, x), (17, 32)),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *[(2, 2, 16, 8)] * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, *shapes = CASES[case]
    inputs = [torch.randn(*shape, device="mps", requires_grad=True) for shape in shapes]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    simulator.clear_launches()
    expected = function(*inputs)
    assert not simulator.launches()
    got = torch.compile(function, dynamic=False)(*twins)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    got.backward(gradient)
    assert simulator.launches()
    for a, b in zip([got, *(x.grad for x in twins)], [expected, *(x.grad for x in inputs)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_index_out_of_range_is_reported() -> None:
    torch._dynamo.reset()
    table = torch.randn(5, 3, device="mps")
    look_up = torch.compile(lambda i: table[i] * 2, dynamic=False)
    torch.testing.assert_close(look_up(torch.tensor([1, 4], device="mps")), table[[1, 4]] * 2)
    with pytest.raises(RuntimeError, match=r"out of range|out of bounds"):
        look_up(torch.tensor([1, 7], device="mps"))
