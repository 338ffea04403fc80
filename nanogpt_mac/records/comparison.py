"""comparison.json: what was measured of each variant, who is fastest, how sure that is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field, JsonValue

from nanogpt_mac.records.base import Amount, Count, Document, Number, Record, Size
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.records.figures import Drift, Outliers, Ratio
from nanogpt_mac.records.parts import Explanation
from nanogpt_mac.records.plan import Lever, Parity, ParityState
from nanogpt_mac.records.run import Denominators, Environment, LeftOut, Mfu, ModelFacts, RunState, Times, WorldFacts

Value = Annotated[float, Field(allow_inf_nan=False)]


class VariantState(StrEnum):
    """What is to be said against a variant."""

    OK = "ok"
    WRONG = "wrong"  # it computes something else: its parity check failed, or its losses are not those of the others
    IN_DOUBT = "in doubt"  # its losses and another's disagree, and nothing shows which are wrong
    PARTIAL = "partial"  # some of its runs failed
    WAITING = "waiting"  # not timed yet
    FAILED = "failed"  # none of its runs ended well


class Work(Record):
    """What an iteration computes. None: not recorded."""

    model: ModelFacts | None = None
    parameters: Size | None = None
    batch_size: Size | None = None
    gradient_accumulation_steps: Size | None = None
    block_size: Size | None = None
    dtype: str | None = None
    matmul_precision: str | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None
    stand_in: bool = False
    tokens_per_iter: Size | None = None
    flops_per_iter: Amount | None = None
    experiment: str | None = None

    def sizes(self) -> dict[str, JsonValue]:
        """The model's, without what is not recorded."""
        return self.model.model_dump(exclude_none=True) if self.model else {}

    def key(self) -> tuple[object, ...]:
        """Equal for runs whose times and losses may be held against each other: model, batch, precision, corpus."""
        model = tuple(sorted(self.sizes().items()))
        batch = self.batch_size, self.gradient_accumulation_steps
        return model, *batch, self.dtype, self.matmul_precision, self.corpus_sha256

    def difference(self, other: Work) -> str:
        """What this does that `other` does not: "batch_size=8, not 4"."""
        mine, theirs = ({**w.model_dump(exclude={"model"}), **w.sizes()} for w in (self, other))
        keys = [key for key in theirs if mine.get(key) != theirs[key] and not key.endswith("per_iter")]
        return ", ".join(f"{key}={mine.get(key)}, not {theirs[key]}" for key in keys)


class Machine(Record):
    """`name`: the GPU's where a variant ran on one, else the processor's."""

    name: str | None = None
    gpu_cores: Size | None = None
    memory_bytes: Count | None = None
    os: str | None = None
    simulated: bool = False


class RoundFigures(Record):
    """One round of a variant: a process's iterations."""

    round: Count
    median: Amount | None = None  # ms
    count: Count = 0
    started: str | None = None
    first_iter_s: Amount | None = None


class Series(Record):
    """A round's kept iterations, in step; of a long round each stretch's fastest and slowest."""

    round: Count
    iter: tuple[Count, ...]
    ms: tuple[Amount, ...]  # `iter_ms` in schema 1
    loss: tuple[Number | None, ...]
    seconds: tuple[Amount, ...]  # when each ended, since the first iteration of the round began


class Evaluated(Record):
    """One evaluation; `round` is None for the pilot run's."""

    round: Count | None = None
    iter: Count
    train_loss: Number | None = None
    val_loss: Number | None = None
    seconds: Amount | None = None


class Projection(Record):
    """What the full recipe would take, and how that is computed."""

    iters: Count
    evaluations: Count
    seconds: Amount
    formula: str


class EnergyFigures(Record):
    """`share`: of the metered time that was iterations; a low one makes the figure a guess."""

    joules_per_1000_tokens: Amount | None = None
    watts: Amount
    source: str | None = None
    share: Amount | None = None


class Roofline(Record):
    """The floor of an iteration by arithmetic, in ms; rates in FLOP/s and bytes/s."""

    floor_ms: Amount
    compute_ms: Amount | None = None
    memory_ms: Amount | None = None
    bound: str  # "compute" or "memory"
    flops: Amount
    bytes: Amount
    peak: Amount | None = None
    peak_source: str | None = None
    bandwidth: Amount | None = None
    bandwidth_source: str | None = None
    share: Amount | None = None  # floor over measured median


class RatioTo(Ratio):
    """A ratio of one variant's times to another's."""

    to: str  # that other's name


class FailedRun(Record):
    round: Count | None = None  # None: the pilot
    state: RunState
    reason: str | None = None


class Figures(Mfu):
    """What a variant's finished runs say; None where it is not known."""

    backend: str | None = None
    device: str | None = None
    capabilities: Capabilities | None = None
    compile: bool | None = None
    dtype: str | None = None
    sync: str | None = None
    shared_machine: bool = False  # other runs slowed it down: never ranked by speed
    details: dict[str, JsonValue] = {}
    times: Times | None = None  # over all rounds, ms; `iter_ms` in schema 1
    rounds: tuple[RoundFigures, ...] = ()
    left_out: dict[LeftOut, Count] = {}
    drift: Drift | None = None
    outliers: Outliers | None = None
    warnings: tuple[str, ...] = ()
    first_iter_s: Amount | None = None  # of the cold pilot run, or of the first round
    compile_s: Value | None = None  # the first iteration less the median: an estimate
    first_iter_warm_s: Amount | None = None
    compile_warm_s: Value | None = None
    eval_s: Amount | None = None
    first_eval_s: Amount | None = None
    eval_iters: Count | None = None
    peak_memory: Count | None = None
    tokens_per_s: Amount | None = None
    mfu_denominators: Denominators = Denominators()
    recipe: Projection | None = None
    energy: EnergyFigures | None = None
    roofline: Roofline | None = None
    series: tuple[Series, ...] = ()
    evaluations: tuple[Evaluated, ...] = ()
    world: WorldFacts | None = None  # of several processes

    @property
    def medians(self) -> dict[int, float]:
        """Round -> median ms of its kept iterations."""
        return {r.round: r.median for r in self.rounds if r.median}

    @property
    def median(self) -> float | None:
        """ms an iteration; None where nothing was timed."""
        return self.times.median if self.times and self.times.median else None

    @property
    def simulated(self) -> bool:
        return self.capabilities is not None and self.capabilities.simulated


class AgreementState(StrEnum):
    AGREE = "agree"
    WRONG = "wrong"
    IN_DOUBT = "in doubt"
    NOT_COMPARED = "not compared"  # no other variant computes the same


class Agreement(Record):
    """How the losses of a variant's rounds stand against those of the others."""

    state: AgreementState = AgreementState.NOT_COMPARED
    reason: str | None = None  # one line
    against: tuple[str, ...] = ()  # names
    iterations: Count = 0  # of a run, at most, that were compared
    share: Amount | None = None  # the largest difference over its limit


class VariantResult(Figures):
    """Everything known of one variant, made whole by one function and never changed."""

    name: str
    label: str
    note: str = ""  # what a short label leaves out
    overrides: tuple[str, ...] | None = None
    lever: Lever | None = None
    state: VariantState
    reason: str | None = None
    parity: ParityState = ParityState.NOT_RUN
    losses: Agreement = Agreement()
    runs: Count = 0  # that ended well and did the same work
    failed_runs: tuple[FailedRun, ...] = ()
    same_work: bool = True  # as the rest of its comparison
    ranked: bool = True
    ranks: Size = 1  # processes that trained together: of several it is never ranked
    alone: str | None = None
    ratio: RatioTo | None = None  # to the fastest
    fallbacks: dict[str, JsonValue] | None = None
    compile_report: dict[str, JsonValue] | None = None

    @property
    def harmless(self) -> bool:
        """Whether nothing speaks against its computing the right thing."""
        unchecked = self.parity in (ParityState.FAIL, ParityState.ERROR)
        return not unchecked and self.state not in (VariantState.WRONG, VariantState.IN_DOUBT)


class LeverRow(Record):
    """One switch against the same variant without it. worth_percent: time saved; below 0 it costs."""

    name: str
    base: str
    key: str
    value: JsonValue = None
    what: str
    ratio: RatioTo | None = None
    worth_percent: Value | None = None


class Verdict(Record):
    sentence: str
    fastest: str | None = None
    ties: tuple[str, ...] = ()


class PlanFacts(Record):
    rounds: Count | None = None
    iters: dict[str, Size] | None = None
    budget_minutes: Amount | None = None
    started: str | None = None
    finished: str | None = None


class Published(Record):
    """One published figure. `note`: what is unknown about it, or wrong with it."""

    source: str
    url: str
    date: str | None
    machine: str
    variant: str
    ms_per_iter: Amount
    note: str
    work: str
    published: bool = True


class Comparison(Document):
    """comparison.json."""

    SCHEMA: ClassVar[int] = 2

    created: str | None = None
    folder: str = ""
    version: str = ""
    complete: bool = True
    work: Work = Work()
    machine: Machine = Machine()
    environment: Environment | None = None
    plan: PlanFacts = PlanFacts()
    verdict: Verdict
    warnings: tuple[str, ...] = ()
    parity: Parity | None = None
    levers: tuple[LeverRow, ...] | None = None
    published: tuple[Published, ...] = ()
    explanation: Explanation | None = None
    variants: tuple[VariantResult, ...]

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        """Schema 1 said `ways` and `iter_ms` for variants, for a distribution and for a series."""
        variants = [_migrated(variant) for variant in document.pop("ways", document.get("variants"))]
        published = [{"variant": row.get("way")} | row for row in document.get("published") or []]
        parity = document.get("parity")
        return document | {
            "variants": variants,
            "published": published,
            "parity": parity and Parity.migrated(dict(parity), 1),
        }

    def named(self, name: str | None) -> VariantResult | None:
        return next((variant for variant in self.variants if variant.name == name), None)


class Contender(Record):
    """A variant that may be taken by default: it computes the right thing, and is ranked."""

    label: str
    backend: str
    compile: bool
    settings: dict[str, JsonValue] = {}  # of the back end, by name


class Remembered(Record):
    """What a comparison found, as later runs look it up. `versions`: of the frameworks, and of this program."""

    folder: str
    chip: str | None
    gpu: str | None
    gpu_cores: Size | None
    versions: dict[str, str | None]
    work: Work
    contenders: tuple[Contender, ...]  # the fastest first


class Comparisons(Document):
    """comparisons.json of the cache folder, the newest first."""

    found: tuple[Remembered, ...] = ()

    def with_one(self, one: Remembered, most: int = 50) -> Comparisons:
        others = tuple(other for other in self.found if other.folder != one.folder)
        return self.model_copy(update={"found": (one, *others)[:most]})


def _migrated(variant: dict[str, Any]) -> dict[str, Any]:
    series = [{"ms": part.get("iter_ms")} | part for part in variant.get("series") or []]
    return {"times": variant.get("iter_ms")} | variant | {"series": series, "details": variant.get("details") or {}}
