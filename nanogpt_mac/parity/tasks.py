"""What the parity gate and its child processes say to each other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from nanogpt_mac.config import Config
from nanogpt_mac.records.base import Record, plain
from nanogpt_mac.records.plan import CaseShape, Check


class Role(StrEnum):
    REFERENCE = "reference"
    VARIANT = "variant"


class Task(Record):
    """What a child is asked: to make the reference in `folder`, or to hold a variant against the one that lies there."""

    role: Role
    config: Config
    folder: Path

    def plain(self) -> Any:
        return plain(self.model_dump() | {"folder": str(self.folder)})


class Made(Record):
    """The answer of the child that made the reference: the shape of each case."""

    shape: dict[str, CaseShape]


class Checked(Record):
    """The answer of a child that held a variant against the reference."""

    device: str
    checks: tuple[Check, ...]  # the worst of all cases, one for each quantity


class Figures(Record):
    """What the reference knows of one case besides arrays."""

    losses: tuple[float, ...]  # of each optimizer step
    norms: tuple[float, ...]  # of each step's gradient before clipping
    grad_clip: float  # 0: not clipped
    val_loss: float
