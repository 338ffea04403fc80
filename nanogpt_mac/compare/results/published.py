"""Times that others have published for nanoGPT's character recipe: facts to stand beside a user's own, never ranked.

None of these was measured by this project, none has passed its parity gate, and none says all that one needs to know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# nanoGPT's config/train_shakespeare_char.py off CUDA: what every row below says that it ran.
FULL_RECIPE = {
    "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "dropout": 0.2},
    "batch_size": 64,
    "gradient_accumulation_steps": 1,
    "dtype": "float32",
}
WORK = "nanoGPT shakespeare_char: 6 layers x 6 heads x 384, batch 64 x block 256, dropout 0.2, float32"

_STATE = "State of training on Metal"
_STATE_URL = "https://vglazer.github.io/training-on-metal"
_RB = "nanogpt-rb"
_RB_URL = "https://github.com/khasinski/nanogpt-rb"
_MACBOOK = "MacBook, chip not stated"


@dataclass(frozen=True)
class Row:
    """One published figure. `note`: what is unknown about it, or wrong with it."""

    source: str
    url: str
    date: str | None
    machine: str
    variant: str
    ms_per_iter: float
    note: str
    work: str = WORK


ROWS = (
    Row(
        _STATE,
        _STATE_URL,
        "2025-09",
        _MACBOOK,
        "MPS eager",
        221.0,
        "276 ms late in the run, cause not given; PyTorch nightly; 3589 s for the whole run, validation loss 1.7099; "
        "its MFU of 1.69 % is against an A100; one run, no spread",
    ),
    Row(
        _STATE,
        _STATE_URL,
        "2025-09",
        _MACBOOK,
        "MPS compiled",
        306.0,
        "330 ms late in the run; PyTorch nightly; first iteration 85 s; last evaluation 1256 s against 33 s eager, "
        "cause unknown; one run, no spread",
    ),
    Row(
        _STATE,
        _STATE_URL,
        "2025-09",
        _MACBOOK,
        "CPU",
        1986.0,
        "50 iterations only; threads and compilation not stated",
    ),
    Row(
        _RB,
        _RB_URL,
        None,
        "M1 Max",
        "MPS",
        500.0,
        "a Ruby port; rounded, no spread; date, versions and GPU cores not stated",
    ),
    Row(
        _RB,
        _RB_URL,
        None,
        "M1 Max",
        "CPU",
        8500.0,
        "a Ruby port; rounded, no spread; date, versions and threads not stated",
    ),
)


def beside(work: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that did the same work as `work` (comparison.json's), as dictionaries marked `published`; else none.

    The text does not count, only its 65 symbols: the stand-in's times are of the same work.
    """
    model = work.get("model") or {}
    same_model = all(model.get(key) == value for key, value in FULL_RECIPE["model"].items())  # type: ignore[attr-defined]
    same = same_model and all(work.get(key) == value for key, value in FULL_RECIPE.items() if key != "model")
    same = same and work.get("matmul_precision") in (None, "highest") and not model.get("bias")
    return [dataclasses.asdict(row) | {"published": True} for row in ROWS] if same else []
