"""plan.json of a comparison, and parity.json of its gate."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from nanogpt_mac.overrides import QUOTED, unquoted
from nanogpt_mac.records.base import Amount, Count, Document, Number, Record, Size


class Lever(Record):
    """One setting changed against a base variant."""

    base: str  # a variant's name
    key: str
    value: Any
    what: str


class Variant(Record):
    """One configuration of train.py that is compared: overrides under a name of its own."""

    name: Annotated[str, Field(min_length=1)]  # unique, fit for a file name
    label: str  # short, for tables: "MLX compiled"
    note: str = ""  # the rest of it, for a page: "CPU, torch's BLAS"
    overrides: tuple[str, ...] = ()
    config: dict[str, Any] | None = None  # what they and the plan's were composed to; None: an older plan
    lever: Lever | None = None
    script: str | None = None  # in train.py's place: a peer's
    ranks: Size = 1  # processes that train together
    alone: str | None = None  # of several: the name of the same in one process


class Asked(Record):
    rounds: Size | None = None
    iters: Size | None = None


class Recipe(Record):
    """How long a run, or the full recipe, trains and evaluates. None: not recorded."""

    model_config = ConfigDict(from_attributes=True)

    max_iters: Count | None = None
    eval_interval: Count | None = None
    eval_iters: Count | None = None


class GateOptions(Record):
    parity: bool = True
    time_wrong: bool = False


class Cut(Record):
    """Rounds that were planned and dropped."""

    rounds: Count
    reason: str


class Measurement(Document):
    """What is measured in rounds, and for how long. `rounds` to `expected_seconds` are None before the pilot runs."""

    rounds: Count | None = None
    iters: dict[str, Size] | None = None  # of one run, by name
    warmup: dict[str, Count] | None = None  # iterations after the first that are not counted
    share: dict[str, Amount] | None = None  # of the rounds, 0..1, that each takes part in
    order: tuple[tuple[int, str], ...] | None = None  # (round, name)
    expected_seconds: Amount | None = None
    cut: Cut | None = None
    asked: Asked
    seed: int
    budget_minutes: Amount
    cooldown_seconds: Amount = 0.0
    heat_wait_seconds: Amount = 0.0
    stall_seconds: Amount

    @model_validator(mode="after")
    def _decided_as_a_whole(self) -> Self:
        for number, name in self.order or ():
            if self.rounds is None or number < 0:
                raise ValueError(f"order has round {number} of rounds={self.rounds}")
            if any(name not in (part or {}) for part in (self.iters, self.warmup, self.share)):
                raise ValueError(f"iters, warmup or share lacks {name!r}")
        return self


class Plan(Measurement):
    """plan.json: what a comparison does."""

    SCHEMA: ClassVar[int] = 3

    version: str = ""
    created: str | None = None
    variants: tuple[Variant, ...]
    overrides: tuple[str, ...]
    experiment: str | None = None
    quick_by_default: bool = False
    recipe: Recipe | None = None
    levers: bool = False
    explain: bool = False
    gate: GateOptions
    missing: dict[str, str] = {}  # back end -> why it cannot run here
    cwd: str

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        if schema < 2:
            document["variants"] = document.pop("ways", document.get("variants"))
        quoted = re.compile(rf"([^=]*=)({QUOTED})", re.DOTALL)  # a text, which was then kept in Hydra's grammar
        whole = [(each, quoted.fullmatch(str(each))) for each in document["overrides"]]
        document["overrides"] = [match[1] + unquoted(match[2]) if match else each for each, match in whole]
        return document

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError("variants must have names of their own, and at least one is needed")
        for _, name in self.order or ():
            if name not in names:
                raise ValueError(f"order names {name!r}, which is not a variant")
        return self


class ParityState(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    NOT_RUN = "not run"


class Check(Record):
    """One quantity of one variant against the reference: the worst `value` over all cases against its `limit`."""

    model_config = ConfigDict(populate_by_name=True)

    quantity: str
    value: Number
    limit: float
    worst: str  # tensor or element that it is of
    passed: Annotated[bool, Field(alias="pass")]


class ParityResult(Record):
    """How one variant's check ended; `reason` is one line where it did not pass."""

    state: ParityState
    reason: str | None = None
    device: str | None = None
    seconds: Amount = 0.0
    checks: tuple[Check, ...] = ()
    deterministic: bool | None = None  # whether one step, done twice, gave the same bits; None: not asked
    varies: str | None = None  # what did not


class CaseShape(Record):
    batch: Size
    block_size: Size
    accumulation: Size
    windows: Size | None = None  # of a batch that differ; the other rows repeat them


class Tolerance(Record):
    dtype: str
    quantity: str
    limit: float
    reason: str


class Parity(Document):
    """parity.json."""

    SCHEMA: ClassVar[int] = 2

    reference: str = ""
    shape: dict[str, CaseShape] | None = None  # by case
    unchecked: tuple[str, ...] = ()  # what a run computes and no case does
    seconds: Amount
    tolerances: tuple[Tolerance, ...] = ()
    variants: dict[str, ParityResult]

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        document["variants"] = document.pop("ways", document.get("variants"))
        return document


class Spent(Document):
    """What every document of a check before the timing says: how long it took."""

    seconds: Amount = 0.0
