"""What a profile shows of a program that is not ours: what leaves the device, from which of its lines, how often.

The program is watched through annotations (program.py): every call of torch's interface carries the number of its
place, so that no Python frame needs to be recorded. Work of the backward pass belongs to the place of the forward call
that it differentiates, and where that is not known to the place that called `backward`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from nanogpt_mac.fallbacks.observed import Sign
from nanogpt_mac.fallbacks.profiled import (
    MARK,
    Reader,
    Record,
    dtypes_of,
    name_of,
    on_device,
    reads_values,
    shapes_of,
    tensors_of,
    walk,
)
from nanogpt_mac.fallbacks.signs import short
from nanogpt_mac.operators.dispatch import Dispatch, dispatch_of

# Annotations beside those of places. Of MASK: a profile does not know the indices of an indexing.
STEP, BACKWARD, WAIT, MASK = f"{MARK}step ", f"{MARK}backward", f"{MARK}wait", f"{MARK}mask"
NOWHERE = -1
_KNOWN_NODES = 2_000_000  # forward calls remembered for their backward pass
_SHAPES = 4  # different ones kept of each finding
_INDEXING = ("aten::index", "aten::_index_put_impl_")  # they wait where an index is a mask


@dataclass
class Seen:
    """One thing at one place: its calls, the host's milliseconds in them, bytes copied, and what it was called with."""

    calls: int = 0
    ms: float = 0.0
    bytes: int = 0
    waits: int = 0
    shapes: list[list[list[int]]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)


class Rhythm:
    """What lies between two marks of one kind: kernels and waits, and in how many intervals the host waited where."""

    def __init__(self) -> None:
        self.intervals: list[tuple[int, int]] = []  # kernels, waits
        self.places: Counter[int] = Counter()
        self.kernels, self.waits = 0, Counter[int]()  # since the last mark

    def mark(self) -> None:
        self.intervals.append((self.kernels, self.waits.total()))
        self.places.update(self.waits.keys())
        self.kernels, self.waits = 0, Counter()


class Ledger:
    """Everything that the windows of one program have shown."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int, bool], Seen] = {}  # sign, operator, place, whether to the host
        self.reached: Counter[str] = Counter()  # operators that came to the device
        self.foreign: set[str] = set()  # operators that are not torch's own
        self.kernels = self.waits = 0
        self.rhythms: dict[str, Rhythm] = {}  # by the annotation that marks them
        self.nodes: dict[int, _Around] = {}  # sequence number of a forward call to where it was made

    def read(self, roots: list[Any]) -> None:
        """Adds one window."""
        _Window(roots, self).read()
        while len(self.nodes) > _KNOWN_NODES:
            del self.nodes[next(iter(self.nodes))]


class _Around(NamedTuple):
    """What is known around an event: its place, whether it is of a backward pass, whether the device has it already."""

    place: int
    backward: bool
    reached: bool
    masked: bool = False  # an indexing by a mask


_OUTSIDE = _Around(NOWHERE, False, False)


class _Window(Reader):
    """Reads each event once: a window has tens of thousands, and every question to one crosses into C++."""

    def __init__(self, roots: list[Any], ledger: Ledger) -> None:
        super().__init__([], True, "", None)
        self.roots, self.ledger = sorted(roots, key=lambda e: e.start_time_ns), ledger
        self.timeline: list[tuple[int, Callable[[], None]]] = []
        self.backwards: list[tuple[int, int, int]] = []  # begin, end, place
        self.crossing: list[tuple[Any, _Around]] = []  # events that may be transfers
        self.fell_back: list[tuple[Any, _Around]] = []
        self.place_of: dict[int, int] = {}  # a record's event to its place
        self.passes: list[tuple[Any, _Around]] = []  # nodes of autograd

    def read(self) -> Any:
        self._walk([(event, _OUTSIDE) for event in self.roots], self.passes)
        # The profiler hangs nodes of later passes under the first: they come by time, when all forward calls are known.
        self._walk(sorted(self.passes, key=lambda entry: entry[0].start_time_ns), None)
        for event, around in self.fell_back:
            self._fell_back(event)
            self._place_new(around)
        for event, around in self.crossing:
            self._transfer(event)
            self._place_new(around)
        for number, record in self.records.items():
            place = self.place_of[number]
            self._count(str(record.sign), record.op, place, record.to_host, record.ms, record.transfers, record)
            self._at(record.began, self._waiter(place, record.transfers))
        for _, act in sorted(self.timeline, key=lambda entry: entry[0]):
            act()
        return self.found

    def _walk(self, events: list[tuple[Any, _Around]], passes: list[tuple[Any, _Around]] | None) -> None:
        """Parents before children. Nodes of autograd are put off into `passes`, or where that is None looked at."""
        pending = events[::-1]
        while pending:
            event, around = pending.pop()
            name = event.name
            if "::" not in name:
                if name.startswith(MARK):
                    around = self._annotation(event, name, around)
            elif name.startswith("autograd::engine"):
                if passes is not None:
                    passes.append((event, around))
                    continue
                around = self._of_node(event, around)
            elif not name.startswith(("autograd::", "torch::")):
                around = self._operator(event, name, around)
            pending += [(child, around) for child in reversed(event.children)]

    def _place_new(self, around: _Around) -> None:
        """Gives a place to the records just made: an operator around an event is of the same line."""
        for number in self.records.keys() - self.place_of.keys():
            self.place_of[number] = around.place

    def _annotation(self, event: Any, name: str, around: _Around) -> _Around:
        number = name[len(MARK) :]
        if number.isdecimal():
            return around._replace(place=int(number), masked=False)
        if name == MASK:
            return around._replace(masked=True)
        if name == WAIT:
            self._count(Sign.SYNC, "synchronize", around.place, True, event.duration_time_ns / 1e6, 1)
            self._at(event.start_time_ns, self._waiter(around.place, 1))
        elif name.startswith((STEP, BACKWARD)):
            rhythm = self.ledger.rhythms.setdefault(name, Rhythm())
            self._at(event.end_time_ns, rhythm.mark)
            if name == BACKWARD:
                self.backwards.append((event.start_time_ns, event.end_time_ns, around.place))
        return around

    def _operator(self, event: Any, name: str, around: _Around) -> _Around:
        fields = event.extra_fields
        if not around.backward and around.place >= 0 and fields.sequence_number >= 0:
            self.ledger.nodes[fields.sequence_number] = around
        if _is_foreign(name):
            self.ledger.foreign.add(name)
        if name == "aten::_to_cpu":
            self.fell_back.append((event, around))
        elif _may_cross(name, event.overload_name) or (around.masked and name in _INDEXING and not around.reached):
            self.crossing.append((event, around))
        if around.reached:
            return around
        full = name_of(event)
        if not _registered(full) or not on_device(event):
            return around
        self.ledger.reached[full] += 1
        if _computes(full):
            self._at(event.start_time_ns, self._kernel)
        return around._replace(reached=True)

    def _at(self, moment: int, act: Callable[[], None]) -> None:
        self.timeline.append((moment, act))

    def _waiter(self, place: int, waits: int) -> Callable[[], None]:
        def act() -> None:
            self.ledger.waits += waits
            for rhythm in self.ledger.rhythms.values() if waits else ():
                rhythm.waits[place] += waits

        return act

    def _kernel(self) -> None:
        self.ledger.kernels += 1
        for rhythm in self.ledger.rhythms.values():
            rhythm.kernels += 1

    def _count(
        self, sign: str, op: str, place: int, to_host: bool, ms: float, waits: int, record: Record | None = None
    ) -> None:
        seen = self.ledger.found.setdefault((str(sign), op, place, to_host), Seen())
        seen.calls += 1
        seen.ms += ms
        seen.waits += waits
        if record is not None:
            seen.bytes += record.bytes
            if record.shapes not in seen.shapes and len(seen.shapes) < _SHAPES:
                seen.shapes.append(record.shapes)
            seen.dtypes += [dtype for dtype in record.dtypes if dtype not in seen.dtypes]

    def _of_node(self, event: Any, around: _Around) -> _Around:
        """Around an autograd node: the place of its forward call; else that of the `backward` under way."""
        known, at = self.ledger.nodes.get(event.extra_fields.sequence_number, _OUTSIDE), event.start_time_ns
        place = known.place
        if place < 0:
            under_way = (p for begin, end, p in reversed(self.backwards) if begin <= at <= end)
            place = next(under_way, around.place)
        return _Around(place, True, around.reached, known.masked)

    # -- what Reader asks -----------------------------------------------------------------------------------------

    def _transfer(self, event: Any) -> None:
        if event.name not in _INDEXING:
            super()._transfer(event)
        elif not any(short(e.name) == "nonzero" for e in walk(event.children)):  # a Mac's kernel calls it: it counts
            self._add(self._keep(Sign.SYNC, event), 0)

    def _record(self, sign: Sign, event: Any, phase: str) -> Record:
        tensors, ms = tensors_of(event), event.duration_time_ns / 1e6
        given = dtypes_of(tensors), shapes_of(tensors)
        return Record(sign, name_of(event), phase, ms, *given, None, [], began=event.start_time_ns)


# -- operators --------------------------------------------------------------------------------------------------------


@cache
def _is_foreign(name: str) -> bool:
    return name.partition("::")[0] not in ("aten", "prims", "prim", "profiler", "inductor", "nanogpt_mps")


@cache
def _may_cross(name: str, overload: str) -> bool:
    return name == "aten::copy_" or reads_values(short(name), overload)


@cache
def _registered(op: str) -> bool:
    """Whether a call of an operator ends at the device: a kernel, or the CPU in its place.

    A Mac's attention decomposes; the simulated device has a kernel of its own for it (DispatchStub has none for MPS).
    """
    return op != "scaled_dot_product_attention" and dispatch_of(op) in (
        Dispatch.KERNEL,
        Dispatch.BY_HAND,
        Dispatch.MISSING,
    )


@cache
def _computes(op: str) -> bool:
    """Whether an operator is work for the device: no view, no allocation."""
    name, _, overload = op.partition(".")
    found = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
    if found is None:
        return False
    returns = found._schema.returns
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not views and not name.startswith(("empty", "set_", "resize_", "_local_scalar_dense"))
