"""One run folder, read for its figures: of any schema and in any state. A file that is damaged counts as absent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from pydantic import JsonValue, TypeAdapter, ValidationError

from nanogpt_mac.backends import kinds
from nanogpt_mac.compare import doubts
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.base import DamagedError, Document
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.records.comparison import Work
from nanogpt_mac.records.plan import Recipe
from nanogpt_mac.records.run import (
    Environment,
    EvaluationRow,
    EventRow,
    ExitState,
    IterationRow,
    LeftOut,
    Outcome,
    Row,
    RunFacts,
    RunState,
    RunSummary,
    read_rows,
)

FILES = ("summary.json", "metrics.jsonl", "env.json", "outcome.json", ".hydra/config.yaml")
_SAFE_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster
_MOST_YAML = 10_000  # characters; libyaml recurses, and thirty thousand brackets are the process's end

_FREE: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])

D = TypeVar("D", bound=Document)


class Settings(Recipe):
    """A run's config, as far as it is read back."""

    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    grad_clip: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder holds; `problems` has a line for each file that is missing or damaged."""

    folder: Path
    summary: RunSummary | None = None
    env: Environment | None = None
    outcome: Outcome | None = None
    config: Settings = field(default_factory=Settings)
    rows: tuple[Row, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def facts(self) -> RunFacts | None:
        """What identifies the run: of its summary, or of env.json where it did not live to write one."""
        return self.summary or (self.env.backend if self.env else None)

    @property
    def capabilities(self) -> Capabilities | None:
        facts = self.facts
        return (facts.capabilities or kinds.recorded(facts.backend, facts.device)) if facts else None

    @property
    def state(self) -> RunState:
        """How it ended; unfinished: no word of that."""
        ended = self.summary.exit_state if self.summary else None
        if self.outcome is None:
            return {None: RunState.UNFINISHED, ExitState.FINISHED: RunState.DONE}.get(ended, RunState.FAILED)
        # A pilot is stopped once it has shown enough; anything else than that or its end is a failure: it diverged.
        good = ended in (None, ExitState.FINISHED, ExitState.STOPPED)
        return self.outcome.state if good or self.outcome.state is not RunState.DONE else RunState.FAILED

    @property
    def reason(self) -> str:
        """Why it is not done, one line."""
        known = (self.outcome and self.outcome.reason) or (self.summary and self.summary.error)
        if known is None and self.summary and self.summary.exit_state is ExitState.DIVERGED:
            known = "diverged: the loss is not a number"
        return (
            known
            or (self.summary and self.summary.exit_state)
            or "; ".join(self.problems)
            or "stopped and left no message"
        )

    @cached_property
    def iterations(self) -> list[IterationRow]:
        return [row for row in self.rows if isinstance(row, IterationRow)]

    @cached_property
    def evaluations(self) -> list[EvaluationRow]:
        return [row for row in self.rows if isinstance(row, EvaluationRow)]

    @cached_property
    def events(self) -> list[EventRow]:
        return [row for row in self.rows if isinstance(row, EventRow)]

    @cached_property
    def kept(self) -> np.ndarray:
        """Times in ms of the iterations that enter statistics, in order."""
        return np.array([row.iter_ms for row in self.iterations if counts(row)], dtype=float)

    @property
    def timed(self) -> bool:
        """Whether it ended well, with times that count."""
        return self.state is RunState.DONE and len(self.kept) > 0

    def left_out(self) -> Counter[LeftOut]:
        return Counter(row.left_out for row in self.iterations if row.left_out)

    @property
    def first_iter_s(self) -> float | None:
        if self.summary and self.summary.first_iter_s is not None:
            return self.summary.first_iter_s
        first = next((row.iter_ms for row in self.iterations if row.left_out is LeftOut.FIRST), None)
        return first / 1e3 if first else None

    @cached_property
    def work(self) -> Work:
        """What an iteration computes; empty where the run left nothing that says so."""
        facts = self.facts
        if facts is None:
            return Work()
        tokens = facts.batch_size * facts.gradient_accumulation_steps * facts.model.block_size
        return Work(
            **{key: getattr(facts, key) for key in Work.model_fields.keys() & RunFacts.model_fields},
            block_size=facts.model.block_size,
            corpus_sha256=facts.corpus_facts.sha256,
            stand_in=facts.corpus_facts.stand_in,
            tokens_per_iter=tokens,
            flops_per_iter=(self.summary and self.summary.flops_per_iter) or _flops(facts, tokens),
        )

    def ends(self) -> list[float]:
        """When each iteration ended, in seconds since the first began: its own time and evaluations in between."""
        pauses = {row.iter: row.seconds for row in self.evaluations if row.iter}
        ends, now = [], 0.0
        for i, row in enumerate(self.iterations):
            now += (pauses.get(row.iter, 0.0) if i else 0.0) + row.iter_ms / 1e3
            ends.append(now)
        return ends


def counts(row: IterationRow) -> bool:
    """Whether an iteration enters statistics."""
    return row.left_out is None and row.iter_ms > 0


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def read(folder: Path) -> Run:
    """Read one run folder. InputError when it is not one: none of a run's files is there."""
    if not is_run(folder):
        what = "holds no run" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder}: {what}; use a folder that train.py wrote, with summary.json or metrics.jsonl")
    problems: list[str] = []
    run = Run(
        folder,
        load(RunSummary, folder / "summary.json", problems),
        load(Environment, folder / "env.json", problems),
        load(Outcome, folder / "outcome.json", problems, usual=False),
        _config(folder / ".hydra" / "config.yaml", problems),
        _rows(folder / "metrics.jsonl", problems),
        problems,
    )
    recorded = run.summary.times.count if run.summary else None
    if run.rows and recorded is not None and recorded != len(run.kept):
        problems.append(f"metrics.jsonl: {len(run.kept)} timed iterations, but summary.json counted {recorded}")
    return run


def load(kind: type[D], path: Path, problems: list[str], usual: bool = True) -> D | None:
    """The document in `path`; None where there is none or it is damaged, with a line in `problems` that says so."""
    try:
        found = kind.load(path)
    except FileNotFoundError:
        problems += [f"{path.name} is missing"] if usual else []
        return None
    except DamagedError as error:
        problems.append(str(error))
        return None
    if found.schema_ > kind.SCHEMA:
        problems.append(doubts.Doubt.NEWER.say(file=path.name, schema=found.schema_, known=kind.SCHEMA))
    return found


def free(path: Path, problems: list[str]) -> dict[str, JsonValue] | None:
    """A document whose keys are another part's, shown as they are; None where there is none or it is damaged."""
    try:
        return _FREE.validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError):
        problems.append(f"{path.name} cannot be read")
        return None


def _rows(path: Path, problems: list[str]) -> tuple[Row, ...]:
    if not path.is_file():  # a pipe would keep its reader waiting
        problems.append(f"{path.name} is missing")
        return ()
    try:
        return tuple(read_rows(path))
    except DamagedError as error:
        problems.append(str(error))
    except OSError:
        problems.append(f"{path.name} cannot be read")
    return ()


def _config(path: Path, problems: list[str]) -> Settings:
    try:
        if not path.is_file():
            raise FileNotFoundError
        text = path.read_text(encoding="utf-8")
        if len(text) > _MOST_YAML:
            raise ValueError("too long for a config of this project")
        return Settings.model_validate(yaml.load(text, Loader=_SAFE_YAML))
    except FileNotFoundError:
        problems.append("config.yaml is missing")
    except (OSError, ValueError, RecursionError, yaml.YAMLError, ValidationError):
        problems.append("config.yaml cannot be read")
    return Settings()


def _flops(facts: RunFacts, tokens: int) -> float | None:
    try:
        return float(GPTSpec(**facts.model.model_dump()).flops_per_token() * tokens)
    except (TypeError, InputError):  # another version's model
        return None
