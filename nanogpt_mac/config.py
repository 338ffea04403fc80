"""The typed config of `train.py` and `sample.py`, and every check that needs no data and no framework.

Plain dataclasses: the command line behind them is cli.py's business. Defaults are nanoGPT's shakespeare_char.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import DTYPES, MATMUL_PRECISIONS, BackendOptions
from nanogpt_mac.corpus import DataConfig
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import ModelConfig

SYNC_POLICIES = ("completion", "iteration", "interval")
FALLBACKS = ("report", "error", "off")
WANDB_MODES = ("offline", "online", "disabled")


@dataclass
class _BackendName:
    name: str = "auto"


if TYPE_CHECKING:

    @dataclass
    class BackendConfig(_BackendName):
        def __getattr__(self, key: str) -> Any: ...

else:  # `name` and every kind's own settings: a back end ignores those of others, so that a sweep can set them
    BackendConfig = make_dataclass(
        "BackendConfig",
        [(key, type_, field(default=default)) for key, (type_, default, _) in kinds.settings().items()],
        bases=(_BackendName,),
        namespace={"__module__": __name__},
    )


@dataclass
class WandbConfig:
    mode: str = "offline"
    project: str = "nanogpt-mac"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    """Everything that `python train.py` can be told. Names are nanoGPT's where nanoGPT has one."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    compile: Any = "auto"  # auto | true | false
    dtype: str = "float32"  # of the matrix products; weights, moments and loss stay float32
    matmul_precision: str = "highest"  # high and medium allow TF32 and the like
    seed: int = 1337

    init_from: str = "scratch"  # scratch | resume | gpt2* | a Hugging Face folder | a nanoGPT ckpt.pt
    run: str | None = None  # the run (or checkpoint) to resume
    run_dir: str = "runs/{date}/{time}-{name}"
    data_dir: str = "data"
    path: str | None = None  # short for data.path
    given: list[str] = field(default_factory=list)  # filled in by cli.py: the overrides of the command line

    max_iters: int = 5000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    decay_lr: bool = True
    warmup_iters: int = 100
    lr_decay_iters: int = 5000
    min_lr: float = 1e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0

    eval_interval: int = 250  # 0: never
    eval_iters: int = 200
    log_interval: int = 10
    checkpoint: bool = True  # `last` and `best`, at every evaluation and at the end

    sync: str = "completion"  # when the host waits: completion (one iteration behind), iteration, interval
    timing_warmup: int = 5  # iterations after the first that enter no statistic
    gemm_seconds: float = 1.0  # spent on measuring this back end's matmul peak, for mfu_measured; 0: not measured
    sample_tokens: int = 300  # text drawn at the end of a run; 0: none
    fallbacks: str = "report"  # report | error | off: MPS alone, what leaves the GPU, looked for before training


@dataclass
class SampleConfig:
    """Everything that `python sample.py` can be told."""

    run: str = "???"
    checkpoint: str = "last"  # last | best
    backend: BackendConfig = field(default_factory=BackendConfig)
    dtype: str = "float32"
    matmul_precision: str = "highest"
    data_dir: str = "data"
    prompt: str = "\n"  # FILE:path reads a file, as nanoGPT does
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = 200
    seed: int = 1337


def _one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value == a and type(value) is type(a) for a in allowed):  # 1 is not true
        names = ", ".join(_as_typed(a) for a in allowed)
        raise InputError(f"{key}={_as_typed(value)}: allowed are {names}")


def _as_typed(value: Any) -> str:
    """A value as the command line spells it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _at_least(config: Any, low: float, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if not value >= low:  # false for nan too
            raise InputError(f"{key}={value}: must be at least {low}")


def _seed(config: Config | SampleConfig) -> None:
    if not 0 <= config.seed < 2**63:
        raise InputError(f"seed={config.seed}: allowed are whole numbers from 0 to 2**63 - 1")


def _check_backend(config: Config | SampleConfig) -> None:
    _one_of("backend", config.backend.name, ("auto", *kinds.KINDS))
    for key, (_, _, allowed) in kinds.settings().items():
        if allowed:
            _one_of(f"backend.{key}", getattr(config.backend, key), allowed)
    _one_of("dtype", config.dtype, DTYPES)
    _one_of("matmul_precision", config.matmul_precision, MATMUL_PRECISIONS)


def validate(config: Config) -> None:
    """Raise InputError at the first value that cannot be meant."""
    _check_backend(config)
    _one_of("compile", config.compile, ("auto", True, False))
    _one_of("sync", config.sync, SYNC_POLICIES)
    _one_of("wandb.mode", config.wandb.mode, WANDB_MODES)
    _one_of("fallbacks", config.fallbacks, FALLBACKS)
    _at_least(config, 1, "max_iters", "batch_size", "gradient_accumulation_steps", "eval_iters", "log_interval")
    _seed(config)
    _at_least(config, 0, "warmup_iters", "eval_interval", "timing_warmup", "sample_tokens")
    _at_least(config, 0.0, "learning_rate", "min_lr", "weight_decay", "grad_clip", "gemm_seconds")
    for key in ("beta1", "beta2"):
        if not 0.0 <= getattr(config, key) < 1.0:
            raise InputError(f"{key}={getattr(config, key)}: allowed are values from 0 up to, not including, 1")
    if config.decay_lr and config.lr_decay_iters <= config.warmup_iters:
        raise InputError(
            f"lr_decay_iters={config.lr_decay_iters}: must be more than warmup_iters={config.warmup_iters}"
        )
    if config.init_from == "resume" and config.run is None:
        raise InputError("run=null: init_from=resume needs the run to go on from (run=runs/DATE/TIME-NAME)")
    if config.init_from != "resume" and config.run is not None:
        raise InputError(f"run={config.run}: only init_from=resume takes a run (here init_from={config.init_from})")


def validate_sample(config: SampleConfig) -> None:
    """As `validate`, for sample.py."""
    _check_backend(config)
    _one_of("checkpoint", config.checkpoint, ("last", "best"))
    _at_least(config, 1, "num_samples", "max_new_tokens")
    _seed(config)
    _at_least(config, 0, "temperature")
    if config.top_k is not None:
        _at_least(config, 1, "top_k")


def backend_options(config: Config | SampleConfig, name: str, compiled: bool = False) -> BackendOptions:
    """What back end `name` is told of `config`; of sampling, which trains nothing, the recipe's defaults."""
    recipe = config if isinstance(config, Config) else Config()
    return BackendOptions(
        name,
        compile=compiled,
        dtype=config.dtype,
        matmul_precision=config.matmul_precision,
        seed=config.seed,
        weight_decay=recipe.weight_decay,
        beta1=recipe.beta1,
        beta2=recipe.beta2,
        grad_clip=recipe.grad_clip,
        settings=kinds.own_settings(name, asdict(config.backend)),
    )
