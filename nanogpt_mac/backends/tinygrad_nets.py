"""The small networks in tinygrad. torch_nets.py has their twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from tinygrad import Tensor

from nanogpt_mac.backends.nets import BETA1, BETA2, EPSILON, LMSpec, MLPSpec, Net, Spec, positions
from nanogpt_mac.backends.tinygrad_arrays import TinygradArrays
from nanogpt_mac.backends.tinygrad_backend import Replayed, correction
from nanogpt_mac.gpt.tinygrad_gpt import mean_nats, tensor

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x.linear(w[f"{name}.weight"].transpose(), w.get(f"{name}.bias"))


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return x.layernorm(eps=1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(spec: MLPSpec, w: Weights, x: Tensor) -> Tensor:
    for i in range(len(spec.widths) - 2):
        x = linear(w, f"layers.{i}", x).relu()
    return linear(w, f"layers.{len(spec.widths) - 2}", x)


def lm(spec: LMSpec, places: Tensor, w: Weights, tokens: Tensor) -> Tensor:
    B, T = (int(size) for size in tokens.shape)
    x = w["embedding.weight"][tokens] + places[:T]
    for i in range(spec.blocks):
        name, y = f"blocks.{i}", norm(w, f"blocks.{i}.ln1", x)
        heads = B, T, spec.heads, spec.width // spec.heads
        q, k, v = (linear(w, f"{name}.{e}", y).reshape(heads).transpose(1, 2) for e in ("query", "key", "value"))
        y = q.scaled_dot_product_attention(k, v, is_causal=True).transpose(1, 2).reshape(B, T, spec.width)
        x = x + linear(w, f"{name}.out", y)
        x = x + linear(w, f"{name}.linear2", linear(w, f"{name}.linear1", norm(w, f"{name}.ln2", x)).relu())
    return linear(w, "head", norm(w, "ln", x))


def model_of(spec: Spec) -> Callable[[Weights, Tensor], Tensor]:
    if isinstance(spec, MLPSpec):
        return partial(mlp, spec)
    return partial(lm, spec, Tensor(positions(spec.context, spec.width)).realize())


class TinygradNet(Net):
    arrays: TinygradArrays

    def build(self) -> None:
        self.model = model_of(self.spec)
        self.parameters, self.exp_avg, self.exp_avg_sq = (
            {name: Tensor(np.zeros(shape, np.float32)).realize() for name, shape in self.spec.shapes.items()}
            for _ in range(3)
        )
        self.steps = Tensor(np.zeros(1, np.float32)).realize()
        ready = partial(Replayed, replays=self.arrays.compiled, context={})
        self.training, self.inference, self.loss_and_gradients = map(ready, (self._trained, self._logits, self._both))
        self.training_of_rows = ready(self._trained_on)

    def _logits(self, inputs: Tensor) -> Tensor:
        return self.model(self.parameters, inputs).contiguous().realize()

    def _gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = self.model(self.parameters, inputs)
        loss = mean_nats(logits, targets)
        return loss, loss.gradient(*self.parameters.values())

    def _both(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        loss, gradients = self._gradients(inputs, targets)
        outputs = [loss.contiguous(), *(gradient.contiguous() for gradient in gradients)]
        Tensor.realize(*outputs)
        return outputs

    def _trained(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """SGD, or AdamW with decay on everything, as the other frameworks' own have it."""
        spec, (loss, gradients) = self.spec, self._gradients(inputs, targets)
        loss, changed, t = loss.contiguous(), list[Tensor](), self.steps + 1
        gradients = [gradient.contiguous() for gradient in gradients]
        Tensor.realize(loss, *gradients)  # before a weight that they read is another
        for g, (name, w) in zip(gradients, self.parameters.items(), strict=True):
            if isinstance(spec, MLPSpec):
                changed.append(w.assign(w - spec.lr * g))
                continue
            m, v = self.exp_avg[name], self.exp_avg_sq[name]
            m.assign(BETA1 * m + (1 - BETA1) * g)
            v.assign(BETA2 * v + (1 - BETA2) * g.square())
            update = (m / correction(BETA1, t)) / ((v / correction(BETA2, t)).sqrt() + EPSILON)
            changed += [m, v, w.assign(w * (1 - spec.lr * spec.weight_decay) - spec.lr * update)]
        return loss.realize(*changed, self.steps.assign(t))

    def _trained_on(self, rows: Tensor) -> Tensor:
        return self._trained(*(array[rows].contiguous() for array in self.resident))

    def put(self, rows: np.ndarray) -> Tensor:
        return tensor(rows if rows.dtype == np.float32 else rows.astype(np.int32)).realize()

    def named(self) -> Sequence[tuple[str, Tensor]]:
        return list(self.parameters.items())

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        changed = [self.parameters[name].assign(tensor(values)) for name, values in weights.items()]
        kept = *self.exp_avg.values(), *self.exp_avg_sq.values(), self.steps
        changed += [tensor.assign(Tensor(np.zeros(tensor.shape, np.float32))) for tensor in kept]
        Tensor.realize(*changed)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        made: Tensor = self.training(inputs.contiguous().realize(), targets.contiguous().realize())
        return made

    def numbers(self, order: np.ndarray) -> np.ndarray:
        """On the host: outside of what is captured every slice is scheduled by itself."""
        return order

    def resident_step(self, rows: np.ndarray) -> Tensor:
        made: Tensor = self.training_of_rows(self.put(rows))
        return made

    def infer(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.inference(inputs.contiguous().realize())
        return made

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, *gradients = self.loss_and_gradients(inputs.contiguous().realize(), targets.contiguous().realize())
        return loss, dict(zip(self.parameters, gradients, strict=True))
