"""The operators that one training step of this model sends to MPS: seen on a Mac, predicted on a machine without it.

A child process runs one iteration, one evaluation and the sampling of a few tokens with the project's own MPS back end.
On a Mac a profile tells what reaches the device (live.py). Elsewhere the child makes the simulated MPS device, with the
operator set of the torch in question, which counts; the code that calls the operators is that of the torch installed
here, which is why that result says `predicted`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from nanogpt_mac import simulator
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks.phases import Phased
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.operators import wheel
from nanogpt_mac.operators.table import IN_COMPOSITE, Kind, Table, load

PACKAGE = Path(__file__).resolve().parents[1]
_REGISTERED = (Kind.NATIVE, Kind.DELEGATE, Kind.PYTHON)
# Sequences, positions and channels a head of the traced model: which operators are called depends on none of them.
_BATCH, _LENGTH, _HEAD = 2, 16, 8
_SYMBOLS = 65
_PROMPT = 4  # tokens before the one that is sampled, at most
PHASES = ("forward", "backward", "clip", "optimizer", "evaluation", "sampling")


class NoTrace(Exception):  # noqa: N818 - a state, not a fault
    """The operators of this model cannot be had here; the text says why."""


@dataclass(frozen=True)
class Trace:
    """Which operators reach the device in one iteration, one evaluation batch and one sampled token.

    Args:
        label: `predicted`, or `live` on a Mac.
        device: where it was traced.
        torch: the version whose code was traced.
        phases: phase to operator (without `aten::`) to number of calls.
        stopped: the error that ended the trace early; None when it is whole.
        waits: phase to how often the host waits for the device in it.
        no_tensors: operators without tensor arguments; a live trace cannot have them.
    """

    label: str
    device: str
    torch: str
    phases: dict[str, dict[str, int]]
    stopped: str | None = None
    waits: dict[str, int] = field(default_factory=dict)
    no_tensors: list[str] = field(default_factory=list)

    def calls(self) -> dict[str, dict[str, int]]:
        """Operator to phase to number of calls."""
        ops = sorted({op for phase in self.phases.values() for op in phase})
        return {op: {name: phase[op] for name, phase in self.phases.items() if op in phase} for op in ops}


def trace_model(model: ModelConfig, dtype: str, table: Table, live: bool | None = None) -> Trace:
    """The operators of a training step, from the cache folder where that was done before.

    Predicted under `table` where there is no MPS; on a Mac those of the installed torch, seen.

    Args:
        live: whether to read a profile of the device, the simulated one off a Mac; by default on a Mac alone.

    Raises:
        NoTrace: not on Linux or a Mac, no torch or no compiler, or the child failed.
    """
    if sys.platform not in ("linux", "darwin"):
        raise NoTrace(f"the simulated MPS device runs on Linux only, not on {sys.platform}")
    try:
        installed = load("installed")
    except InputError as error:
        raise NoTrace(str(error)) from error
    live = sys.platform == "darwin" if live is None else live
    how: dict[str, Any] = {"registered": _registered(installed)} if live else _changes(installed, table)
    task = json.dumps({"model": asdict(model), "dtype": dtype, "live": live, **how}, sort_keys=True)
    kept = wheel.cache_folder() / "traces" / f"{_digest(task)}.json"
    if kept.exists():
        try:
            return Trace(**json.loads(kept.read_text()))
        except (ValueError, TypeError) as error:
            print(f"{kept}: damaged ({error}); the model is traced again", file=sys.stderr)
    result = _run_child(task)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
        file.write(result)
    Path(file.name).replace(kept)
    return Trace(**json.loads(result))


def _registered(installed: Table) -> list[str]:
    """The operators whose calls end at MPS, by a kernel of its own or by the fallback."""
    made_of_others = [op for op, e in installed.entries.items() if e.kind is Kind.COMPOSITE and op not in IN_COMPOSITE]
    return sorted(installed.entries.keys() - made_of_others)


def _changes(installed: Table, table: Table) -> dict[str, Any]:
    """How the operator set of `table` differs from the installed torch's, which the simulator knows."""
    old = {op for op, entry in installed.entries.items() if entry.kind in _REGISTERED}
    new = {op: entry for op, entry in table.entries.items() if entry.kind in _REGISTERED}
    return {
        "gained": {op: entry.facts.no_device_check for op, entry in new.items() if op not in old},
        "lost": sorted(op for op in old - new.keys()),
        "missing": sorted(op for op, e in table.entries.items() if e.kind in (Kind.MISSING, Kind.MISSING_CPU)),
        "fallback": sorted(op for op, entry in table.entries.items() if entry.kind is Kind.FALLBACK),
    }


def _digest(task: str) -> str:
    """Of the task and of all the code that answers it."""
    digest = hashlib.sha256(f"{installed_version('torch')} {sys.version} {platform.platform()} {task}".encode())
    folders = (PACKAGE / name for name in ("gpt", "backends", "simulator"))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = (
        "coverage/trace.py",
        "coverage/live.py",
        "fallbacks/phases.py",
        "fallbacks/profiled.py",
        "fallbacks/signs.py",
    )
    files += [PACKAGE / name for name in names]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _run_child(task: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")}
    environment["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"  # a missing operator must not end the trace; read at import
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), environment.get("PYTHONPATH", "")])
    if sys.platform != "darwin":
        environment[simulator.VARIABLE] = "1"
    argv = [sys.executable, "-W", "ignore", "-m", "nanogpt_mac.coverage.trace"]
    child = subprocess.run(argv, input=task, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        device = "MPS" if sys.platform == "darwin" else "the simulated MPS device"
        raise NoTrace(f"tracing on {device} failed: {lines[-1]}")
    return child.stdout


# -- in the child -----------------------------------------------------------------------------------------------------


class _Phases(Phased):
    """Sorts what the device counts into the phases of an iteration."""

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


def _trace(task: dict[str, Any]) -> Trace:
    import numpy as np

    from nanogpt_mac.backends import kinds
    from nanogpt_mac.backends.base import Tokens
    from nanogpt_mac.config import Config, backend_options

    if not task["live"]:
        _install(task)
    elif reason := kinds.missing("mps"):
        raise InputError(reason)
    import torch

    from nanogpt_mac.coverage import live

    m = ModelConfig(**task["model"])
    length = min(m.block_size, _LENGTH)
    symbols = m.vocab_size or _SYMBOLS
    spec = GPTSpec(m.n_layer, m.n_head, m.n_head * _HEAD, length, symbols, m.dropout, m.bias, m.gelu)
    text = (np.arange(50 * length) % symbols).astype(np.uint16)
    backend: Any = kinds.create(
        spec, backend_options(Config(dtype=task["dtype"]), "mps"), Tokens({"train": text, "val": text}, length)
    )
    backend.load(spec.init_weights(0))
    starts = np.arange(_BATCH)[None]
    phases: Any = live.Phases(task["registered"]) if task["live"] else _Phases()
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
    label, device = ("live", "mps") if task["live"] else ("predicted", simulator.DEVICE_NAME)
    if simulator.active():
        device = simulator.DEVICE_NAME
    no_tensors = sorted({op for ops in counts.values() for op in ops if not live.takes_tensors(op)})
    waits = {name: phases.waits[name] for name in counts}
    return Trace(label, device, torch.__version__, counts, stopped, waits, no_tensors)


def _install(task: dict[str, Any]) -> None:
    """The simulated device with the operator set of the torch in question, as far as the installed one has them."""
    import torch

    from nanogpt_mac.simulator.optable import NO_DEVICE_CHECK, installed_table

    exist = {name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    table = installed_table()
    native = {op: flags for op, flags in table.native.items() if op not in task["lost"]}
    native |= {op: NO_DEVICE_CHECK if free else 0 for op, free in task["gained"].items() if op in exist}
    fallback = [op for op in task["fallback"] if op in exist]
    missing = [op for op in task["missing"] if op in exist and op not in native]
    simulator.install(replace(table, native=native, fallback=fallback, missing=missing))


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_trace(json.load(sys.stdin)))))
    except InputError as error:
        sys.exit(str(error))
