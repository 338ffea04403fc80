"""The small networks in MLX, on Metal, CUDA or the CPU. torch_nets.py has their twins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from nanogpt_mac.backends.mlx_arrays import MLXArrays
from nanogpt_mac.backends.nets import LMSpec, MLPSpec, Net, positions


class MLP(nn.Module):
    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        widths = zip(spec.widths, spec.widths[1:], strict=False)
        self.layers = [nn.Linear(inner, outer) for inner, outer in widths]

    def __call__(self, x: mx.array) -> mx.array:
        *hidden, last = self.layers
        for layer in hidden:
            x = nn.relu(layer(x))
        return last(x)


class Block(nn.Module):
    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        w, self.heads = spec.width, spec.heads
        self.ln1, self.ln2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.query, self.key, self.value, self.out = (nn.Linear(w, w, bias=False) for _ in range(4))
        self.linear1, self.linear2 = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.ln1(x)
        q, k, v = (self._split(projection(y)) for projection in (self.query, self.key, self.value))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
        x = x + self.out(mx.flatten(y.swapaxes(1, 2), 2))
        return x + self.linear2(nn.relu(self.linear1(self.ln2(x))))

    def _split(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self.heads, -1)).swapaxes(1, 2)


class LM(nn.Module):
    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.vocab, spec.width)
        self._positions = mx.array(positions(spec.context, spec.width))  # _: no parameter
        self.blocks = [Block(spec) for _ in range(spec.blocks)]
        self.ln, self.head = nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.vocab)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens) + self._positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class MLXNet(Net):
    arrays: MLXArrays

    def build(self) -> None:
        spec = self.spec
        self.model: nn.Module = MLP(spec) if isinstance(spec, MLPSpec) else LM(spec)
        self._start_afresh()

    def _start_afresh(self) -> None:
        spec, model = self.spec, self.model
        optimizer: optim.Optimizer = (
            optim.SGD(spec.lr)
            if isinstance(spec, MLPSpec)
            else optim.AdamW(spec.lr, weight_decay=spec.weight_decay, bias_correction=True)
        )
        optimizer.init(model.trainable_parameters())

        def loss(inputs: mx.array, targets: mx.array) -> mx.array:
            return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")

        self.loss_and_gradients = nn.value_and_grad(model, loss)

        def step(inputs: mx.array, targets: mx.array) -> mx.array:
            value, gradients = self.loss_and_gradients(inputs, targets)
            optimizer.update(model, gradients)
            return value

        state = [model.state, optimizer.state]
        compiled = self.arrays.compiled
        self.training = mx.compile(step, inputs=state, outputs=state) if compiled else step
        # Without `inputs` a compiled function would keep the weights that it was compiled with.
        self.inference: Any = mx.compile(model.__call__, inputs=[model.state]) if compiled else model

    def put(self, rows: np.ndarray) -> mx.array:
        return mx.array(rows if rows.dtype == np.float32 else rows.astype(np.int32))

    def named(self) -> Sequence[tuple[str, mx.array]]:
        return tree_flatten(self.model.trainable_parameters())  # type: ignore[return-value]

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.model.update(tree_unflatten([(name, mx.array(values)) for name, values in weights.items()]))
        mx.eval(self.model.parameters())
        self._start_afresh()

    def step(self, inputs: mx.array, targets: mx.array) -> mx.array:
        return self.training(inputs, targets)

    def infer(self, inputs: mx.array) -> mx.array:
        return self.inference(inputs)

    def gradients(self, inputs: mx.array, targets: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        value, gradients = self.loss_and_gradients(inputs, targets)
        return value, dict(tree_flatten(gradients))
