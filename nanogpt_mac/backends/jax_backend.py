"""The JAX back end: the CPU, CUDA, or a Mac's GPU through a plugin; one jax.jit a training iteration.

Import it through `kinds.create`, which sets what JAX reads from the process only once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_mac.backends import base
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Lever, Tokens
from nanogpt_mac.backends.jax_entry import JAX_PLUGINS, jax_plugins
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.backends.parts import Parts
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.gpt.jax_gpt import GPT, KVCache, Weights, dropout_masks
from nanogpt_mac.gpt.spec import INIT_LOSS_SCALE, GPTSpec, TrainState
from nanogpt_mac.records.capabilities import Capabilities

PRECISIONS = {
    "highest": jax.lax.Precision.HIGHEST,
    "high": jax.lax.Precision.HIGH,
    "medium": jax.lax.Precision.DEFAULT,
}
Layers = dict[int, tuple[jax.Array, jax.Array]]
State = dict[str, Any]  # weights and moments by name, step, loss scale: what a step takes and gives


def _named(platform: str) -> str:
    """JAX's name of a platform as a device of ours."""
    names = {JAX_PLUGINS[plugin]: plugin for plugin in jax_plugins() if plugin in JAX_PLUGINS}
    return {"gpu": "cuda", **names}.get(platform, platform)


def taken(settings: Mapping[str, Any]) -> str:
    """The device of this process; InputError where `settings`, a kind's own, name another: JAX takes one for good."""
    platforms = str(getattr(jax.config, "jax_platforms", None) or "")  # as they were before JAX started
    try:
        wanted, device = settings.get("jax_device", "auto"), _named(jax.default_backend())
    except Exception as error:  # whatever a plugin raises, and AssertionError of JAX itself
        raise InputError(f"JAX_PLATFORMS={platforms}: JAX cannot start it: {reason(error)}; unset it") from error
    if wanted not in ("auto", device):
        asked = _named(platforms.partition(",")[0])
        if asked == wanted:
            raise InputError(f"backend.jax_device={wanted}: JAX finds none here; use auto or {device}")
        raise InputError(f"backend.jax_device={wanted}: JAX has taken {device} in this process; start a new one")
    return device


def _has_another(plugin: str, here: Capabilities, _config: Any) -> bool:
    return here.device in JAX_PLUGINS and here.device != plugin and plugin in jax_plugins()


class JaxBackend(Backend):
    LEVERS = tuple(
        Lever("backend.jax_device", plugin, "the other plugin for Metal", partial(_has_another, plugin))
        for plugin in JAX_PLUGINS
    )

    def __init__(self, spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> None:
        self.spec, self.options, self.tokens = spec, options, tokens
        kind = KINDS[options.name]
        self.capabilities = kind.on(taken(options.settings))
        self.place = jax.local_devices()[0]
        dtype, precision = getattr(jnp, options.dtype), PRECISIONS[options.matmul_precision]
        self.model = GPT(spec, dtype, precision, options.checkpointing)
        self.resident = {
            split: _put(array.astype(np.int32))
            for split, array in tokens.splits.items()
            if len(array) <= options.resident_tokens
        }
        self.half = options.dtype == "float16"  # which alone has a loss scale
        self.iteration = 0
        self.trained: State = {}
        self.load({name: np.zeros(shape, np.float32) for name, shape in spec.shapes().items()})

        # compile=true: an iteration is one executable, which overwrites the state that it is given. compile=false: JAX
        # compiles and runs every operation by itself, as it does where nothing asks for more.
        jit: Callable[..., Any] = jax.jit if options.compile else _eager
        self.ready = jit
        self._step = jit(self._iteration, donate_argnums=0, static_argnames="shape")
        self._loss_and_grads = jit(self._gradients, static_argnames="drops")
        self._val_loss = jit(self._window_loss)
        self._windows_of, self._logits = jit(self._windows), jit(self.model)
        # Sampling is always worth a compiler: each graph serves every length.
        self._first_logits, self._next_logits = jax.jit(self._decode_prompt), jax.jit(self._decode_one)

        self.details = {"resident_data": sorted(self.resident)}
        if self.device_name in JAX_PLUGINS:
            self.details["plugin"] = f"{self.device_name} {jax_plugins()[self.device_name]}"

    @classmethod
    def device_of(cls, kind: Kind) -> str:
        """Of a plugin the name alone: it brings an MLX of its own, best kept out of processes that only look around."""
        chosen = _named(os.environ.get("JAX_PLATFORMS", "").partition(",")[0])
        return chosen if chosen in JAX_PLUGINS else _named(jax.default_backend())

    # -- data: what crosses to the device is the starts, or whole windows where the split does not live there -----

    def _batch(self, split: str, starts: np.ndarray) -> np.ndarray:
        if split in self.resident:
            return starts.astype(np.int32)
        return self.tokens.windows(split, starts.reshape(-1)).reshape(*starts.shape, -1)

    def _windows(self, resident: jax.Array | None, batch: jax.Array) -> jax.Array:
        return batch if resident is None else resident[batch[..., None] + jnp.arange(self.spec.block_size + 1)]

    # -- training -------------------------------------------------------------------------------------------------

    def step(self, starts: np.ndarray, lr: float) -> jax.Array:
        key = _key(base.step_seed(self.options.seed, self.iteration))  # dropout: a function of the iteration
        self.iteration += 1
        batch, resident = self._batch("train", starts), self.resident.get("train")
        # One array crosses, because each costs 0.1 ms; and the result sets out for the host before it is asked for.
        words = np.concatenate([key, np.array([lr], np.float32).view(np.uint32), batch.view(np.uint32).reshape(-1)])
        self.trained, figures = self._step(self.trained, resident, words, shape=batch.shape)
        figures.copy_to_host_async()
        return figures

    def _iteration(
        self, now: State, resident: jax.Array | None, words: jax.Array, shape: tuple[int, ...]
    ) -> tuple[State, jax.Array]:
        """The whole iteration: pick batch, forward, loss, backward, accumulate, clip, AdamW. Loss and norm, (2,).

        `words`, uint32: the key, the bits of the learning rate, and a batch of `shape`.
        """
        words = jnp.asarray(words)
        key, lr = words[:2], jax.lax.bitcast_convert_type(words[2], jnp.float32)
        windows = self._windows(resident, words[3:].astype(jnp.int32).reshape(shape))
        count = len(windows)
        with self.phase("forward"):  # and backward: value_and_grad gives both
            if count == 1:
                total, grads = self._of_windows(now, windows[0], key, 1)
            else:
                each = jax.random.key_data(jax.random.split(jax.random.wrap_key_data(key), count))
                total, grads = self._accumulated(now, windows, each)
        with self.phase("clip"):
            grads, norm = self._clipped(now, grads)
        with self.phase("optimizer"):
            now = self._updated(now, grads, lr, norm)
        return now, jnp.stack([total, norm])

    def _accumulated(self, now: State, windows: jax.Array, keys: jax.Array) -> tuple[jax.Array, Weights]:
        """The mean of several batches: one graph for all of them where it is compiled."""
        count = len(windows)

        def add(sums: Any, one: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, self._of_windows(now, *one, count)), None

        if self.options.compile:
            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, now["weights"])
            return jax.lax.scan(add, zeros, (windows, keys))[0]
        sums = self._of_windows(now, windows[0], keys[0], count)
        for one in zip(windows[1:], keys[1:], strict=True):
            sums, _ = add(sums, one)
        return sums

    def _of_windows(self, now: State, windows: jax.Array, key: jax.Array, count: int) -> tuple[jax.Array, Weights]:
        return self._gradients(now, windows[:, :-1], windows[:, 1:], key, count)

    def _gradients(
        self, now: State, x: jax.Array, y: jax.Array, key: jax.Array, count: int = 1, drops: bool = True
    ) -> tuple[jax.Array, Weights]:
        """The loss over `count`, and its gradients times the loss scale."""
        keep = dropout_masks(self.spec, x.shape[0], x.shape[1], key) if self.spec.dropout and drops else None

        def scaled(weights: Weights) -> tuple[jax.Array, jax.Array]:
            loss = self.model.loss(weights, x, y, keep) / count
            return (loss * now["loss_scale"] if self.half else loss), loss

        (_, loss), grads = jax.value_and_grad(scaled, has_aux=True)(now["weights"])
        return loss, grads

    def _clipped(self, now: State, grads: Weights) -> tuple[Weights, jax.Array]:
        """Gradients without the loss scale, clipped, and their norm before."""
        if self.half:
            grads = {name: g / now["loss_scale"] for name, g in grads.items()}
        norm = jnp.sqrt(sum((jnp.sum(jnp.square(g)) for g in grads.values()), start=jnp.zeros(())))
        if self.options.grad_clip:  # torch.nn.utils.clip_grad_norm_
            clip = jnp.minimum(self.options.grad_clip / (norm + 1e-6), 1.0)
            grads = {name: g * clip for name, g in grads.items()}
        return grads, norm

    def _updated(self, now: State, grads: Weights, lr: jax.Array, norm: jax.Array) -> State:
        return self._scaled_update(now, grads, lr, norm) if self.half else self._adamw(now, grads, lr)

    def _adamw(self, now: State, grads: Weights, lr: jax.Array) -> State:
        """AdamW (Loshchilov and Hutter) as torch has it: decay on matrices alone, bias correction, eps 1e-8."""
        o, step = self.options, now["step"] + 1
        correction1, correction2 = (_correction(beta, step) for beta in (o.beta1, o.beta2))
        new: State = {**now, "step": step, "weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, g in grads.items():
            w = now["weights"][name]
            m = o.beta1 * now["exp_avg"][name] + (1 - o.beta1) * g
            v = o.beta2 * now["exp_avg_sq"][name] + (1 - o.beta2) * jnp.square(g)
            decay = 1 - lr * o.weight_decay if w.ndim >= 2 else 1.0
            update = (m / correction1) / (jnp.sqrt(v / correction2) + 1e-8)
            new["weights"][name], new["exp_avg"][name], new["exp_avg_sq"][name] = w * decay - lr * update, m, v
        return new

    def _scaled_update(self, now: State, grads: Weights, lr: jax.Array, norm: jax.Array) -> State:
        """torch.amp.GradScaler's rule: leave out an update that overflowed and halve the scale; double it in time."""
        finite = jnp.isfinite(norm)
        new = jax.tree.map(partial(jnp.where, finite), self._adamw(now, grads, lr), now)
        growth = jnp.where(finite, now["scale_growth"] + 1, 0)
        grown = growth == base.GROWTH_INTERVAL
        factor = jnp.where(grown, base.SCALE_GROWTH, jnp.where(finite, 1.0, base.SCALE_BACKOFF))
        return {**new, "loss_scale": now["loss_scale"] * factor, "scale_growth": jnp.where(grown, 0, growth)}

    def wait(self, handle: jax.Array) -> tuple[float, float]:
        with self.phase("result"):
            loss, norm = np.asarray(handle)  # not block_until_ready, which returns at once on one plugin
            return float(loss), float(norm)

    def evaluate(self, split: str, starts: np.ndarray) -> float:
        weights, resident = self.trained["weights"], self.resident.get(split)
        with self.phase("evaluation"):
            batches = [self._windows_of(resident, self._batch(split, each)) for each in starts]
            losses = [self._val_loss(weights, windows) for windows in batches]
            return float(np.mean([np.asarray(loss) for loss in losses]))

    def _window_loss(self, weights: Weights, windows: jax.Array) -> jax.Array:
        return self.model.loss(weights, windows[:, :-1], windows[:, 1:])

    # -- looking inside -------------------------------------------------------------------------------------------

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(self._logits(self.trained["weights"], tokens.astype(np.int32)))

    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        # Where nothing is dropped the training graph itself is what is checked; else only evaluation is deterministic.
        drops = bool(self.spec.dropout) and np.float32(1 - self.spec.dropout) == 1
        key = _key(base.step_seed(self.options.seed, self.iteration))
        x, y = (jnp.asarray(each.astype(np.int32)) for each in (tokens, targets))
        loss, grads = self._loss_and_grads(self.trained, x, y, key, drops=bool(drops))
        scale = np.asarray(self.trained["loss_scale"])
        return float(loss), {name: np.asarray(g) / scale for name, g in grads.items()}

    def decode(self) -> Callable[[np.ndarray], np.ndarray]:
        layers: Layers | None = None
        length = 0

        def decoder(tokens: np.ndarray) -> np.ndarray:
            nonlocal layers, length
            weights, new = self.trained["weights"], tokens.astype(np.int32)
            with self.phase("sampling"):
                if layers is None:
                    whole = np.zeros((1, self.spec.block_size), np.int32)
                    whole[0, : len(new)] = new
                    logits, layers = self._first_logits(weights, whole, len(new))
                else:
                    for i, token in enumerate(new):
                        logits, layers = self._next_logits(weights, token[None, None], layers, length + i)
                length += len(new)
                return np.array(logits)

        return decoder

    def _decode_prompt(self, weights: Weights, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, Layers]:
        """Of tokens (1, block_size), of which `length` are the prompt's: the next one's logits (V,), and the cache.

        Nothing sees what stands behind the prompt: later tokens take its places.
        """
        cache = KVCache()
        return self.model(weights, tokens, cache)[0, length - 1], cache.layers

    def _decode_one(
        self, weights: Weights, token: jax.Array, layers: Layers, length: jax.Array
    ) -> tuple[jax.Array, Layers]:
        """One further token, (1, 1); its logits (V,) and the cache after it."""
        cache = KVCache()
        cache.layers, cache.length = dict(layers), length
        return self.model(weights, token, cache)[0, -1], cache.layers

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> TrainState:
        now = self.trained
        return TrainState(
            _copied(now["weights"]),
            _copied(now["exp_avg"]),
            _copied(now["exp_avg_sq"]),
            iteration=self.iteration,
            optimizer_steps=int(now["step"]),
            loss_scale=float(now["loss_scale"]) if self.half else INIT_LOSS_SCALE,
            scale_growth=int(now["scale_growth"]),
        )

    def restore(self, state: TrainState) -> None:
        self.trained = {
            "weights": _put_all(state.weights),
            "exp_avg": _put_all(state.exp_avg),
            "exp_avg_sq": _put_all(state.exp_avg_sq),
            "step": _put(np.float32(state.optimizer_steps)),
            "loss_scale": _put(np.float32(state.loss_scale if self.half else 1.0)),
            "scale_growth": _put(np.int32(state.scale_growth)),
        }
        self.iteration = state.iteration

    # -- the device -----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        np.asarray(self.trained["step"])  # the last that was enqueued

    def memory(self) -> dict[str, int]:
        held = self.place.memory_stats()
        if not held:  # a CPU, and a plugin that does not count
            return base.resident_memory()
        return {"current": held["bytes_in_use"], "peak": held.get("peak_bytes_in_use", held["bytes_in_use"])}

    def free_memory(self) -> int:
        held = self.place.memory_stats() or {}
        return held["bytes_limit"] - held["bytes_in_use"] if "bytes_limit" in held else super().free_memory()

    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[int], None]:
        m, k, n = shape
        keys = jax.random.split(jax.random.key(0))  # of its own
        a, b = (
            jax.random.normal(key, size, getattr(jnp, dtype)) for key, size in zip(keys, ((m, k), (k, n)), strict=True)
        )

        def matmuls(count: int) -> None:
            for _ in range(count):
                product = jnp.matmul(a, b, precision=self.model.precision)
            np.asarray(product[0, 0])  # they run one after the other

        return matmuls

    def parts(self, starts: np.ndarray) -> Parts:
        from nanogpt_mac.backends.jax_parts import JaxParts

        return JaxParts(self, starts)


def _put(array: np.ndarray | np.generic) -> jax.Array:
    """A copy on the device: an array of the host's may be taken as it is, and a step overwrites what it is given."""
    return jax.device_put(np.array(array))


def _put_all(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: _put(array) for name, array in arrays.items()}


def _copied(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in arrays.items()}


def _key(seed: int) -> np.ndarray:
    """63 bits as the two uint32 of a threefry key: as one number they would overflow JAX's int32."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _correction(beta: float, step: jax.Array) -> jax.Array | float:
    """1 - beta**step, which float32 would round away for a beta near 1."""
    return -jnp.expm1(step * math.log(beta)) if beta else 1.0


def _eager(function: Callable[..., Any], **_how: Any) -> Callable[..., Any]:
    """jax.jit's place where compile=false."""
    return function
