"""One run folder, read for its figures: of any schema, in any state, with files missing or broken."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nanogpt_mac.errors import InputError
from nanogpt_mac.records.run import RunSummary

RUN_FILES = ("summary.json", "metrics.jsonl", "env.json", "outcome.json", ".hydra/config.yaml")
_SAFE_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster
WORK_KEYS = ("batch_size", "gradient_accumulation_steps", "dtype", "matmul_precision", "corpus_sha256")
_MOST_YAML = 10_000  # characters; libyaml recurses, and thirty thousand brackets are the process's end
_MOST_MS = 1e9  # eleven days: no iteration, but a damaged number
_MOST = 1e30  # of anything that is counted or measured here
_MOST_COUNT = 10**12
_MOST_LAYERS = 10_000  # a spec names each layer's tensors: a damaged number must not take forever

# What a document's key must hold to be used; nested ones (env.json's backend, the model) have the same keys.
_WORDS = ("exit_state", "error", "device", "dtype", "matmul_precision", "sync", "corpus", "sha256", "state", "reason",
          "started", "chip", "gpu", "os", "power_source", "name")  # fmt: skip
_AMOUNTS = ("parameters", "flops_per_iter", "first_iter_s", "peak_memory", "joules", "seconds", "memory_bytes", "mfu",
            "mfu_measured", "mfu_a100")  # fmt: skip
_COUNTS = ("batch_size", "gradient_accumulation_steps", "n_layer", "n_head", "n_embd", "block_size", "vocab_size",
           "gpu_cores", "max_iters", "eval_iters")  # fmt: skip
_OBJECTS = ("iter_ms", "model", "corpus_facts", "mfu_denominators", "energy", "details", "heat", "versions", "git")


@dataclass
class Run:
    """What a run folder holds. Files that are absent or cannot be read are empty, and `problems` says so."""

    folder: Path
    summary: dict[str, Any]
    env: dict[str, Any]
    config: dict[str, Any]
    outcome: dict[str, Any]
    iterations: list[dict[str, Any]] = field(default_factory=list)  # rows of metrics.jsonl, numbers as floats
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def fact(self, key: str) -> Any:
        """What identifies the run: from the summary, else env.json's copy (a run that did not end), else the config."""
        for source in (self.summary, self.env.get("backend")):
            if isinstance(source, dict) and source.get(key) is not None:
                return source[key]
        value = self.config.get(key)
        if key == "backend" and isinstance(value, dict):
            return value.get("name")
        return value

    @property
    def state(self) -> str:
        """done, failed, timeout, oom, missing_op, skipped, or unfinished: no word of how it ended."""
        told = self.outcome.get("state")
        ended = self.summary.get("exit_state")
        if told == "done" and ended not in (None, "finished", "stopped"):  # a pilot is stopped once it has shown enough
            return "failed"  # diverged
        return str(told) if told else {None: "unfinished", "finished": "done"}.get(ended, "failed")

    @property
    def reason(self) -> str | None:
        """Why it is not done, one line."""
        said = self.outcome.get("reason") or self.summary.get("error")
        if said is None and self.summary.get("exit_state") == "diverged":
            said = "diverged: the loss is no number"
        return str(said or self.summary.get("exit_state") or "; ".join(self.problems) or "no record of its end")

    @cached_property
    def kept(self) -> np.ndarray:
        """Times in ms of the iterations that enter statistics, in order."""
        rows = self.iterations
        times = [row["iter_ms"] for row in rows if not row.get("left_out") and (row.get("iter_ms") or 0) > 0]
        return np.array(times, dtype=float)

    def left_out(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for row in self.iterations:
            if row.get("left_out"):
                counts[row["left_out"]] = counts.get(row["left_out"], 0) + 1
        return counts

    @property
    def first_iter_s(self) -> float | None:
        if (told := number(self.summary.get("first_iter_s"))) is not None:
            return told
        first = next((row["iter_ms"] for row in self.iterations if row.get("left_out") == "first"), None)
        return first / 1e3 if first else None

    def work(self) -> dict[str, Any]:
        """What an iteration computes; unknown parts are None."""
        model = self.fact("model")
        model = dict(model) if isinstance(model, dict) else {}
        corpus = self.fact("corpus_facts")
        corpus = corpus if isinstance(corpus, dict) else {}
        batch, accumulation = (number(self.fact(key)) for key in ("batch_size", "gradient_accumulation_steps"))
        block = number(model.get("block_size"))
        tokens = int(batch * (accumulation or 1) * block) if batch and block else None
        return {
            "model": model or None,
            "parameters": self.fact("parameters"),
            "batch_size": self.fact("batch_size"),
            "gradient_accumulation_steps": self.fact("gradient_accumulation_steps"),
            "block_size": model.get("block_size"),
            "dtype": self.fact("dtype"),
            "matmul_precision": self.fact("matmul_precision"),
            "corpus": self.fact("corpus"),
            "corpus_sha256": corpus.get("sha256"),
            "stand_in": corpus.get("stand_in", self.fact("corpus") == "stand-in"),
            "tokens_per_iter": tokens,
            "flops_per_iter": number(self.summary.get("flops_per_iter")) or _flops(model, tokens),
        }

    def seconds(self) -> list[float]:
        """When each iteration ended, in seconds since the first began: its own time and evaluations in between."""
        pauses = {row["iter"]: row["seconds"] for row in self.evaluations if row.get("seconds") and row.get("iter")}
        ends, now = [], 0.0
        start = self.iterations[0]["iter"] if self.iterations else 0
        for row in self.iterations:
            now += pauses.get(row["iter"], 0.0) if row["iter"] > start else 0.0
            now += (row.get("iter_ms") or 0.0) / 1e3
            ends.append(now)
        return ends


def work_key(work: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for runs whose times and losses may be held against each other: model, batch, precision, corpus."""
    model = work.get("model") or {}
    sizes = tuple(sorted((key, value) for key, value in model.items() if value is not None))
    return (sizes, *(work.get(key) for key in WORK_KEYS))


def read(folder: Path) -> Run:
    """Read one run folder. InputError when it is no run: none of a run's files is there."""
    if not any((folder / name).is_file() for name in RUN_FILES):
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise InputError(
            f"{folder}: {what}; allowed is a folder that train.py wrote, with summary.json or metrics.jsonl"
        )
    problems: list[str] = []
    names = ("summary.json", "env.json", "outcome.json")
    documents = [_usable(document(folder / name, problems), name, problems) for name in names]
    config = _usable(_config(folder, problems), "config.yaml", problems)
    run = Run(folder, documents[0], documents[1], config, documents[2], problems=problems)
    schema = run.summary.get("schema")
    if isinstance(schema, int) and schema > RunSummary.SCHEMA:
        problems.append(f"summary.json has schema {schema}, newer than this program's {RunSummary.SCHEMA}")
    _rows(folder / "metrics.jsonl", run)
    told = (run.summary.get("iter_ms") or {}).get("count")
    if run.iterations and number(told) is not None and told != len(run.kept):
        problems.append(f"metrics.jsonl: {len(run.kept)} timed iterations, but summary.json counted {told:.0f}")
    return run


def parsed(text: str) -> Any:
    """JSON in which every number is finite: any other (NaN, 1e400) is None. ValueError for what is no JSON."""
    try:
        return json.loads(
            text,
            parse_constant=lambda _: None,
            parse_float=lambda digits: number(float(digits)),
            parse_int=lambda digits: int(digits) if len(digits) < 20 else number(float(digits)),
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def document(path: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """A JSON file's object; empty, with a line in `problems`, where there is none. An absent outcome.json is usual."""
    said: str | None = None
    try:
        found = parsed(_content(path))
        if isinstance(found, dict):
            return found
        said = f"{path.name} is not an object"
    except FileNotFoundError:
        said = None if path.name == "outcome.json" else f"{path.name} is missing"
    except (OSError, ValueError):
        said = f"{path.name} cannot be read"
    if said and problems is not None:
        problems.append(said)
    return {}


def _content(path: Path, errors: str = "strict") -> str:
    if path.exists() and not path.is_file():
        raise OSError("no file")  # a pipe would keep its reader waiting
    return path.read_text(encoding="utf-8", errors=errors)


def _usable(found: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """The document without what cannot be what its key says: that is None, and `problems` names it."""

    def fits(key: str, value: Any) -> bool:
        if key in _WORDS:
            return isinstance(value, str)
        if key in _OBJECTS:
            return isinstance(value, dict)
        if key in _COUNTS:
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and 0 < value <= (_MOST_LAYERS if key == "n_layer" else _MOST_COUNT)
        if key in _AMOUNTS:
            return number(value) is not None and 0 <= value < _MOST
        if key in ("backend", "errors", "compile"):
            return isinstance(value, {"backend": str | dict, "errors": list, "compile": str | bool}[key])
        return not isinstance(value, int | float) or isinstance(value, bool) or number(value) is not None

    def clean(key: str, value: Any, inside: str) -> Any:
        if value is not None and not fits(key, value):
            problems.append(f"{name}: {'.'.join(filter(None, (inside, key)))} cannot be {reprlib.repr(value)}")
            return None
        if inside == "model" and isinstance(value, dict | list):
            return reprlib.repr(value)  # another version's; a model's sizes are compared
        if isinstance(value, dict) and (key in _OBJECTS or key == "backend"):
            return {k: clean(k, v, key) for k, v in value.items()}
        return value

    return {key: clean(key, value, "") for key, value in found.items()}


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    path = folder / ".hydra" / "config.yaml"
    try:
        text = _content(path)
        if len(text) > _MOST_YAML:
            raise ValueError("no config of ours is so long")
        found = yaml.load(text, Loader=_SAFE_YAML)
    except FileNotFoundError:
        problems.append("config.yaml is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        problems.append("config.yaml cannot be read")
        return {}
    if not isinstance(found, dict):
        problems.append("config.yaml is not an object")
        return {}
    return found


def _rows(path: Path, run: Run) -> None:
    kinds = {"iteration": run.iterations, "evaluation": run.evaluations, "event": run.events}
    broken = 0
    try:
        lines = _content(path, "replace").splitlines()
    except FileNotFoundError:
        run.problems.append("metrics.jsonl is missing")
        return
    except OSError:
        run.problems.append("metrics.jsonl cannot be read")
        return
    for line in lines:
        try:
            row = parsed(line)
            if not all(row.get(key) is None or isinstance(row[key], str) for key in _ROW_WORDS):
                raise ValueError("a word is none")
            if (iteration := number(row["iter"])) is None or iteration < 0:
                raise ValueError("no iteration")
            numbers = {key: value if key in _ROW_WORDS else number(value) for key, value in row.items()}
            if any(not 0 <= (numbers.get(key) or 0) < _MOST_MS for key in ("iter_ms", "seconds")):
                raise ValueError("no time")
            kinds[row["kind"]].append(numbers | {"iter": int(iteration)})
        except (ValueError, KeyError, TypeError, AttributeError):
            broken += 1
    if broken:
        run.problems.append(f"metrics.jsonl: {broken} of {len(lines)} lines cannot be read")


_ROW_WORDS = ("kind", "event", "left_out", "power_source", "thermal_state")


def number(value: Any) -> float | None:
    """A finite number, or None; the recorder writes what is not finite as its name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def _flops(model: dict[str, Any], tokens: int | None) -> float | None:
    from nanogpt_mac.gpt.spec import GPTSpec

    try:
        return number(GPTSpec(**model).flops_per_token() * tokens) if model and tokens else None
    except (TypeError, InputError):  # another version's model
        return None
