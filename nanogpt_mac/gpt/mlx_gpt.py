"""GPT-2 as in nanoGPT, in MLX. Its twin, line for line, is torch_gpt.py.

Shapes in the comments: B sequences, T tokens, C = n_embd channels, nh = n_head heads of hs = C / nh, V = vocab_size.

What torch.autocast does for the twin is written out here: matrix products in `dtype`, the residual stream, layer
norms, softmax and loss in float32, weights in float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from nanogpt_mac.gpt.spec import GPTSpec


class KVCache:
    """Keys and values, (B, nh, T, hs), of the tokens seen so far, one pair a layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[mx.array, mx.array]] = {}
        self.length = 0

    def append(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of all tokens so far, after those of new ones were added."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k, v = mx.concatenate([past_k, k], axis=2), mx.concatenate([past_v, v], axis=2)  # (B, nh, past + T, hs)
        self.layers[layer] = k, v
        return k, v


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, fused."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = mx.ones(size)
        self.bias = mx.zeros(size) if bias else None

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, 1e-5)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """x W^T + b in `dtype`. Rows are flattened: the weight gradient is then one product, not a batch of them."""
    y = x.reshape(-1, x.shape[-1]).astype(dtype) @ weight.astype(dtype).T  # (B T, inputs) -> (B T, outputs)
    if bias is not None:
        y = y + bias.astype(dtype)
    return y.reshape(*x.shape[:-1], -1)  # (B, T, outputs)


class Linear(nn.Module):
    """A linear layer that multiplies in `dtype`; its weight is (outputs, inputs) in float32, as torch's."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: mx.Dtype) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, inputs))
        self.bias = mx.zeros(outputs) if bias else None
        self.dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self.weight, self.bias, self.dtype)


def scaled_dot_product_attention(q: mx.array, k: mx.array, v: mx.array, dropout_p: float, is_causal: bool) -> mx.array:
    """MLX's fused attention, or, as that has no dropout, the product written out. All of (B, nh, T, hs)."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    if dropout_p == 0.0:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if is_causal else None)
    scores = (q * scale) @ k.swapaxes(-1, -2)  # (B, nh, T, T)
    if is_causal:
        scores = mx.where(mx.tri(q.shape[2], dtype=mx.bool_), scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    kept = mx.random.bernoulli(1.0 - dropout_p, weights.shape)
    return (kept * weights * (1.0 / (1.0 - dropout_p))) @ v  # (B, nh, T, hs)


def gelu(x: mx.array, approximate: str) -> mx.array:
    """GELU in float32 whatever `x` is, as torch's kernels compute it; fused by mx.compile."""
    wide = x.astype(mx.float32)
    return (nn.gelu(wide) if approximate == "none" else nn.gelu_approx(wide)).astype(x.dtype)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and those before it, in each of nh heads."""

    def __init__(self, spec: GPTSpec, layer: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.c_attn = Linear(spec.n_embd, 3 * spec.n_embd, spec.bias, dtype)
        self.c_proj = Linear(spec.n_embd, spec.n_embd, spec.bias, dtype)
        self.resid_dropout = nn.Dropout(spec.dropout)
        self.n_head, self.dropout, self.layer = spec.n_head, spec.dropout, layer

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        B, T, C = x.shape
        q, k, v = mx.split(self.c_attn(x), 3, axis=2)  # three of (B, T, C)
        q, k, v = (t.reshape(B, T, self.n_head, C // self.n_head).swapaxes(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.swapaxes(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, 4 C wide in between, with a GELU."""

    def __init__(self, spec: GPTSpec, dtype: mx.Dtype) -> None:
        super().__init__()
        self.c_fc = Linear(spec.n_embd, 4 * spec.n_embd, spec.bias, dtype)
        self.c_proj = Linear(4 * spec.n_embd, spec.n_embd, spec.bias, dtype)
        self.dropout = nn.Dropout(spec.dropout)
        self.gelu = partial(gelu, approximate="none" if spec.gelu == "exact" else "tanh")

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C) -> (B, T, 4 C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each reads a layer norm of the residual stream and adds to it."""

    def __init__(self, spec: GPTSpec, layer: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(spec.n_embd, spec.bias)
        self.attn = CausalSelfAttention(spec, layer, dtype)
        self.ln_2 = LayerNorm(spec.n_embd, spec.bias)
        self.mlp = MLP(spec, dtype)

    def __call__(self, x: mx.array, cache: KVCache | None = None) -> mx.array:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Weights are loaded, never drawn here. Mixed precision is `dtype`, the type of the matrix products."""

    def __init__(self, spec: GPTSpec, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.transformer = {
            "wte": nn.Embedding(spec.vocab_size, spec.n_embd),
            "wpe": nn.Embedding(spec.block_size, spec.n_embd),
            "drop": nn.Dropout(spec.dropout),
            "h": [Block(spec, i, dtype) for i in range(spec.n_layer)],
            "ln_f": LayerNorm(spec.n_embd, spec.bias),
        }
        self.dtype = dtype

    def __call__(self, idx: mx.array, cache: KVCache | None = None) -> mx.array:
        """Logits (B, T, V) in float32 of tokens `idx` (B, T); with a cache, they are T new tokens that follow its own.

        A cache that holds tokens takes one further token at a time.
        """
        t: Any = self.transformer
        start = cache.length if cache is not None else 0
        # A slice, not a lookup: compiled for Metal, torch 2.13 gets a lookup's gradient wrong (docs/method.md).
        pos = t["wpe"].weight[start : start + idx.shape[1]]  # (T, C)
        x = t["drop"](t["wte"](idx) + pos)  # (B, T, C)
        for block in t["h"]:
            x = block(x, cache)
        if cache is not None:
            cache.length += idx.shape[1]
        # (B, T, V): the head's weight is the embedding's
        return linear(t["ln_f"](x), t["wte"].weight, None, self.dtype).astype(mx.float32)

    def loss(self, idx: mx.array, targets: mx.array) -> mx.array:
        """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
        logits = self(idx)
        # of (B T, V) and (B T,)
        return nn.losses.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="mean")
