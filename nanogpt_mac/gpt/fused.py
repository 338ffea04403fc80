"""torch_gpt's forward pass on an NVIDIA GPU by the operators of triton_ops.py: same arithmetic, nothing left to fuse.

All weights are cast to 16 bits by one kernel, and their gradients are float32. Loss and logits are what GPT computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogpt_mac.gpt import triton_ops as ops
from nanogpt_mac.gpt import triton_products as products
from nanogpt_mac.gpt.torch_gpt import GPT, Block, LayerNorm


def logits(model: GPT, idx: Tensor, last: bool = False) -> Tensor:
    """Logits (B, T, V) in float32 of tokens `idx` (B, T): what `model` computes by itself, dropout included.

    `last`: of the last token alone, (B, 1, V).
    """
    y, of_head = _stream(model, idx)
    return head(model, y[:, -1:] if last else y, of_head)[..., : model.spec.vocab_size].float()


def loss(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
    return nats(model, *_stream(model, idx), targets)


def _stream(model: GPT, idx: Tensor) -> tuple[Tensor, products.Near]:
    """The last layer norm's output (B, T, C), and what the head computes with."""
    t: Any = model.transformer
    drawn, dropped, after, (of_head, *of_blocks) = seeds(model, idx), dropout(model), norms(model)[2::2], near(model)
    x, y = enter(model, idx, drawn)
    for layer, one in enumerate(t["h"]):
        given = one, of_blocks[4 * layer : 4 * layer + 4], after[layer], x, y, drawn[layer], dropped
        if model.checkpointing and model.training:  # masks come from seeds that are given
            x, y = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            x, y = block(*given)
    return y, of_head


def norms(model: GPT) -> list[LayerNorm]:
    """In the order in which they are computed: the first alone, the others behind a residual sum each."""
    t: Any = model.transformer
    return [norm for block in t["h"] for norm in (block.ln_1, block.ln_2)] + [t["ln_f"]]


def near(model: GPT) -> list[products.Near]:
    """Of the head, its rows padded, and of each block's four linear layers: in autocast's dtype where that is on."""
    t: Any = model.transformer
    layers = [of for b in t["h"] for of in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    own: list[Tensor] = [p.detach() for of in (t["wte"], *layers) for p in of.parameters()]
    if torch.is_autocast_enabled(own[0].device.type):
        dtype = torch.get_autocast_dtype(own[0].device.type)
        lower = [torch.empty_like(p, dtype=dtype) for p in own]
        torch._foreach_copy_(lower, own)  # one kernel, where each weight's own takes as long as its launch
        own = lower
    biased, rows = model.spec.bias, _longer(own[0], ops.padded(len(own[0])))
    return [products.Near(rows), *(products.Near(*own[i : i + 1 + biased]) for i in range(1, len(own), 1 + biased))]


def _longer(weight: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind it; itself where it has as many: padding copies all."""
    return weight if len(weight) == rows else F.pad(weight, (0, 0, 0, rows - len(weight)))


def seeds(model: GPT, idx: Tensor) -> Tensor:
    """A row a layer, int64, of its masks' seeds, the embedding's behind the first's; any numbers where nothing is
    dropped."""
    layers = model.spec.n_layer
    return torch.randint(2**32, (layers, 4), device=idx.device) if dropout(model) else idx[:1].expand(layers, -1)


def dropout(model: GPT) -> float:
    """The share that is dropped now."""
    return model.spec.dropout if model.training else 0.0


def enter(model: GPT, idx: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream's beginning and its layer norm, (B, T, C) both, in the dtypes that a block returns."""
    t: Any = model.transformer
    wte, wpe, norm, device = t["wte"].weight, t["wpe"].weight, norms(model)[0], idx.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return ops.embed_norm(idx, wte, wpe, norm.weight, norm.bias, dtype, dropout(model), drawn[0], 3)


def block(
    of: Block, near: Sequence[products.Near], following: LayerNorm, x: Tensor, y: Tensor, drawn: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    """The residual stream x and the norm y of it, (B, T, C), after a block; `following` is the norm behind it."""
    x, y = add(of.ln_2, x, attend(of, near[:2], y, drawn, dropout), drawn, 1, dropout)
    return add(following, x, mlp(of, near[2:], y), drawn, 2, dropout)


def attend(of: Block, near: Sequence[products.Near], y: Tensor, drawn: Tensor, dropout: float) -> Tensor:
    """A block's attention with both projections, (B, T, C)."""
    y, _ = ops.attention(linear(of.attn.c_attn, near[0], y), of.attn.n_head, dropout, drawn, 0)
    return linear(of.attn.c_proj, near[1], y)


def linear(of: nn.Linear | nn.Embedding, near: products.Near, x: Tensor) -> Tensor:
    """What `of`, whose numbers in x's dtype are `near`, makes of `x` (..., K)."""
    rows, bias = x.flatten(0, -2), getattr(of, "bias", None)
    if products.exact(x.dtype):
        y = products.product(rows, _longer(of.weight, len(near.weight)).T)
        y = y if bias is None else y + bias
    else:
        y = cast(Tensor, products.Linear.apply(rows, of.weight, bias, *near))
    return y.unflatten(0, x.shape[:-1])


def mlp(of: Block, near: Sequence[products.Near], y: Tensor) -> Tensor:
    """A block's MLP, (B, T, C)."""
    gelu = ops.gelu if of.mlp.gelu.approximate == "none" else of.mlp.gelu
    return linear(of.mlp.c_proj, near[1], gelu(linear(of.mlp.c_fc, near[0], y)))


def add(norm: LayerNorm, x: Tensor, y: Tensor, drawn: Tensor, place: int, dropout: float) -> tuple[Tensor, Tensor]:
    """The residual sum behind a block's attention (`place` 1) or MLP (2), with dropout, and the norm behind it."""
    return ops.add_norm(x, y, norm.weight, norm.bias, dropout, drawn, place)


def head(model: GPT, y: Tensor, near: products.Near) -> Tensor:
    """Logits (B, T, V and more) of the last layer norm's output, in its dtype: `near` has the embedding's rows."""
    t: Any = model.transformer
    return linear(t["wte"], near, y)


def nats(model: GPT, y: Tensor, near: products.Near, targets: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of `targets` (B, T) after the last layer norm's output (B, T, C)."""
    mean, _ = ops.cross_entropy(head(model, y, near), targets, model.spec.vocab_size)
    return mean
