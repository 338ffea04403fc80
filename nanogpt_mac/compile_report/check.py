"""The compile report: what torch.compile makes of this model's training iteration and of its evaluation on MPS.

    with compiled.watch() as seen:  # before the first compilation in this process
        with seen.phase("training"):
            step()
        with seen.iteration("training"):  # one steady iteration, whose launches are reported
            step()
    describe(seen)  # records/compiled.py

`check` does that with the project's own back end in a process and a compiler cache of their own: on a Mac live, off it
as a dry run on the simulated device, which records kernels and does not run them.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from typing import Any

from pydantic import TypeAdapter

from nanogpt_mac import child, simulator
from nanogpt_mac.compile_report.checked import CheckedReport, Task, Warm
from nanogpt_mac.compile_report.describe import describe
from nanogpt_mac.compile_report.seen import Seen, watch
from nanogpt_mac.compile_report.text import lines, sections
from nanogpt_mac.corpus import TINY_SHAKESPEARE_SYMBOLS
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig

__all__ = ["Seen", "check", "describe", "lines", "sections", "watch"]

_TIMED_ITERATIONS = 10
_task, _report = TypeAdapter(Task), TypeAdapter(CheckedReport)
_DROPPED = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_", "TORCH_LOGS")  # what changes the outcome


def check(model: ModelConfig, dtype: str, batch_size: int, warm: bool = True) -> CheckedReport:
    """Compile this model for MPS in a fresh process with an empty cache, and report what came of it.

    With `warm` once more in a second process. InputError where there is neither a Mac's GPU nor a machine for the
    simulated one, or the model cannot be compiled.
    """
    _spec(model)
    task = Task(model, dtype, batch_size)
    with tempfile.TemporaryDirectory(prefix="nanogpt-mac-compile-") as cache:
        report = _run_child(task, cache)
        second = _run_child(task, cache) if warm else None
    report.warm = Warm(second.compile, second.cache) if second else None
    _add_kinds(report)
    return report


def _spec(m: ModelConfig) -> GPTSpec:
    symbols = m.vocab_size or TINY_SHAKESPEARE_SYMBOLS
    return GPTSpec(m.n_layer, m.n_head, m.n_embd, m.block_size, symbols, m.dropout, m.bias, m.gelu)


def _run_child(task: Task, cache: str) -> CheckedReport:
    environment = simulator.environment(False, *_DROPPED, TORCHINDUCTOR_CACHE_DIR=cache, PYTHONWARNINGS="ignore")
    try:
        answer = child.ask("nanogpt_mac.compile_report.check", asdict(task), environment=environment)
    except child.ChildError as error:
        raise InputError(f"compiled=true: compiling this model for MPS failed: {error}") from error
    return _report.validate_python(answer)


def _add_kinds(report: CheckedReport) -> None:
    """Where MPS runs the ATen operators that generated code calls, by the operator table of the installed torch."""
    from nanogpt_mac.operators.table import load

    rows = [row for it in report.iterations.values() for row in it.aten or []]
    if not rows:
        return
    try:
        table = load("installed")
    except InputError as error:
        report.unknown.append(f"kinds of ATen operators: {error}")
        table = None
    for row in rows:
        op = row.name.removeprefix("aten.")
        row.kind = table.kind(op) if table and row.name.startswith("aten.") else None


def _child(given: Any) -> dict[str, Any]:
    import numpy as np

    from nanogpt_mac.backends import kinds
    from nanogpt_mac.backends.base import Tokens
    from nanogpt_mac.config import Config, backend_options

    if reason := kinds.missing("mps"):
        raise InputError(reason)
    task, live = _task.validate_python(given), not simulator.active()
    execute = live if task.execute is None else task.execute
    if not live:
        simulator.set_max_memory(1 << 50)  # a dry run touches little of what it allocates
    spec, batch_size = _spec(task.model), task.batch_size
    text = np.random.default_rng(0).integers(0, spec.vocab_size, batch_size + spec.block_size + 1).astype(np.uint16)
    tokens = Tokens({"train": text, "val": text}, spec.block_size)
    starts = np.arange(batch_size)[None]
    with watch(execute) as seen:
        backend: Any = kinds.create(spec, backend_options(Config(dtype=task.dtype), "mps", True), tokens)
        backend.load(spec.init_weights(0))
        with seen.phase("training"):
            for _ in range(2):
                backend.wait(backend.step(starts, 1e-3))
        with seen.iteration("training"):
            handle = backend.step(starts, 1e-3)
        backend.wait(handle)
        with seen.phase("evaluation"):
            backend.evaluate("val", starts)
        with seen.iteration("evaluation"):
            backend.evaluate("val", starts)
        if execute:
            seen.iterations["training"].ms = _iteration_ms(backend, starts)
            with seen.timing():
                backend.wait(backend.step(starts, 1e-3))
        report = describe(seen)
    model = asdict(replace(task.model, vocab_size=spec.vocab_size))
    about = {"label": "live" if live else "dry run", "model": model, "dtype": task.dtype, "batch_size": batch_size}
    return about | asdict(report)


def _iteration_ms(backend: Any, starts: Any) -> float:
    """Milliseconds of a steady iteration, recorders included; the next is enqueued before one is waited for."""
    began, handle = time.perf_counter(), backend.step(starts, 1e-3)
    for _ in range(_TIMED_ITERATIONS - 1):
        following = backend.step(starts, 1e-3)
        backend.wait(handle)
        handle = following
    backend.wait(handle)
    return (time.perf_counter() - began) / _TIMED_ITERATIONS * 1e3


if __name__ == "__main__":
    child.answer(_child)
