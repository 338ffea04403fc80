"""GPT-2 as in nanoGPT, in MLX. Its twin, line for line, is torch_gpt.py.

Shapes in the comments: B sequences, T tokens, C = n_embd channels, nh = n_head heads of hs = C / nh, V = vocab_size.

What torch.autocast does for the twin is written out here: matrix products in `dtype`, the residual stream, layer
norms, softmax and loss in float32, weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from nanogpt_mac.gpt.spec import GPTSpec, keeping

Keep = Sequence[mx.array | None]  # dropout's masks


class KVCache:
    """Keys and values, (2, B, nh, block_size, hs) a layer, of which the first `length` are of tokens seen."""

    def __init__(self) -> None:
        self.layers: dict[int, mx.array] = {}
        self.length = 0

    def append(self, layer: int, new: mx.array, size: int) -> mx.array:
        """Write those of new tokens, (2, B, nh, T, hs), behind the others, of at most `size`; all that are there."""
        if layer not in self.layers:
            self.layers[layer] = mx.zeros((*new.shape[:3], size, new.shape[4]), new.dtype)
        end = self.length + new.shape[3]
        self.layers[layer][..., self.length : end, :] = new
        return self.layers[layer][..., :end, :]


def dropout_masks(spec: GPTSpec, batch: int, length: int, key: mx.array) -> list[mx.array]:
    """What one forward pass keeps, bool, of `spec.mask_shapes`.

    One draw for all, 16 bits an activation: MLX has no narrower one than 32, which is cut in two.
    """
    shapes = spec.mask_shapes(batch, length)
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    bits = mx.random.split(key, -(-ends[-1] // 4)).reshape(-1).view(mx.uint16)
    parts = mx.split(bits <= mx.array(keeping(spec.dropout) - 1, mx.uint16), ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=False)]


def drop(x: mx.array, keep: mx.array | None, dropout: float) -> mx.array:
    """`x` where `keep` says so, scaled so that its mean stays; all of it where there is no `keep`."""
    return x if keep is None else mx.where(keep, x * (65536 / keeping(dropout)), mx.array(0, x.dtype))


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, fused."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = mx.ones(size)
        self.bias = mx.zeros(size) if bias else None

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight, self.bias, 1e-5)


@mx.custom_function
def product(x: mx.array, weight: mx.array) -> mx.array:
    """x W^T of (rows, inputs) and (outputs, inputs)."""
    return x @ weight.T


@product.vjp
def _product_gradient(inputs: Any, cotangent: mx.array, _: mx.array) -> Any:
    """The weight's as (outputs, inputs); MLX's own is the transpose, which is then copied: worth it where a product of
    float32 on an NVIDIA GPU has the longer side as columns, in half the time."""
    x, weight = inputs
    turned = x.dtype == mx.float32 and cotangent.shape[1] > x.shape[1] and mx.cuda.is_available()
    return cotangent @ weight, (x.T @ cotangent).T if turned else cotangent.T @ x


def linear(x: mx.array, weight: mx.array, bias: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """x W^T + b in `dtype`. Rows are flattened: the weight gradient is then one product, not a batch of them."""
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)  # (B T, inputs)
    y = cast(mx.array, product(rows, weight.astype(dtype))).reshape(*x.shape[:-1], -1)  # (B, T, outputs)
    return y if bias is None else y + bias.astype(dtype)  # fused with what reads it


class Linear(nn.Module):
    """A linear layer that multiplies in `dtype`; its weight is (outputs, inputs) in float32, as torch's."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: mx.Dtype) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, inputs))
        self.bias = mx.zeros(outputs) if bias else None
        self.dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        return linear(x, self.weight, self.bias, self.dtype)


def scaled_dot_product_attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    """MLX's fused attention, all of (B, nh, T, hs). `mask` says what is seen: (T, T), or "causal"."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0 / math.sqrt(q.shape[-1]), mask=mask)


def dropped_attention(packed: mx.array, mask: mx.array, keep: mx.array, dropout: float) -> mx.array:
    """The product written out, for MLX's has no dropout: (B, nh, T, hs), of `packed` (B, T, 3, nh, hs) and a `mask`
    (T, T) of the same dtype, 0 where a token is seen and -inf elsewhere.

    It is bound by memory: the product scales and masks what it writes, and heads are copied once, because each product
    copies what is a view of one. A softmax's gradient needs the sum over tokens of its weights times theirs, which is
    the output times the output's (Dao et al., FlashAttention, 2022, appendix B).
    """
    scale = 1.0 / math.sqrt(packed.shape[-1])

    @mx.custom_function
    def attend(packed: mx.array) -> tuple[mx.array, ...]:
        q, k, v = mx.contiguous(packed.transpose(2, 0, 3, 1, 4))
        scores = mx.addmm(mask, q, k.swapaxes(-1, -2), alpha=scale)  # (B, nh, T, T)
        weights = mx.softmax(scores, axis=-1, precise=True)
        dropped = drop(weights, keep, dropout)
        return dropped @ v, q, k, v, weights, dropped

    @attend.vjp
    def gradient(_: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        y, q, k, v, weights, dropped = outputs
        dy = mx.contiguous(cotangents[0])
        mean = (dy.astype(mx.float32) * y.astype(mx.float32)).sum(axis=-1, keepdims=True)  # (B, nh, T, 1)
        of_weights = drop((dy @ v.swapaxes(-1, -2)).astype(mx.float32), keep, dropout)
        scores = (weights.astype(mx.float32) * (of_weights - mean) * scale).astype(weights.dtype)
        parts = scores @ k, scores.swapaxes(-1, -2) @ q, dropped.swapaxes(-1, -2) @ dy
        return mx.concatenate([part.swapaxes(1, 2)[:, :, None] for part in parts], axis=2)

    return cast(Any, attend(packed))[0]


def erf(x: mx.array) -> mx.array:
    """The error function in float32, within 4e-7, as the rational function that Eigen and XLA have.

    MLX on a CPU calls the C library for every element; this is vectorized.
    """
    x = mx.clip(x, -4.0, 4.0)
    t = x * x
    p, q = mx.array(ERF_P[0]), mx.array(ERF_Q[0])
    for c in ERF_P[1:]:
        p = p * t + c
    for c in ERF_Q[1:]:
        q = q * t + c
    return x * p / q


ERF_P = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
ERF_Q = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def normal(x: mx.array) -> mx.array:
    """The normal distribution's integral."""
    x = x * math.sqrt(0.5)
    return 0.5 + 0.5 * (erf(x) if on_cpu() else mx.erf(x))


@mx.custom_function
def exact_gelu(x: mx.array) -> mx.array:
    """x Phi(x), in float32 whatever `x` is."""
    wide = x.astype(mx.float32)
    return (wide * normal(wide)).astype(x.dtype)


@exact_gelu.vjp
def _gelu_gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    """Phi(x) + x Phi'(x) from `x` alone: one kernel, where MLX's own keeps two arrays of `x`'s size for it.

    On a GPU as 1 - Phi(-x), because mx.compile would keep what the forward pass computes in the same words, in float32;
    a CPU is better off with that.
    """
    wide = x.astype(mx.float32)
    density = mx.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    integral = normal(wide) if on_cpu() else 1 - normal(-wide)
    return (cotangent.astype(mx.float32) * (integral + wide * density)).astype(x.dtype)


def gelu(x: mx.array, approximate: str) -> mx.array:
    """GELU in float32 whatever `x` is, as torch's kernels compute it; fused by mx.compile."""
    if approximate == "none":
        return cast(mx.array, exact_gelu(x))
    return nn.gelu_approx(x.astype(mx.float32)).astype(x.dtype)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and those before it, in each of nh heads."""

    def __init__(self, spec: GPTSpec, layer: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.c_attn = Linear(spec.n_embd, 3 * spec.n_embd, spec.bias, dtype)
        self.c_proj = Linear(spec.n_embd, spec.n_embd, spec.bias, dtype)
        self.n_head, self.dropout, self.layer, self.block_size = spec.n_head, spec.dropout, layer, spec.block_size

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: KVCache | None, keep: Keep) -> mx.array:
        return self.after(self.between(self.before(x), mask, cache, keep[0]), keep[1])

    def before(self, x: mx.array) -> mx.array:
        """Queries, keys and values, (B, T, 3, nh, hs)."""
        return self.c_attn(x).reshape(*x.shape[:2], 3, self.n_head, -1)

    def between(
        self, packed: mx.array, mask: mx.array | str | None, cache: KVCache | None, keep: mx.array | None
    ) -> mx.array:
        """What the heads see, (B, nh, T, hs)."""
        if keep is not None:
            return dropped_attention(packed, cast(mx.array, mask), keep, self.dropout)
        if cache is None:
            q, k, v = (part.squeeze(2).swapaxes(1, 2) for part in mx.split(packed, 3, axis=2))  # (B, nh, T, hs) each
        else:
            q, new = mx.split(packed.transpose(2, 0, 3, 1, 4), [1])
            q, (k, v) = q.squeeze(0), cache.append(self.layer, new, self.block_size)
        return scaled_dot_product_attention(q, k, v, mask)

    def after(self, y: mx.array, keep: mx.array | None) -> mx.array:
        y = y.swapaxes(1, 2).flatten(2)  # the heads side by side, (B, T, C)
        return drop(self.c_proj(y), keep, self.dropout)


class MLP(nn.Module):
    """Two linear layers, 4 C wide in between, with a GELU."""

    def __init__(self, spec: GPTSpec, dtype: mx.Dtype) -> None:
        super().__init__()
        self.c_fc = Linear(spec.n_embd, 4 * spec.n_embd, spec.bias, dtype)
        self.c_proj = Linear(4 * spec.n_embd, spec.n_embd, spec.bias, dtype)
        self.dropout = spec.dropout
        self.gelu = partial(gelu, approximate="none" if spec.gelu == "exact" else "tanh")

    def __call__(self, x: mx.array, keep: mx.array | None) -> mx.array:
        # (B, T, C) -> (B, T, 4 C) -> (B, T, C)
        return drop(self.c_proj(self.gelu(self.c_fc(x))), keep, self.dropout)


class Block(nn.Module):
    """Attention, then MLP; each reads a layer norm of the residual stream and adds to it."""

    def __init__(self, spec: GPTSpec, layer: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(spec.n_embd, spec.bias)
        self.attn = CausalSelfAttention(spec, layer, dtype)
        self.ln_2 = LayerNorm(spec.n_embd, spec.bias)
        self.mlp = MLP(spec, dtype)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: KVCache | None, keep: Keep) -> mx.array:
        return self.after(x, self.attn.between(self.before(x), mask, cache, keep[0]), keep)

    def before(self, x: mx.array) -> mx.array:
        """All that comes before a token sees others."""
        return self.attn.before(self.ln_1(x))

    def after(self, x: mx.array, y: mx.array, keep: Keep) -> mx.array:
        """And all that follows, where `y` is what it sees."""
        x = x + self.attn.after(y, keep[1])
        return x + self.mlp(self.ln_2(x), keep[2])


def checkpointed(block: Block, x: mx.array, mask: mx.array | str | None, keep: Keep) -> mx.array:
    """A block of which only what goes in is kept, and which the backward pass computes anew.

    One block after the other: left to mx.checkpoint, MLX's order of evaluation holds the activations of all at once, as
    soon as anything (a norm, say) reads the gradients of all.
    """

    def forward(weights: dict[str, Any], x: mx.array) -> mx.array:
        block.update(weights)
        return block(x, mask, None, keep)

    run = mx.custom_function(forward)

    @run.vjp
    def backward(inputs: Any, cotangent: mx.array, _: mx.array) -> Any:
        names, arrays = zip(*tree_flatten(list(inputs)), strict=True)

        def flat(*arrays: mx.array) -> mx.array:
            return forward(*tree_unflatten(list(zip(names, arrays, strict=True))))

        gradients: Any = mx.vjp(flat, mx.depends(list(arrays), [cotangent]), [cotangent])[1]
        gradients[-1:] = mx.depends(gradients[-1:], gradients[:-1])
        return tuple(tree_unflatten(list(zip(names, gradients, strict=True))))

    return cast(mx.array, run(block.trainable_parameters(), x))


class GPT(nn.Module):
    """Weights are loaded, never drawn here. Mixed precision is `dtype`, the type of the matrix products.

    With `checkpointing` the backward pass computes each block's activations anew, and only their inputs are kept.
    """

    def __init__(self, spec: GPTSpec, dtype: mx.Dtype = mx.float32, checkpointing: bool = False) -> None:
        super().__init__()
        self.transformer = {
            "wte": nn.Embedding(spec.vocab_size, spec.n_embd),
            "wpe": nn.Embedding(spec.block_size, spec.n_embd),
            "h": [Block(spec, i, dtype) for i in range(spec.n_layer)],
            "ln_f": LayerNorm(spec.n_embd, spec.bias),
        }
        self.dtype, self.spec, self.checkpointing = dtype, spec, checkpointing
        seen = mx.tri(spec.block_size, dtype=mx.bool_)
        self._causal = mx.where(seen, 0.0, -mx.inf).astype(dtype)  # made once

    def __call__(
        self, idx: mx.array, cache: KVCache | None = None, keep: Sequence[mx.array | None] | None = None
    ) -> mx.array:
        """Logits (B, T, V) in float32 of tokens `idx` (B, T); with a cache, they are T new tokens that follow its own.

        `keep`: `dropout_masks` of this pass; without them nothing is dropped.
        """
        t: Any = self.transformer
        T = idx.shape[1]
        keep = keep or [None] * (1 + 3 * self.spec.n_layer)
        # One token sees all, without a mask: with one, MLX has no kernel for it on CUDA.
        mask = (None if T == 1 else "causal") if keep[0] is None else self._causal[:T, :T]
        # A slice, not a lookup: compiled for Metal, torch 2.13 gets a lookup's gradient wrong (docs/method.md).
        start = cache.length if cache is not None else 0
        x = self.embed(idx, t["wpe"].weight[start : start + T], keep[0])
        for i, block in enumerate(t["h"]):
            kept = keep[3 * i + 1 : 3 * i + 4]
            again = self.checkpointing and self.training
            x = checkpointed(block, x, mask, kept) if again else block(x, mask, cache, kept)
            if cache is not None and on_cpu():
                mx.async_eval(x)  # computed while Python builds what follows
        if cache is not None:
            cache.length += T
        return self.head(t["ln_f"](x))

    def embed(self, idx: mx.array, pos: mx.array, keep: mx.array | None) -> mx.array:
        """The residual stream's beginning (B, T, C): tokens `idx` (B, T) and positions `pos` (T, C), with dropout."""
        t: Any = self.transformer
        return drop(t["wte"](idx) + pos, keep, self.spec.dropout)

    def head(self, x: mx.array) -> mx.array:
        """Logits (B, T, V) of the last layer norm's output (B, T, C): the head's weight is the embedding's."""
        t: Any = self.transformer
        return linear(x, t["wte"].weight, None, self.dtype).astype(mx.float32)

    def loss(self, idx: mx.array, targets: mx.array, keep: Sequence[mx.array | None] | None = None) -> mx.array:
        """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
        return mean_nats(self(idx, keep=keep), targets)


def mean_nats(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean cross entropy of `logits` (B, T, V), for each of B T rows."""
    return nn.losses.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="mean")
