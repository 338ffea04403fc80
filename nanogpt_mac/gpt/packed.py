"""Attention and the residual sum with dropout, in few kernels: for devices where a launch costs more than its work.

Autograd would write each gradient of q, k and v by itself and join them; here they are written where they belong.
Compiled for a CPU, attention and GELU are written as Inductor makes the most of them.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data.default


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int, causal: Tensor, keep: Tensor | None) -> Tensor:
        B, T, width = qkv.shape
        hs = width // (3 * n_head)
        packed = qkv.view(B, T, 3, n_head, hs).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, hs)
        q, k, v = packed.unbind(0)
        scale = 1.0 / math.sqrt(hs)
        if _compiled_for_a_cpu(qkv):  # what is added and multiplied is fused with the softmax
            scores = torch.bmm(q, k.transpose(1, 2)).float() * scale + causal
        else:
            scores = torch.baddbmm(causal, q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        kept = (weights if keep is None else weights * keep.view_as(weights)).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights, kept, keep, causal)
        return torch.bmm(kept, v).view(B, n_head, T, hs).transpose(1, 2).reshape(B, T, n_head * hs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, weights, kept, keep, causal = ctx.saved_tensors
        (grad,) = gradients
        (B, T, C), hs = grad.shape, q.shape[-1]
        grad = grad.view(B, T, C // hs, hs).transpose(1, 2).reshape(q.shape)
        packed = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)
        dq, dk, dv = packed.unbind(0)
        torch.bmm(kept.transpose(1, 2), grad, out=dv)
        dweights = torch.bmm(grad, v.transpose(1, 2))
        dweights = dweights.float() if keep is None else dweights * keep.view_as(dweights)
        dscores, scale = SOFTMAX_BACKWARD(dweights, weights, -1, torch.float32), 1.0 / math.sqrt(hs)
        if _compiled_for_a_cpu(grad):
            dscores = (dscores * scale).to(q.dtype)
            torch.bmm(dscores, k, out=dq)
            torch.bmm(dscores.transpose(1, 2), q, out=dk)
        else:
            dscores, zero = dscores.to(q.dtype), causal[:1, :1].to(q.dtype)  # what is added is left out by beta=0
            torch.baddbmm(zero, dscores, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(zero, dscores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        return packed.view(3, B, C // hs, T, hs).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C), None, None, None


def packed_attention(qkv: Tensor, n_head: int, causal: Tensor, keep: Tensor | None) -> Tensor:
    """Causal attention (B, T, C) of packed `qkv` (B, T, 3 C), in its dtype with the softmax in float32.

    `causal` (T, T) is added to the scores: 0 where a token may look, minus infinity where not. `keep`, of B nh T T
    float32 elements, multiplies the weights: 0 or 1 / (1 - dropout); None drops nothing.
    """
    return cast(Tensor, _Attention.apply(qkv, n_head, causal, keep))


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.dtype = y.dtype
        return torch.addcmul(x, y.to(x.dtype), keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (keep,), (grad,) = ctx.saved_tensors, gradients
        return grad, (grad * keep).to(ctx.dtype), None


def add_scaled(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """x + y * keep, all of one shape; in x's dtype."""
    return cast(Tensor, _AddScaled.apply(x, y, keep))


class _GELU(torch.autograd.Function):
    """With its slope: both need exp(-x^2 / 2), half of the work. erf is Abramowitz and Stegun's 7.1.26, off by at most
    1.5e-7, as torch's own is with AVX-512."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.float()
        bell, t = torch.exp(-0.5 * y * y), 1 / (1 + 0.3275911 / math.sqrt(2) * y.abs())
        series = -0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
        tail = 0.5 * t * (0.254829592 + t * series) * bell  # of the normal distribution, beyond |x|
        below = torch.where(y > 0, 1 - tail, tail)
        slope = below + y * bell * (1 / math.sqrt(2 * math.pi))
        both = torch.stack(
            ((y * below).to(x.dtype), slope.to(x.dtype))
        )  # else the slope is computed anew where it is used
        ctx.save_for_backward(both[1])
        return both[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.saved_tensors[0]


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU of `x`, float32 or of 16 bits, in its dtype and shape; `approximate`: none or tanh, as torch has it."""
    own = approximate == "none" and x.requires_grad and _compiled_for_a_cpu(x)
    return cast(Tensor, _GELU.apply(x)) if own else F.gelu(x, approximate=approximate)


def _compiled_for_a_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.is_cpu
