"""The typed config of `compare.py` and its checks. Plain dataclass: the command line is cli.py's business."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nanogpt_mac.config import BackendConfig, Config, at_least, check_fields, one_of
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import path_field

BUDGET_MINUTES = 9.0  # ten, less what a slower or busier machine adds
FEW, LEVER_MINUTES = 4, 2.0  # more for each variant of levers=true beyond the first few

# Keys of train.py that a comparison decides itself for each of its runs, and what takes their place.
DECIDED = {
    "max_iters": "use iters=N, of each run",
    "eval_interval": "it evaluates in its first round",
    "checkpoint": "it keeps none",
    "sample_tokens": "it draws none",
    "fallbacks": "it looks for them apart, before any timing",
    "wandb": "its runs are written to its folder alone",
    "logger": "its runs are written to its folder alone",
    "objective": "it is of a sweep of train.py",
}


@dataclass
class CompareConfig(Config):
    """Everything that `python compare.py` can be told: keys of its own, and those of train.py for every run.

    It inherits rather than holds a `Config`, because its command line takes train.py's keys as they are
    (`dtype=bfloat16`, not `work.dtype=bfloat16`). Six of them mean something else here and are written down anew.
    """

    backend: BackendConfig = field(default_factory=BackendConfig)
    """Its name narrows the variants to those of one back end; its settings go to every run."""
    compile: Any = one_of("auto", True, False)
    """Narrows the variants to those that are compiled, or are not; auto: both."""
    run: str | None = path_field(None)
    """The comparison to go on with, as it was planned."""
    run_dir: str = path_field("runs/{date}/{time}-{name}")
    """The folder of a new comparison."""
    seed: int = at_least(0, 1337, below=2**63)
    """Of every run, and of the order in which variants run."""
    given: list[str] = field(default_factory=list)
    """Filled in by cli.py: the command line's overrides word for word, not their keys alone."""

    variants: Any = None
    """[cpu,mlx] or ["cpu", "cpu backend.fused_adamw=false"]; null: all that this machine has."""
    levers: bool = False
    """On every back end, one setting changed at a time."""
    explain: bool = False
    """After the rounds, measure the model's parts in each variant, and say what the slower ones take longer in."""
    ranks: Any = None
    """[2,4]: every variant once more by so many processes of this machine, in a table of their own."""
    rounds: int | None = at_least(1, None)
    """Processes of each variant; null: what the budget allows."""
    iters: int | None = at_least(1, None)
    """Iterations of each run; null: what the budget allows."""
    budget_minutes: float | None = None
    """Minutes that all of it may take; null: 9, more with levers=true."""
    parity: bool = True
    """First check that the variants compute the same."""
    time_wrong: bool = False
    """Time variants that do not, marked WRONG."""
    cooldown_seconds: float = at_least(0, 1.0, below=math.inf)
    """Seconds before every run."""
    heat_wait_seconds: float = at_least(0, 60.0, below=math.inf)
    """Seconds, at most, before a run on a Mac that says it is hot."""
    stall_seconds: float = at_least(1, 600.0, below=math.inf)
    """Seconds: a first iteration (which compiles) that takes longer is a hang."""
    chip: Any = None
    """m4-max, [m1,m4-max-32] or all: the least an iteration can take there, by arithmetic; nothing is run."""


@dataclass
class ReportConfig:
    """What `python report.py runs/a runs/b output=folder` takes; bare paths become `runs`."""

    runs: list[str] = path_field(list)  # folders of compare.py and train.py
    output: str | None = path_field(None)  # null: a comparison's own folder, for several runs/{date}/{time}-report
    details: bool = False  # true: the whole report in the terminal, not its verdict and one table


def validate(config: CompareConfig) -> None:
    """Raise InputError at the first value that cannot be meant; what depends on a variant is checked with it."""
    named = {override.lstrip("+~").split("=")[0]: override for override in config.given}
    for key, override in named.items():
        if key.split(".")[0] in DECIDED:
            raise InputError(f"{override}: a comparison decides this itself: {DECIDED[key.split('.')[0]]}")
    if config.run is not None:
        others = [override for key, override in named.items() if key != "run"]
        if others:
            raise InputError(f"{others[0]}: run={config.run} goes on as it was planned; use run= alone")
    if config.init_from == "resume":
        raise InputError(
            "init_from=resume: a comparison starts its runs from the same weights; run=... goes on with one"
        )
    if config.levers and config.variants is not None:
        raise InputError(f"variants={config.variants}: levers=true chooses its own; use backend=NAME to narrow them")
    if config.levers and config.compile != "auto":
        raise InputError(
            f"compile={str(config.compile).lower()}: levers=true tries both; use backend=NAME to narrow them"
        )
    if config.chip is not None and not chips(config):
        raise InputError(f"chip={config.chip}: use a name such as m4-max, a list of names, or all")
    if config.time_wrong and not config.parity:
        raise InputError("time_wrong=true: parity=false does not look for variants that are wrong; use one of the two")
    check_fields(config)
    sizes(config)
    fewest = max(config.timing_warmup, 1) + 3  # the second is not counted either: it finds a GPU's queue empty
    if config.iters is not None and config.iters < fewest:
        raise InputError(
            f"iters={config.iters}: must be at least {fewest}: the first, timing_warmup={config.timing_warmup} more "
            "(or one) and the last are not counted"
        )
    if config.budget_minutes is not None and not 0 < config.budget_minutes < math.inf:
        raise InputError(f"budget_minutes={config.budget_minutes}: must be more than 0")


def chips(config: CompareConfig) -> list[str]:
    """The chips of `chip=`, if any."""
    return [str(name) for name in (config.chip if isinstance(config.chip, list) else [config.chip]) if name is not None]


def sizes(config: CompareConfig) -> list[int]:
    """The numbers of processes of `ranks=`, of several, each once."""
    given = config.ranks if isinstance(config.ranks, list) else [] if config.ranks is None else [config.ranks]
    if any(type(size) is not int or size < 1 for size in given):
        raise InputError(f"ranks={config.ranks}: use a number of processes, or a list such as [2,4]")
    shared = config.gradient_accumulation_steps
    for size in given:
        if shared % size:
            raise InputError(
                f"ranks={config.ranks}: {size} processes cannot share gradient_accumulation_steps={shared}; use a "
                f"multiple of {size}"
            )
    return [size for size in dict.fromkeys(given) if size > 1]


def entries(variants: Any) -> list[str] | None:
    """`variants` as a list of texts; None where all are meant."""
    if variants is None:
        return None
    given = variants if isinstance(variants, list) else [variants]
    if not given or not all(isinstance(entry, str) and entry.split() for entry in given):
        raise InputError(f"variants={variants}: use a list such as [cpu,mlx]")
    return list(given)
