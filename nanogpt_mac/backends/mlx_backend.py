"""The MLX back end: Metal on a Mac, the CPU or CUDA elsewhere; one compiled graph a training iteration.

Import it through `kinds.create`, which sets what MLX reads from the process only once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from nanogpt_mac.backends import base
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Lever, Recommended, Tokens
from nanogpt_mac.backends.kinds import KINDS, MLXSettings
from nanogpt_mac.gpt.mlx_gpt import GPT, KVCache
from nanogpt_mac.gpt.spec import INIT_LOSS_SCALE, GPTSpec, TrainState
from nanogpt_mac.records.capabilities import Capabilities

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Handle:
    """An iteration under way; reading either array waits for it, and for nothing enqueued later."""

    loss: mx.array
    norm: mx.array


class MLXBackend(Backend):
    LEVERS = (
        Lever(
            "backend.blas",
            "own",
            "the reference BLAS of MLX's Linux wheel",
            lambda _, config: config.backend.blas == "torch",
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
        self.model = GPT(spec, getattr(mx, options.dtype))
        self.resident = {
            split: mx.array(array.astype(np.int32))
            for split, array in tokens.splits.items()
            if len(array) <= options.resident_tokens
        }
        self.iteration = 0
        self.optimizer: dict[str, Any] = {}  # moments by name, step, loss scale: all arrays, so all compiled state
        self.load({name: np.zeros(shape, np.float32) for name, shape in spec.shapes().items()})

        state = [self.model.state, self.optimizer, mx.random.state]
        weights = [self.model.state]
        compile_ = mx.compile if options.compile else _eager
        self._step = compile_(self._iteration, inputs=state, outputs=state)
        # Weights are outputs here too: taking gradients leaves tracers in the model, which must not outlive the trace.
        self._loss_and_grads = compile_(partial(_loss_and_grads, self.model), inputs=weights, outputs=weights)
        self._val_loss = compile_(partial(self._window_loss, "val"), inputs=weights)
        self._train_loss = compile_(partial(self._window_loss, "train"), inputs=weights)

        if mx.metal.is_available():  # keep the weights from being paged out, as mlx-lm does
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        self.details = {"resident_data": sorted(self.resident), "blas": MLXSettings(**options.settings).blas}

    @classmethod
    def device_of(cls, kind: Kind) -> str:
        if mx.default_device() != mx.Device(mx.gpu):
            return "cpu"
        return "metal" if mx.metal.is_available() else "cuda"

    @classmethod
    def recommended(cls, capabilities: Capabilities) -> tuple[Recommended, ...]:
        """The reference BLAS of the Linux CPU wheel is ten times slower than libtorch's; no Mac has it."""
        lends = sys.platform == "linux" and capabilities.device == "cpu" and find_spec("torch")
        return (Recommended("backend.blas", "torch", "torch's BLAS"),) if lends else ()

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
        mx.random.seed(base.step_seed(self.options.seed, self.iteration))  # dropout: a function of the iteration
        self.iteration += 1
        self.model.train()
        loss, norm = self._step(self._batch("train", starts), mx.array(lr, mx.float32))
        with self.phase("result"):
            mx.async_eval(loss, norm, self.model.parameters(), self.optimizer)
            return Handle(loss, norm)

    def _iteration(self, batch: mx.array, lr: mx.array) -> tuple[mx.array, mx.array]:
        """The whole iteration as one graph: pick batch, forward, loss, backward, accumulate, clip, AdamW."""
        windows, scale = self._windows("train", batch), self.optimizer["loss_scale"]
        total, grads = mx.zeros(()), Arrays()
        with self.phase("forward"):  # and backward: value_and_grad gives both
            for window in windows:
                loss, new = _loss_and_grads(self.model, window[:, :-1], window[:, 1:], scale / len(windows))
                total = total + loss / len(windows)
                grads = {name: grads[name] + g if name in grads else g for name, g in new.items()}
        with self.phase("clip"):
            grads = {name: g / scale for name, g in grads.items()}
            norm = mx.sqrt(sum((mx.sum(mx.square(g)) for g in grads.values()), start=mx.zeros(())))
            if self.options.grad_clip:  # torch.nn.utils.clip_grad_norm_
                clip = mx.minimum(self.options.grad_clip / (norm + 1e-6), 1.0)
                grads = {name: g * clip for name, g in grads.items()}
        with self.phase("optimizer"):
            if self.options.dtype == "float16":
                self._scaled_update(grads, lr, mx.isfinite(norm))
            else:
                self._adamw(grads, lr)
        return total, norm

    def _adamw(self, grads: Arrays, lr: mx.array) -> None:
        """AdamW (Loshchilov and Hutter) as torch has it: decay on matrices alone, bias correction, eps 1e-8."""
        o, opt = self.options, self.optimizer
        opt["step"] = opt["step"] + 1
        correction1, correction2 = (_correction(beta, opt["step"]) for beta in (o.beta1, o.beta2))
        weights = self._weights()
        for name, g in grads.items():
            m = o.beta1 * opt["exp_avg"][name] + (1 - o.beta1) * g
            v = o.beta2 * opt["exp_avg_sq"][name] + (1 - o.beta2) * mx.square(g)
            opt["exp_avg"][name], opt["exp_avg_sq"][name] = m, v
            decay = 1 - lr * o.weight_decay if g.ndim >= 2 else 1.0
            update = (m / correction1) / (mx.sqrt(v / correction2) + 1e-8)
            weights[name] = weights[name] * decay - lr * update
        self.model.update(tree_unflatten(list(weights.items())))

    def _scaled_update(self, grads: Arrays, lr: mx.array, finite: mx.array) -> None:
        """torch.amp.GradScaler's rule: leave out an update that overflowed and halve the scale; double it in time."""
        opt, weights = self.optimizer, self._weights()
        before = dict(opt, exp_avg=dict(opt["exp_avg"]), exp_avg_sq=dict(opt["exp_avg_sq"]))
        self._adamw(grads, lr)
        kept = {name: mx.where(finite, new, weights[name]) for name, new in self._weights().items()}
        self.model.update(tree_unflatten(list(kept.items())))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            opt[key] = tree_map(partial(mx.where, finite), opt[key], before[key])
        growth = mx.where(finite, opt["scale_growth"] + 1, 0)
        grown = growth == base.GROWTH_INTERVAL
        factor = mx.where(grown, base.SCALE_GROWTH, mx.where(finite, 1.0, base.SCALE_BACKOFF))
        opt["loss_scale"], opt["scale_growth"] = opt["loss_scale"] * factor, mx.where(grown, 0, growth)

    def wait(self, handle: Handle) -> tuple[float, float]:
        with self.phase("result"):
            return _float(handle.loss), _float(handle.norm)

    def evaluate(self, split: str, starts: np.ndarray) -> float:
        self.model.eval()
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

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.model.eval()
        return np.array(self.model(mx.array(tokens.astype(np.int32))))

    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        # Where nothing is dropped the training graph itself is what is checked; else only evaluation is deterministic.
        self.model.train(bool(np.float32(1 - self.spec.dropout) == 1))
        mx.random.seed(base.step_seed(self.options.seed, self.iteration))
        x, y = mx.array(tokens.astype(np.int32)), mx.array(targets.astype(np.int32))
        scale = self.optimizer["loss_scale"]
        loss, grads = self._loss_and_grads(x, y, scale)
        return _float(loss), {name: np.array(g / scale) for name, g in grads.items()}

    def decode(self) -> Callable[[np.ndarray], np.ndarray]:
        cache = KVCache()

        def decoder(tokens: np.ndarray) -> np.ndarray:
            self.model.eval()
            with self.phase("sampling"):
                return np.array(self.model(mx.array(tokens[None].astype(np.int32)), cache)[0, -1])

        return decoder

    # -- state ----------------------------------------------------------------------------------------------------

    def _weights(self) -> Arrays:
        return dict(tree_flatten(self.model.parameters()))

    def state(self) -> TrainState:
        opt = self.optimizer
        weights, exp_avg, exp_avg_sq = (
            {name: np.array(a) for name, a in tree.items()}
            for tree in (self._weights(), opt["exp_avg"], opt["exp_avg_sq"])
        )
        return TrainState(
            weights,
            exp_avg,
            exp_avg_sq,
            iteration=self.iteration,
            optimizer_steps=int(_float(opt["step"])),
            loss_scale=_float(opt["loss_scale"]) if self.options.dtype == "float16" else INIT_LOSS_SCALE,
            scale_growth=int(_float(opt["scale_growth"])),
        )

    def restore(self, state: TrainState) -> None:
        self.model.update(tree_unflatten([(name, mx.array(w)) for name, w in state.weights.items()]))
        # In place: the compiled step holds this very dictionary.
        self.optimizer.update(
            exp_avg={name: mx.array(a) for name, a in state.exp_avg.items()},
            exp_avg_sq={name: mx.array(a) for name, a in state.exp_avg_sq.items()},
            step=mx.array(float(state.optimizer_steps)),
            loss_scale=mx.array(state.loss_scale if self.options.dtype == "float16" else 1.0),
            scale_growth=mx.array(state.scale_growth),
        )
        self.iteration = state.iteration
        mx.eval(self.model.parameters(), self.optimizer)

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

    def free_memory(self) -> int:
        return int(mx.device_info().get("free_memory", super().free_memory()))  # there on CUDA alone

    def release_memory(self) -> None:
        mx.clear_cache()


def _loss_and_grads(model: GPT, x: mx.array, y: mx.array, scale: mx.array) -> tuple[mx.array, Arrays]:
    """The loss, and the gradients of `scale` times the loss by canonical name."""

    def scaled(model: GPT, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        loss = model.loss(x, y)
        return loss * scale, loss

    (_, loss), grads = nn.value_and_grad(model, scaled)(model, x, y)
    return loss, dict(tree_flatten(grads))


def _correction(beta: float, step: mx.array) -> mx.array | float:
    """1 - beta**step, which float32 would round away for a beta near 1."""
    return -mx.expm1(step * math.log(beta)) if beta else 1.0


def _float(scalar: mx.array) -> float:
    """Wait for `scalar` and read it."""
    return float(cast(float, scalar.item()))


def _eager(function: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> Callable[..., Any]:
    """mx.compile's place where compile=false."""
    return function
