"""One run's records: the rows of metrics.jsonl, summary.json, env.json, and outcome.json of a supervised run."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nanogpt_mac.files import plain
from nanogpt_mac.records.base import Amount, Count, DamagedError, Document, Number, Record, Share, Size, first
from nanogpt_mac.records.capabilities import Capabilities


class LeftOut(StrEnum):
    """Why an iteration's time enters no statistic."""

    FIRST = "first"  # compiles and allocates
    WARMUP = "warmup"
    SLEPT = "slept"  # the machine did, during it
    RESTART = "restart"  # the first after a pause met an empty queue
    DRAIN = "drain"  # the last before one had nothing enqueued behind it


class ExitState(StrEnum):
    """How a training loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    FAILED = "failed"


class RunState(StrEnum):
    """How a supervised run ended, as far as its folder tells."""

    DONE = "done"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OOM = "oom"
    MISSING_OP = "missing_op"
    SKIPPED = "skipped"
    UNFINISHED = "unfinished"
    UNREADABLE = "unreadable"
    OTHER_WORK = "other_work"


class Mfu(Record):
    """Model FLOPs utilisation, 0..1, against each denominator; None where that is not known."""

    mfu: Share | None = None  # this chip's peak
    mfu_measured: Share | None = None  # the best matrix product measured here
    mfu_a100: Share | None = None  # 312e12, nanoGPT's own


class IterationRow(Mfu):
    """One finished iteration."""

    kind: Literal["iteration"] = "iteration"
    iter: Count
    loss: Number
    lr: float
    grad_norm: Number
    iter_ms: Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]  # between completions; 1e9: eleven days
    dispatch_ms: Amount  # host time to enqueue
    tokens_per_s: Amount
    memory: Count  # bytes, as the back end counts them
    left_out: LeftOut | None = None


class EvaluationRow(Record):
    """Mean losses over eval_iters batches of each split, without dropout."""

    kind: Literal["evaluation"] = "evaluation"
    iter: Count
    train_loss: Number
    val_loss: Number
    seconds: Amount


class EventRow(Record):
    """A pause (with what the machine said of itself then), a divergence, and the like."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["event"] = "event"
    iter: Count
    event: str
    power_source: str | None = None
    thermal_state: str | None = None
    gpu_utilisation: float | None = None  # per cent


Row = Annotated[IterationRow | EvaluationRow | EventRow, Field(discriminator="kind")]
_ROW: TypeAdapter[Row] = TypeAdapter(Row)


def read_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl. FileNotFoundError where there is none; `DamagedError` names the first damaged line."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(_ROW.validate_json(line))
            except ValidationError as error:
                if rows and not line.endswith(b"\n"):  # the run was killed while it wrote
                    break
                raise DamagedError(f"{path.name}, line {number}: {first(error)}") from error
    return rows


def row_line(row: IterationRow | EvaluationRow | EventRow) -> str:
    """A row as it stands in metrics.jsonl; what was not set is left out."""
    return json.dumps({"kind": row.kind, "iter": row.iter} | plain(row.model_dump(exclude_unset=True))) + "\n"


class Times(Record):
    """A distribution of iteration times, ms. `ci95` bounds the median; None below six values."""

    median: Amount | None = None
    ci95: tuple[float, float] | None = None
    mean: Amount | None = None
    min: Amount | None = None
    p10: Amount | None = None
    p90: Amount | None = None
    max: Amount | None = None
    count: Count = 0


class ModelFacts(Record):
    """The model's sizes as recorded; fields of an older or newer model are kept aside by `extra`."""

    model_config = ConfigDict(extra="allow")

    n_layer: Annotated[int, Field(gt=0, le=10_000)]  # a spec names each layer's tensors: a damaged one takes forever
    n_head: Size
    n_embd: Size
    block_size: Size
    vocab_size: Size
    dropout: float = 0.0
    bias: bool = False


class CorpusFacts(Record):
    name: str
    label: str
    sha256: str
    stand_in: bool = False


class RunFacts(Record):
    """What identifies a run's work and how it is computed: in summary.json, and in env.json under `backend`."""

    backend: str
    device: str
    compile: bool
    dtype: str
    matmul_precision: str
    sync: str
    seed: int
    details: dict[str, Any] = {}  # what the back end chose where its options left a choice
    capabilities: Capabilities | None = None  # None: written by schema 1, see backends.kinds.recorded
    model: ModelFacts
    parameters: Size
    batch_size: Size
    gradient_accumulation_steps: Size
    max_iters: Size
    corpus: str
    corpus_facts: CorpusFacts
    init_from: str
    shared_machine: bool = False  # other runs slowed it down: its speed is never ranked
    world_size: Size = 1  # processes that trained together


class Denominators(Record):
    """FLOP/s that each utilisation is held against; None where not known."""

    mfu: Amount | None = None
    mfu_measured: Amount | None = None  # the best matmul ever seen on this machine
    mfu_a100: Amount | None = None
    measured_here: Amount | None = None  # the best that this run itself has seen


class MatmulPeaks(Document):
    """peaks.json of the cache folder: the best matmul, FLOP/s, by everything that decides how fast one can be."""

    best: dict[str, Annotated[float, Field(gt=0, lt=1e18, allow_inf_nan=False)]] = {}

    def with_one(self, key: str, flops_per_s: float) -> Self:
        return self.model_copy(update={"best": self.best | {key: max(flops_per_s, self.best.get(key, 0.0))}})


class ProcessTimes(Record):
    """Seconds, as /usr/bin/time gives them, and the peak of the resident set."""

    wall: Amount
    user: Amount
    system: Amount
    max_rss_bytes: Count | None = None


class Energy(Record):
    """Of the whole machine or GPU while the loop ran; the parts are None where they are not measured apart."""

    joules: Amount
    gpu_joules: Amount | None = None
    cpu_joules: Amount | None = None
    seconds: Amount
    source: str | None = None


class FallbackCounts(Record):
    findings: Count
    why_incomplete: Count


class Ending(Record):
    """How a run ended, and what it took in all."""

    exit_state: ExitState
    signal: str | None = None  # "SIGINT"
    error: str | None = None  # one line
    resumed_at: Count | None = None  # iteration
    process: ProcessTimes | None = None
    energy: Energy | None = None
    fallbacks: FallbackCounts | None = None


class Rank(Record):
    """One of several processes of a run."""

    rank: Count
    machine: Count  # from 0
    times: Times
    waited_ms: Amount | None = None  # the median of an iteration: nothing but waiting for the other ranks
    peak_memory: Count = 0


class WorldFacts(Record):
    """What several processes of a run did for each other. `exposed` is communication that nothing overlaps."""

    machines: Size
    by: str  # gloo, nccl, ring, jaccl
    bytes_per_iter: Count  # that every rank gives to the sum of an iteration
    alone_ms: Amount | None = None  # that sum with nothing beside it, the median
    exposed_ms: Amount | None = None  # of an iteration, on the rank that waits least: of the others some is idleness
    exposed_share: Share | None = None  # of an iteration's median
    exposed_missing: str | None = None  # why it is not known
    ranks: list[Rank] = []


class RunSummary(Document, RunFacts, Ending, Mfu):
    """summary.json."""

    SCHEMA: ClassVar[int] = 2

    times: Times  # `iter_ms` in schema 1
    left_out: dict[LeftOut, Count] = {}
    first_iter_s: Amount | None = None
    compile_s: float | None = None  # the first iteration less the median: an estimate
    dispatch_ms: Amount | None = None  # the median
    tokens_per_s: Amount | None = None
    flops_per_iter: Amount
    mfu_denominators: Denominators = Denominators()
    peak_memory: Count = 0
    evaluations: Count = 0
    eval_s: Amount = 0.0
    first_eval_s: Amount | None = None
    val_loss: Number | None = None
    train_loss: Number | None = None
    best_val_loss: Number | None = None
    best_iter: Count | None = None
    errors: list[str] = []
    warnings: list[str] = []
    world: WorldFacts | None = None  # None: one process

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        document["times"] = document.pop("iter_ms")
        return document


class Git(Record):
    commit: str
    dirty: bool


class Environment(Document):
    """env.json: the machine and its programs; `backend` identifies the run, should it not live to its summary."""

    model_config = ConfigDict(extra="allow")

    os: str | None = None
    os_version: str | None = None
    macos_version: str | None = None
    machine: str | None = None
    python: str | None = None
    chip: str | None = None
    cpu_cores: Count | None = None
    cpu_core_kinds: Any = None
    gpu: str | None = None
    gpu_cores: Size | None = None
    gpu_driver: str | None = None
    memory_bytes: Count | None = None
    power_source: str | None = None
    low_power_mode: bool | None = None
    thermal_state: str | None = None
    versions: dict[str, str | None] = {}
    git: Git | None = None
    problems: list[str] = []
    backend: RunFacts | None = None


class Heat(Record):
    """What was found before and after a run of a comparison."""

    before: str | None = None
    waited_s: Amount = 0.0
    at_start: str | None = None
    load: float | None = None
    after: str | None = None


class Outcome(Document):
    """outcome.json: how a supervised run ended. `round` is a number, or "pilot"."""

    SCHEMA: ClassVar[int] = 2

    variant: str  # `way` in schema 1
    round: int | Literal["pilot"]
    state: RunState
    code: int | None = None
    reason: str | None = None  # one line
    seconds: Amount = 0.0
    started: str | None = None
    heat: Heat | None = None
    cut: bool = False  # asked to end before it had done all its iterations; those that it has done count

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        document["variant"] = document.pop("way", document.get("variant"))
        return document
