"""GPT-2 as in nanoGPT, in tinygrad. Its twins, line for line, are torch_gpt.py and mlx_gpt.py.

Shapes in the comments: B sequences, T tokens, C = n_embd channels, nh = n_head heads of hs = C / nh, V = vocab_size.

What torch.autocast does for the twin is written out here: matrix products in `dtype`, summed in float32; the residual
stream, layer norms, scores, softmax and loss in float32, weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from nanogpt_mac.gpt.spec import GPTSpec, keeping

Keep = Sequence[Tensor | None]  # dropout's masks


def tensor(array: np.ndarray) -> Tensor:
    """A tensor of `array`, which may be read-only as a memory map is: for CUDA tinygrad reads writable ones alone."""
    return Tensor(np.require(array, requirements="W"))


class KVCache:
    """Keys and values, (2, B, nh, block_size, hs) a layer, of which the first `length` are of tokens seen.

    `places` says where new tokens go: None for a prompt, which fills all (what lies behind its end is never looked at),
    else bool (block_size, 1), true at the one place.
    """

    def __init__(self, layers: Sequence[Tensor], length: Tensor | None = None) -> None:
        self.layers = list(layers)
        T = self.layers[0].shape[3]
        seen = Tensor.arange(T)
        self.places = None if length is None else (seen == length).reshape(T, 1)
        self.visible = seen.reshape(1, T) <= (seen.reshape(T, 1) if length is None else length.reshape(1, 1))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens in their places; all `block_size` of them."""
        kept, new = self.layers[layer], k.stack(v).cast(self.layers[layer].dtype)
        kept.assign(new if self.places is None else self.places.where(new, kept)).realize()
        return kept[0], kept[1]


def dropout_masks(spec: GPTSpec, batch: int, length: int, draw: Tensor) -> list[Tensor]:
    """What one forward pass keeps, bool, of `spec.mask_shapes`.

    `draw`, uint32 (4,), is a key and a counter: the same bits come of the same numbers, captured or not, which those of
    `Tensor.manual_seed` do not. One draw for all, 16 bits an activation.
    """
    shapes = spec.mask_shapes(batch, length)
    ends = list(accumulate((math.prod(shape) for shape in shapes), initial=0))
    words = -(-ends[-1] // 2)
    bits = Tensor.random_bits(draw[:2], draw[2:], words).contiguous()
    halves = (bits.reshape(words, 1) >> (Tensor.arange(2, dtype=dtypes.uint32) * 16)) & 0xFFFF
    keep = (halves.reshape(-1) < keeping(spec.dropout)).contiguous()
    return [keep[a:b].reshape(shape) for (a, b), shape in zip(pairwise(ends), shapes, strict=True)]


def drop(x: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """`x` where `keep` says so, scaled so that its mean stays; all of it where there is no `keep`."""
    return x if keep is None else keep.where(x * (65536 / keeping(dropout)), 0)


class LayerNorm:
    """Layer norm with an optional bias."""

    def __init__(self, size: int, bias: bool) -> None:
        self.weight = Tensor.ones(size)
        self.bias = Tensor.zeros(size) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = x.layernorm(eps=1e-5) * self.weight
        return y if self.bias is None else y + self.bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: DType) -> Tensor:
    """x W^T + b in `dtype`, summed in float32."""
    y = x.cast(dtype) @ weight.cast(dtype).transpose()  # (B, T, inputs) -> (B, T, outputs)
    return y if bias is None else y + bias.cast(dtype)


class Linear:
    """A linear layer that multiplies in `dtype`; its weight is (outputs, inputs) in float32, as torch's."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: DType) -> None:
        self.weight = Tensor.zeros(outputs, inputs)
        self.bias = Tensor.zeros(outputs) if bias else None
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.dtype)


class Embedding:
    """A row of `weight` (rows, C) for each number."""

    def __init__(self, rows: int, size: int) -> None:
        self.weight = Tensor.zeros(rows, size)

    def __call__(self, idx: Tensor) -> Tensor:
        return self.weight[idx]


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, keep: Tensor | None, dropout: float
) -> Tensor:
    """The product written out; tinygrad fuses what it can. All of (B, nh, T, hs); `mask` says what is seen, (T, T)."""
    scores = q.matmul(k.transpose(-1, -2), dtype=dtypes.float32) * (1.0 / math.sqrt(q.shape[-1]))  # (B, nh, T, T)
    weights = mask.where(scores, -math.inf).softmax(-1).cast(q.dtype)
    return drop(weights, keep, dropout) @ v  # (B, nh, T, hs)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU in float32 whatever `x` is, as torch's kernels compute it."""
    return x.float().gelu(approximate).cast(x.dtype)


def sizes(x: Tensor) -> tuple[int, ...]:
    """The shape; tinygrad's own type of it has symbols too, of which there are none here."""
    return cast(tuple[int, ...], x.shape)


class CausalSelfAttention:
    """Every token looks at itself and those before it, in each of nh heads."""

    def __init__(self, spec: GPTSpec, layer: int, dtype: DType) -> None:
        self.c_attn = Linear(spec.n_embd, 3 * spec.n_embd, spec.bias, dtype)
        self.c_proj = Linear(spec.n_embd, spec.n_embd, spec.bias, dtype)
        self.n_head, self.dropout, self.layer = spec.n_head, spec.dropout, layer

    def __call__(self, x: Tensor, mask: Tensor, cache: KVCache | None, keep: Keep) -> Tensor:
        B, T, C = sizes(x)
        q, k, v = self.c_attn(x).chunk(3, dim=2)  # three of (B, T, C)
        q, k, v = (t.reshape(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = scaled_dot_product_attention(q, k, v, mask, keep[0], self.dropout)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return drop(self.c_proj(y), keep[1], self.dropout)


class MLP:
    """Two linear layers, 4 C wide in between, with a GELU."""

    def __init__(self, spec: GPTSpec, dtype: DType) -> None:
        self.c_fc = Linear(spec.n_embd, 4 * spec.n_embd, spec.bias, dtype)
        self.c_proj = Linear(4 * spec.n_embd, spec.n_embd, spec.bias, dtype)
        self.dropout, self.approximate = spec.dropout, "none" if spec.gelu == "exact" else "tanh"

    def __call__(self, x: Tensor, keep: Tensor | None) -> Tensor:
        # (B, T, C) -> (B, T, 4 C) -> (B, T, C)
        return drop(self.c_proj(gelu(self.c_fc(x), self.approximate)), keep, self.dropout)


class Block:
    """Attention, then MLP; each reads a layer norm of the residual stream and adds to it."""

    def __init__(self, spec: GPTSpec, layer: int, dtype: DType) -> None:
        self.ln_1 = LayerNorm(spec.n_embd, spec.bias)
        self.attn = CausalSelfAttention(spec, layer, dtype)
        self.ln_2 = LayerNorm(spec.n_embd, spec.bias)
        self.mlp = MLP(spec, dtype)

    def __call__(self, x: Tensor, mask: Tensor, cache: KVCache | None, keep: Keep) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, keep)
        return x + self.mlp(self.ln_2(x), keep[2])


class GPT:
    """Weights are loaded, never drawn here. Mixed precision is `dtype`, the type of the matrix products."""

    def __init__(self, spec: GPTSpec, dtype: DType = dtypes.float32) -> None:
        self.transformer: dict[str, Any] = {
            "wte": Embedding(spec.vocab_size, spec.n_embd),
            "wpe": Embedding(spec.block_size, spec.n_embd),
            "h": [Block(spec, i, dtype) for i in range(spec.n_layer)],
            "ln_f": LayerNorm(spec.n_embd, spec.bias),
        }
        self.dtype, self.spec = dtype, spec

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Compute with `weights`, by canonical name, from now on."""
        for name, weight in weights.items():
            path, _, last = name.rpartition(".")
            setattr(self.part(path), last, weight)

    def part(self, name: str) -> Any:
        """What "transformer.h.0.attn" stands for."""
        part: Any = self
        for step in name.split("."):
            part = part[int(step)] if step.isdigit() else part[step] if isinstance(part, dict) else getattr(part, step)
        return part

    def __call__(self, idx: Tensor, cache: KVCache | None = None, keep: Keep | None = None) -> Tensor:
        """Logits (B, T, V) in float32 of tokens `idx` (B, T); with a cache, a whole prompt or one token behind its own.

        `keep`: `dropout_masks` of this pass; without them nothing is dropped.
        """
        t = self.transformer
        T = idx.shape[1]
        keep = keep or [None] * (1 + 3 * self.spec.n_layer)
        mask = Tensor.ones(T, T, dtype=dtypes.bool).tril() if cache is None else cache.visible
        pos = t["wpe"].weight[:T]  # (T, C)
        if cache is not None and cache.places is not None:
            pos = cache.places.where(t["wpe"].weight, 0).sum(0, keepdim=True)
        x = self.embed(idx, pos, keep[0])
        for i, block in enumerate(t["h"]):
            x = block(x, mask, cache, keep[3 * i + 1 : 3 * i + 4])
        return self.head(t["ln_f"](x))

    def embed(self, idx: Tensor, pos: Tensor, keep: Tensor | None) -> Tensor:
        """The residual stream's beginning (B, T, C): tokens `idx` (B, T) and positions `pos` (T, C), with dropout."""
        return drop(self.transformer["wte"](idx) + pos, keep, self.spec.dropout)

    def head(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of the last layer norm's output (B, T, C): the head's weight is the embedding's."""
        return linear(x, self.transformer["wte"].weight, None, self.dtype).float()

    def loss(self, idx: Tensor, targets: Tensor, keep: Keep | None = None) -> Tensor:
        """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
        return mean_nats(self(idx, keep=keep), targets)


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of `logits` (B, T, V), for each of B T rows."""
    return cast(Tensor, logits.reshape(-1, logits.shape[-1]).sparse_categorical_crossentropy(targets.reshape(-1)))
