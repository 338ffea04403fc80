"""The typed config of `report.py`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ReportConfig:
    """What `python report.py runs/a runs/b output=folder` can be told; bare paths become `runs`."""

    runs: list[str] = field(default_factory=list)  # folders of compare.py and train.py
    output: str | None = None  # null: a comparison's own folder, for several runs/{date}/{time}-report
