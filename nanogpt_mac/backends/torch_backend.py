"""The torch back end: cpu, mps and cuda, eager or compiled."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt_mac import simulator
from nanogpt_mac.backends import base, torch_buckets, torch_vml
from nanogpt_mac.backends.base import Backend, BackendOptions, Kind, Meant, Tokens
from nanogpt_mac.backends.cuda_graph import Graphed
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.backends.parts import Parts
from nanogpt_mac.backends.torch_adamw import AdamW
from nanogpt_mac.backends.torch_choices import LEVERS, Choices
from nanogpt_mac.gpt.spec import INIT_LOSS_SCALE, GPTSpec, TrainState
from nanogpt_mac.gpt.torch_gpt import GPT, KVCache

if TYPE_CHECKING:
    from nanogpt_mac.backends.torch_world import TorchWorld

# Everything sent between host and device, or waited for, while a phase runs: change it with the code below. Copies to
# the device that do not block wait for nothing and are not listed.
MEANT = (
    Meant("result", "copy_", True, 1, "loss and gradient norm go to the host behind the iteration"),
    Meant("evaluation", "_local_scalar_dense", True, 1, "the mean loss of an evaluation is read once"),
    Meant("sampling", "copy_", True, 2, "the logits of each token go to the host, where it is drawn"),
    Meant("sampling", "copy_", False, 2, "each token goes to the device"),
)

TOGETHER = 1 << 29  # bytes of an evaluation's widest activation


@dataclass(frozen=True)
class Handle:
    """An iteration under way: its loss and gradient norm on their way to the host, and the event behind them."""

    result: Tensor  # float32 (2,), of several ranks (4,), on the host, valid once `event` has passed
    event: Any  # None on a CPU, where the result is already there
    sources: list[Tensor]  # what the iteration copies from, kept alive until it has


@dataclass(frozen=True)
class Cached:
    """A cache of keys and values and what feeds it, kept for the next sequence: recording a graph takes long."""

    cache: KVCache
    several: Callable[[Tensor], Tensor]  # tokens (1, T) to the logits (V,) after them
    one: Callable[[Tensor], Tensor]  # the same of a single token, as one CUDA graph where there is one


class TorchBackend(Backend):
    LEVERS = LEVERS

    def __init__(self, spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> None:
        self.spec, self.options, self.tokens = spec, options, tokens
        kind = KINDS[options.name]
        self.capabilities = kind.on(self.device_of(kind))
        self.device = torch.device(options.name)
        self.accelerator = None if options.name == "cpu" else getattr(torch, options.name)  # torch.mps, torch.cuda
        torch_vml.settle()
        torch.set_float32_matmul_precision(options.matmul_precision)
        self.dtype = getattr(torch, options.dtype)
        choices = Choices(spec, options, self.device)
        self.settings = choices.settings
        self.own, graph = choices.own_kernels, choices.cuda_graph
        fused, own, prepared = choices.fused_adamw, self.own, None
        if own is not None:
            prepared = own.ops.prepare(spec, self.dtype, self.device)
        self.model = GPT(spec, choices.few_kernels, options.checkpointing, own is not None).to(self.device)
        self.loss: Callable[[Tensor, Tensor], Tensor] = partial(own.loss, self.model) if own else self.model.loss
        default = self.settings.compile_mode == "default"
        self.compiled = options.compile and not (own and graph and default)  # which leave nothing to fuse or to call
        if self.compiled:
            # Until pytorch PR 181564 AOTAutograd's cache did not ask for autocast's type: one ran the other's code.
            torch.compiler.config.cache_key_tag = options.dtype
            if own is not None and prepared is not None:
                prepared.result()  # Dynamo is imported here, and not while others import Triton
                # Else a graph ends there; a change of the precision fails its guards.
                torch.compiler.assume_constant_result(own.products.exact)
            self.loss = torch.compile(self.loss, dynamic=False, mode=self.settings.compile_mode)
        self.parameters = dict(self.model.named_parameters())
        betas = (options.beta1, options.beta2)
        update = own.ops.adamw if own is not None and fused else None
        self.optimizer = AdamW(self.parameters, betas, options.weight_decay, fused, graph, update)
        self.joint: Callable[[Tensor, Tensor, int], tuple[Tensor, Sequence[Tensor]]] | None = None
        if choices.joint_graph:
            torch._dynamo.config.trace_autograd_ops = True  # else the graph ends before autograd
            # Between its kernels C++ takes the host less time than Python; torch's tests of it leave a Mac out.
            how = torch._inductor.list_mode_options(self.settings.compile_mode)
            how = {**how, "cpp_wrapper": sys.platform == "linux"}
            self.joint = torch.compile(self._joint, dynamic=False, options=how)
        self.scaler: Any = torch.amp.GradScaler(  # whose types ask for an optimizer of torch's own
            self.device.type,
            INIT_LOSS_SCALE,
            base.SCALE_GROWTH,
            base.SCALE_BACKOFF,
            base.GROWTH_INTERVAL,
            enabled=options.dtype == "float16",
        )
        self.resident = {
            split: torch.from_numpy(array.astype(np.int64)).to(self.device)
            for split, array in tokens.splits.items()
            if len(array) <= options.resident_tokens
        }
        self.offsets = torch.arange(spec.block_size + 1, device=self.device)
        self.lr: float | Tensor = torch.zeros((), device=self.device) if graph else 0.0
        self.sources: list[Tensor] = []
        self.iteration = 0
        self.train_windows: Callable[[Tensor], Tensor] = Graphed(self._train) if graph else self._train
        self.evaluate_window: Callable[[Tensor], Tensor] = Graphed(self._evaluate) if graph else self._evaluate
        self.evaluate_windows: Callable[[Tensor], Tensor] = Graphed(self._evaluate) if graph else self._evaluate
        self.eval_chunk = 5 * base.EVAL_CHUNK if graph else base.EVAL_CHUNK  # a GPU is idle while a result is read
        self.one_graph = choices.token_graph
        self.full_window: Callable[[Tensor], Tensor] = (
            Graphed(self._last_logits, 1) if self.one_graph else self._last_logits
        )
        self.spare: list[Cached] = []
        if prepared is not None:
            prepared.result()
        self.details = {
            "fused_adamw": fused,
            "cuda_graph": graph,
            "own_kernels": own is not None,
            "torch_compile": self.compiled or choices.joint_graph,
            "resident_data": sorted(self.resident),
        }

    @classmethod
    def device_of(cls, kind: Kind) -> str:
        return simulator.DEVICE_NAME if kind.name == "mps" and simulator.active() else kind.name

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def windows(self, split: str, starts: np.ndarray) -> Tensor:
        """Windows at `starts`, int64 (..., T + 1), gathered on the device where the split lives there.

        The copy to the device does not wait: on MPS a blocking one would drain the queue. It reads its source later
        (pytorch issue 189690), so `sources` keeps that alive until the iteration is complete.
        """
        resident = split in self.resident
        source = torch.from_numpy(starts if resident else self.tokens.windows(split, starts))
        if self.device.type == "cuda":  # else the copy, and with it the host, waits for the iteration before
            source = source.pin_memory()
        self.sources.append(source)
        moved = source.to(self.device, non_blocking=True)
        return self.resident[split][moved.unsqueeze(-1) + self.offsets] if resident else moved.long()

    # -- training -----------------------------------------------------------------------------------------------

    def step(self, starts: np.ndarray, lr: float) -> Handle:
        self._seed(base.step_seed(self.options.seed, self.iteration, self.world.rank))
        self.iteration += 1
        self._mode(training=True)
        if self.world.size > 1:
            self.optimizer.shared[-1:].fill_(self.world.asked)
        self.lr = self.lr.fill_(lr) if isinstance(self.lr, Tensor) else lr
        with self.phase("forward"):
            windows = self.windows("train", starts)  # (accumulation, B, T + 1)
        try:
            result = self.train_windows(windows)
        except RuntimeError:  # before its update, which comes last: it never was
            self.iteration -= 1
            raise
        with self.phase("result"):
            return self._handle(result)

    def _mode(self, training: bool) -> None:
        """As nn.Module.train, which walks over all modules for each of a sample's tokens, whatever they are."""
        if self.model.training is not training:
            self.model.train(training)

    def _seed(self, seed: int) -> None:
        """Dropout, a function of the iteration; torch.manual_seed formats a stack for each device that is not there."""
        (self.accelerator or torch.default_generator).manual_seed(seed)

    def _train(self, windows: Tensor) -> Tensor:
        """One iteration on `windows`, int64 (accumulation, B, T + 1): its mean loss and its gradient norm, (2,).

        Of several ranks, (4,): then the mean of `World.asked`, and how long this one has waited for the others, ms.
        """
        total, shared, of_ranks = torch.zeros(()), self.optimizer.shared, tuple[Tensor, ...]()
        for number, window in enumerate(windows):
            if self.joint is not None and self.world.size == 1:
                with self.phase("backward"):
                    loss, gradients = self.joint(window[:, :-1], window[:, 1:], len(windows))
                    total = total + loss if number else loss
                    self.optimizer.take(gradients, add=number > 0)
                continue
            with self.phase("forward"), self.autocast():
                loss = self.loss(window[:, :-1], window[:, 1:])
                if len(windows) > 1:
                    loss = loss / len(windows)
                scaled = self.scaler.scale(loss)
            with self.phase("backward"):
                total = total + loss.detach() if number else loss.detach()
                if self.world.size > 1 and number == len(windows) - 1:
                    shared[-2] = total
                    torch_buckets.backward(scaled, self.optimizer, self._ranks, add=number > 0)
                else:
                    gradients = torch.autograd.grad(scaled, self.optimizer.ordered, materialize_grads=True)
                    self.optimizer.take(gradients, add=number > 0)
        if self.world.size > 1:
            with self.phase("backward"):
                total, of_ranks = shared[-2], (shared[-1], self._ranks.finish())
        with self.phase("clip"):
            self.scaler.unscale_(self.optimizer)
            norm = self.optimizer.clip(self.options.grad_clip)
        with self.phase("optimizer"):
            self.scaler.step(self.optimizer, self.lr)
            self.scaler.update()
        with self.phase("result"):
            return torch.stack((total, norm, *of_ranks))

    @property
    def _ranks(self) -> TorchWorld:
        """`world`, where it is of several."""
        return cast("TorchWorld", self.world)

    def _joint(self, idx: Tensor, targets: Tensor, share: int) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss over `share`, and its gradients in the optimizer's order: what is compiled as one graph."""
        with self.autocast():
            loss = self.model.loss(idx, targets)
            if share > 1:
                loss = loss / share
        return loss.detach(), torch.autograd.grad(loss, self.optimizer.ordered, materialize_grads=True)

    def _handle(self, result: Tensor) -> Handle:
        """Send the result to the host behind the iteration's work, so that reading it later drains nothing."""
        sources, self.sources = self.sources, []
        if self.accelerator is None:
            return Handle(result, None, sources)
        # NaN, so that a copy that an event failed to wait for would end the run and not pass for a loss.
        host = torch.full(result.shape, float("nan"), pin_memory=self.device.type == "cuda")
        host.copy_(result, non_blocking=True)
        event = self.accelerator.Event()
        event.record()
        return Handle(host, event, sources)

    def wait(self, handle: Handle) -> tuple[float, float]:
        with self.phase("result"):
            if handle.event is not None:
                handle.event.synchronize()
            loss, norm, *of_ranks = handle.result.tolist()
            if of_ranks:
                self.world.heard(*of_ranks)
            return loss, norm

    @torch.no_grad()
    def evaluate(self, split: str, starts: np.ndarray) -> float:
        self._mode(training=False)
        with self.phase("evaluation"):
            total, size = torch.zeros((), device=self.device), self._together(starts.shape[1])
            whole = len(starts) // size * size if size > 1 else 0
            for some in starts[:whole].reshape(-1, size * starts.shape[1]):
                total += self.evaluate_windows(self.windows(split, some)) * size
            for batch_starts in starts[whole:]:
                total += self.evaluate_window(self.windows(split, batch_starts))
            mean = total.item() / len(starts)
        self.sources.clear()
        return mean

    def _together(self, batch: int) -> int:
        """How many batches are evaluated as one graph: of larger ones, kernels leave fewer processors idle."""
        if not isinstance(self.evaluate_window, Graphed) or self.compiled:
            return 1
        widest = max(4 * self.spec.n_embd * self.dtype.itemsize, 4 * self.spec.vocab_size) * self.spec.block_size
        blocks = self.spec.n_head * batch  # of attention's grid, which has room for 65,535
        return max(1, min(base.EVAL_CHUNK, TOGETHER // (widest * batch), 65535 // blocks))

    def _evaluate(self, window: Tensor) -> Tensor:
        with self.autocast():
            return self.loss(window[:, :-1], window[:, 1:])

    # -- looking inside -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self._mode(training=False)
        with self.autocast():
            logits = self.model(self._tokens(tokens))
        return logits.cpu().numpy()

    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        # Where nothing is dropped the training graph itself is what is checked; else only evaluation is deterministic.
        self._mode(training=bool(np.float32(1 - self.spec.dropout) == 1))
        self._seed(base.step_seed(self.options.seed, self.iteration))
        if self.joint is not None:
            loss, gradients = self.joint(self._tokens(tokens), self._tokens(targets), 1)
        else:
            with self.autocast():
                loss = self.loss(self._tokens(tokens), self._tokens(targets))
            gradients = torch.autograd.grad(self.scaler.scale(loss), self.optimizer.ordered, materialize_grads=True)
        scale = np.float32(self.scaler.get_scale())
        found = dict(zip(self.optimizer.names, gradients, strict=True))
        return loss.item(), {name: found[name].cpu().numpy() / scale for name in self.parameters}

    def decode(self) -> Callable[[np.ndarray], np.ndarray]:
        mine: list[Cached] = []  # once it is needed

        @torch.no_grad()
        def decoder(tokens: np.ndarray) -> np.ndarray:
            self._mode(training=False)
            if len(tokens) == self.spec.block_size:  # no room for a further token, so nothing need be kept
                run = self.full_window
            else:
                if not mine:
                    mine.append(self.spare.pop() if self.spare else self._cached())
                    mine[0].cache.clear()
                run = mine[0].one if len(tokens) == 1 else mine[0].several
            with self.phase("sampling"):
                return run(torch.from_numpy(tokens[None].astype(np.int64)).to(self.device)).cpu().numpy()

        weakref.finalize(decoder, lambda spare: spare.extend(mine), self.spare).atexit = False
        return decoder

    def _cached(self) -> Cached:
        cache = KVCache(self.spec, self.device, self.dtype)
        feed = partial(self._last_logits, cache=cache)
        return Cached(cache, feed, Graphed(feed, 1) if self.one_graph else feed)

    def _last_logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (V,) of what follows `tokens`, int64 (1, T)."""
        with self.autocast(), self.decoding():
            return self.model(tokens, cache, last=True)[0, 0]

    def decoding(self) -> AbstractContextManager[Any]:
        """Within, attention has no kernel that plans anew for every length of a prompt, as cuDNN's does."""
        if self.device.type != "cuda":
            return nullcontext()
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

    def _tokens(self, tokens: np.ndarray) -> Tensor:
        """In the strides of a window less a token, those of `batch`: others would be compiled anew."""
        wide = np.pad(tokens.astype(np.int64), ((0, 0), (0, 1)))
        return torch.from_numpy(wide).to(self.device)[:, :-1]

    def recover(self) -> None:
        """Forget an iteration that an error ended: what its copies read from."""
        self.sources.clear()

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> TrainState:
        weights, exp_avg, exp_avg_sq = self.optimizer.copies()
        state = TrainState(weights, exp_avg, exp_avg_sq, self.iteration, int(self.optimizer.steps[0]))
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state.loss_scale, state.scale_growth = scaler["scale"], scaler["_growth_tracker"]
        return state

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        optimizer = self.optimizer
        for name, p in self.parameters.items():
            p.copy_(torch.from_numpy(state.weights[name]))
            exp_avg, exp_avg_sq = optimizer.moments[name]
            exp_avg.copy_(torch.from_numpy(state.exp_avg[name]))
            exp_avg_sq.copy_(torch.from_numpy(state.exp_avg_sq[name]))
        for steps in optimizer.steps:
            steps.fill_(float(state.optimizer_steps))
        self.iteration = state.iteration
        if self.scaler.is_enabled():
            saved = {"scale": state.loss_scale, "_growth_tracker": state.scale_growth}
            self.scaler.load_state_dict(self.scaler.state_dict() | saved)

    # -- the device ---------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.accelerator is not None:
            self.accelerator.synchronize()

    def memory(self) -> dict[str, int]:
        if self.device.type == "cuda":
            return {"current": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
        if self.device.type == "mps":  # the driver's pool only grows, so its size is the peak
            return {
                "current": torch.mps.current_allocated_memory(),
                "peak": torch.mps.driver_allocated_memory(),
            }
        return base.resident_memory()

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[int], None]:
        m, k, n = shape
        random = torch.Generator(self.device).manual_seed(0)  # the global one belongs to the training run
        kind = {"device": self.device, "dtype": getattr(torch, dtype)}
        a, b = (torch.randn(size, generator=random, **kind) for size in ((m, k), (k, n)))
        out = torch.empty(m, n, **kind)
        multiply: Callable[[], object] = partial(torch.mm, a, b, out=out)
        if self.own is not None and self.own.products.exact(a.dtype):
            multiply = partial(self.own.products.product, a, b)
        self.synchronize()

        def matmuls(count: int) -> None:
            for _ in range(count):
                multiply()
            self.synchronize()

        return matmuls

    def parts(self, starts: np.ndarray) -> Parts:
        from nanogpt_mac.backends.torch_parts import TorchParts  # and torch's profiler

        return TorchParts(self, starts)

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) if self.device.type == "cuda" else super().free_memory()

    def close(self) -> None:
        self.synchronize()
        self.train_windows = self._train  # NCCL waits for the end of graphs that have recorded it

    def release_memory(self) -> None:
        if self.accelerator is not None:
            self.accelerator.empty_cache()
