"""What was predicted off a Mac of the MPS device: the files in coverage/predictions/."""

from __future__ import annotations

from nanogpt_mac.records.base import Count, Document, Record


class Asked(Record):
    """The work that was looked at; a prediction holds for the same alone."""

    model: dict[str, bool | int | float | str | None]
    dtype: str
    batch_size: int


class Observed(Record):
    """What a device does, part by part; None for a part that could not be had."""

    torch: str = ""
    device: str | None = None
    phases: dict[str, dict[str, Count]] | None = None  # phase to operator to calls
    waits: dict[str, Count] | None = None  # phase to waits of the host
    errors: dict[str, str | None] | None = None  # operator to the text of its error
    warnings: dict[str, str | None] | None = None
    findings: dict[str, Count] | None = None  # "operator, kind, phase" of the fallback detector
    compiled: dict[str, dict[str, Count | None]] | None = None  # figures of the compile report


class Prediction(Document, Observed):
    """predictions/RELEASE.json."""

    release: str
    asked: Asked
