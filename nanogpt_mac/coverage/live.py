"""The operators of a training step, seen on a real device: torch's profiler, where the simulated device counts.

A profile has every call that goes through the dispatcher. Those that reach MPS are the outermost ones of an operator
that is registered for it, with a tensor of the device: what a native kernel calls inside is its own affair, and so is
the allocation of its result. Used in the child process of trace.py alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nanogpt_mac.fallbacks.phases import Phased
from nanogpt_mac.fallbacks.profiled import DEVICE, MARK, name_of, parents_of, tensors_of, walk
from nanogpt_mac.fallbacks.signs import short


class Phases(Phased):
    """Sorts what the profiler saw into the phases of an iteration; the same interface as trace.py's counter."""

    def __init__(self, registered: Iterable[str]) -> None:
        super().__init__()
        self.registered = set(registered)
        self.counts: dict[str, Counter[str]] = {}
        self.waits: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything between is recorded, and sorted at the end. `counts` and `waits` are empty before."""
        import torch
        from torch._C._profiler import _ExperimentalConfig
        from torch.profiler import ProfilerActivity, profile

        config = _ExperimentalConfig(verbose=True, capture_overload_names=True)
        profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=config)
        with profiler:
            yield
        torch.mps.synchronize()
        results: Any = profiler.profiler
        self._sort(list(walk(results.kineto_results.experimental_event_tree())))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        import torch

        before, self.current = self.current, name
        try:
            with torch.profiler.record_function(MARK + name):
                yield
        finally:
            self.current = before

    def _sort(self, events: list[Any]) -> None:
        windows = [
            (e.start_time_ns, e.end_time_ns, e.name.removeprefix(MARK)) for e in events if e.name.startswith(MARK)
        ]
        for event in events:
            begun = [w for w in windows if w[0] <= event.start_time_ns <= w[1]]
            phase = max(begun)[2] if begun else ""  # the innermost, on whatever thread
            if not phase:
                continue
            if self._reaches(event) and not any(self._reaches(above) for above in parents_of(event)):
                self.counts.setdefault(phase, Counter())[name_of(event)] += 1
            if _waits(event) and not any(_waits(above) for above in parents_of(event)):
                self.waits[phase] += 1

    def _reaches(self, event: Any) -> bool:
        if not event.name.startswith("aten::") or name_of(event) not in self.registered:
            return False
        return any(t.device.type == DEVICE for t in tensors_of(event))


def takes_tensors(op: str) -> bool:
    """Whether an operator has tensor arguments by its schema; one that has none is never seen to reach a device."""
    import torch

    name, _, overload = op.partition(".")
    found = getattr(getattr(torch.ops.aten, name), overload or "default")
    return any("Tensor" in str(argument.type) for argument in found._schema.arguments)


def _waits(event: Any) -> bool:
    """Whether the host waits for the device in a call: a value is read, or a copy between them blocks."""
    name, tensors = short(event.name), tensors_of(event)
    if name == "_local_scalar_dense":
        return any(t.device.type == DEVICE for t in tensors)
    if name != "copy_" or len(tensors) < 2 or len({t.device.type == DEVICE for t in tensors[:2]}) == 1:
        return False
    inputs = event.extra_fields.inputs
    return not (len(inputs) > 2 and inputs[2] is True)
