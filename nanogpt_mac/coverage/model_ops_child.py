"""Run by model_ops.py in a process of its own: one iteration, one evaluation and one token of this model on MPS.

The task is JSON on standard input, the answer a `Trace` as JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from nanogpt_mac import child, simulator
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.corpus import TINY_SHAKESPEARE_SYMBOLS
from nanogpt_mac.coverage.model_ops import PHASES, Task, Trace
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import profiled
from nanogpt_mac.fallbacks.phases import Phased
from nanogpt_mac.fallbacks.signs import short
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.simulator.optable import NO_DEVICE_CHECK, installed_table

# Sequences, positions and channels a head of the traced model: which operators are called depends on none of them.
_BATCH, _LENGTH, _HEAD = 2, 16, 8
_PROMPT = 4  # tokens before the one that is sampled, at most


class Counted(Phased):
    """Sorts what the simulated device counts into the phases of an iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {}
        self.waits: Counter[str] = Counter()

    def switch(self, name: str) -> str:
        """Ends the current phase and returns its name; an empty name counts nowhere."""
        if self.current:
            self.waits[self.current] += simulator.counts().waits
            for kind in ("native", "fallback", "refused"):
                for op, calls in simulator.operators(kind).items():
                    self.counts.setdefault(self.current, Counter())[op.removeprefix("aten::")] += calls
        simulator.reset_counts()
        self.current, before = name, self.current
        return before

    @contextmanager
    def watching(self) -> Iterator[None]:
        yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)


class Profiled(Phased):
    """As `Counted` on any device, by torch's profiler.

    A profile has every call that goes through the dispatcher. Those that reach MPS are the outermost ones of an
    operator that is registered for it, with a tensor of the device: what a native kernel calls inside is its own
    affair, and so is the allocation of its result.
    """

    def __init__(self, registered: Iterable[str]) -> None:
        super().__init__()
        self.registered = set(registered)
        self.counts: dict[str, Counter[str]] = {}
        self.waits: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything between is recorded, and sorted at the end. `counts` and `waits` are empty before."""
        config = _ExperimentalConfig(verbose=True, capture_overload_names=True)
        profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=config)
        with profiler:
            yield
        torch.mps.synchronize()
        results: Any = profiler.profiler
        self._sort(list(profiled.walk(results.kineto_results.experimental_event_tree())))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            with torch.profiler.record_function(profiled.MARK + name):
                yield
        finally:
            self.current = before

    def _sort(self, events: list[Any]) -> None:
        phase_of = profiled.phases_of(events)
        for event in events:
            if not (phase := phase_of(event)):
                continue
            if self._reaches(event) and not any(self._reaches(above) for above in profiled.parents_of(event)):
                self.counts.setdefault(phase, Counter())[profiled.name_of(event)] += 1
            if _waits(event) and not any(_waits(above) for above in profiled.parents_of(event)):
                self.waits[phase] += 1

    def _reaches(self, event: Any) -> bool:
        return (
            event.name.startswith("aten::") and profiled.name_of(event) in self.registered and profiled.on_device(event)
        )


def takes_tensors(op: str) -> bool:
    """Whether an operator has tensor arguments by its schema; one that has none is never seen to reach a device."""
    name, _, overload = op.partition(".")
    found = getattr(getattr(torch.ops.aten, name), overload or "default")
    return any("Tensor" in str(argument.type) for argument in found._schema.arguments)


def _waits(event: Any) -> bool:
    """Whether the host waits for the device in a call: a value is read, or a copy between them blocks."""
    if short(event.name) == "_local_scalar_dense":
        return profiled.on_device(event)
    return profiled.crossing(event) is not None and not profiled.non_blocking(event)


def _trace(task: Task) -> Trace:
    if not task.live:
        _install(task)
    elif reason := kinds.missing("mps"):
        raise InputError(reason)
    m = task.model
    length = min(m.block_size, _LENGTH)
    symbols = m.vocab_size or TINY_SHAKESPEARE_SYMBOLS
    spec = GPTSpec(m.n_layer, m.n_head, m.n_head * _HEAD, length, symbols, m.dropout, m.bias, m.gelu)
    text = (np.arange(50 * length) % symbols).astype(np.uint16)
    backend: Any = kinds.create(
        spec, backend_options(Config(dtype=task.dtype), "mps"), Tokens({"train": text, "val": text}, length)
    )
    backend.load(spec.init_weights(0))
    starts = np.arange(_BATCH)[None]
    phases: Any = Profiled(task.registered) if task.live else Counted()
    backend.phase = lambda name: nullcontext() if name == "result" else phases.within(name)  # that is forward's here
    stopped = None
    try:
        backend.wait(backend.step(starts, 1e-3))  # the first iteration makes what later ones find
        decode, prompt = backend.decode(), min(_PROMPT, length - 1)
        if prompt:
            decode(text[:prompt])
        with phases.watching():
            with phases.phase("forward"):
                handle = backend.step(starts, 1e-3)
            backend.wait(handle)
            with phases.phase("evaluation"):
                backend.evaluate("val", starts)
            with phases.phase("sampling"):
                decode(text[prompt : prompt + 1])
    except NotImplementedError as error:  # an operator that even the fallback cannot run
        stopped = " ".join(str(error).split())[:300]
    counts = {name: dict(sorted(phases.counts[name].items())) for name in PHASES if name in phases.counts}
    label, device = ("live", "mps") if task.live else ("predicted", simulator.DEVICE_NAME)
    if simulator.active():
        device = simulator.DEVICE_NAME
    no_tensors = sorted({op for ops in counts.values() for op in ops if not takes_tensors(op)})
    waits = {name: phases.waits[name] for name in counts}
    return Trace(label, device, torch.__version__, counts, stopped, waits, no_tensors)


def _install(task: Task) -> None:
    """The simulated device with the operator set of the torch in question, as far as the installed one has them."""
    exist = {name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    table = installed_table()
    native = {op: flags for op, flags in table.native.items() if op not in task.lost}
    native |= {op: NO_DEVICE_CHECK if free else 0 for op, free in task.gained.items() if op in exist}
    fallback = [op for op in task.fallback if op in exist]
    missing = [op for op in task.missing if op in exist and op not in native]
    simulator.install(replace(table, native=native, fallback=fallback, missing=missing))


if __name__ == "__main__":
    child.answer(lambda task: asdict(_trace(Task.model_validate(task))))
