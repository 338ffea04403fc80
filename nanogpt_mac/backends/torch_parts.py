"""The parts of torch's iteration, and what torch's profiler says of them within it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from nanogpt_mac import simulator
from nanogpt_mac.backends.cuda_graph import Recorded
from nanogpt_mac.backends.parts import Call, Inside, Part, Parts, Stage
from nanogpt_mac.gpt import torch_gpt
from nanogpt_mac.gpt.torch_gpt import GPT, Few

if TYPE_CHECKING:
    from nanogpt_mac.backends.torch_backend import TorchBackend

# What torch.compile makes into CUDA graphs is compiled alike here, without them.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
SEEN = 3  # iterations under the profiler


def stages(model: GPT) -> list[Stage]:
    """A training forward pass of `model` as a chain. `few` is None, or what a pass in few kernels shares."""
    t: Any = model.transformer
    own = _owner(model)

    def embed(tokens: Tensor, few: Few | None) -> Tensor:
        return model.embed(tokens, t["wpe"].weight[: tokens.shape[1]], few)

    chain = [Stage("dropout masks", lambda tokens: model._few(*tokens.shape), ("tokens",), ("few",))]
    if model.few_kernels == "never" or not model.spec.dropout:
        chain = []
    chain += [Stage("embedding", embed, ("tokens", "few"), ("x",), own(t["wte"], t["wpe"]))]
    for block in t["h"]:

        def add(x: Tensor, y: Tensor, few: Few | None, block: Any = block, place: int = 2) -> Tensor:
            z: Tensor = block._add(x, y, place, few)
            return z

        def attend(y: Tensor, few: Few | None, block: Any = block) -> Tensor:
            z: Tensor = block.attn(y, None, few)
            return z

        inside = [
            Stage("layer norms", block.ln_1, ("x",), ("y",), own(block.ln_1)),
            Stage("attention", attend, ("y", "few"), ("y",), own(block.attn), note="has both projections"),
            Stage("residual sums", add, ("x", "y", "few"), ("x",), note="have dropout"),
            Stage("layer norms", block.ln_2, ("x",), ("y",), own(block.ln_2)),
            Stage("MLP", block.mlp, ("y",), ("y",), own(block.mlp)),
            Stage("residual sums", functools.partial(add, place=3), ("x", "y", "few"), ("x",)),
        ]
        chain += [stage.anew(_again) for stage in inside] if model.checkpointing else inside

    def head(y: Tensor, targets: Tensor) -> Tensor:
        return torch_gpt.mean_nats(model.head(y), targets)

    last = Stage("head and loss", head, ("y", "targets"), ("loss",), tied=("transformer.wte.weight",))
    return [*chain, Stage("layer norms", t["ln_f"], ("x",), ("y",), own(t["ln_f"])), last]


def own_stages(model: GPT, casts: bool) -> list[Stage]:
    """The same where `model` takes the way of fused.py, whose kernels draw their masks from `seeds` and compute with
    `near`, which a stage makes where that takes `casts` or copies."""
    from nanogpt_mac.gpt import fused  # and Triton
    from nanogpt_mac.gpt.triton_products import Near

    t: Any = model.transformer
    own, norms = _owner(model), fused.norms(model)

    def draw(tokens: Tensor) -> Tensor:
        return fused.seeds(model, tokens)

    def embed(tokens: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        return fused.enter(model, tokens, seeds)

    def lower(tokens: Tensor) -> list[Near]:
        return fused.near(model)

    def head(y: Tensor, near: list[Near], targets: Tensor) -> Tensor:
        return fused.nats(model, y, near[0], targets)

    chain = [Stage("dropout masks", draw, ("tokens",), ("seeds",), note="are seeds: kernels draw them where they are")]
    if not model.spec.dropout:
        chain = []
    note, of_embedding = "has dropout and the first layer norm", own(t["wte"], t["wpe"], norms[0])
    if casts:
        note_of_casts = "are of all weights, to what products are computed in"
        chain += [Stage("casts", lower, ("tokens",), ("near",), note=note_of_casts)]
    chain += [Stage("embedding", embed, ("tokens", "seeds"), ("x", "y"), of_embedding, note=note)]
    note = "have dropout and the layer norm behind them, in one kernel of ours"
    for layer, block in enumerate(t["h"]):

        def attend(y: Tensor, near: Any, seeds: Tensor, layer: int = layer, block: Any = block) -> Tensor:
            return fused.attend(block, near[4 * layer + 1 :][:2], y, seeds[layer], fused.dropout(model))

        def mlp(y: Tensor, near: Any, layer: int = layer, block: Any = block) -> Tensor:
            return fused.mlp(block, near[4 * layer + 3 :][:2], y)

        def add(x: Tensor, y: Tensor, seeds: Tensor, layer: int = layer, place: int = 1) -> tuple[Tensor, Tensor]:
            return fused.add(norms[2 * layer + place], x, y, seeds[layer], place, fused.dropout(model))

        sums = ("x", "y", "seeds"), ("x", "y")
        inside = [
            Stage("attention", attend, ("y", "near", "seeds"), ("y",), own(block.attn), note="has both projections"),
            Stage("residual sums", add, *sums, own(norms[2 * layer + 1]), note=note),
            Stage("MLP", mlp, ("y", "near"), ("y",), own(block.mlp)),
            Stage("residual sums", functools.partial(add, place=2), *sums, own(norms[2 * layer + 2])),
        ]
        again = functools.partial(_again, preserve_rng_state=False)  # masks come from seeds that are given
        chain += [stage.anew(again) for stage in inside] if model.checkpointing else inside
    last = Stage("head and loss", head, ("y", "near", "targets"), ("loss",), tied=("transformer.wte.weight",))
    return [*chain, last]


def _owner(model: GPT) -> Callable[..., tuple[str, ...]]:
    """A function from modules to the names of their parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return lambda *modules: tuple(names[id(p)] for module in modules for p in module.parameters())


def _again(function: Callable[..., Any], preserve_rng_state: bool = True) -> Callable[..., Any]:
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=preserve_rng_state)


class TorchParts(Parts):
    def __init__(self, backend: TorchBackend, starts: np.ndarray) -> None:
        self.backend, self.starts = backend, starts
        model = backend.model.train()
        window = backend.windows("train", starts)[0]
        few = None if model.few_kernels == "never" or model.spec.dropout else model._few(*window[:, :-1].shape)
        self.values: dict[str, Any] = {"tokens": window[:, :-1], "targets": window[:, 1:], "few": few}
        if model.own_logits is not None:
            any_numbers = window[:1, :-1].expand(model.spec.n_layer, -1)
            self.values["seeds"] = any_numbers  # where nothing is dropped; else a stage's
            with backend.autocast():
                self.values["near"] = backend.own.near(model)
            rows = len(self.values["near"][0].weight)
            self.stages = own_stages(model, backend.dtype != torch.float32 or rows > model.spec.vocab_size)
        else:
            self.stages = stages(model)
        self.parts = {part.name: part for part in (self._batch(), *self._of_model(), *self._of_optimizer())}
        if backend.accelerator is not None:
            one = torch.zeros(1, device=backend.device)
            self.smallest = lambda number: (one.add_(1),)

    @torch.no_grad()
    def _run(self, stage: Stage, given: tuple[Any, ...]) -> tuple[Any, ...]:
        with self.backend.autocast():
            return stage.made(stage.function(*given))

    def _calls(self, stage: Stage, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Call, Call | None]:
        backend, function = self.backend, self._compiled(stage.function)
        inputs = [v.detach().requires_grad_() if i in stage.moving else v for i, v in enumerate(given)]
        of = [inputs[i] for i in stage.moving] + [backend.parameters[name] for name in stage.parameters + stage.tied]

        def forward(number: int) -> Sequence[Any]:
            with backend.autocast():
                return stage.made(function(*inputs))

        def both(number: int) -> Sequence[Any]:
            outputs = forward(number)
            return torch.autograd.grad(outputs, of, cotangents, materialize_grads=True)

        cotangents = [torch.randn_like(output) for output in made] if of else []
        return self._sent(forward), self._sent(both) if of else None

    def _sent(self, call: Call) -> Call:
        """`call` as the step sends it: recorded where that is one CUDA graph, or the host would be what is timed."""
        if not self.backend.details["cuda_graph"]:
            return call

        def once() -> Sequence[Any]:  # what is recorded would be kept with all that a backward pass reads
            return [output.detach() if isinstance(output, Tensor) else output for output in call(0)]

        recorded = Recorded(once)
        return lambda number: recorded()

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        backend = self.backend
        if not backend.compiled:
            return function
        mode = backend.settings.compile_mode
        return torch.compile(function, dynamic=False, mode=WITHOUT_GRAPHS.get(mode, mode))

    def _batch(self) -> Part:
        note = "gathers its windows, of numbers that cross to the device"
        return Part("batch", 1, lambda number: (self.backend.windows("train", self.starts),), note=note)

    def _of_optimizer(self) -> Iterator[Part]:
        """The weights stay: the learning rate is 0. Where losses are scaled, each part undoes or ends the scaling."""
        backend, optimizer, scaler = self.backend, self.backend.optimizer, self.backend.scaler
        with backend.autocast():
            of = backend.own.loss if backend.own else GPT.loss
            loss = scaler.scale(of(backend.model, self.values["tokens"], self.values["targets"]))
        taken = torch.autograd.grad(loss, optimizer.ordered, materialize_grads=True)
        lr = torch.zeros((), device=backend.device) if isinstance(backend.lr, Tensor) else 0.0

        def take(number: int) -> Sequence[Any]:
            optimizer.take(taken, add=number % len(self.starts) > 0)
            return (optimizer.gradients,)

        def clip(number: int) -> Sequence[Any]:
            scaler.unscale_(optimizer)
            norm = optimizer.clip(backend.options.grad_clip)
            if scaler.is_enabled():
                scaler.update()
            return (norm,)

        def update(number: int) -> Sequence[Any]:
            scaler.step(optimizer, lr)
            scaler.update()
            return (optimizer.weights,)

        take(0)
        yield Part("gradients", len(self.starts), take, note="are put into the optimizer's buffers")
        own = optimizer.own is not None
        yield Part("clip", 1, self._sent(clip), note="is the norm alone" if own else "includes the norm")
        yield Part("optimizer", 1, self._sent(update), note="is AdamW" + ", which clips as it reads" * own)

    # -- the device -----------------------------------------------------------------------------------------------

    def start(self, outputs: Sequence[Any]) -> None:
        """torch has enqueued them."""

    def wait(self, outputs: Sequence[Any]) -> None:
        self.backend.synchronize()
        self.backend.sources.clear()

    def peek(self, array: Any) -> float:
        tensor: Any = array.keep[0] if isinstance(array, Few) else array[0].weight if isinstance(array, list) else array
        return float(tensor.detach()[(0,) * tensor.ndim].item())

    def counted(self, call: Call) -> dict[str, int]:
        backend = self.backend
        self.wait(call(0))
        if backend.capabilities.simulated:
            simulator.reset_counts()
            call(0)
            found = simulator.counts()
            return {"kernels": found.kernels, "waits": found.waits}
        if backend.accelerator is not torch.cuda:
            return {}
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.wait(call(0))
        return {"kernels": sum(e.count for e in seen.key_averages() if e.self_device_time_total > 0)}

    # -- within an iteration --------------------------------------------------------------------------------------

    def inside(self, step: Callable[[], Any]) -> Inside:
        backend = self.backend
        if backend.compiled:
            return Inside({}, 0.0, "compiled, a whole forward pass is one piece, and so is its backward pass")
        if backend.accelerator not in (None, torch.cuda):
            return Inside({}, 0.0, "torch has no profiler of this device")
        on_device = backend.accelerator is not None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
        with _marked(backend), mock.patch.object(backend, "train_windows", backend._train):  # not as one CUDA graph
            step()
            with profile(activities=activities) as seen:
                for _ in range(SEEN):
                    with record_function("iteration"):
                        step()
        return _told(seen.events(), on_device)


@contextmanager
def _marked(backend: TorchBackend) -> Iterator[None]:
    """While it lasts, each part's code is a range of the profiler."""
    model: Any = backend.model
    t, optimizer = model.transformer, backend.optimizer
    found: list[tuple[Any, str, str]] = [
        (backend, "windows", "batch"), (model, "_few", "dropout masks"), (model, "embed", "embedding"),
        (model, "head", "head and loss"), (optimizer, "take", "gradients"), (optimizer, "clip", "clip"),
        (backend.scaler, "step", "optimizer"), (t["ln_f"], "forward", "layer norms"),
        (torch_gpt, "mean_nats", "head and loss"),
    ]  # fmt: skip
    for block in t["h"]:
        of_block = ((block.ln_1, "layer norms"), (block.ln_2, "layer norms"), (block.attn, "attention"))
        found += [(block, "_add", "residual sums"), (block.mlp, "forward", "MLP")]
        found += [(module, "forward", part) for module, part in of_block]
    if model.own_logits is not None:
        from nanogpt_mac.gpt import fused

        found += [
            (fused, "seeds", "dropout masks"), (fused, "near", "casts"), (fused, "enter", "embedding"),
            (fused, "attend", "attention"), (fused, "mlp", "MLP"), (fused, "add", "residual sums"),
            (fused, "nats", "head and loss"),
        ]  # fmt: skip
    with ExitStack() as stack:
        for thing, name, part in found:
            stack.enter_context(mock.patch.object(thing, name, _range(getattr(thing, name), part)))
        yield


def _range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def marked(*arguments: Any, **named: Any) -> Any:
        with record_function(f"part: {part}"):
            return function(*arguments, **named)

    return marked


def _told(events: Any, on_device: bool) -> Inside:
    """Ranges are forward; a node of the backward pass belongs to the range in which its number was given."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    of_node: dict[int, str] = {}

    def took(event: Any) -> float:
        if not on_device:
            return float(event.cpu_time_total) / 1e3 / SEEN
        return float(sum(child.device_time_total for child in event.cpu_children)) / 1e3 / SEEN  # a range has none

    def around(event: Any, word: str) -> Any:
        while event is not None and not event.name.startswith(word):
            event = event.cpu_parent
        return event

    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    backward = "autograd::engine::evaluate_function"
    for event in on_host:
        part, within = around(event, "part: "), around(event, backward)
        if part is not None and within is None and event.sequence_nr >= 0:
            of_node[event.sequence_nr] = part.name.removeprefix("part: ")
    for event in on_host:
        if event.name.startswith("part: "):
            again = around(event, backward)  # with checkpointing
            found[event.name.removeprefix("part: ")][again is not None] += took(event)
            if again is not None:
                found[of_node.get(again.sequence_nr, "")][1] -= took(event)
        elif event.name.startswith(backward):
            found[of_node.get(event.sequence_nr, "")][1] += took(event)
    iteration = sum(event.cpu_time_total for event in on_host if event.name == "iteration") / 1e3 / SEEN
    return Inside({part: (f, b) for part, (f, b) in found.items() if part}, iteration)
