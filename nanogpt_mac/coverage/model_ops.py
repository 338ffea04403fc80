"""The operators that one training step of this model sends to MPS: seen on a Mac, predicted on a machine without it.

A child process (model_ops_child.py) runs one iteration, one evaluation and the sampling of a few tokens with the
project's own MPS back end. On a Mac a profile shows what reaches the device. Elsewhere the child makes the simulated
MPS device, with the operator set of the torch in question, which counts; the code that calls the operators is that of
the torch installed here, which is why that result says `predicted`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from nanogpt_mac import child, files, simulator
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.operators import wheel
from nanogpt_mac.operators.by_hand import IN_COMPOSITE
from nanogpt_mac.operators.table import Kind, Table, load
from nanogpt_mac.records.base import Record

PACKAGE = Path(__file__).resolve().parents[1]
_REGISTERED = (Kind.NATIVE, Kind.DELEGATE, Kind.PYTHON)
PHASES = ("forward", "backward", "clip", "optimizer", "evaluation", "sampling")


class NoTrace(Exception):  # noqa: N818 - a state, not a fault
    """The operators of this model cannot be had here; the text says why."""


class Task(Record):
    """What model_ops_child.py is asked. `live` reads a profile and needs `registered` alone; else the rest is needed.

    `registered` are the operators whose calls end at MPS. The others say how the operator set of the torch in question
    differs from the installed one's, which the simulator knows; those gained with whether they check no device.
    """

    model: ModelConfig
    dtype: str
    live: bool
    registered: tuple[str, ...] = ()
    gained: Mapping[str, bool]
    lost: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Which operators reach the device in one iteration, one evaluation batch and one sampled token."""

    label: str  # `predicted`, or `live` on a Mac
    device: str  # where it was traced
    torch: str  # the version whose code was traced
    phases: dict[str, dict[str, int]]  # phase to operator (without `aten::`) to number of calls
    stopped: str | None = None  # the error that ended the trace early; None when it is whole
    waits: dict[str, int] = field(default_factory=dict)  # phase to how often the host waits for the device in it
    no_tensors: list[str] = field(default_factory=list)  # without tensor arguments; a live trace cannot have them

    def calls(self) -> dict[str, dict[str, int]]:
        """Operator to phase to number of calls."""
        ops = sorted({op for phase in self.phases.values() for op in phase})
        return {op: {name: phase[op] for name, phase in self.phases.items() if op in phase} for op in ops}


def trace_model(model: ModelConfig, dtype: str, table: Table, live: bool | None = None) -> Trace:
    """The operators of a training step, from the cache folder where that was done before.

    Predicted under `table` where there is no MPS; on a Mac those of the installed torch, seen. `live` is whether to
    read a profile of the device, the simulated one off a Mac; by default on a Mac alone. `NoTrace` where it is neither
    Linux nor a Mac, without torch or a compiler, and where the child failed.
    """
    if sys.platform not in ("linux", "darwin"):
        raise NoTrace(f"MPS needs a Mac, or Linux to simulate it; this is {sys.platform}")
    try:
        installed = load("installed")
    except InputError as error:
        raise NoTrace(str(error)) from error
    live = sys.platform == "darwin" if live is None else live
    task = task_of(model, dtype, installed, None if live else table)
    kept = wheel.cache_folder() / "traces" / f"{_digest(task.model_dump_json())}.json"
    return files.kept(kept, lambda text: Trace(**json.loads(text)), lambda: json.dumps(_ask(task)))


def task_of(model: ModelConfig, dtype: str, installed: Table, table: Table | None) -> Task:
    """The task of a trace predicted under `table`, or of a live one where that is None."""
    if table is None:
        of_others = [op for op, e in installed.entries.items() if e.kind is Kind.COMPOSITE and op not in IN_COMPOSITE]
        registered = tuple(sorted(installed.entries.keys() - of_others))
        return Task(model=model, dtype=dtype, live=True, registered=registered, gained={})
    old = {op for op, entry in installed.entries.items() if entry.kind in _REGISTERED}
    entries = sorted(table.entries.items())
    new = {op: entry for op, entry in entries if entry.kind in _REGISTERED}
    return Task(
        model=model,
        dtype=dtype,
        live=False,
        gained={op: entry.facts.no_device_check for op, entry in new.items() if op not in old},
        lost=tuple(sorted(old - new.keys())),
        missing=tuple(op for op, e in entries if e.kind in (Kind.MISSING, Kind.MISSING_CPU)),
        fallback=tuple(op for op, e in entries if e.kind is Kind.FALLBACK),
    )


def _digest(task: str) -> str:
    """Of the task and of all the code that answers it."""
    digest = hashlib.sha256(f"{installed_version('torch')} {sys.version} {platform.platform()} {task}".encode())
    folders = (PACKAGE / name for name in ("gpt", "backends", "simulator"))
    sources = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = ("coverage/model_ops_child.py", *(f"fallbacks/{name}.py" for name in ("phases", "profiled", "signs")))
    sources += [PACKAGE / name for name in names]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _ask(task: Task) -> Any:
    environment = simulator.environment(fallback=True)  # a missing operator must not end the trace
    try:
        return child.ask("nanogpt_mac.coverage.model_ops_child", task.model_dump(mode="json"), environment=environment)
    except child.ChildError as error:
        device = "MPS" if sys.platform == "darwin" else "the simulated MPS device"
        raise NoTrace(f"tracing on {device} failed: {error}") from error
