"""The parts of JAX's iteration. Each is an executable of its own, where the iteration is one as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_mac.backends.jax_arrays import complete, first
from nanogpt_mac.backends.parts import DerivedParts, Part
from nanogpt_mac.gpt.jax_gpt import Weights, dropout_masks, mean_nats

if TYPE_CHECKING:
    from nanogpt_mac.backends.jax_backend import JaxBackend


class JaxParts(DerivedParts):
    def __init__(self, backend: JaxBackend, starts: np.ndarray) -> None:
        self.backend, self.starts, self.spec = backend, starts, backend.spec
        self.again = jax.checkpoint if backend.options.checkpointing else None
        self.ready, self.causal = backend.ready, jnp.tri(self.spec.block_size, dtype=bool)
        window = backend._windows(backend.resident.get("train"), jnp.asarray(backend._batch("train", starts)))[0]
        self.values: dict[str, Any] = {
            "tokens": window[:, :-1],
            "targets": window[:, 1:],
            "keep": [None] * (1 + 3 * self.spec.n_layer),
            "key": jnp.zeros(2, jnp.uint32),
        }
        self.stages = self._stages()
        self.parts = {part.name: part for part in (self._batch(), *self._of_model(), *self._of_optimizer())}
        if backend.runs_ahead:
            one, add = jnp.zeros(1), jax.jit(lambda array: array + 1)
            self.smallest = lambda number: (add(one),)

    @property
    def weights(self) -> Mapping[str, jax.Array]:  # type: ignore[override]  # a step overwrites those it is given
        now: Mapping[str, jax.Array] = self.backend.trained["weights"]
        return now

    # -- the twin -------------------------------------------------------------------------------------------------

    def _part(self, name: str, weights: Weights) -> Callable[..., Any]:
        *path, last = name.split(".")
        method = "norm" if last.startswith("ln_") else "attention" if last == "attn" else last
        return partial(getattr(self.backend.model, method), weights, *([name] if path else []))

    def _masks(self, key: jax.Array) -> list[jax.Array]:
        return dropout_masks(self.spec, self.starts.shape[1], self.spec.block_size, key)

    def _mean_nats(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        return mean_nats(logits, targets)

    def _vjp(self, function: Callable[..., Any], of: list[jax.Array], cotangents: list[jax.Array]) -> list[jax.Array]:
        outputs, backward = jax.vjp(function, *of)
        return [*outputs, *backward(cotangents)]

    def _cotangent(self, output: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(1), output.shape, output.dtype)

    # -- beside it ------------------------------------------------------------------------------------------------

    def _batch(self) -> Part:
        backend, resident = self.backend, self.backend.resident.get("train")
        gather = self.ready(lambda resident, batch: backend._windows(resident, jnp.asarray(batch)))
        note = "gathers its windows, of numbers that cross to the device"
        return Part("batch", 1, lambda number: (gather(resident, backend._batch("train", self.starts)),), note=note)

    def _of_optimizer(self) -> Iterator[Part]:
        """The weights stay: the learning rate is 0."""
        backend, values, compiled = self.backend, self.values, self.backend.options.compile
        _, grads = backend._loss_and_grads(backend.trained, values["tokens"], values["targets"], values["key"])
        sums, lr, norm = jax.tree.map(jnp.zeros_like, grads), jnp.zeros(()), jnp.ones(())
        add = self.ready(lambda sums, new: jax.tree.map(jnp.add, sums, new), donate_argnums=0)
        clip, update = self.ready(backend._clipped), self.ready(backend._updated, donate_argnums=0)

        def taken(number: int) -> Sequence[Any]:
            nonlocal sums
            sums = add(sums, grads)
            return jax.tree.leaves(sums)

        def clipped(number: int) -> Sequence[Any]:
            return jax.tree.leaves(clip({"loss_scale": backend.trained["loss_scale"]}, grads))

        def step(number: int) -> Sequence[Any]:
            backend.trained = update(backend.trained, grads, lr, norm)
            return jax.tree.leaves(backend.trained)

        count = len(self.starts)
        if count > 1:  # else they are what the clip reads
            times = count if compiled else count - 1  # compiled, they are added to zeros first
            yield Part("gradients", times, taken, note="are added to those of the batches before")
        yield Part("clip", 1, clipped, note="includes the norm")
        yield Part("optimizer", 1, step, note="is AdamW")

    # -- the device -----------------------------------------------------------------------------------------------

    def start(self, outputs: Sequence[Any]) -> None:
        """JAX has started them when it gives them."""

    def wait(self, outputs: Sequence[Any]) -> None:
        complete(outputs, self.backend.device_name)

    def peek(self, array: Any) -> float:
        return first(array)
