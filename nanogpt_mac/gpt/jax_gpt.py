"""GPT-2 as in nanoGPT, in JAX. Its twin, line for line, is torch_gpt.py.

Shapes in the comments: B sequences, T tokens, C = n_embd channels, nh = n_head heads of hs = C / nh, V = vocab_size.

Weights are a flat dict by nanoGPT's names, and every function of them is pure: jax.jit and jax.grad take them as they
are. What torch.autocast does for the twin is written out here: matrix products in `dtype`, the residual stream, layer
norms, softmax and loss in float32, weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from nanogpt_mac.gpt.spec import GPTSpec, keeping

Weights = Mapping[str, jax.Array]
Keep = Sequence[jax.Array | None]  # dropout's masks


class KVCache:
    """Keys and values, (B, nh, block_size, hs), one pair a layer, of which the first `length` are of tokens seen.

    Their shape never changes, so one compiled step serves every length; there `length` is an int32 array.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[jax.Array, jax.Array]] = {}
        self.length: int | jax.Array = 0

    def append(self, layer: int, k: jax.Array, v: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Write those of new tokens behind the others; all `size` of them."""
        if layer not in self.layers:
            empty = jnp.zeros((*k.shape[:2], size, k.shape[3]), k.dtype)
            self.layers[layer] = empty, empty
        past_k, past_v = self.layers[layer]
        self.layers[layer] = _write(past_k, k, self.length), _write(past_v, v, self.length)
        return self.layers[layer]

    def visible(self, new: int, size: int) -> jax.Array:
        """Which of `size` places each of `new` tokens sees, (new, size): those that are filled, itself included."""
        return jnp.arange(size) <= (jnp.arange(new) + self.length)[:, None]


def _write(past: jax.Array, new: jax.Array, start: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(past, new, start, axis=2)


def dropout_masks(spec: GPTSpec, batch: int, length: int, key: jax.Array) -> list[jax.Array]:
    """What one forward pass keeps, bool, of `spec.mask_shapes`.

    One draw for all, 16 bits an activation: jax.random.bits hashes once for each of them, which is four times the work.
    `key` is two uint32.
    """
    shapes = spec.mask_shapes(batch, length)
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    words = threefry_2x32(key, jax.lax.iota(jnp.uint32, 2 * -(-ends[-1] // 4)))
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
    parts = jnp.split(bits <= jnp.uint16(keeping(spec.dropout) - 1), ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=False)]


def drop(x: jax.Array, keep: jax.Array | None, dropout: float) -> jax.Array:
    """`x` where `keep` says so, scaled so that its mean stays; all of it where there is no `keep`."""
    return x if keep is None else jnp.where(keep, x * (65536 / keeping(dropout)), jnp.zeros((), x.dtype))


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Layer norm with an optional bias."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weight
    return y if bias is None else y + bias


def gelu(x: jax.Array, approximate: str) -> jax.Array:
    """GELU in float32 whatever `x` is, as torch's kernels compute it.

    Not jax.nn.gelu, which a plugin for Metal replaces by a function of its own.
    """
    wide = x.astype(jnp.float32)
    if approximate == "none":
        y = wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))
    else:
        y = 0.5 * wide * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return y.astype(x.dtype)


@dataclass(frozen=True)
class GPT:
    """The model's functions; weights are given to each. Mixed precision is `dtype`, the type of the matrix products.

    `precision` is JAX's, of float32 products. With `checkpointing` the backward pass computes each block's activations
    anew, and only their inputs are kept.
    """

    spec: GPTSpec
    dtype: Any = jnp.float32
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    checkpointing: bool = False

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=self.precision)

    def linear(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
        """x W^T + b in `dtype`; W is (outputs, inputs) in float32, as torch's."""
        y = self.matmul(x.astype(self.dtype), w[f"{name}.weight"].astype(self.dtype).T)  # (B, T, outputs)
        bias = w.get(f"{name}.bias")
        return y if bias is None else y + bias.astype(self.dtype)

    def norm(self, w: Weights, name: str, x: jax.Array) -> jax.Array:
        return layer_norm(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def scaled_dot_product_attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, keep: jax.Array | None
    ) -> jax.Array:
        """The product written out, all of (B, nh, T, hs). `mask` says what is seen, (T, T)."""
        scores = self.matmul(q, k.swapaxes(-1, -2))  # (B, nh, T, T)
        scores = jnp.where(mask, scores * (1.0 / math.sqrt(q.shape[-1])), jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
        return self.matmul(drop(weights, keep, self.spec.dropout), v)  # (B, nh, T, hs)

    def attention(
        self, w: Weights, name: str, x: jax.Array, mask: jax.Array, cache: tuple[KVCache, int] | None, keep: Keep
    ) -> jax.Array:
        """Every token looks at itself and those before it, in each of nh heads. `cache`: it, and the layer's number."""
        (B, T, C), nh = x.shape, self.spec.n_head
        q, k, v = jnp.split(self.linear(w, f"{name}.c_attn", x), 3, axis=2)  # three of (B, T, C)
        q, k, v = (t.reshape(B, T, nh, C // nh).swapaxes(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache[0].append(cache[1], k, v, self.spec.block_size)
        y = self.scaled_dot_product_attention(q, k, v, mask, keep[0])  # (B, nh, T, hs)
        y = y.swapaxes(1, 2).reshape(B, T, C)  # the heads side by side
        return drop(self.linear(w, f"{name}.c_proj", y), keep[1], self.spec.dropout)

    def mlp(self, w: Weights, name: str, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Two linear layers, 4 C wide in between, with a GELU."""
        approximate = "none" if self.spec.gelu == "exact" else "tanh"
        hidden = gelu(self.linear(w, f"{name}.c_fc", x), approximate)  # (B, T, 4 C)
        return drop(self.linear(w, f"{name}.c_proj", hidden), keep, self.spec.dropout)

    def block(
        self, w: Weights, name: str, x: jax.Array, mask: jax.Array, cache: tuple[KVCache, int] | None, keep: Keep
    ) -> jax.Array:
        """Attention, then MLP; each reads a layer norm of the residual stream and adds to it."""
        x = x + self.attention(w, f"{name}.attn", self.norm(w, f"{name}.ln_1", x), mask, cache, keep)
        x = x + self.mlp(w, f"{name}.mlp", self.norm(w, f"{name}.ln_2", x), keep[2])
        return x

    def __call__(self, w: Weights, idx: jax.Array, cache: KVCache | None = None, keep: Keep | None = None) -> jax.Array:
        """Logits (B, T, V) in float32 of tokens `idx` (B, T); with a cache, they are T new tokens that follow its own.

        `keep`: `dropout_masks` of this pass; without them nothing is dropped.
        """
        T, size = idx.shape[1], self.spec.block_size
        keep = keep or [None] * (1 + 3 * self.spec.n_layer)
        mask = jnp.tri(T, dtype=bool)
        # A slice, not a lookup: compiled for Metal, torch 2.13 gets a lookup's gradient wrong (docs/method.md).
        pos = w["transformer.wpe.weight"][:T]  # (T, C)
        if cache is not None:
            mask = cache.visible(T, size)
            pos = jax.lax.dynamic_slice_in_dim(w["transformer.wpe.weight"], cache.length, T)
        x = self.embed(w, idx, pos, keep[0])
        for i in range(self.spec.n_layer):
            name, kept = f"transformer.h.{i}", keep[3 * i + 1 : 3 * i + 4]
            if cache is None and self.checkpointing:
                x = jax.checkpoint(lambda w, x, kept, name=name: self.block(w, name, x, mask, None, kept))(w, x, kept)
            else:
                x = self.block(w, name, x, mask, None if cache is None else (cache, i), kept)
        if cache is not None:
            cache.length = cache.length + T
        return self.head(w, self.norm(w, "transformer.ln_f", x))

    def embed(self, w: Weights, idx: jax.Array, pos: jax.Array, keep: jax.Array | None) -> jax.Array:
        """The residual stream's beginning (B, T, C): tokens `idx` (B, T) and positions `pos` (T, C), with dropout."""
        return drop(w["transformer.wte.weight"][idx] + pos, keep, self.spec.dropout)

    def head(self, w: Weights, x: jax.Array) -> jax.Array:
        """Logits (B, T, V) of the last layer norm's output (B, T, C): the head's weight is the embedding's."""
        return self.linear(w, "transformer.wte", x).astype(jnp.float32)

    def loss(self, w: Weights, idx: jax.Array, targets: jax.Array, keep: Keep | None = None) -> jax.Array:
        """Mean cross entropy, in nats, of `targets` (B, T) after tokens `idx` (B, T)."""
        return mean_nats(self(w, idx, keep=keep), targets)


def mean_nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross entropy of `logits` (B, T, V), for each of B T rows."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)
    return -chosen.mean()
