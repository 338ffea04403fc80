"""The profiler's pass: which operators copied to the CPU or waited for it, and from where, read from torch's events.

A profile knows the devices of every operator's arguments, so a copy from the device shows wherever it hides: below
`aten::_to_cpu` (the CPU fallback), below another operator (CPU work inside a native kernel), or below none (this
model's own code). Only the CPU activity is needed, which every build of torch has.
"""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanogpt_mac.backends.base import PHASES
from nanogpt_mac.fallbacks.observed import Call, MeantCalls, Sign
from nanogpt_mac.fallbacks.signs import CONTROL, Frame, is_generated, place, relative, short

MARK = "nanogpt-mac: "  # names the annotations that phases are recognised by
DEVICE = "mps"
_MANY = 8  # tensor arguments
# Operators that only carry a transfer: whoever called them is the one that wanted it.
CARRIERS = {"to", "_to_copy", "copy_", "_copy_from", "_copy_from_and_resize", "_to_cpu", "clone", "contiguous", "cpu"}
CARRIERS |= {"item", "_local_scalar_dense", "is_nonzero", "lift_fresh", "lift_fresh_copy"}


@dataclass
class Record(Call):
    """A call, and what is needed to judge it."""

    transfers: int = 0
    to_host: bool = True
    own: bool | None = None  # whether the back end's own file made the call; None where that is not known
    began: int = 0  # of the profile's clock, in nanoseconds
    line_of: tuple[str, str, int] | None = None  # operator, file and first line of a function; no more is known

    def call(self) -> Call:
        return Call(**{f.name: getattr(self, f.name) for f in fields(Call)})


@dataclass
class Profile:
    """What one pass saw."""

    records: list[Record] = field(default_factory=list)
    meant: list[MeantCalls] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)  # phase to operators that took tensors of the device
    overloads: bool = True  # whether operators carry their overload names
    last: dict[str, Record] = field(default_factory=dict)  # phase to the outermost operator that began last


def profiler() -> tuple[profile, bool]:
    """A profiler that records arguments, Python frames and, where this torch can, overload names (the flag)."""
    from torch._C._profiler import _ExperimentalConfig

    try:
        config, overloads = _ExperimentalConfig(verbose=True, capture_overload_names=True), True
    except TypeError:  # before torch 2.7 or so
        config, overloads = _ExperimentalConfig(verbose=True), False
    activities = [ProfilerActivity.CPU]
    return profile(activities=activities, record_shapes=True, with_stack=True, experimental_config=config), overloads


def read(finished: profile, overloads: bool, generated: str, backend: ModuleType) -> Profile:
    """The records of a profile. `generated` is the folder that Inductor wrote its code to; `backend` the module of the
    back end, whose MEANT are no findings.
    """
    results: Any = finished.profiler
    return Reader(results.kineto_results.experimental_event_tree(), overloads, generated, backend).read()


class Reader:
    def __init__(self, roots: list[Any], overloads: bool, generated: str, backend: ModuleType | None) -> None:
        self.events = sorted(walk(roots), key=lambda e: e.start_time_ns)
        self.operators = [e for e in self.events if is_operator(e)]
        self.generated, self.backend = generated, backend
        self._phase = phases_of(self.events)
        self.found = Profile(overloads=overloads)
        self.records: dict[int, Record] = {}  # by the event's id
        self.forward: dict[int, Any] = {}  # autograd's sequence number to the forward operator that made the node

    def read(self) -> Profile:
        counts: Counter[str] = Counter()
        last: dict[str, Any] = {}
        for event in self.operators:
            phase = self._phase(event)
            if on_device(event):
                counts[phase] += 1
            if event.extra_fields.sequence_number >= 0 and phase != "backward":
                self.forward[event.extra_fields.sequence_number] = event
            if operator_above(event) is None:
                last[phase] = event
        self.found.last = {phase: self._record(Sign.SYNC, event, phase) for phase, event in last.items()}
        self.found.operators = {phase: counts[phase] for phase in (*PHASES, CONTROL)}
        for event in self.operators:
            if short(event.name) == "_to_cpu":
                self._fell_back(event)
        for event in self.operators:
            self._transfer(event)
        self.found.records = [r for r in self.records.values() if not self._is_meant(r)]
        return self.found

    # -- what an operator did -------------------------------------------------------------------------------------

    def _fell_back(self, event: Any) -> None:
        above = operator_above(event)
        if above is not None:
            self._keep(Sign.FALLBACK, above)

    def _transfer(self, event: Any) -> None:
        """Keeps a copy between the devices, or a wait for values, unless an outer operator accounts for it."""
        name = short(event.name)
        size = 0
        if name == "copy_":
            crosses = crossing(event)
            if crosses is None or not crosses[1] or any(crossing(e) for e in parents_of(event)):
                return
            to_host, size = crosses
            if not to_host and non_blocking(event):
                return  # waits for nothing
        elif reads_values(name, event.overload_name) and on_device(event):
            to_host = True
        else:
            return
        outer = [e for e in parents_of(event) if e.id in self.records and self.records[e.id].sign == Sign.FALLBACK]
        if outer:
            self._add(self.records[outer[0].id], size)
            return
        owner = event if short(event.name) not in CARRIERS else self._owner(event)
        if owner is None or name != "copy_":
            record = self._keep(Sign.SYNC, event if owner is None else owner)
            record.to_host = to_host
        else:
            if not to_host and size <= 8 and owner.id not in self.records:
                return  # a number that a kernel takes as an argument
            inside = to_host or owner.id in self.records  # one that goes only to the device brings an argument there
            record = self._keep(Sign.HIDDEN if inside else Sign.SYNC, owner)
            record.to_host = inside
        self._add(record, size)

    def _owner(self, event: Any) -> Any:
        return next((e for e in parents_of(event) if is_operator(e) and short(e.name) not in CARRIERS), None)

    def _add(self, record: Record, size: int) -> None:
        record.bytes += size
        record.transfers += 1

    def _keep(self, sign: Sign, event: Any) -> Record:
        record = self.records.get(event.id)
        if record is None or (record.sign == Sign.SYNC and sign == Sign.HIDDEN):
            before = record
            record = self.records[event.id] = self._record(sign, event, self._phase(event))
            if before is not None:
                record.bytes, record.transfers = before.bytes, before.transfers
        return record

    def _record(self, sign: Sign, event: Any, phase: str) -> Record:
        tensors = tensors_of(event)
        origin, evidence = self._origin(event, phase)
        frames, exact = _frames(origin) if origin is not None else ([], True)
        generated = bool(frames) and any(is_generated(f, self.generated) for f in frames)
        own = relative(frames[0][0]) == relative(str(self.backend.__file__)) if frames and self.backend else None
        return Record(
            sign,
            name_of(event),
            phase,
            event.duration_time_ns / 1e6,
            dtypes_of(tensors),
            shapes_of(tensors),
            None if generated else place(frames),
            evidence,
            own=own,
            line_of=None if exact or generated else (_bare(origin.name), relative(frames[0][0]) or "", frames[0][1]),
        )

    def _is_meant(self, record: Record) -> bool:
        for meant in self.backend.MEANT if self.backend else ():
            same = (record.phase, record.op, record.to_host) == (meant.phase, meant.op, meant.to_host)
            if record.sign == Sign.SYNC and same and record.own is not False:
                known = next((row for row in self.found.meant if row.reason == meant.reason), None)
                if known is None:
                    self.found.meant.append(MeantCalls(meant.phase, meant.op, meant.reason))
                    return True
                if known.calls < meant.most:
                    known.calls += 1
                    return True
        return False

    # -- where it came from ---------------------------------------------------------------------------------------

    def _origin(self, event: Any, phase: str) -> tuple[Any, list[str]]:
        """The operator that Python called: this one, or the forward one whose gradient it is; and what is known."""
        origin, evidence = event, []
        frames, _ = _frames(event)
        if inner := next((f for f in frames if is_generated(f, self.generated)), None):
            return event, [f"called from Inductor's generated code: {linecache.getline(*inner[:2]).strip()}"]
        node = next((e for e in (event, *parents_of(event)) if e.name.startswith("autograd::engine")), None)
        if phase == "backward" and node is not None:
            evidence.append(f"gradient of {node.name.rpartition(' ')[2]}")
            origin = self.forward.get(node.extra_fields.sequence_number)
            frames = _frames(origin)[0] if origin is not None else []
        if frames and (path := place(frames[:1])) and path != place(frames):
            evidence.append(f"called in {path}")
        return origin, evidence


# -- events -----------------------------------------------------------------------------------------------------------


def phases_of(events: list[Any]) -> Callable[[Any], str]:
    """Of an event, the innermost phase under way when it began, on whatever thread; "" outside of all."""
    windows = [(e.start_time_ns, e.end_time_ns, e.name.removeprefix(MARK)) for e in events if e.name.startswith(MARK)]
    return lambda event: max((w for w in windows if w[0] <= event.start_time_ns <= w[1]), default=("",))[-1]


def walk(roots: list[Any]) -> Iterator[Any]:
    pending = list(roots)
    while pending:
        event = pending.pop()
        yield event
        pending.extend(event.children)


def parents_of(event: Any) -> Iterator[Any]:
    while event.parent is not None:
        event = event.parent
        yield event


def _is_torch_event(event: Any) -> bool:
    return bool(event.typed[0] == torch._C._profiler._EventType.TorchOp)


def is_operator(event: Any) -> bool:
    """An operator of any namespace; autograd's nodes, annotations and Python calls are none."""
    return _is_torch_event(event) and "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def operator_above(event: Any) -> Any:
    return next((e for e in parents_of(event) if is_operator(e)), None)


def name_of(event: Any) -> str:
    overload = getattr(event, "overload_name", "")
    return short(f"{event.name}.{overload}" if overload else event.name)


def _bare(name: str) -> str:
    return short(name).partition(".")[0]


def tensors_of(event: Any) -> list[Any]:
    """What is known of its tensor arguments, those in lists included."""
    found: list[Any] = []
    for value in getattr(event.extra_fields, "inputs", []):
        found += [v for v in (value if isinstance(value, list) else [value]) if hasattr(v, "sizes")]
    return found


def on_device(event: Any) -> bool:
    """Whether one of its tensor arguments lies on the device."""
    return any(t.device.type == DEVICE for t in tensors_of(event))


def dtypes_of(tensors: Iterable[Any]) -> list[str]:
    """The different ones."""
    return list(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors))


def shapes_of(tensors: list[Any]) -> list[list[int]]:
    """Of every tensor; of long lists of them the different ones."""
    shapes = [tuple(t.sizes) for t in tensors]
    return [list(s) for s in (shapes if len(shapes) <= _MANY else dict.fromkeys(shapes))]


def crossing(event: Any) -> tuple[bool, int] | None:
    """Of a copy between the devices: whether it goes to the host, and its bytes."""
    if not is_operator(event) or short(event.name) != "copy_":
        return None
    tensors = tensors_of(event)
    if len(tensors) < 2 or (tensors[0].device.type == DEVICE) == (tensors[1].device.type == DEVICE):
        return None
    source = tensors[1]
    numel = 1
    for length in source.sizes:
        numel *= length
    return source.device.type == DEVICE, numel * source.dtype.itemsize


def non_blocking(event: Any) -> bool:
    inputs = event.extra_fields.inputs
    return len(inputs) > 2 and inputs[2] is True


@cache
def reads_values(name: str, overload: str) -> bool:
    """Whether the host needs the values of an operator's arguments: torch's own tags say so.

    Of those that call `item` only `item`'s own kernel counts, and indexing only waits for a mask, by way of nonzero.
    """
    if name != "_local_scalar_dense" and (name in CARRIERS or name.startswith(("index", "_index", "_unsafe_index"))):
        return False
    packet: Any = getattr(torch.ops.aten, name, None)
    found = getattr(packet, overload or "default", None)
    tags = getattr(found, "tags", [])
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _frames(event: Any) -> tuple[list[Frame], bool]:
    """Python frames above an event, innermost first; and whether the innermost line is exact.

    A profiler records calls. An operator such as `x + y` is none, so of the function around it only its first line is
    known.
    """
    kinds = torch._C._profiler._EventType
    frames: list[Frame] = []
    exact = True
    for above in parents_of(event):
        if above.typed[0] not in (kinds.PyCall, kinds.PyCCall):
            continue
        fields = above.extra_fields
        if not frames and above.typed[0] == kinds.PyCall:
            frames.append((fields.callsite.file_name, fields.callsite.line_number, fields.callsite.function_name))
            exact = False
        frames.append((fields.caller.file_name, fields.caller.line_number, fields.caller.function_name))
    return frames, exact
