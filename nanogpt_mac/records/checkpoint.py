"""state.json of a checkpoint: everything but the tensors."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from nanogpt_mac.records.base import Count, Document, Number, Record
from nanogpt_mac.records.run import ModelFacts


class Spec(ModelFacts):
    """The model's sizes. `gelu` is exact or tanh."""

    model_config = ConfigDict(strict=True)

    gelu: str = "exact"


class CorpusLabel(Record):
    """What the model was trained on."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    label: str | None = None
    sha256: str | None = None


class CheckpointState(Document):
    """`config` is the run's own; `encoder` what `corpus.encoders.encoder_from_json` takes."""

    model_config = ConfigDict(strict=True)

    spec: Spec
    config: dict[str, object]
    corpus: CorpusLabel
    encoder: dict[str, object]
    best_val_loss: Number | None = None
    written_by: dict[str, object] = {}
    cwd: str | None = None  # what the config's relative paths start from; None: written by 0.1
    iteration: Count
    optimizer_steps: Count
    loss_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    scale_growth: Count
    sha256: dict[str, str]  # of each file of tensors
