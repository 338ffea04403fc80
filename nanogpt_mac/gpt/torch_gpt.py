"""GPT-2 as in nanoGPT, in torch. Its twin, line for line, is mlx_gpt.py.

Shapes in the comments: B sequences, T tokens, C = n_embd channels, nh = n_head heads of hs = C / nh, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogpt_mac.gpt.packed import add_scaled, gelu, packed_attention
from nanogpt_mac.gpt.spec import GPTSpec

FewKernels = Literal["never", "training", "always"]


class KVCache:
    """Keys and values, (B, nh, block_size, hs) a layer, of the tokens so far: each token is the same work."""

    def __init__(self, spec: GPTSpec, device: torch.device, dtype: torch.dtype, batch: int = 1) -> None:
        shape = (spec.n_layer, 2, batch, spec.n_head, spec.block_size, spec.n_embd // spec.n_head)
        self.layers = torch.zeros(shape, device=device, dtype=dtype)
        self.places = torch.arange(spec.block_size, device=device)
        self.positions = self.places[:0]  # of the new tokens
        self.visible = self.places[:0, None] >= self.places  # what each of them may look at, bool (T, block_size)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Forget all tokens; a number that is not finite would reach the next ones through a weight of zero."""
        self.layers.zero_()
        self.length.zero_()

    def begin(self, tokens: int) -> None:
        """Make room for so many tokens behind those that are there."""
        self.positions = self.places[:tokens] + self.length
        self.visible = self.positions[:, None] >= self.places
        self.length += tokens

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, after those of the new tokens, (B, nh, T, hs), were put in their places."""
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept.index_copy_(2, self.positions, new.to(kept.dtype))
        keys, values = self.layers[layer]
        return keys, values


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, fused."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


@dataclass(frozen=True)
class Few:
    """What a forward pass in few kernels shares: the causal mask (T, T), and every dropout mask from one draw.

    Masks are float32, 0 or 1 / (1 - dropout), in the order of use: of the embedding (B, T, C), then a layer of the
    attention's weights (B, nh, T, T), of its output and of the MLP's (B, T, C). None where nothing is dropped.
    """

    causal: Tensor
    keep: list[Tensor | None]


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and those before it, in each of nh heads."""

    def __init__(self, spec: GPTSpec, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(spec.n_embd, 3 * spec.n_embd, bias=spec.bias)
        self.c_proj = nn.Linear(spec.n_embd, spec.n_embd, bias=spec.bias)
        self.n_head, self.dropout, self.layer = spec.n_head, spec.dropout, layer

    def forward(self, x: Tensor, cache: KVCache | None = None, few: Few | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 C)
        if few is not None:
            y = packed_attention(qkv, self.n_head, few.causal, few.keep[3 * self.layer + 1])
            return self.c_proj(y)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in qkv.split(C, dim=2))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=cache.visible)  # (B, nh, T, hs)
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side


class MLP(nn.Module):
    """Two linear layers, 4 C wide in between, with a GELU."""

    def __init__(self, spec: GPTSpec) -> None:
        super().__init__()
        self.c_fc = nn.Linear(spec.n_embd, 4 * spec.n_embd, bias=spec.bias)
        self.c_proj = nn.Linear(4 * spec.n_embd, spec.n_embd, bias=spec.bias)
        self.gelu = nn.GELU(approximate="none" if spec.gelu == "exact" else "tanh")

    def forward(self, x: Tensor) -> Tensor:
        # (B, T, C) -> (B, T, 4 C) -> (B, T, C)
        return self.c_proj(gelu(self.c_fc(x), self.gelu.approximate))


class Block(nn.Module):
    """Attention, then MLP; each reads a layer norm of the residual stream and adds to it, with dropout."""

    def __init__(self, spec: GPTSpec, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(spec.n_embd, spec.bias)
        self.attn = CausalSelfAttention(spec, layer)
        self.ln_2 = LayerNorm(spec.n_embd, spec.bias)
        self.mlp = MLP(spec)
        self.dropout, self.layer = spec.dropout, layer

    def forward(self, x: Tensor, cache: KVCache | None = None, few: Few | None = None) -> Tensor:
        x = self._add(x, self.attn(self.ln_1(x), cache, few), 2, few)
        x = self._add(x, self.mlp(self.ln_2(x)), 3, few)
        return x

    def _add(self, x: Tensor, y: Tensor, place: int, few: Few | None) -> Tensor:
        if few is not None and (keep := few.keep[3 * self.layer + place]) is not None:
            return add_scaled(x, y, keep)
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """Weights are loaded, never drawn here. Mixed precision is the caller's `torch.autocast`.

    `few_kernels` says when to take packed.py's functions, the causal mask made once and dropout's masks from one draw.
    With `checkpointing` the backward pass computes each block's activations anew, and only their inputs are kept.
    `own_kernels`: whole sequences take fused.py's way, which computes the same with kernels for an NVIDIA GPU.
    """

    causal: Tensor  # float32 (block_size, block_size): 0 where a token may look, minus infinity elsewhere

    def __init__(
        self, spec: GPTSpec, few_kernels: FewKernels = "never", checkpointing: bool = False, own_kernels: bool = False
    ) -> None:
        super().__init__()
        self.own_logits = None
        if own_kernels:
            from nanogpt_mac.gpt import fused  # and Triton

            self.own_logits = fused.logits
        self.spec, self.few_kernels, self.checkpointing = spec, few_kernels, checkpointing
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(spec.vocab_size, spec.n_embd),
                "wpe": nn.Embedding(spec.block_size, spec.n_embd),
                "h": nn.ModuleList(Block(spec, i) for i in range(spec.n_layer)),
                "ln_f": LayerNorm(spec.n_embd, spec.bias),
            }
        )
        causal = torch.full((spec.block_size, spec.block_size), float("-inf")).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, idx: Tensor, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """Logits (B, T, V) in float32 of tokens `idx` (B, T); with a cache, T new ones that follow its own.

        `last`: of the last token alone, (B, 1, V).
        """
        if self.own_logits is not None and cache is None:
            return self.own_logits(self, idx, last)
        t: Any = self.transformer
        few = None
        if cache is None and self.few_kernels in ("always", "training" if self.training else "always"):
            few = self._few(*idx.shape)
        if cache is not None:
            cache.begin(idx.shape[1])
            pos = t["wpe"](cache.positions)  # (T, C)
        else:  # a slice, not a lookup: compiled for Metal, torch 2.13 gets a lookup's gradient wrong (docs/method.md)
            pos = t["wpe"].weight[: idx.shape[1]]
        x = self.embed(idx, pos, few)
        for block in t["h"]:
            again = self.checkpointing and self.training
            x = checkpoint(block, x, cache, few, use_reentrant=False) if again else block(x, cache, few)
        if last:
            x = x[:, -1:]
        return self.head(t["ln_f"](x))

    def embed(self, idx: Tensor, pos: Tensor, few: Few | None = None) -> Tensor:
        """The residual stream's beginning (B, T, C): tokens `idx` (B, T) and positions `pos` (T, C), with dropout."""
        x = self.transformer["wte"](idx) + pos
        keep = few.keep[0] if few is not None else None
        return F.dropout(x, self.spec.dropout, self.training) if keep is None else x * keep

    def head(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of the last layer norm's output (B, T, C): the head's weight is the embedding's."""
        weight: Any = self.transformer["wte"].weight
        return F.linear(x, weight).float()

    def _few(self, B: int, T: int) -> Few:
        spec, causal = self.spec, self.causal[:T, :T]
        if not self.training or spec.dropout == 0:
            return Few(causal, [None] * (1 + 3 * spec.n_layer))
        layer = ((B, spec.n_head, T, T), (B, T, spec.n_embd), (B, T, spec.n_embd))
        shapes: list[tuple[int, ...]] = [layer[1], *(layer * spec.n_layer)]
        if torch.compiler.is_compiling():  # which draws each mask where it is used
            draw = self._hashed if causal.is_cpu else self._masks
            return Few(causal, [draw(shape) for shape in shapes])
        sizes = [math.prod(shape) for shape in shapes]
        drawn = self._masks((sum(sizes),)).split(sizes)
        return Few(causal, [part.view(shape) for part, shape in zip(drawn, shapes, strict=True)])

    def _masks(self, shape: tuple[int, ...]) -> Tensor:
        keep = 1 - self.spec.dropout
        return torch.empty(shape, device=self.causal.device).bernoulli_(keep).div_(keep)

    def _hashed(self, shape: tuple[int, ...]) -> Tensor:
        """The same from a hash of each place: torch's generator draws one number after the other on most CPUs, eight
        times the work of this in vector instructions, which a compiler fuses and threads share."""
        start, factor = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=self.causal.device)
        x = (torch.arange(math.prod(shape), dtype=torch.int32, device=self.causal.device) + start) * (factor | 1)
        x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D  # lowbias32, as in triton_kernels.py; shifts of int32 carry its sign
        x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
        x = x ^ (x >> 16 & 0xFFFF)
        dropped = min(round(self.spec.dropout * 2**32), 2**32 - 1) - 2**31
        return (x >= dropped).view(shape) * (1 / (1 - self.spec.dropout))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
        return mean_nats(self(idx), targets)


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of `logits` (B, T, V), for each of B T rows."""
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
