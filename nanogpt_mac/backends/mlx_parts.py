"""The parts of MLX's iteration. Each is a graph of its own: compiled, where the iteration is compiled as a whole."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from nanogpt_mac.backends.mlx_arrays import first_number
from nanogpt_mac.backends.parts import Call, DerivedParts, Part
from nanogpt_mac.gpt.mlx_gpt import mean_nats

if TYPE_CHECKING:
    from nanogpt_mac.backends.mlx_backend import MLXBackend

# Primitives that compute nothing: they say where the same numbers lie.
VIEWS = re.compile(
    "Broadcast(Axes)?|Copy|CustomTransforms|Depends|ExpandDims|(Unf|F)latten|Split|Squeeze|StopGradient|Transpose|View"
)


class MLXParts(DerivedParts):
    def __init__(self, backend: MLXBackend, starts: np.ndarray) -> None:
        self.backend, self.starts, self.spec = backend, starts, backend.spec
        self.ready = mx.compile if backend.options.compile else lambda function, **_: function
        self.again = mx.checkpoint if backend.options.checkpointing else None
        self.causal = backend.model._causal if self.spec.dropout else "causal"
        backend.model.train()
        window = backend._windows("train", backend._batch("train", starts))[0]
        self.values: dict[str, Any] = {
            "tokens": window[:, :-1],
            "targets": window[:, 1:],
            "keep": [None] * (1 + 3 * self.spec.n_layer),
            "key": mx.random.key(0),
        }
        self.weights = dict(backend.layout.split(backend.trained["weights"]))
        mx.eval(self.values, self.weights)
        self.stages = self._stages()
        self.parts = {part.name: part for part in (self._batch(), *self._of_model(), *self._of_optimizer())}
        if backend.runs_ahead:
            one = mx.zeros(1)
            self.smallest = lambda number: (one + 1,)

    # -- the twin -------------------------------------------------------------------------------------------------

    def _part(self, name: str, weights: Mapping[str, mx.array]) -> Any:
        self.backend.bound = False  # a traced call leaves its tracers in the model
        self.backend.model.update(tree_unflatten(list(weights.items())))
        part: Any = self.backend.model
        for step in name.split("."):
            part = part[int(step) if step.isdigit() else step] if type(part) in (dict, list) else getattr(part, step)
        return part

    def _masks(self, key: mx.array) -> Any:
        return self.backend._masks(self.starts.shape[1], key)

    def _mean_nats(self, logits: mx.array, targets: mx.array) -> mx.array:
        return mean_nats(logits, targets)

    def _vjp(self, function: Callable[..., Any], of: list[mx.array], cotangents: list[mx.array]) -> list[mx.array]:
        outputs, gradients = mx.vjp(function, of, cotangents)
        return [*outputs, *gradients]

    def _cotangent(self, output: mx.array) -> mx.array:
        drawn = mx.random.normal(output.shape, output.dtype, key=mx.random.key(1))
        mx.eval(drawn)
        return drawn

    # -- beside it ------------------------------------------------------------------------------------------------

    def _batch(self) -> Part:
        backend, gather = self.backend, self.ready(lambda batch: self.backend._windows("train", batch))
        note = "gathers its windows, of numbers that cross to the device"
        return Part("batch", 1, lambda number: (gather(backend._batch("train", self.starts)),), note=note)

    def _of_optimizer(self) -> Iterator[Part]:
        """The weights stay: the learning rate is 0."""
        backend, layout, count = self.backend, self.backend.layout, len(self.starts)
        keep = backend._masks(self.starts.shape[1], self.values["key"])
        _, joined = backend._loss_and_grads(self.values["tokens"], self.values["targets"], keep)
        backend.bound = False
        named = {name: mx.contiguous(gradient) for name, gradient in layout.split(joined)}
        lr, norm = mx.array(0.0), mx.array(1.0)
        mx.eval(named, joined)

        def added(named: dict[str, mx.array], before: list[mx.array]) -> list[mx.array]:
            return [a + b for a, b in zip(before, layout.join(named), strict=True)]

        def updated(gradients: list[mx.array], lr: mx.array, norm: mx.array) -> mx.array:
            backend._updated(gradients, lr, norm)
            return norm

        join, add, clip = (self.ready(function) for function in (layout.join, added, backend._clipped))
        update, trained = self.ready(updated, inputs=backend.trained, outputs=backend.trained), backend.trained

        def taken(number: int) -> Sequence[Any]:
            made: Sequence[Any] = add(named, joined) if number % count else join(named)
            return made

        def step(number: int) -> Sequence[Any]:
            update(joined, lr, norm)
            return [*trained["weights"], *trained["exp_avg"], *trained["exp_avg_sq"]]

        yield Part("gradients", count, taken, note="are put into the optimizer's buffers")
        yield Part("clip", 1, lambda number: clip(joined), note="includes the norm")
        yield Part("optimizer", 1, step, note="is AdamW")

    # -- the device -----------------------------------------------------------------------------------------------

    def start(self, outputs: Sequence[Any]) -> None:
        mx.async_eval(*outputs)

    def wait(self, outputs: Sequence[Any]) -> None:
        mx.eval(*outputs)
        mx.synchronize()

    def peek(self, array: Any) -> float:
        return first_number(array if isinstance(array, mx.array) else array[0])

    def counted(self, call: Call) -> dict[str, int]:
        outputs = call(0)
        return {"kernels": kernels(outputs)} if self.backend.runs_ahead and outputs else {}


def kernels(outputs: Sequence[Any]) -> int:
    """Primitives of the graph behind `outputs`, but for views: each launches a kernel, some of them a few."""
    graph, flat = io.StringIO(), [array for _, array in cast(list[Any], tree_flatten(list(outputs)))]
    mx.export_to_dot(graph, *flat)
    found = Counter(re.findall(r'\[label ="(\w+)", shape=rectangle\]', graph.getvalue()))
    return sum(count for name, count in found.items() if not VIEWS.fullmatch(name))
