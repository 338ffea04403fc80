"""Watching torch.compile in this process: what it made, and what one marked iteration then does on MPS.

Everything that is not public API of torch is read through `ask`, which turns what a version does not have into a line
under `unknown` and a null, never into a zero. For a process of its own, never for a timed run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nanogpt_mac.compile_report import dynamo
from nanogpt_mac.compile_report.recorders import Alike, Call, Recorder, What, recording

_REPEATS = 10  # of a call that is timed


@dataclass
class Iteration:
    """What one marked iteration did, and its time where that was measured."""

    calls: list[Call] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)  # of graphs
    compilations: int | None = None  # inside the marked iteration: 0 when it is steady
    ms: float | None = None


class Seen(Recorder):
    """What `watch` saw; `describe` makes the report of it, inside the context or after it."""

    def __init__(self, execute: bool) -> None:
        super().__init__(execute)
        self.breaks: list[dynamo.Break] = []
        self.compiled: list[tuple[str | None, Any]] = []  # phase, torch's record of one compilation
        self.iterations: dict[str, Iteration] = {}
        self.ms_each: dict[Alike, float] = {}
        self._known = self.ask("compilations", dynamo.compilations) or []
        self._counted = self.ask("counters", dynamo.counters) or {}
        self._phase: str | None = None
        self._marked: Iteration | None = None
        self._timing = False

    # -- marking ------------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what is going on, so that a compilation is reported under it. For warming up."""
        self.collect()
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self.collect()
            self._phase = before

    @contextmanager
    def iteration(self, name: str = "training") -> Iterator[None]:
        """Marks one steady iteration, whose launches are reported under `name`. Reports the last one of each name."""
        with self.phase(name):
            before = len(self.compiled)
            marked = self.iterations[name] = self._marked = Iteration()
            try:
                yield
            finally:
                self._marked = None
        if self.known("compilations"):
            marked.compilations = len(self.compiled) - before

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Times everything inside: the first call of each kind is repeated between two `torch.mps.Event`s.

        What takes the GPU less than the host needs to launch it is given as the latter. Results inside are garbage,
        since kernels that work in place run ten times over.
        """
        self._timing = True
        try:
            yield
        finally:
            self._timing = False

    # -- what the recorders report ------------------------------------------------------------------------------------

    def ran(self, graph: str) -> None:
        if self._marked is not None:
            self._marked.runs[graph] += 1

    def record(self, call: Call, run: Callable[[], Any]) -> Any:
        if self._timing and call.what is not What.BUFFER and call.alike not in self.ms_each:
            self.ms_each[call.alike] = _milliseconds(run)
        if self._marked is not None:
            self._marked.calls.append(call)
        return run()

    def collect(self) -> None:
        """Takes over the compilations since the last call, under the current phase."""
        records = self.ask("compilations", dynamo.compilations) or []
        known = {id(record) for record in self._known}
        new = [record for record in records if id(record) not in known]
        self.compiled += [(self._phase, record) for record in new if not getattr(record, "is_runtime", False)]
        self._known += new  # kept alive, so that no later one gets the same id

    # -- the report ---------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Counter[str]] | None:
        """torch's own counters since the start."""
        now = self.ask("counters", dynamo.counters)
        if now is None:
            return None
        return {group: values - self._counted.get(group, Counter()) for group, values in now.items()}


def _milliseconds(run: Callable[[], Any]) -> float:
    """The mean time of a call on the device."""
    import torch

    first, last = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
    run()
    torch.mps.synchronize()
    first.record()
    for _ in range(_REPEATS):
        run()
    last.record()
    torch.mps.synchronize()
    return float(first.elapsed_time(last)) / _REPEATS


@contextmanager
def watch(execute: bool = True) -> Iterator[Seen]:
    """Watches compilation, and what every graph compiled inside does. Enter it before the first compilation.

    With `execute=False` generated kernels, matrix products and functional ATen operators are recorded in place of
    being run: launches, shapes and sizes are right, values garbage. For a dry run at full size. RuntimeError where
    another `watch` is open in this process.
    """
    seen = Seen(execute)
    loggers = seen.ask("lines of graph breaks", dynamo.break_loggers) or []
    with recording(seen), dynamo.listening(loggers, seen.breaks):
        yield seen
