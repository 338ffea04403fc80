"""GPT-2 as in nanoGPT, in torch. Its twin, line for line, is mlx_gpt.py.

Shapes in the comments: B sequences, T tokens, C = n_embd channels, nh = n_head heads of hs = C / nh, V = vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogpt_mac.gpt.spec import GPTSpec


class KVCache:
    """Keys and values, (B, nh, T, hs), of the tokens seen so far, one pair a layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, after those of new ones were added."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)  # (B, nh, past + T, hs)
        self.layers[layer] = k, v
        return k, v


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, fused."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and those before it, in each of nh heads."""

    def __init__(self, spec: GPTSpec, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(spec.n_embd, 3 * spec.n_embd, bias=spec.bias)
        self.c_proj = nn.Linear(spec.n_embd, spec.n_embd, bias=spec.bias)
        self.resid_dropout = nn.Dropout(spec.dropout)
        self.n_head, self.dropout, self.layer = spec.n_head, spec.dropout, layer

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, 4 C wide in between, with a GELU."""

    def __init__(self, spec: GPTSpec) -> None:
        super().__init__()
        self.c_fc = nn.Linear(spec.n_embd, 4 * spec.n_embd, bias=spec.bias)
        self.c_proj = nn.Linear(4 * spec.n_embd, spec.n_embd, bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout)
        self.gelu = nn.GELU(approximate="none" if spec.gelu == "exact" else "tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C) -> (B, T, 4 C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each reads a layer norm of the residual stream and adds to it."""

    def __init__(self, spec: GPTSpec, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(spec.n_embd, spec.bias)
        self.attn = CausalSelfAttention(spec, layer)
        self.ln_2 = LayerNorm(spec.n_embd, spec.bias)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Weights are loaded, never drawn here. Mixed precision is the caller's `torch.autocast`.

    With `checkpointing` the backward pass computes each block's activations anew, and only their inputs are kept.
    """

    def __init__(self, spec: GPTSpec, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(spec.vocab_size, spec.n_embd),
                "wpe": nn.Embedding(spec.block_size, spec.n_embd),
                "drop": nn.Dropout(spec.dropout),
                "h": nn.ModuleList(Block(spec, i) for i in range(spec.n_layer)),
                "ln_f": LayerNorm(spec.n_embd, spec.bias),
            }
        )

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) in float32 of tokens `idx` (B, T); with a cache, they are T new tokens that follow its own.

        A cache that holds tokens takes one further token at a time.
        """
        t: Any = self.transformer
        start = cache.length if cache is not None else 0
        # A slice, not a lookup: compiled for Metal, torch 2.13 gets a lookup's gradient wrong (docs/method.md).
        pos = t["wpe"].weight[start : start + idx.shape[1]]  # (T, C)
        x = t["drop"](t["wte"](idx) + pos)  # (B, T, C)
        for block in t["h"]:
            again = self.checkpointing and self.training
            x = checkpoint(block, x, cache, use_reentrant=False) if again else block(x, cache)
        if cache is not None:
            cache.length += idx.shape[1]
        # (B, T, V): the head's weight is the embedding's
        return F.linear(t["ln_f"](x), t["wte"].weight).float()

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
        logits = self(idx)
        # of (B T, V) and (B T,)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
