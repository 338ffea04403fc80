"""The fallback detector: what of this model's training leaves the GPU on MPS, seen and not predicted.

A child process (watch.py) runs every phase once more, before training and with all fallbacks made visible. Here its
task is made and what it saw becomes findings. docs/coverage.md has the document's schema.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_mac import simulator
from nanogpt_mac.corpus import TINY_SHAKESPEARE_SYMBOLS, vocab_size
from nanogpt_mac.fallbacks.findings import findings_of
from nanogpt_mac.gpt.spec import GPTSpec

if TYPE_CHECKING:
    from nanogpt_mac.config import Config

SCHEMA = 1
TIMEOUT_S = 3600.0  # of the child; a large model is compiled in it
_ROOT = Path(__file__).resolve().parents[2]


def check(config: Config, spec: GPTSpec | None = None, resident: bool = True) -> dict[str, Any]:
    """Runs the detector for a run of `config` on MPS. Takes a few iterations' time, and compiles if the run does.

    Args:
        spec: the run's model where it is known already; by default what `config.model` and `config.data` give.
        resident: whether the corpus fits on the device, which decides how batches get there.

    Returns:
        The document, JSON-able. A child that fails is `complete: False` and the reason; nothing is raised for it.
    """
    return check_task(task_of(config, spec, resident))


def task_of(config: Config, spec: GPTSpec | None = None, resident: bool = True) -> dict[str, Any]:
    """What `check` has the child do, JSON-able; for `check_task`."""
    from nanogpt_mac.backends import kinds
    from nanogpt_mac.config import backend_options

    if spec is None:
        vocabulary = config.model.vocab_size or vocab_size(config.data) or TINY_SHAKESPEARE_SYMBOLS
        spec = GPTSpec(**asdict(config.model) | {"vocab_size": vocabulary})
    return {
        "options": asdict(backend_options(config, "mps", kinds.resolve_compile(config.compile, "mps"))),
        "spec": asdict(spec),
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "resident": resident,
    }


def check_task(
    task: dict[str, Any],
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """As `check`, for a task and under any interpreter that has torch and numpy.

    Args:
        env: the child's environment, by default this process's. What the detector needs is added.
    """
    seen, failure = _run_child(task, python, dict(os.environ if env is None else env), timeout_s)
    return document(task, seen, failure)


def document(task: dict[str, Any], seen: dict[str, Any], failure: str | None = None) -> dict[str, Any]:
    """The document of what a child saw (watch.py), or of its failure."""
    options = task["options"]
    findings, why_incomplete = ([], [failure]) if failure else findings_of(seen)
    passes: dict[str, Any] = {}
    if not failure:
        passes = {
            "control": seen["control"],
            "warnings": {
                "calls": _calls(seen["warnings"]["fallbacks"]),
                "admitted": len(seen["warnings"]["admitted"]),
                "control": seen["warnings"]["control"],
            },
            "profiler": {
                "calls": _calls([r for r in seen["profiler"]["records"] if r["sign"] == "fallback"]),
                **{key: seen["profiler"][key] for key in ("meant", "operators", "overloads", "control")},
            },
        }
    return {
        "schema": SCHEMA,
        "torch": seen.get("torch"),
        "python": seen.get("python"),
        "device": seen.get("device"),
        "backend": "mps",
        "compile": options["compile"],
        "dtype": options["dtype"],
        "model": task["spec"],
        "batch_size": task["batch_size"],
        "gradient_accumulation_steps": task["gradient_accumulation_steps"],
        "complete": not why_incomplete,
        "why_incomplete": why_incomplete,
        "phases": seen.get("reached", []),
        "findings": findings,
        "passes": passes,
        "seconds": seen.get("seconds"),
        "compile_report": seen.get("compile_report"),
    }


def _calls(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Phase to operator to calls."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["phase"], Counter())[row["op"]] += 1
    return {phase: dict(sorted(counter.items())) for phase, counter in counts.items()}


def _run_child(
    task: dict[str, Any], python: str, environment: dict[str, str], timeout_s: float
) -> tuple[dict[str, Any], str | None]:
    """What the child saw, or why there is nothing."""
    environment["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"  # read when torch is loaded
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH", "")]))
    if simulator.active():
        environment[simulator.VARIABLE] = "1"
    argv = [python, "-m", "nanogpt_mac.fallbacks.watch"]
    # A folder of its own for what Inductor compiles, or the run would find it there and its compile time be no such.
    with tempfile.TemporaryDirectory(prefix="nanogpt-mac-") as folder:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())
        try:
            child = subprocess.run(
                argv,
                input=json.dumps(task | {"scratch": folder}),
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {}, f"the child did not end within {timeout_s:.0f} s"
        except OSError as error:
            return {}, f"{python}: cannot be run: {error.strerror}"
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()] or ["without a word"]
        return {}, f"the child ended with exit code {child.returncode}: {lines[-1].strip()[:300]}"
    try:
        return json.loads(child.stdout), None
    except ValueError:
        return {}, f"the child's document cannot be read: {child.stdout[:100]!r}"
