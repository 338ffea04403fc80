"""The compile report: what torch.compile made of a model for MPS, and what its iterations then do.

Plain dataclasses, since the fallback detector's child makes one where only torch and numpy are installed; the parent
validates it. A figure that this torch does not give is None, with a line under `unknown`. `bytes` are the sizes of all
arguments, `line` and `lines` are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    UNKNOWN = "unknown"  # this torch does not show what the rule looks at
    ABSENT = "absent"
    SUSPECT = "suspect"
    CONFIRMED = "confirmed"


@dataclass
class Graph:
    name: str
    kernels: int  # in its generated module
    runs: dict[str, int]  # in one iteration of each phase


@dataclass
class GraphBreak:
    reason: str
    line: str | None
    count: int


@dataclass
class Recompilation:
    """One of a function that had been compiled before. `reason` is the guard that failed."""

    function: str | None
    line: str
    reason: str
    phase: str | None
    expected: bool  # evaluation's own: without gradients it is another graph


@dataclass
class Compilation:
    function: str | None  # torch does not name every backward
    backward: bool
    phase: str | None
    seconds: float


@dataclass
class Compilations:
    """`shader_seconds` are those inside `torch.mps.compile_shader`; None in a dry run."""

    seconds: float
    shader_seconds: float | None
    compilations: list[Compilation]


@dataclass
class CacheCounts:
    hits: int
    misses: int
    bypasses: int


Caches = dict[str, CacheCounts | None]


@dataclass
class Alike:
    """All calls of one iteration that are alike. `ms_each` is a call's own time, where it was measured."""

    name: str
    graph: str | None
    count: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    bytes: int
    lines: list[str]
    ms_each: float | None


@dataclass
class Kernel(Alike):
    """Metal launches. `threads` and `group` as launched; torch chooses a group that is None."""

    kind: str  # pointwise or reduction
    does: list[str]
    threads: tuple[int, ...]
    group: tuple[int, ...] | None


@dataclass
class Operator(Alike):
    """Calls of an extern kernel or an ATen operator, each of so many matrix products."""

    products: int


@dataclass
class Iteration:
    """One marked iteration, by what it did."""

    ms: float | None
    compilations: int | None  # 0 when it is steady
    launches: int | None
    pointwise: int | None
    reduction: int | None
    metal_bytes: int | None
    kernels: list[Kernel] | None
    externs: list[Operator] | None
    extern_bytes: int | None
    aten: Sequence[Operator] | None
    aten_bytes: int | None
    matrix_products: int | None
    buffers: int | None


@dataclass
class Judged:
    """A suspect against a training iteration: how many `count` calls show it, and the `ms` that a Mac's clock gave."""

    name: str
    status: Status
    claim: str
    versions: str
    evidence: str
    count: int
    ms: float | None
    commands: tuple[str, ...]


@dataclass
class CompileReport:
    schema: int
    torch: str
    device: str
    executed: bool
    dynamo_graphs: int | None
    graphs: list[Graph] | None
    graph_breaks: list[GraphBreak] | None
    recompilations: list[Recompilation] | None
    compile: Compilations | None
    cache: Caches | None
    kernels_generated: int | None
    iterations: Mapping[str, Iteration]
    suspects: list[Judged]
    unknown: list[str]
