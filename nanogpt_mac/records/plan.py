"""plan.json of a comparison, and parity.json of its gate."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

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
    lever: Lever | None = None
    script: str | None = None  # in train.py's place: a peer's


class Asked(Record):
    rounds: Size | None = None
    iters: Size | None = None


class Recipe(Record):
    """How long the full recipe trains and evaluates."""

    max_iters: Count
    eval_interval: Count
    eval_iters: Count


class GateOptions(Record):
    parity: bool = True
    time_wrong: bool = False


class Cut(Record):
    """Rounds that were planned and dropped."""

    rounds: Count
    reason: str


class Plan(Document):
    """What a comparison does. `rounds` to `expected_seconds` are decided after the pilot runs, None before."""

    SCHEMA: ClassVar[int] = 2

    version: str = ""
    created: str | None = None
    variants: tuple[Variant, ...]
    rounds: Count | None = None
    iters: dict[str, Size] | None = None
    warmup: dict[str, Count] | None = None
    share: dict[str, Amount] | None = None
    order: tuple[tuple[int, str], ...] | None = None  # (round, variant)
    expected_seconds: Amount | None = None
    cut: Cut | None = None
    asked: Asked = Asked()
    overrides: tuple[str, ...] = ()
    experiment: str | None = None
    quick_by_default: bool = False
    recipe: Recipe | None = None
    seed: int = 1337
    budget_minutes: Amount
    levers: bool = False
    gate: GateOptions = GateOptions()
    cooldown_seconds: Amount = 0.0
    heat_wait_seconds: Amount = 0.0
    stall_seconds: Amount
    missing: dict[str, str] = {}
    cwd: str

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        document["variants"] = document.pop("ways", document.get("variants"))
        return document

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError("variants must have names of their own, and at least one is needed")
        for _, name in self.order or ():
            if name not in names:
                raise ValueError(f"order names {name!r}, which is not a variant")
            if any(name not in (part or {}) for part in (self.iters, self.warmup)):
                raise ValueError(f"iters or warmup lacks {name!r}")
        return self


class ParityState(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"
    NOT_RUN = "not run"


class Check(Record):
    """One quantity of one variant against the reference: the worst `value` over all cases against its `limit`."""

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


class Tolerance(Record):
    dtype: str
    quantity: str
    limit: float
    reason: str


class Parity(Document):
    """parity.json."""

    SCHEMA: ClassVar[int] = 2

    reference: str = ""
    shape: dict[str, Any] | None = None
    seconds: Amount
    tolerances: tuple[Tolerance, ...] = ()
    variants: dict[str, ParityResult]

    @classmethod
    def migrated(cls, document: dict[str, Any], schema: int) -> dict[str, Any]:
        document["variants"] = document.pop("ways", document.get("variants"))
        return document
