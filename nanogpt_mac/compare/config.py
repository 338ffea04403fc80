"""The typed config of `compare.py` and its checks. Plain dataclass: the command line is cli.py's business."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError

BUDGET_MINUTES = 9.0  # ten, less what a slower or busier machine adds
LEVER_MINUTES = 2.0  # more for each variant of levers=true beyond the first four

# Keys of train.py that a comparison decides itself for each of its runs, and what takes their place.
DECIDED = {
    "max_iters": "allowed is iters=N, of each run",
    "eval_interval": "it evaluates in its first round",
    "checkpoint": "it keeps none",
    "sample_tokens": "it draws none",
    "fallbacks": "it looks for them apart, before any timing",
    "wandb": "its runs are written to its folder alone",
    "logger": "its runs are written to its folder alone",
}


@dataclass
class CompareConfig(Config):
    """Everything that `python compare.py` can be told: its own keys, and those of train.py for every run.

    `backend` and `compile` narrow the variants. `run` is the comparison to go on with, `run_dir` where a new one goes,
    `seed` also that of the order, and `given`, filled in by cli.py, what the command line said, word for word.
    """

    variants: Any = None  # null: all that this machine has; [cpu,mlx]; ["cpu", "cpu backend.fused_adamw=false"]
    levers: bool = False  # on every back end, one setting changed at a time
    rounds: int | None = None  # null: what the budget allows; so with iters
    iters: int | None = None  # of each run
    budget_minutes: float | None = None  # null: 9, more with levers=true
    parity: bool = True  # first check that the variants compute the same
    time_wrong: bool = False  # time variants that do not, marked WRONG
    cooldown_seconds: float = 1.0  # before every run
    heat_wait_seconds: float = 60.0  # at most, before a run on a Mac that says it is hot
    stall_seconds: float = 600.0  # a first iteration (which compiles) of more than this is a hang
    chip: Any = None  # m4-max, [m1,m4-max-32] or all: the floor of an iteration there, by arithmetic; nothing is run
    run_dir: str = "runs/{date}/{time}-{name}"


@dataclass
class ReportConfig:
    """What `python report.py runs/a runs/b output=folder` takes; bare paths become `runs`."""

    runs: list[str] = field(default_factory=list)  # folders of compare.py and train.py
    output: str | None = None  # null: a comparison's own folder, for several runs/{date}/{time}-report
    details: bool = False  # true: the whole report in the terminal, not its verdict and one table


def validate(config: CompareConfig) -> None:
    """Raise InputError at the first value that cannot be meant; train.py's own keys are checked variant by variant."""
    named = {override.lstrip("+~").split("=")[0]: override for override in config.given}
    for key, override in named.items():
        if key.split(".")[0] in DECIDED:
            raise InputError(f"{override}: a comparison decides this itself: {DECIDED[key.split('.')[0]]}")
    if config.run is not None:
        others = [override for key, override in named.items() if key != "run"]
        if others:
            raise InputError(f"{others[0]}: run={config.run} goes on as it was planned; allowed is run alone")
    if config.init_from == "resume":
        raise InputError(
            "init_from=resume: a comparison starts its runs from the same weights; run=... goes on with one"
        )
    if config.levers and config.variants is not None:
        raise InputError(f"variants={config.variants}: levers=true chooses its own; allowed beside it is backend=NAME")
    if config.levers and config.compile != "auto":
        raise InputError(
            f"compile={str(config.compile).lower()}: levers=true tries both; allowed beside it is backend=NAME"
        )
    if config.chip is not None and not chips(config):
        raise InputError(f"chip={config.chip}: allowed is a name such as m4-max, a list of names, or all")
    if config.time_wrong and not config.parity:
        raise InputError(
            "time_wrong=true: parity=false does not look for variants that are wrong; allowed is one of them"
        )
    for key in ("rounds", "iters"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise InputError(f"{key}={value}: must be at least 1")
    fewest = max(config.timing_warmup, 1) + 3  # the second is not counted either: it finds a GPU's queue empty
    if config.iters is not None and config.iters < fewest:
        raise InputError(
            f"iters={config.iters}: must be at least {fewest}: the first, timing_warmup={config.timing_warmup} more "
            "(or one) and the last are not counted"
        )
    if config.budget_minutes is not None and not 0 < config.budget_minutes < math.inf:
        raise InputError(f"budget_minutes={config.budget_minutes}: must be more than 0")
    for key in ("cooldown_seconds", "heat_wait_seconds"):
        if not 0 <= getattr(config, key) < math.inf:
            raise InputError(f"{key}={getattr(config, key)}: must be at least 0")
    if not 1 <= config.stall_seconds < math.inf:
        raise InputError(f"stall_seconds={config.stall_seconds}: must be at least 1")


def chips(config: CompareConfig) -> list[str]:
    """The chips of `chip=`, if any."""
    return [str(name) for name in (config.chip if isinstance(config.chip, list) else [config.chip]) if name is not None]


def entries(variants: Any) -> list[str] | None:
    """`variants` as a list of texts; None where all are meant."""
    if variants is None:
        return None
    given = variants if isinstance(variants, list) else [variants]
    if not given or not all(isinstance(entry, str) and entry.split() for entry in given):
        raise InputError(f"variants={variants}: allowed is a list such as [cpu,mlx]")
    return list(given)
