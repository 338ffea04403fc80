"""A training step as MLX's users write it: nothing of it is ours, and it computes what ours computes.

The model is made of mlx.nn's layers (mlx-examples, transformer_lm/main.py); the step is compiled over model, optimizer
and random state and waited for each iteration (mlx-lm 0.32.2, tuner/trainer.py, `train`), with optim.AdamW, in two
groups because weight decay is for matrices alone, and optim.clip_grad_norm. Below float32 the weights stay float32 and
are cast once a step, as in ours.

Import it after the back end's `Kind.prepare`, which sets what MLX reads once a process.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
from _sides import How, Work, _blocks
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_map, tree_unflatten


class Attention(nn.Module):
    def __init__(self, C: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.attn_dropout, self.dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self._heads, self._p = heads, dropout

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        B, T, C = x.shape
        split = mx.split(self.c_attn(x), 3, axis=-1)
        q, k, v = (a.reshape(B, T, self._heads, -1).transpose(0, 2, 1, 3) for a in split)
        scale = (C // self._heads) ** -0.5
        if self._p:  # MLX's fused attention has no dropout
            weights = mx.softmax((q * scale) @ k.swapaxes(-1, -2) + mask, axis=-1, precise=True)
            y = self.attn_dropout(weights) @ v
        else:
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self.dropout(self.c_proj(y.transpose(0, 2, 1, 3).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, C: int, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(self.c_proj(nn.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, C: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.attn, self.mlp = Attention(C, heads, dropout), MLP(C, dropout)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class TransformerLM(nn.Module):
    """Its parameters have nanoGPT's names."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        recipe, C = work.recipe, work.recipe.n_embd
        self.transformer = {
            "wte": nn.Embedding(work.vocab_size, C),
            "wpe": nn.Embedding(recipe.block_size, C),
            "drop": nn.Dropout(recipe.dropout),
            "h": [Block(C, recipe.n_head, recipe.dropout) for _ in range(recipe.n_layer)],
            "ln_f": nn.LayerNorm(C, bias=False),
        }

    def __call__(self, x: mx.array) -> mx.array:
        t: Any = self.transformer
        h = t["drop"](t["wte"](x) + t["wpe"](mx.arange(x.shape[1])))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1]).astype(h.dtype)
        for block in t["h"]:
            h = block(h, mask)
        return t["wte"].as_linear(t["ln_f"](h))


def loss_fn(model: nn.Module, window: mx.array) -> mx.array:
    logits = model(window[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, window[:, 1:], reduction="mean")


class MLXPeer:
    """That step on a recipe."""

    def __init__(self, work: Work, how: How, precision: str) -> None:
        recipe = work.recipe
        self.work, self.dtype = work, getattr(mx, how.dtype)
        mx.random.seed(1337)
        self.model = TransformerLM(work)
        self.model.update(tree_unflatten([(name, mx.array(w)) for name, w in work.weights().items()]))
        self.model.train()
        betas = [recipe.beta1, recipe.beta2]
        groups = [
            optim.AdamW(recipe.learning_rate, betas=betas, weight_decay=decay, bias_correction=True)
            for decay in (recipe.weight_decay, 0.0)
        ]
        self.groups = groups
        self.optimizer = optim.MultiOptimizer(groups, [lambda name, weight: weight.ndim >= 2])
        self.optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, self.optimizer.state, mx.random.state]
        mx.eval(self.state)
        wrap = partial(mx.compile, inputs=self.state, outputs=self.state) if how.compile else lambda function: function
        self.update = wrap(self._update)
        self.facts: dict[str, Any] = {
            "program": "mlx.nn and mlx.optimizers, as mlx-lm's trainer steps",
            "device": str(mx.default_device()),
            "compile": how.compile,
            "dtype": how.dtype,
            "matmul_precision": precision,
            "settings": {"waits": "each iteration", "weights": "float32, cast once a step"},
        }

    def _update(self, window: mx.array) -> mx.array:
        grad, model, recipe = nn.value_and_grad(self.model, loss_fn), self.model, self.work.recipe
        if self.dtype == mx.float32:
            loss, grads = grad(model, window)
        else:
            full = model.parameters()
            model.update(tree_map(lambda weight: weight.astype(self.dtype), full))
            loss, grads = grad(model, window)
            model.update(full)
            grads = tree_map(lambda g: g.astype(mx.float32), grads)
        grads, _ = optim.clip_grad_norm(grads, recipe.grad_clip)
        self.optimizer.update(model, grads)
        return loss

    def step(self, iteration: int) -> mx.array:
        """One iteration enqueued; its loss."""
        recipe, tokens = self.work.recipe, self.work.tokens
        windows = tokens[self.work.starts(iteration)[:, None] + np.arange(recipe.block_size + 1)]
        for group in self.groups:
            group.learning_rate = recipe.lr(iteration)
        return self.update(mx.array(windows.astype(np.int32)))

    def loss(self, iteration: int) -> float:
        loss = self.step(iteration)
        mx.eval(self.state, loss)
        return float(cast(float, loss.item()))

    def run(self, first: int, count: int, every: int) -> list[float]:
        marks = [time.perf_counter()]
        for number in range(count):
            mx.eval(self.state, self.step(first + number))
            if (number + 1) % every == 0:
                marks.append(time.perf_counter())
        return _blocks(marks, every)
