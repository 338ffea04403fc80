"""The MLX back end: Metal on a Mac, the CPU or CUDA elsewhere; one compiled graph a training iteration.

Import it through `kinds.create`, which sets what MLX reads from the process only once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from nanogpt_mac.backends import base, blas
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Lever, Tokens
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.backends.parts import Parts
from nanogpt_mac.gpt.mlx_gpt import GPT, KVCache, Linear, dropout_masks
from nanogpt_mac.gpt.spec import INIT_LOSS_SCALE, GPTSpec, TrainState

if TYPE_CHECKING:
    from nanogpt_mac.backends.mlx_world import MLXWorld

FREE_SHARE = 0.8  # of the GPU's free memory that MLX may hold; the rest is for what it cannot use of its blocks


@dataclass(frozen=True)
class Handle:
    """An iteration under way; reading either array waits for it, and for nothing enqueued later."""

    loss: mx.array
    norm: mx.array
    asked: mx.array  # mean over ranks of World.asked


@dataclass(frozen=True)
class _Layout:
    """Which parameters share a one-dimensional buffer, and whether a buffer's weights decay.

    On a GPU all that decay share one and all others another: the norm, the clip and AdamW then launch a few kernels
    and not a few for each parameter. On a CPU, where launches cost nothing, each has its own, which stays in its cache.
    """

    shapes: dict[str, tuple[int, ...]]
    buffers: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, spec: GPTSpec, one_buffer: bool) -> _Layout:
        shapes = spec.shapes()
        shared = (tuple(n for n, s in shapes.items() if (len(s) >= 2) is decays) for decays in (True, False))
        return cls(shapes, tuple(shared) if one_buffer else tuple((name,) for name in shapes))

    @property
    def decays(self) -> list[bool]:
        return [len(self.shapes[names[0]]) >= 2 for names in self.buffers]

    def join(self, arrays: Mapping[str, mx.array]) -> list[mx.array]:
        """One array a buffer, of what is given by canonical name."""
        return [mx.concatenate([arrays[name].reshape(-1) for name in names]) for names in self.buffers]

    def split(self, buffers: list[mx.array]) -> list[tuple[str, mx.array]]:
        """Each parameter as a view of its buffer, with its canonical name."""
        found = []
        for names, buffer in zip(self.buffers, buffers, strict=True):
            ends = list(accumulate(math.prod(self.shapes[name]) for name in names))
            parts = mx.split(buffer, ends[:-1]) if len(names) > 1 else [buffer]
            found += [(name, part.reshape(self.shapes[name])) for name, part in zip(names, parts, strict=True)]
        return found


class MLXBackend(Backend):
    LEVERS = (
        Lever(
            "backend.blas",
            "own",
            "the reference BLAS of MLX's Linux wheel",
            lambda here, config: sys.platform == "linux" and here.device == "cpu" and config.backend.blas != "own",
        ),
        Lever(
            "model.dropout",
            0.0,
            "no dropout, which learns something else; MLX then takes its fused attention",
            lambda _, config: config.model.dropout > 0,
        ),
        Lever(
            "model.dropout",
            0.2,
            "dropout of 0.2, which learns something else; MLX's fused attention cannot have it",
            lambda _, config: config.model.dropout == 0,
        ),
    )

    def __init__(self, spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> None:
        self.spec, self.options, self.tokens = spec, options, tokens
        kind = KINDS[options.name]
        self.capabilities = kind.on(self.device_of(kind))
        self.model = GPT(spec, getattr(mx, options.dtype), options.checkpointing)
        self.layout = _Layout.of(spec, one_buffer=self.device_name != "cpu")
        self.resident = {
            split: mx.array(array.astype(np.int32))
            for split, array in tokens.splits.items()
            if len(array) <= options.resident_tokens
        }
        self.half = options.dtype == "float16"  # which alone has a loss scale
        self.iteration = 0
        # Weights and moments as the layout has them, step, loss scale: all arrays, so all compiled state.
        self.trained: dict[str, Any] = {}
        self.load({name: np.zeros(shape, np.float32) for name, shape in spec.shapes().items()})

        compile_ = mx.compile if options.compile else _eager
        self._step = compile_(self._iteration, inputs=self.trained, outputs=self.trained)
        self._added = compile_(self._accumulated, inputs=self.trained)
        self._finish = compile_(self._finished, inputs=self.trained, outputs=self.trained)
        self._loss_and_grads = compile_(self._gradients, inputs=self.trained)
        weights = [self.model.state]
        self._val_loss = compile_(partial(self._window_loss, "val"), inputs=weights)
        self._train_loss = compile_(partial(self._window_loss, "train"), inputs=weights)
        # A GPU's launches are worth compiling for; on a CPU a compiler would run for seconds first.
        compile_ = mx.compile if options.compile or self.device_name != "cpu" else _eager
        self.decoding = GPT(spec, getattr(mx, options.dtype))  # never trained, and so without dropout
        for block in cast(Any, self.decoding.transformer)["h"]:  # but for attention, whose shape each length changes
            block.before, block.after = (compile_(part, inputs=[block.state]) for part in (block.before, block.after))

        if mx.metal.is_available():  # keep the weights from being paged out, as mlx-lm does
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        # What is enqueued has its memory already: without a limit the host runs ahead until there is none left.
        limit = int(1e9 * options.settings.get("memory_limit_gb", 0))
        if not limit and self.device_name != "cpu":  # MLX counts all that it holds in this process
            limit = mx.get_active_memory() + mx.get_cache_memory() + int(FREE_SHARE * self.free_memory())
        if limit:
            mx.set_memory_limit(limit)
        self.details = {"resident_data": sorted(self.resident), "blas": blas.taken(), "memory_limit": limit or None}

    @classmethod
    def device_of(cls, kind: Kind) -> str:
        if mx.default_device() != mx.Device(mx.gpu):
            return "cpu"
        return "metal" if mx.metal.is_available() else "cuda"

    # -- data: what crosses to the device is the starts, or whole windows where the split does not live there -----

    def _batch(self, split: str, starts: np.ndarray) -> mx.array:
        if split in self.resident:
            return mx.array(starts.astype(np.int32))
        return mx.array(self.tokens.windows(split, starts.reshape(-1)).reshape(*starts.shape, -1))

    def _windows(self, split: str, batch: mx.array) -> mx.array:
        if split in self.resident:
            return self.resident[split][batch[..., None] + mx.arange(self.spec.block_size + 1)]
        return batch

    # -- training -------------------------------------------------------------------------------------------------

    def step(self, starts: np.ndarray, lr: float) -> Handle:
        seed = base.step_seed(self.options.seed, self.iteration, self.world.rank)
        key, count = mx.random.key(seed), len(starts)  # dropout: a function of the iteration
        self.iteration += 1
        rate, asked = mx.array(lr, mx.float32), mx.array(float(self.world.asked))
        if count == 1:
            loss, norm, asked = self._step(self._batch("train", starts[0]), rate, key, asked)
        else:
            # A graph a batch: of all of them in one, MLX would hold every forward pass before the first backward.
            total, grads = mx.zeros(()), [mx.zeros(buffer.shape) for buffer in self.trained["weights"]]
            for row, one in zip(starts, mx.random.split(key, count), strict=True):
                total, grads = self._added(self._batch("train", row), one, count, total, grads)
                mx.async_eval(total, grads)
            loss, norm, asked = self._finish(total, grads, rate, asked)
        self.bound = False
        with self.phase("result"):
            mx.async_eval(loss, norm, self.trained)
            return Handle(loss, norm, asked)

    def _iteration(
        self, batch: mx.array, lr: mx.array, key: mx.array, asked: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The whole iteration of one batch as one graph: pick it, forward, loss, backward, clip, AdamW."""
        return self._finished(*self._of_batch(batch, key, 1), lr, asked)

    def _of_batch(self, batch: mx.array, key: mx.array, count: int) -> tuple[mx.array, list[mx.array]]:
        """The loss over `count` and its gradients, of a batch as `_batch` gives it."""
        windows = self._windows("train", batch)
        with self.phase("forward"):  # and backward: value_and_grad gives both
            return self._gradients(windows[:, :-1], windows[:, 1:], self._masks(len(windows), key), count)

    def _accumulated(
        self, batch: mx.array, key: mx.array, count: int, total: mx.array, grads: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """One of `count` batches, added to those before."""
        loss, new = self._of_batch(batch, key, count)
        return total + loss, [a + b for a, b in zip(grads, new, strict=True)]

    def _finished(
        self, total: mx.array, grads: list[mx.array], lr: mx.array, asked: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The mean over ranks, clip, AdamW."""
        if self.world.size > 1:
            *grads, total, asked = cast("MLXWorld", self.world).average([*grads, total, asked])
        with self.phase("clip"):
            grads, norm = self._clipped(grads)
        with self.phase("optimizer"):
            self._updated(grads, lr, norm)
        return total, norm, asked

    def _clipped(self, grads: list[mx.array]) -> tuple[list[mx.array], mx.array]:
        """Gradients without the loss scale, clipped, and their norm before."""
        if self.half:
            grads = [g / self.trained["loss_scale"] for g in grads]
        norm = mx.sqrt(sum((mx.sum(mx.square(g)) for g in grads), start=mx.zeros(())))
        if self.options.grad_clip:  # torch.nn.utils.clip_grad_norm_
            clip = mx.minimum(self.options.grad_clip / (norm + 1e-6), 1.0)
            grads = [g * clip for g in grads]
        return grads, norm

    def _updated(self, grads: list[mx.array], lr: mx.array, norm: mx.array) -> None:
        if self.half:
            self._scaled_update(grads, lr, mx.isfinite(norm))
        else:
            self._adamw(grads, lr)

    def _masks(self, batch: int, key: mx.array) -> list[mx.array] | None:
        return dropout_masks(self.spec, batch, self.spec.block_size, key) if self.spec.dropout else None

    def _gradients(
        self, x: mx.array, y: mx.array, keep: list[mx.array] | None, count: int = 1
    ) -> tuple[mx.array, list[mx.array]]:
        """The loss over `count`, and its gradients times the loss scale, as the layout has them."""

        def scaled(weights: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
            self.model.train().update(tree_unflatten(list(weights.items())))
            loss = self.model.loss(x, y, keep)
            if count > 1:
                loss = loss / count
            return (loss * self.trained["loss_scale"] if self.half else loss), loss

        (_, loss), grads = mx.value_and_grad(scaled)(dict(self.layout.split(self.trained["weights"])))
        return loss, self.layout.join(grads)

    def _adamw(self, grads: list[mx.array], lr: mx.array) -> None:
        """AdamW (Loshchilov and Hutter) as torch has it: decay on matrices alone, bias correction, eps 1e-8."""
        o, now = self.options, self.trained
        now["step"] = now["step"] + 1
        correction1, correction2 = (_correction(beta, now["step"]) for beta in (o.beta1, o.beta2))
        for i, (g, decays) in enumerate(zip(grads, self.layout.decays, strict=True)):
            m = o.beta1 * now["exp_avg"][i] + (1 - o.beta1) * g
            v = o.beta2 * now["exp_avg_sq"][i] + (1 - o.beta2) * mx.square(g)
            now["exp_avg"][i], now["exp_avg_sq"][i] = m, v
            decay = 1 - lr * o.weight_decay if decays else 1.0
            update = (m / correction1) / (mx.sqrt(v / correction2) + 1e-8)
            now["weights"][i] = now["weights"][i] * decay - lr * update

    def _scaled_update(self, grads: list[mx.array], lr: mx.array, finite: mx.array) -> None:
        """torch.amp.GradScaler's rule: leave out an update that overflowed and halve the scale; double it in time."""
        now = self.trained
        before = tree_map(lambda array: array, now)  # new lists of the same arrays
        self._adamw(grads, lr)
        for key in ("weights", "exp_avg", "exp_avg_sq", "step"):
            now[key] = tree_map(partial(mx.where, finite), now[key], before[key])
        growth = mx.where(finite, now["scale_growth"] + 1, 0)
        grown = growth == base.GROWTH_INTERVAL
        factor = mx.where(grown, base.SCALE_GROWTH, mx.where(finite, 1.0, base.SCALE_BACKOFF))
        now["loss_scale"], now["scale_growth"] = now["loss_scale"] * factor, mx.where(grown, 0, growth)

    def wait(self, handle: Handle) -> tuple[float, float]:
        with self.phase("result"):
            if self.world.size > 1:
                self.world.heard(_float(handle.asked))
            return _float(handle.loss), _float(handle.norm)

    def evaluate(self, split: str, starts: np.ndarray) -> float:
        self._evaluated()
        loss = self._val_loss if split == "val" else self._train_loss
        total = mx.zeros(())
        with self.phase("evaluation"):
            for batch_starts in starts:
                total = total + loss(self._batch(split, batch_starts))
                mx.async_eval(total)
            return _float(total) / len(starts)

    def _window_loss(self, split: str, batch: mx.array) -> mx.array:
        windows = self._windows(split, batch)
        return self.model.loss(windows[:, :-1], windows[:, 1:])

    # -- looking inside -------------------------------------------------------------------------------------------

    def _evaluated(self) -> GPT:
        """The model with the weights of now: an iteration leaves its tracers in it."""
        if not self.bound:
            self.model.update(tree_unflatten(self.layout.split(self.trained["weights"])))
            self.bound = True
        self.model.eval()
        return self.model

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(self._evaluated()(mx.array(tokens.astype(np.int32))))

    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        # Where nothing is dropped the training graph itself is what is checked; else only evaluation is deterministic.
        key = mx.random.key(base.step_seed(self.options.seed, self.iteration))
        drops = self.spec.dropout and np.float32(1 - self.spec.dropout) == 1
        keep = dropout_masks(self.spec, tokens.shape[0], tokens.shape[1], key) if drops else None
        x, y = mx.array(tokens.astype(np.int32)), mx.array(targets.astype(np.int32))
        loss, grads = self._loss_and_grads(x, y, keep)
        self.bound = False
        scale = self.trained["loss_scale"]
        return _float(loss), self._named([g / scale for g in grads])

    def decode(self) -> Callable[[np.ndarray], np.ndarray]:
        cache, model = KVCache(), self.decoding
        model.update(tree_unflatten(self.layout.split(self.trained["weights"])))
        for module in model.modules():
            if isinstance(module, Linear):  # cast once, not for every token
                module.apply(partial(mx.array.astype, dtype=module.dtype))

        def decoder(tokens: np.ndarray) -> np.ndarray:
            new = mx.array(tokens[None].astype(np.int32))
            with self.phase("sampling"):
                return np.array(model(new, cache)[0, -1])

        return decoder

    # -- state ----------------------------------------------------------------------------------------------------

    def _joined(self, arrays: Mapping[str, np.ndarray]) -> list[mx.array]:
        return self.layout.join({name: mx.array(array) for name, array in arrays.items()})

    def _named(self, arrays: list[mx.array]) -> dict[str, np.ndarray]:
        """A copy of each, by canonical name."""
        return {name: np.array(array) for name, array in self.layout.split(arrays)}

    def state(self) -> TrainState:
        now = self.trained
        return TrainState(
            self._named(now["weights"]),
            self._named(now["exp_avg"]),
            self._named(now["exp_avg_sq"]),
            iteration=self.iteration,
            optimizer_steps=int(_float(now["step"])),
            loss_scale=_float(now["loss_scale"]) if self.half else INIT_LOSS_SCALE,
            scale_growth=int(_float(now["scale_growth"])),
        )

    def restore(self, state: TrainState) -> None:
        # In place: the compiled step holds this very dictionary.
        self.trained.update(
            weights=self._joined(state.weights),
            exp_avg=self._joined(state.exp_avg),
            exp_avg_sq=self._joined(state.exp_avg_sq),
            step=mx.array(float(state.optimizer_steps)),
            loss_scale=mx.array(state.loss_scale if self.half else 1.0),
            scale_growth=mx.array(state.scale_growth),
        )
        self.iteration, self.bound = state.iteration, False
        mx.eval(self.trained)
        self._evaluated()  # a step must find no tracer of an earlier one in the model

    # -- the device -----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        mx.synchronize()

    def memory(self) -> dict[str, int]:
        if self.device_name == "cpu":
            return base.resident_memory()
        return {"current": mx.get_active_memory(), "peak": mx.get_peak_memory(), "cache": mx.get_cache_memory()}

    def reset_peak_memory(self) -> None:
        mx.reset_peak_memory()

    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[int], None]:
        m, k, n = shape
        keys = mx.random.split(mx.random.key(0))  # the global one belongs to the training run
        a, b = (mx.random.normal(size, getattr(mx, dtype), key=keys[i]) for i, size in enumerate(((m, k), (k, n))))
        mx.eval(a, b)

        def matmuls(count: int) -> None:
            for _ in range(count):
                mx.async_eval(mx.matmul(a, b))
            mx.synchronize()

        return matmuls

    def parts(self, starts: np.ndarray) -> Parts:
        from nanogpt_mac.backends.mlx_parts import MLXParts

        return MLXParts(self, starts)

    def free_memory(self) -> int:
        return int(mx.device_info().get("free_memory", super().free_memory()))  # there on CUDA alone

    def iteration_bytes(self) -> int:
        mx.synchronize()  # its loss comes before its update, and until then it holds more than what stays
        return mx.get_peak_memory() - mx.get_active_memory()  # given when it is enqueued, so a second takes as much

    def release_memory(self) -> None:
        mx.clear_cache()


def _correction(beta: float, step: mx.array) -> mx.array | float:
    """1 - beta**step, which float32 would round away for a beta near 1."""
    return -mx.expm1(step * math.log(beta)) if beta else 1.0


def _float(scalar: mx.array) -> float:
    """Wait for `scalar` and read it."""
    return float(cast(float, scalar.item()))


def _eager(function: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> Callable[..., Any]:
    """mx.compile's place where compile=false."""
    return function
