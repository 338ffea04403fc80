"""What `check` asks of its child, and the report that it makes of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanogpt_mac.files import plain
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.records.compiled import Caches, Compilations, CompileReport, Iteration, Operator


@dataclass
class Task:
    model: ModelConfig
    dtype: str
    batch_size: int
    execute: bool | None = None  # by default on a Mac only


@dataclass
class PlacedOperator(Operator):
    """`kind` is how MPS has it, in table.Kind's words; None where the operator table does not have it."""

    kind: str | None = None


@dataclass
class CheckedIteration(Iteration):
    aten: Sequence[PlacedOperator] | None


@dataclass
class Warm:
    """What a second process, with the first one's cache, spent on compiling."""

    compile: Compilations | None
    cache: Caches | None


@dataclass(kw_only=True)
class CheckedReport(CompileReport):
    label: str  # live on a Mac, otherwise dry run
    model: ModelConfig
    dtype: str
    batch_size: int
    iterations: Mapping[str, CheckedIteration]
    warm: Warm | None = None

    def document(self) -> dict[str, Any]:
        """As it is written: JSON's own types."""
        made: dict[str, Any] = plain(asdict(self))
        return made
