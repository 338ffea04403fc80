"""Products of matrices as operators that autograd and a compiler know, and the linear layer that a model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import register_autograd, register_fake

from nanogpt_mac.gpt import triton_kernels as kernels

TILE = {"ROWS": 128, "COLUMNS": 64, "STEP": 32, "BAND": 8, "num_warps": 8, "num_stages": 3}  # of a product of float32
WIDER = {**TILE, "COLUMNS": 256, "STEP": 64}  # of 16 bits
SHARES, BUSY = 16, 1200  # into how many a product's terms are split at most, and programs that are enough


def operator(function: Callable[..., Any]) -> Any:
    """torch.library.custom_op without what that imports at its first call: Dynamo, which takes a second."""
    name = f"nanogpt_mac::{function.__name__.lstrip('_')}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    return getattr(torch.ops.nanogpt_mac, name.split("::")[1]).default


def exact(dtype: torch.dtype) -> bool:
    """Whether products are to keep what float32 holds: where torch was asked for that."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


@operator
def product(a: Tensor, b: Tensor) -> Tensor:
    """`a` (M, K) times `b` (K, N), in their dtype with sums in float32. No step takes it in 16 bits; suite=gemm does.

    Each number of float32 is split into three of bfloat16, which hold it to the last bit, and six of the nine products
    are summed: the other three are below float32's rounding. A quarter of cuBLAS's error, in less time.
    """
    (M, K), N, single = a.shape, b.shape[1], a.dtype == torch.float32
    tile = TILE if single else WIDER
    tiles = triton.cdiv(M, tile["ROWS"]) * triton.cdiv(N, tile["COLUMNS"])
    count = min(SHARES, BUSY // tiles, K // 512) if single else 1  # a weight's gradient has few tiles and many terms
    length = triton.cdiv(K, max(1, count) * tile["STEP"]) * tile["STEP"]
    shares = a.new_empty(triton.cdiv(K, length), M, N)
    even = M % tile["ROWS"] == N % tile["COLUMNS"] == K % length == 0
    precision = "bf16x6" if single and a.is_cuda else "ieee"  # all that Triton's interpreter has
    kernels.product[tiles, len(shares)](
        a, b, shares, M, N, K, *a.stride(), *b.stride(), length, PRECISION=precision, EVEN=even, **tile
    )  # fmt: skip
    return shares[0] if len(shares) == 1 else shares.sum(0)


register_fake(product)(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return product(grad, b.T), product(grad.T, a).T


register_autograd(product, _product_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@operator
def transposed(x: Tensor) -> Tensor:
    """`x`^T (N, M) of (M, N), with rows of its own: in half the time of torch's copy."""
    (M, N), block = x.shape, 32
    y = x.new_empty(N, M)
    kernels.transpose[triton.cdiv(M, block), triton.cdiv(N, block)](x.contiguous(), y, M, N, BLOCK=block)
    return y


register_fake(transposed)(lambda x: x.new_empty(x.shape[1], x.shape[0]))


@operator
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad`^T (N, M) times `x` (M, K), float32 also of 16 bits, whose sums are float32 and need not be rounded."""
    if grad.dtype == torch.float32:  # the longer side as columns: a quarter faster
        return transposed(x.T @ grad) if grad.shape[1] > x.shape[1] else grad.T @ x
    if grad.is_cuda:
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return grad.T.float() @ x.float()


register_fake(weight_gradient)(lambda grad, x: grad.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32))


class Near(NamedTuple):
    """What a linear layer computes with: its numbers in the dtype of products."""

    weight: Tensor  # (N, K); there may be more rows than the layer has, of zeros
    bias: Tensor | None = None


class Linear(torch.autograd.Function):
    """x W^T + b of rows (M, K) by cuBLAS from `near`; the gradients of the float32 weight and bias are float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, near_weight: Tensor, near_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, near_weight)
        ctx.rows, ctx.biased = weight.shape[0], bias is not None
        return x @ near_weight.T if near_bias is None else torch.addmm(near_bias, x, near_weight.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        (x, weight), (grad,) = ctx.saved_tensors, gradients
        if grad.dtype == torch.float32:  # TF32 is up to a third slower where terms do not lie side by side
            weight = transposed(weight).T
        dbias = grad.sum(0, dtype=torch.float32)[: ctx.rows] if ctx.biased else None
        return grad @ weight, weight_gradient(grad, x)[: ctx.rows], dbias, None, None
