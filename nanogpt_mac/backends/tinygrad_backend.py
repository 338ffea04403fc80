"""The tinygrad back end: Metal on a Mac, CUDA or the CPU elsewhere; a training iteration is captured once and replayed.

Import it through `kinds.create`, which says which device tinygrad takes. Every kernel is compiled, whatever `compile`
says: true has TinyJit keep the list of an iteration's kernels and replay it, false schedules every iteration anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit, dtypes
from tinygrad.helpers import GlobalCounters

from nanogpt_mac.backends import base
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Lever, Tokens
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.backends.parts import Parts
from nanogpt_mac.backends.tinygrad_entry import TinygradSettings
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.gpt.spec import INIT_LOSS_SCALE, GPTSpec, TrainState
from nanogpt_mac.gpt.tinygrad_gpt import GPT, KVCache, dropout_masks, sizes, tensor


class Replayed:
    """`function` under TinyJit, captured once for all that tinygrad would bake in: shapes, and what is no tensor.

    It is captured at its first call, which TinyJit leaves to the second: nothing here is made lazily, and an iteration
    that compiles is then the first alone. What it returns lies in the same buffers after every call.
    """

    def __init__(self, function: Callable[..., Any], replays: bool, context: Mapping[str, int]) -> None:
        self.function, self.replays, self.context = function, replays, context
        self.captured: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *given: Any) -> Any:
        with Context(**self.context):
            if not self.replays:
                return self.function(*given)
            fixed = tuple((g.shape, g.dtype) if isinstance(g, Tensor) else g for g in given)
            if fixed not in self.captured:
                self.captured[fixed] = jit = TinyJit(partial(_with, self.function, fixed))
                jit.cnt = 1
            return self.captured[fixed](*(g for g in given if isinstance(g, Tensor)))


def _with(function: Callable[..., Any], fixed: tuple[Any, ...], *tensors: Tensor) -> Any:
    """`function` of what is `fixed`, with `tensors` in the places of their shapes."""
    left = iter(tensors)
    return function(*(next(left) if isinstance(given, tuple) else given for given in fixed))


class TinygradBackend(Backend):
    LEVERS = (
        Lever(
            "backend.beam",
            2,
            "the fastest of several versions of each kernel; the search is part of compiling",
            lambda here, config: not config.backend.beam and here.accelerator,
        ),
        Lever("checkpointing", True, "it has none", lambda here, config: False),  # everybody else's
    )

    def __init__(self, spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> None:
        if options.checkpointing:
            raise InputError("checkpointing=true: backend=tinygrad has none; use checkpointing=false")
        self.spec, self.options, self.tokens = spec, options, tokens
        kind, settings = KINDS[options.name], TinygradSettings(**options.settings)
        try:
            self.capabilities = kind.on(self.device_of(kind))
        except Exception as error:  # whatever its drivers raise
            why = f"tinygrad cannot open it: {reason(error)}"
            raise InputError(f"DEV={Device.DEFAULT}: {why}; use DEV=CPU, or a device that this machine has") from error
        self.model = GPT(spec, getattr(dtypes, options.dtype))
        self.resident = {
            split: tensor(array).realize()
            for split, array in tokens.splits.items()
            if len(array) <= options.resident_tokens
        }
        self.half = options.dtype == "float16"  # which alone has a loss scale
        self.iteration, self.peak = 0, 0
        # All state lies in buffers that stay: what is captured reads and writes these very ones.
        shapes = spec.shapes()
        self.weights, self.exp_avg, self.exp_avg_sq, self.grads = (
            {name: Tensor(np.zeros(shape, np.float32)) for name, shape in shapes.items()} for _ in range(4)
        )
        self.loss, self.steps, self.scale, self.growth = (Tensor(np.zeros(1, np.float32)) for _ in range(4))
        trees = self.weights, self.exp_avg, self.exp_avg_sq, self.grads
        Tensor.realize(*(tensor for tree in trees for tensor in tree.values()))
        Tensor.realize(self.loss, self.steps, self.scale, self.growth)
        self.model.bind(self.weights)

        self.context = {"BEAM": settings.beam, "ALLOW_TF32": int(options.matmul_precision != "highest")}
        ready = self.ready = partial(Replayed, replays=options.compile, context=self.context)
        self._micro_batch = ready(self._of_words)
        self._gradients_of, self._loss_of, self._logits_of = (
            ready(function) for function in (self._gradients, self._batch_loss, self._logits)
        )
        self._prompt, self._next = (
            Replayed(function, True, self.context) for function in (self._decode_prompt, self._decode_one)
        )
        self.details = {"resident_data": sorted(self.resident), "renderer": type(Device.default.renderer).__name__}

    @classmethod
    def device_of(cls, kind: Kind) -> str:
        Device[Device.DEFAULT]  # raises where it cannot be opened
        return Device.DEFAULT.split(":")[0].lower()

    # -- data: what crosses to the device is the starts, or whole windows where the split does not live there -----

    def _host_batch(self, split: str, starts: np.ndarray) -> np.ndarray:
        return starts.astype(np.int32) if split in self.resident else self.tokens.windows(split, starts)

    def _batch(self, split: str, starts: np.ndarray) -> Tensor:
        return _put(self._host_batch(split, starts))

    def _windows(self, split: str, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int32 (B, T)."""
        if split in self.resident:
            offsets = batch.reshape(-1, 1) + Tensor.arange(self.spec.block_size + 1)
            batch = self.resident[split][offsets].cast(dtypes.int32).contiguous()
        batch = batch.reshape(-1, self.spec.block_size + 1)
        return batch[:, :-1], batch[:, 1:]

    # -- training -------------------------------------------------------------------------------------------------

    def step(self, starts: np.ndarray, lr: float) -> Any:
        for i, row in enumerate(starts):
            # One array crosses: each costs 1 ms. As Python numbers all of it would stay what it was when captured.
            batch = self._host_batch("train", row).view(np.uint32).reshape(-1)
            words = np.concatenate([self._key(i), np.array([lr], np.float32).view(np.uint32), batch])
            result = self._micro_batch("train", _put(words), len(starts), i > 0, i + 1 == len(starts))
        self.iteration += 1
        self.peak = max(self.peak, GlobalCounters.mem_used)
        with self.phase("result"):
            loss, norm = result.tolist()
            return loss, norm

    def _key(self, micro: int) -> np.ndarray:
        """Key and counter of dropout, uint32 (4,): a function of the iteration and of the micro-batch."""
        seed = base.step_seed(self.options.seed, self.iteration)
        return np.array([seed & 0xFFFFFFFF, seed >> 32, micro, 0], np.uint32)

    def _of_words(self, split: str, words: Tensor, count: int, more: bool, last: bool) -> Tensor:
        """A micro-batch, one of `count`: its gradients, added to those before if there are `more`; after the `last`,
        clip and AdamW, and loss and norm, (2,). `words`, uint32: key and counter, bits of the learning rate, batch."""
        draw, lr, batch = words[:4].contiguous(), words[4:5].bitcast(dtypes.float32), words[5:].cast(dtypes.int32)
        loss = self._gradients(*self._windows(split, batch), draw if self.spec.dropout else None, count, more)
        return self._updated(lr) if last else loss

    def _gradients(self, x: Tensor, y: Tensor, draw: Tensor | None, count: int, more: bool) -> Tensor:
        """The loss over `count`, and in `self.grads` its gradients times the loss scale: added to them, if `more`."""
        B, T = sizes(x)
        keep = None if draw is None else dropout_masks(self.spec, B, T, draw)
        with self.phase("forward"):  # and backward: scheduled together
            loss = self.model.loss(x, y, keep) / count
            found = (loss * self.scale if self.half else loss).sum().gradient(*self.weights.values())
            for place, new in zip(self.grads.values(), found, strict=True):
                place.assign(place + new.cast(dtypes.float32) if more else new.cast(dtypes.float32))
            self.loss.assign(self.loss + loss if more else loss.reshape(1))
            return self.loss.realize(*self.grads.values())

    def _updated(self, lr: Tensor) -> Tensor:
        """Clip and AdamW, of the gradients that are there; loss and norm, (2,)."""
        with self.phase("clip"):
            grads, norm = self._clipped(list(self.grads.values()))
        with self.phase("optimizer"):
            changed = self._adamw(grads, lr, norm)
        return self.loss.cat(norm).contiguous().realize(*changed)

    def _clipped(self, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Gradients without the loss scale, clipped, and their norm before, (1,)."""
        if self.half:
            grads = [g / self.scale for g in grads]
        norm = sum((g.square().sum() for g in grads), start=Tensor.zeros(1)).sqrt().contiguous()
        if self.options.grad_clip:  # torch.nn.utils.clip_grad_norm_
            clip = (self.options.grad_clip / (norm + 1e-6)).minimum(1.0)
            grads = [g * clip for g in grads]
        return grads, norm

    def _adamw(self, grads: list[Tensor], lr: Tensor, norm: Tensor) -> list[Tensor]:
        """AdamW (Loshchilov and Hutter) as torch has it: decay on matrices alone, bias correction, eps 1e-8.

        In float16 an update that overflowed is left out, and the loss scale moves as torch.amp.GradScaler's.
        """
        o, finite = self.options, norm.isfinite()

        def kept(new: Tensor, old: Tensor) -> Tensor:
            return finite.where(new, old) if self.half else new

        t = self.steps + 1
        correction1, correction2 = (correction(beta, t) for beta in (o.beta1, o.beta2))
        changed = []
        for g, (name, w) in zip(grads, self.weights.items(), strict=True):
            m, v, decay = self.exp_avg[name], self.exp_avg_sq[name], o.weight_decay if w.ndim >= 2 else 0.0
            m.assign(kept(o.beta1 * m + (1 - o.beta1) * g, m))
            v.assign(kept(o.beta2 * v + (1 - o.beta2) * g.square(), v))
            update = (m / correction1) / ((v / correction2).sqrt() + 1e-8)
            w.assign(kept(w * (1 - lr * decay) - lr * update, w))
            changed += [m, v, w]
        if self.half:
            growth = finite.where(self.growth + 1, 0)
            grown = growth == base.GROWTH_INTERVAL
            factor = grown.where(base.SCALE_GROWTH, finite.where(1.0, base.SCALE_BACKOFF))
            growth, scale = grown.where(0, growth).contiguous(), (self.scale * factor).contiguous()
            changed += [self.growth.assign(growth), self.scale.assign(scale)]
        return [*changed, self.steps.assign(kept(t, self.steps))]

    def wait(self, handle: tuple[float, float]) -> tuple[float, float]:
        return handle

    def evaluate(self, split: str, starts: np.ndarray) -> float:
        with self.phase("evaluation"):
            return sum(self._loss_of(split, self._batch(split, row)).item() for row in starts) / len(starts)

    def _batch_loss(self, split: str, batch: Tensor) -> Tensor:
        return self.model.loss(*self._windows(split, batch)).realize()

    # -- looking inside -------------------------------------------------------------------------------------------

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Padded to `block_size`, behind which nobody looks: every length has the same kernels."""
        T = tokens.shape[1]
        padded = np.pad(tokens, ((0, 0), (0, self.spec.block_size - T))).astype(np.int32)
        made: np.ndarray = self._logits_of(_put(padded)).numpy()
        return made[:, :T].copy()

    def _logits(self, idx: Tensor) -> Tensor:
        return self.model(idx).realize()

    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        # Where nothing is dropped the training graph itself is what is checked; else only evaluation is deterministic.
        draw = _put(self._key(0)) if self.spec.dropout and np.float32(1 - self.spec.dropout) == 1 else None
        x, y = (_put(a.astype(np.int32)) for a in (tokens, targets))
        loss = self._gradients_of(x, y, draw, 1, False).item()
        scale = self.scale.item() if self.half else 1.0
        return loss, {name: g / np.float32(scale) for name, g in _read(self.grads).items()}

    def decode(self) -> Callable[[np.ndarray], np.ndarray]:
        spec, length = self.spec, 0
        empty = np.zeros((2, 1, spec.n_head, spec.block_size, spec.n_embd // spec.n_head), np.float32)
        layers = [Tensor(empty).cast(self.model.dtype).contiguous().realize() for _ in range(spec.n_layer)]

        def decoder(tokens: np.ndarray) -> np.ndarray:
            nonlocal length
            with self.phase("sampling"):
                if not length:
                    length = len(tokens)
                    prompt = np.pad(tokens, (0, spec.block_size - length)).astype(np.int32)
                    made = self._prompt(_put(prompt[None]), *layers).numpy()[length - 1]
                else:
                    for token in tokens:
                        place, new = _put(np.array([length], np.int32)), _put(np.array([[token]], np.int32))
                        made, length = self._next(new, place, *layers).numpy(), length + 1
            return np.array(made)

        return decoder

    def _decode_prompt(self, idx: Tensor, *layers: Tensor) -> Tensor:
        """Logits (block_size, V) of a prompt (1, block_size), padded behind its end; `layers` then hold it."""
        return self.model(idx, KVCache(layers))[0].contiguous().realize()

    def _decode_one(self, token: Tensor, length: Tensor, *layers: Tensor) -> Tensor:
        """Logits (V,) of one further token, (1, 1), behind `length` others. The same kernels for every length."""
        return self.model(token, KVCache(layers, length))[0, 0].contiguous().realize()

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> TrainState:
        return TrainState(
            _read(self.weights),
            _read(self.exp_avg),
            _read(self.exp_avg_sq),
            iteration=self.iteration,
            optimizer_steps=int(self.steps.item()),
            loss_scale=float(self.scale.item()) if self.half else INIT_LOSS_SCALE,
            scale_growth=int(self.growth.item()),
        )

    def restore(self, state: TrainState) -> None:
        trees = (state.weights, self.weights), (state.exp_avg, self.exp_avg), (state.exp_avg_sq, self.exp_avg_sq)
        arrays = [(buffers[name], array) for tree, buffers in trees for name, array in tree.items()]
        scalars = (self.steps, state.optimizer_steps), (self.scale, state.loss_scale), (self.growth, state.scale_growth)
        arrays += [(buffer, np.array([value], np.float32)) for buffer, value in scalars]
        Tensor.realize(*(buffer.assign(tensor(array)) for buffer, array in arrays))
        self.iteration = state.iteration

    # -- the device -----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        Device.default.synchronize()

    def memory(self) -> dict[str, int]:
        if self.device_name == "cpu":
            return base.resident_memory()
        return {"current": GlobalCounters.mem_used, "peak": max(self.peak, GlobalCounters.mem_used)}

    def reset_peak_memory(self) -> None:
        self.peak = 0

    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[int], None]:
        m, k, n = shape
        rng = np.random.Generator(np.random.Philox(0))
        a, b = (Tensor(rng.standard_normal(s, np.float32)).cast(dtype).contiguous().realize() for s in ((m, k), (k, n)))
        multiply = Replayed(_product, True, self.context)

        def matmuls(count: int) -> None:
            for _ in range(count):
                multiply(a, b)
            Device.default.synchronize()

        return matmuls

    def parts(self, starts: np.ndarray) -> Parts:
        from nanogpt_mac.backends.tinygrad_parts import TinygradParts

        return TinygradParts(self, starts)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b).realize()


def _read(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A copy of each."""
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def _put(array: np.ndarray) -> Tensor:
    """A copy on the device."""
    return tensor(array).realize()


def correction(beta: float, step: Tensor) -> Tensor | float:
    """1 - beta**step, (1,), which float32 would round away for a beta near 1: -expm1, by its series near 0."""
    if not beta:
        return 1.0
    x = step * math.log(beta)
    series = Tensor.ones(1)
    for n in range(8, 1, -1):
        series = 1 + x / n * series
    return -(x > -0.5).where(x * series, x.exp() - 1)
