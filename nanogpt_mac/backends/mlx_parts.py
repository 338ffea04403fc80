"""The parts of MLX's iteration. Each is a graph of its own: compiled, where the iteration is compiled as a whole."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from nanogpt_mac.backends.mlx_arrays import first_number
from nanogpt_mac.backends.parts import Call, Part, Parts, Stage
from nanogpt_mac.gpt.mlx_gpt import mean_nats

if TYPE_CHECKING:
    from nanogpt_mac.backends.mlx_backend import MLXBackend

# Primitives that compute nothing: they say where the same numbers lie.
VIEWS = re.compile("Broadcast(Axes)?|Depends|ExpandDims|(Unf|F)latten|Split|Squeeze|StopGradient|Transpose|View")


def stages(backend: MLXBackend, batch: int, length: int) -> list[Stage]:
    """A training forward pass as a chain; each stage's function takes its weights by name, then its inputs."""
    spec, model = backend.spec, backend.model
    t: Any = model.transformer
    names = list(spec.shapes())
    mask: Any = model._causal[:length, :length] if spec.dropout else "causal"

    def own(prefix: str) -> tuple[str, ...]:
        return tuple(name for name in names if name.startswith(f"{prefix}."))

    def bound(weights: dict[str, mx.array]) -> None:
        backend.bound = False  # a traced call leaves its tracers in the model
        model.update(tree_unflatten(list(weights.items())))

    def embed(weights: dict[str, mx.array], tokens: mx.array, keep: list[mx.array]) -> mx.array:
        bound(weights)
        return model.embed(tokens, t["wpe"].weight[:length], keep[0] if keep else None)

    def head(weights: dict[str, mx.array], y: mx.array, targets: mx.array) -> mx.array:
        bound(weights)
        return mean_nats(model.head(y), targets)

    def norm(name: str, module: Any) -> Stage:
        def normed(weights: dict[str, mx.array], x: mx.array) -> Any:
            bound(weights)
            return module(x)

        return Stage("layer norms", normed, ("x",), ("y",), own(name))

    def attention(name: str, module: Any, place: int) -> Stage:
        def attended(weights: dict[str, mx.array], y: mx.array, keep: list[mx.array]) -> Any:
            bound(weights)
            return module(y, mask, None, keep[place : place + 3] if keep else [None] * 3)

        return Stage("attention", attended, ("y", "keep"), ("y",), own(name), note="has both projections and dropout")

    def mlp(name: str, module: Any, place: int) -> Stage:
        def fed(weights: dict[str, mx.array], y: mx.array, keep: list[mx.array]) -> Any:
            bound(weights)
            return module(y, keep[place + 2] if keep else None)

        return Stage("MLP", fed, ("y", "keep"), ("y",), own(name), note="has dropout")

    add = Stage("residual sums", lambda _, x, y: x + y, ("x", "y"), ("x",))
    masks = Stage("dropout masks", lambda _, key: backend._masks(batch, key), ("key",), ("keep",))
    embedding = own("transformer.wte") + own("transformer.wpe")
    chain = [masks] if spec.dropout else []
    chain.append(Stage("embedding", embed, ("tokens", "keep"), ("x",), embedding))
    for i, block in enumerate(t["h"]):
        name, place = f"transformer.h.{i}", 3 * i + 1
        inside = [
            *(norm(f"{name}.ln_1", block.ln_1), attention(f"{name}.attn", block.attn, place), add),
            *(norm(f"{name}.ln_2", block.ln_2), mlp(f"{name}.mlp", block.mlp, place), add),
        ]
        chain += [stage.anew(mx.checkpoint) for stage in inside] if model.checkpointing else inside
    last = Stage("head and loss", head, ("y", "targets"), ("loss",), tied=("transformer.wte.weight",))
    return [*chain, norm("transformer.ln_f", t["ln_f"]), last]


class MLXParts(Parts):
    def __init__(self, backend: MLXBackend, starts: np.ndarray) -> None:
        self.backend, self.starts = backend, starts
        self.compile: Any = mx.compile if backend.options.compile else lambda function, **_: function
        backend.model.train()
        window = backend._windows("train", backend._batch("train", starts))[0]
        self.values: dict[str, Any] = {
            "tokens": window[:, :-1],
            "targets": window[:, 1:],
            "keep": [],
            "key": mx.random.key(0),
        }
        self.weights = dict(backend.layout.split(backend.trained["weights"]))
        mx.eval(self.values, self.weights)
        self.stages = stages(backend, len(window), backend.spec.block_size)
        self.parts = {part.name: part for part in (self._batch(), *self._of_model(), *self._of_optimizer())}
        if backend.runs_ahead:
            one = mx.zeros(1)
            self.smallest = lambda number: (one + 1,)

    def _named(self, stage: Stage) -> dict[str, mx.array]:
        return {name: self.weights[name] for name in stage.parameters + stage.tied}

    def _run(self, stage: Stage, given: tuple[Any, ...]) -> tuple[Any, ...]:
        made = stage.made(stage.function(self._named(stage), *given))
        mx.eval(made)
        return made

    def _calls(self, stage: Stage, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Call, Call | None]:
        weights, moving, count = self._named(stage), stage.moving, len(stage.moving)

        def forward(weights: dict[str, mx.array], given: tuple[Any, ...]) -> tuple[Any, ...]:
            return stage.made(stage.function(weights, *given))

        def both(weights: dict[str, mx.array], given: tuple[Any, ...], cotangents: list[mx.array]) -> list[mx.array]:
            def flat(*arrays: mx.array) -> list[mx.array]:
                inputs = list(given)
                for i, array in zip(moving, arrays, strict=False):
                    inputs[i] = array
                return list(forward(dict(zip(weights, arrays[count:], strict=True)), tuple(inputs)))

            outputs, gradients = mx.vjp(flat, [*(given[i] for i in moving), *weights.values()], cotangents)
            return [*outputs, *gradients]

        run, run_both = self.compile(forward), self.compile(both)
        if not weights and not moving:
            return lambda number: run(weights, given), None
        of = [mx.random.normal(output.shape, output.dtype, key=mx.random.key(1)) for output in made]
        mx.eval(of)
        return lambda number: run(weights, given), lambda number: run_both(weights, given, of)

    def _batch(self) -> Part:
        backend, gather = self.backend, self.compile(lambda batch: self.backend._windows("train", batch))
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

        join, add, clip = (self.compile(function) for function in (layout.join, added, backend._clipped))
        update, trained = self.compile(updated, inputs=backend.trained, outputs=backend.trained), backend.trained

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
