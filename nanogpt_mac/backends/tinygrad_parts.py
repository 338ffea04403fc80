"""The parts of tinygrad's iteration: each is captured and replayed by itself, where the iteration is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.helpers import GlobalCounters

from nanogpt_mac.backends.parts import Call, Part, Stage, TwinParts
from nanogpt_mac.gpt.tinygrad_gpt import dropout_masks, mean_nats, tensor

if TYPE_CHECKING:
    from nanogpt_mac.backends.tinygrad_backend import TinygradBackend


def _realized(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Each of them computed."""
    computed = [output.contiguous() for output in outputs]
    Tensor.realize(*computed)
    return computed


class TinygradParts(TwinParts):
    """Its weights lie in buffers that stay, so they are read from there."""

    def __init__(self, backend: TinygradBackend, starts: np.ndarray) -> None:
        self.backend, self.starts, self.spec, self.weights = backend, starts, backend.spec, backend.weights
        tokens, targets = _realized(backend._windows("train", backend._batch("train", starts[0])))
        keep = [None] * (1 + 3 * self.spec.n_layer)
        self.values = {"tokens": tokens, "targets": targets, "keep": keep, "key": tensor(backend._key(0)).realize()}
        self.ready = backend.ready
        self.causal = Tensor.ones(*2 * [self.spec.block_size], dtype=dtypes.bool).tril()
        self.stages = self._stages()
        self.parts = {part.name: part for part in (self._batch(), *self._of_model(), *self._of_optimizer())}

    # -- the twin -------------------------------------------------------------------------------------------------

    def _part(self, name: str, weights: Any) -> Any:
        return self.backend.model.part(name)

    def _masks(self, key: Tensor) -> list[Tensor]:
        return dropout_masks(self.spec, self.starts.shape[1], self.spec.block_size, key)

    def _mean_nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        return mean_nats(logits, targets)

    def _call(self, function: Callable[[], Sequence[Tensor]]) -> Call:
        """`function` as a part's call: what it reads lies in buffers that stay, so nothing goes in."""
        ready = self.ready(function)
        return lambda number: ready()

    def _run(self, stage: Stage, given: tuple[Any, ...]) -> tuple[Any, ...]:
        (made,) = super()._run(stage, given)
        return (_realized(made) if isinstance(made, list) else _realized([made])[0],)

    def _calls(self, stage: Stage, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Call, Call | None]:
        weights = self._named(stage)
        wanted = [*(given[i] for i in stage.moving), *weights.values()]

        def forward() -> list[Tensor]:
            output = stage.function(weights, *given)
            return _realized(output if isinstance(output, list) else [output])

        def both() -> list[Tensor]:
            output = stage.function(weights, *given)
            return _realized([output, *output.gradient(*wanted, gradient=cotangent)])

        if not wanted:
            return self._call(forward), None
        shape = made[0].shape
        drawn = np.random.Generator(np.random.Philox(1)).standard_normal(shape or (1,), np.float32)
        cotangent = tensor(drawn).cast(made[0].dtype).contiguous().realize().reshape(shape)
        return self._call(forward), self._call(both)

    # -- beside it ------------------------------------------------------------------------------------------------

    def _batch(self) -> Part:
        backend = self.backend
        gather = self.ready(lambda batch: _realized(backend._windows("train", batch)))

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
            return _realized([size, *found])

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
