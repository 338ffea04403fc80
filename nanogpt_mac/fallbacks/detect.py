"""The fallback detector: what of this model's training leaves the GPU on MPS, seen and not predicted.

A child process (watch.py) runs every phase once more, before training and with all fallbacks made visible. Here its
task is made, and what it saw becomes findings.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nanogpt_mac import child, simulator
from nanogpt_mac.backends import kinds
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.corpus import TINY_SHAKESPEARE_SYMBOLS, vocab_size
from nanogpt_mac.fallbacks.findings import findings_of
from nanogpt_mac.fallbacks.observed import Call, Observed, Sign, Task, Warned
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.fallbacks import Fallbacks, Meant, Passes, ProfilerPass, WarningPass

TIMEOUT_S = 3600.0  # of the child; a large model is compiled in it
_observed = TypeAdapter(Observed)


def check(config: Config, spec: GPTSpec | None = None, resident: bool = True) -> Fallbacks:
    """Run the detector for a run of `config` on MPS. It takes a few iterations' time, and compiles if the run does.

    `spec` is the run's model, by default what `config.model` and `config.data` give; `resident` is whether the corpus
    fits on the device, which decides how batches get there. A child that fails makes the document incomplete and is
    its reason; nothing is raised for it.
    """
    return check_task(task_of(config, spec, resident))


def task_of(config: Config, spec: GPTSpec | None = None, resident: bool = True) -> Task:
    """What `check` has the child do; for `check_task`."""
    if spec is None:
        vocabulary = config.model.vocab_size or vocab_size(config.data) or TINY_SHAKESPEARE_SYMBOLS
        spec = GPTSpec(**asdict(config.model) | {"vocab_size": vocabulary})
    options = backend_options(config, "mps", kinds.resolve_compile(config.compile, "mps"))
    if not resident:
        options = replace(options, resident_tokens=0)
    return Task(options, spec, config.batch_size, config.gradient_accumulation_steps)


def check_task(
    task: Task,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Fallbacks:
    """As `check`, for a task and under any interpreter that has torch and numpy.

    `env` is the child's environment, by default this process's; what the detector needs is added.
    """
    environment = dict(os.environ if env is None else env)
    environment["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"  # read when torch is loaded
    if simulator.active():
        environment[simulator.VARIABLE] = "1"
    # A folder of its own for what Inductor compiles: else the run would find it there, and compile in no time.
    with tempfile.TemporaryDirectory(prefix="nanogpt-mac-") as folder:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())
        try:
            answer = child.ask(
                "nanogpt_mac.fallbacks.watch",
                asdict(task) | {"scratch": folder},
                python=python,
                environment=environment,
                timeout_s=timeout_s,
            )
            return document(task, _observed.validate_python(answer))
        except child.ChildError as error:
            return document(task, failure=f"the detector's process failed: {error}")
        except ValidationError as error:
            return document(task, failure=f"the detector's answer is damaged: {error.errors()[0]['msg']}")


def document(task: Task, seen: Observed | None = None, failure: str = "") -> Fallbacks:
    """The document of what a child saw, or of its `failure`."""
    findings, why = ([], [failure]) if seen is None else findings_of(seen)
    made = Fallbacks(
        backend=task.options.name,
        compile=task.options.compile,
        dtype=task.options.dtype,
        model=asdict(task.spec),
        batch_size=task.batch_size,
        gradient_accumulation_steps=task.gradient_accumulation_steps,
        complete=not why,
        why_incomplete=tuple(why),
        findings=tuple(findings),
    )
    if seen is None:
        return made
    about = {key: getattr(seen, key) for key in ("torch", "python", "device", "seconds", "compile_report")}
    return made.model_copy(update={**about, "phases": tuple(seen.reached), "passes": _passes(seen)})


def _passes(seen: Observed) -> Passes:
    profiler = seen.profiler
    return Passes(
        control=seen.control,
        warnings=WarningPass(
            calls=_calls(seen.warnings.fallbacks),
            admitted=len(seen.warnings.admitted),
            control=seen.warnings.control,
        ),
        profiler=ProfilerPass(
            calls=_calls(call for call in profiler.records if call.sign is Sign.FALLBACK),
            meant=tuple(Meant(**asdict(meant)) for meant in profiler.meant),
            operators=profiler.operators,
            overloads=profiler.overloads,
            control=profiler.control,
        ),
    )


def _calls(rows: Iterable[Call | Warned]) -> dict[str, dict[str, int]]:
    """Phase to operator to calls."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.phase, Counter())[row.op] += 1
    return {phase: dict(sorted(counter.items())) for phase, counter in counts.items()}
