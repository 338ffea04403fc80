"""The parts of tinygrad's iteration: each is captured and replayed by itself, where the iteration is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.helpers import GlobalCounters

from nanogpt_mac.backends.parts import Call, Part, Parts, Stage
from nanogpt_mac.gpt.tinygrad_gpt import dropout_masks, mean_nats, tensor

if TYPE_CHECKING:
    from nanogpt_mac.backends.tinygrad_backend import TinygradBackend


def stages(backend: TinygradBackend, batch: int, length: int) -> list[Stage]:
    """A training forward pass as a chain; the model's weights are the back end's own."""
    spec, model = backend.spec, backend.model
    t, names = model.transformer, list(spec.shapes())
    mask = Tensor.ones(length, length, dtype=dtypes.bool).tril()

    def own(prefix: str) -> tuple[str, ...]:
        return tuple(name for name in names if name.startswith(f"{prefix}."))

    def embed(tokens: Tensor, keep: list[Tensor]) -> Tensor:
        return model.embed(tokens, t["wpe"].weight[:length], keep[0] if keep else None)

    def norm(name: str, module: Any) -> Stage:
        return Stage("layer norms", lambda x: module(x), ("x",), ("y",), own(name))

    def attention(name: str, module: Any, place: int) -> Stage:
        def attended(y: Tensor, keep: list[Tensor]) -> Tensor:
            made: Tensor = module(y, mask, None, keep[place : place + 3] if keep else [None] * 3)
            return made

        return Stage("attention", attended, ("y", "keep"), ("y",), own(name), note="has both projections and dropout")

    def mlp(name: str, module: Any, place: int) -> Stage:
        def fed(y: Tensor, keep: list[Tensor]) -> Tensor:
            made: Tensor = module(y, keep[place + 2] if keep else None)
            return made

        return Stage("MLP", fed, ("y", "keep"), ("y",), own(name), note="has dropout")

    add = Stage("residual sums", lambda x, y: x + y, ("x", "y"), ("x",))
    draw = Stage("dropout masks", lambda key: [dropout_masks(spec, batch, length, key)], ("key",), ("keep",))
    chain = [draw] if spec.dropout else []
    chain.append(Stage("embedding", embed, ("tokens", "keep"), ("x",), own("transformer.wte") + own("transformer.wpe")))
    for i, block in enumerate(t["h"]):
        name, place = f"transformer.h.{i}", 3 * i + 1
        chain += [
            *(norm(f"{name}.ln_1", block.ln_1), attention(f"{name}.attn", block.attn, place), add),
            *(norm(f"{name}.ln_2", block.ln_2), mlp(f"{name}.mlp", block.mlp, place), add),
        ]
    last = Stage("head and loss", lambda y, targets: mean_nats(model.head(y), targets), ("y", "targets"), ("loss",),
                 tied=("transformer.wte.weight",))  # fmt: skip
    return [*chain, norm("transformer.ln_f", t["ln_f"]), last]


def _realized(made: Any) -> tuple[Any, ...]:
    """What a stage made, computed: tensors, or one list of them."""
    outputs = tuple(made[0]) if isinstance(made, list) else (made,)
    computed = [output.contiguous() for output in outputs]
    Tensor.realize(*computed)
    return (computed,) if isinstance(made, list) else tuple(computed)


class TinygradParts(Parts):
    def __init__(self, backend: TinygradBackend, starts: np.ndarray) -> None:
        self.backend, self.starts = backend, starts
        tokens, targets = (
            a.contiguous().realize() for a in backend._windows("train", backend._batch("train", starts[0]))
        )
        self.values: dict[str, Any] = {"tokens": tokens, "targets": targets, "keep": [], "key": backend._draw(0)}
        self.stages = stages(backend, len(starts[0]), backend.spec.block_size)
        self.parts = {part.name: part for part in (self._batch(), *self._of_model(), *self._of_optimizer())}

    def _call(self, function: Callable[[], Sequence[Tensor]]) -> Call:
        """`function` as a part's call: what it reads lies in buffers that stay, so nothing goes in."""
        ready = self.backend.ready(function)
        return lambda number: ready()

    def _run(self, stage: Stage, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return _realized(stage.function(*given))

    def _calls(self, stage: Stage, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Call, Call | None]:
        weights = [self.backend.weights[name] for name in stage.parameters + stage.tied]
        wanted = [*(given[i] for i in stage.moving), *weights]

        def forward() -> Sequence[Tensor]:
            (output,) = _realized(stage.function(*given))
            return output if isinstance(output, list) else [output]

        def both() -> list[Tensor]:
            output = stage.function(*given)
            outputs = [output.contiguous(), *(g.contiguous() for g in output.gradient(*wanted, gradient=cotangent))]
            Tensor.realize(*outputs)
            return outputs

        if not wanted:
            return self._call(forward), None
        shape = made[0].shape
        drawn = np.random.Generator(np.random.Philox(1)).standard_normal(shape or (1,), np.float32)
        cotangent = tensor(drawn).cast(made[0].dtype).contiguous().realize().reshape(shape)
        return self._call(forward), self._call(both)

    def _batch(self) -> Part:
        backend, gather = self.backend, self.backend.ready(lambda batch: _both(self.backend._windows("train", batch)))

        def windows(number: int) -> list[Tensor]:
            return [array for row in self.starts for array in gather(backend._batch("train", row))]

        return Part("batch", 1, windows, note="gathers its windows, of numbers that cross to the device")

    def _of_optimizer(self) -> Iterator[Part]:
        """The weights stay: the learning rate is 0."""
        backend, count = self.backend, len(self.starts)
        draw = self.values["key"] if backend.spec.dropout else None
        backend._gradients(self.values["tokens"], self.values["targets"], draw, count, False)
        new = [tensor(grad.numpy()).realize() for grad in backend.grads.values()]
        grads = list(backend.grads.values())
        lr, norm = (Tensor(np.array([number], np.float32)).realize() for number in (0, 1))

        def put() -> list[Tensor]:
            Tensor.realize(*(g.assign(n + 0) for g, n in zip(grads, new, strict=True)))
            return grads

        def added() -> list[Tensor]:
            Tensor.realize(*(g.assign(g + n) for g, n in zip(grads, new, strict=True)))
            return grads

        def clipped() -> list[Tensor]:
            found, size = backend._clipped(grads)
            outputs = [size, *(g.contiguous() for g in found)]
            Tensor.realize(*outputs)
            return outputs

        def updated() -> list[Tensor]:
            changed = backend._adamw(grads, lr, norm)
            Tensor.realize(*changed)
            return changed

        first, more = self._call(put), self._call(added)

        def taken(number: int) -> Sequence[Any]:
            return (more if number % count else first)(number)

        yield Part("gradients", count, taken, note="are put into the optimizer's buffers")
        yield Part("clip", 1, self._call(clipped), note="includes the norm")
        yield Part("optimizer", 1, self._call(updated), note="is AdamW")

    # -- the device -----------------------------------------------------------------------------------------------

    def start(self, outputs: Sequence[Any]) -> None:
        """They are under way."""

    def wait(self, outputs: Sequence[Any]) -> None:
        Device.default.synchronize()

    def peek(self, array: Any) -> float:
        return float(array.numpy().reshape(-1)[0])

    def counted(self, call: Call) -> dict[str, int]:
        before = GlobalCounters.kernel_count
        call(0)
        return {"kernels": GlobalCounters.kernel_count - before} if self.backend.capabilities.accelerator else {}


def _both(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    made = [array.contiguous() for array in pair]
    Tensor.realize(*made)
    return made
