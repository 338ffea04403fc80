"""The typed config of `bench.py` and its checks. Plain dataclasses: the command line is cli.py's business."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from nanogpt_mac.config import BackendConfig, Config, at_least, check_fields, one_of
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import path_field, text_field

SUITES = ("ops", "gemm", "mlp", "lm", "parts")

# Of train.py's keys those that every suite may read, then those that some do; others would be ignored in silence.
OF_TRAINING = (*("backend", "compile", "data", "experiment", "dtype", "seed", "run_dir", "data_dir", "path"),)
OF_SOME = {
    **dict.fromkeys(("model", "batch_size"), ("ops", "gemm", "parts")),
    **dict.fromkeys(("optim", "weight_decay", "beta1", "beta2", "grad_clip", "learning_rate"), ("parts",)),
    **dict.fromkeys(("gradient_accumulation_steps", "matmul_precision"), ("parts",)),
}
TIMES_ALONE = ("model", "batch_size", "rounds", "scale", "cache")  # of suite=ops: dtypes=true reads none of these


@dataclass
class OpsKeys:
    """Of suite=ops."""

    READ_BY: ClassVar[tuple[str, ...]] = ("ops",)

    scale: float = 1.0
    """Of the published sizes: 0.01 is for tests."""
    dtypes: bool = False
    """In place of times: which dtypes every operation takes, and what it makes of them."""
    cache: str = one_of("cold", "warm")
    """cold: inputs rotate past the last cache; warm: they stay the same."""


@dataclass
class NetKeys:
    """Of suite=mlp and suite=lm."""

    READ_BY: ClassVar[tuple[str, ...]] = ("mlp", "lm")

    epochs: int = at_least(1, 10)
    """Timed epochs of a run, of suite=lm as many times 20 iterations; `rounds` are its runs, by default 5."""
    placement: str = one_of("resident", "per_batch")
    """Where the data are: on the device, or on the host, from where each batch is brought."""
    sync: str = one_of("batch", "epoch")
    """When the host waits for the device."""


@dataclass
class MLPKeys:
    """Of suite=mlp."""

    READ_BY: ClassVar[tuple[str, ...]] = ("mlp",)

    mnist: str | None = path_field(None)
    """Folder with MNIST's four IDX files, .gz or not; null: under data.dir, downloaded where they are missing."""
    images: int = at_least(1000, 60_000, below=60_001)
    """Of the training images, the first so many: fewer are for tests."""


@dataclass
class LMKeys:
    """Of suite=lm."""

    READ_BY: ClassVar[tuple[str, ...]] = ("lm",)

    lm_size: str = one_of("auto", "small", "full")
    """full: 12 blocks, 1024 wide, context 1024; small: 2 blocks, 128 wide, context 128; auto: full where a GPU is."""


@dataclass
class BenchConfig(OpsKeys, NetKeys, MLPKeys, LMKeys, Config):
    """Everything that `python bench.py` can be told. The keys of one suite stand in a class of their own, as above.

    It inherits from `Config` because model, precision and back ends' settings are train.py's, and so is a recipe
    (experiment=quick).
    """

    backend: BackendConfig = field(default_factory=BackendConfig)
    """Its name narrows the ways to those of one back end; its settings go to each."""
    compile: Any = one_of("auto", True, False)
    """Narrows the ways to those that are compiled, or are not; auto: both."""
    run_dir: str = path_field("runs/{date}/{time}-{name}")
    """The folder of its report; {name} is bench-SUITE."""
    seed: int = at_least(0, 1337, below=2**63)
    """Of all numbers that are drawn, and of the order in which ways run."""
    given: list[str] = field(default_factory=list)
    """Filled in by cli.py: the overrides of the command line."""

    suite: str = one_of("ops", *SUITES[1:])
    """ops, gemm, mlp, lm or parts: docs/suites.md says what each measures."""
    ways: Any = None
    """[cpu,mlx-eager]; null: all that this machine has."""
    rows: str | None = text_field(None)
    """Only rows whose name has this in it; * stands for anything: "matmul*1000". A list: [relu,softmax]."""
    rounds: int | None = at_least(1, None)
    """Fresh processes of every row on every way; null: 2. Two and more give an interval."""
    budget_minutes: float = 30.0
    """Minutes that all of it may take; what does not fit is skipped and named."""


def validate(config: BenchConfig) -> None:
    """Raise InputError at the first value that cannot be meant; what depends on the machine is checked by the suite."""
    check_fields(config)
    own = OF_SOME | {f.name: vars(keys)["READ_BY"] for keys in _classes() for f in _own_fields(keys)}
    general = {f.name for f in _own_fields(BenchConfig)}
    for override in config.given:
        key = override.lstrip("+~").split("=")[0].split(".")[0]
        if key in own and config.suite not in own[key]:
            readers = " or ".join(f"suite={name}" for name in own[key])
            raise InputError(f"{override}: only read with {readers}; leave it out (here suite={config.suite})")
        if config.dtypes and key in TIMES_ALONE:
            raise InputError(f"{override}: not read with dtypes=true; leave it out")
        if key not in own and key not in general and key not in OF_TRAINING:
            raise InputError(f"{override}: bench.py trains nothing by this key; leave it out")
    if not 0 < config.scale <= 1:
        raise InputError(f"scale={config.scale:g}: use a number above 0, and at most 1")
    if not 0 < config.budget_minutes < math.inf:
        raise InputError(f"budget_minutes={config.budget_minutes:g}: use a number above 0")
    ways(config)


def training(config: BenchConfig) -> Config:
    """Its part that train.py reads. A key that a suite has for itself (`sync`) is train.py's default there."""
    taken = {f.name for keys in _classes() for f in _own_fields(keys)}
    return Config(**{f.name: getattr(config, f.name) for f in fields(Config) if f.name not in taken})


def _classes() -> list[Any]:
    return [keys for keys in BenchConfig.__mro__ if "READ_BY" in vars(keys)]


def _own_fields(keys: Any) -> list[Any]:
    return [f for f in fields(keys) if f.name in inspect.get_annotations(keys)]


def ways(config: BenchConfig) -> list[str] | None:
    """`ways` as a list of names; None where all are meant."""
    if config.ways is None:
        return None
    given = config.ways if isinstance(config.ways, list) else [config.ways]
    if not given or not all(isinstance(name, str) and name.split() for name in given):
        raise InputError(f"ways={config.ways}: use a list such as [cpu,mlx]")
    return list(dict.fromkeys(given))
