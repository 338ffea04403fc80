"""The small networks in JAX, as functions of a dict of weights. torch_nets.py and mlx_nets.py have their twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_mac.backends.jax_arrays import JaxArrays
from nanogpt_mac.backends.nets import BETA1, BETA2, EPSILON, LMSpec, MLPSpec, Net, Spec, positions
from nanogpt_mac.gpt.jax_gpt import layer_norm, mean_nats

Weights = Mapping[str, jax.Array]
Model = Callable[[Weights, jax.Array], jax.Array]


def linear(w: Weights, name: str, x: jax.Array) -> jax.Array:
    y, bias = x @ w[f"{name}.weight"].T, w.get(f"{name}.bias")
    return y if bias is None else y + bias


def norm(w: Weights, name: str, x: jax.Array) -> jax.Array:
    return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])


def mlp(spec: MLPSpec) -> Model:
    last = len(spec.widths) - 2

    def model(w: Weights, x: jax.Array) -> jax.Array:
        for i in range(last):
            x = jax.nn.relu(linear(w, f"layers.{i}", x))
        return linear(w, f"layers.{last}", x)

    return model


def lm(spec: LMSpec) -> Model:
    places = positions(spec.context, spec.width)

    def block(w: Weights, name: str, x: jax.Array) -> jax.Array:
        y = norm(w, f"{name}.ln1", x)
        heads = (*y.shape[:2], spec.heads, -1)
        q, k, v = (linear(w, f"{name}.{each}", y).reshape(heads) for each in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(w, f"{name}.out", y.reshape(x.shape))
        hidden = jax.nn.relu(linear(w, f"{name}.linear1", norm(w, f"{name}.ln2", x)))
        return x + linear(w, f"{name}.linear2", hidden)

    def model(w: Weights, tokens: jax.Array) -> jax.Array:
        x = w["embedding.weight"][tokens] + places[: tokens.shape[1]]
        for i in range(spec.blocks):
            x = block(w, f"blocks.{i}", x)
        return linear(w, "head", norm(w, "ln", x))

    return model


def model_of(spec: Spec) -> Model:
    return mlp(spec) if isinstance(spec, MLPSpec) else lm(spec)


class JaxNet(Net):
    arrays: JaxArrays

    def build(self) -> None:
        self.inference = self.arrays.ready(model_of(self.spec))
        self.training, self.loss_and_gradients = self.arrays.ready(self._trained), self.arrays.ready(self._gradients)
        self.training_of_rows = self.arrays.ready(self._trained_on)
        self.load({name: np.zeros(shape, np.float32) for name, shape in self.spec.shapes.items()})

    def _gradients(self, w: Weights, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, Weights]:
        model = model_of(self.spec)
        return jax.value_and_grad(lambda w: mean_nats(model(w, inputs), targets))(w)

    def _trained(
        self, w: Weights, m: Weights, v: Weights, step: jax.Array, inputs: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, Weights, Weights, Weights, jax.Array]:
        """SGD, or AdamW with decay on everything, as the other frameworks' own have it."""
        spec, (loss, gradients) = self.spec, self._gradients(w, inputs, targets)
        if isinstance(spec, MLPSpec):
            return loss, jax.tree.map(lambda w, g: w - spec.lr * g, w, gradients), m, v, step
        lr, keep, step = spec.lr, 1 - spec.lr * spec.weight_decay, step + 1
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, gradients)
        v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * jnp.square(g), v, gradients)
        size1, size2 = (-jnp.expm1(step * float(np.log(beta))) for beta in (BETA1, BETA2))

        def updated(w: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return keep * w - lr * (m / size1) / (jnp.sqrt(v / size2) + EPSILON)

        return loss, jax.tree.map(updated, w, m, v), m, v, step

    def _trained_on(self, state: Any, resident: Sequence[jax.Array], rows: jax.Array) -> tuple[Any, ...]:
        return tuple(self._trained(*state, *(array[rows] for array in resident)))

    def put(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows if rows.dtype == np.float32 else rows.astype(np.int32), self.arrays.place)

    def named(self) -> Sequence[tuple[str, jax.Array]]:
        return list(self.parameters.items())

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.parameters: Weights = {name: self.put(values) for name, values in weights.items()}
        self.moments = jax.tree.map(jnp.zeros_like, (self.parameters, self.parameters))
        self.steps = jnp.zeros(())

    def step(self, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return self._kept(self.training(self.parameters, *self.moments, self.steps, inputs, targets))

    def numbers(self, order: np.ndarray) -> np.ndarray:
        """On the host: to pick a batch outside of a step costs JAX more than the step."""
        return order.astype(np.int32)

    def resident_step(self, rows: np.ndarray) -> jax.Array:
        return self._kept(self.training_of_rows((self.parameters, *self.moments, self.steps), self.resident, rows))

    def _kept(self, made: tuple[Any, ...]) -> jax.Array:
        loss, self.parameters, *moments, self.steps = made
        self.moments = tuple(moments)
        return loss

    def infer(self, inputs: jax.Array) -> jax.Array:
        made: jax.Array = self.inference(self.parameters, inputs)
        return made

    def gradients(self, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, gradients = self.loss_and_gradients(self.parameters, inputs, targets)
        return loss, dict(gradients)
