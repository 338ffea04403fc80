"""The typed config of `train.py` and `sample.py`, and every check that needs no data and no framework.

Plain dataclasses: the command line behind them is cli.py's business. What a value may be stands beside its default;
rules about several keys are in `validate`. Defaults are nanoGPT's shakespeare_char.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import DTYPES, MATMUL_PRECISIONS, BackendOptions
from nanogpt_mac.corpus import DataConfig, vocab_size
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import write
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.overrides import key_of, path_field, text_field

MOST_SEED = 2**63
WANDB_MODES = ("offline", "online", "disabled")

# -- what a value may be ----------------------------------------------------------------------------------------------


def one_of(default: Any, *others: Any) -> Any:
    """A field with few values."""
    return field(default=default, metadata={"allowed": (default, *others)})


def at_least(low: float, default: float | None, below: float | None = None) -> Any:
    """A field with a number from `low` up to, not including, `below`."""
    return field(default=default, metadata={"low": low, "below": below})


def check_fields(config: Any, prefix: str = "") -> None:
    """Hold every field of a dataclass, and of those in it, against what stands beside it. A null is always allowed.

    InputError at the first that does not fit.
    """
    for each in dataclasses.fields(config):
        key, value, rule = prefix + each.name, getattr(config, each.name), each.metadata
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{key}.")
        if "allowed" in rule and not (value is None and each.default is None):
            check_one_of(key, value, rule["allowed"])
        if "low" in rule and value is not None:
            low, below = rule["low"], rule["below"]
            if not (low <= value and (below is None or value < below)):  # true for nan
                limit = "" if below is None else " and finite" if below == math.inf else f" and below {spelt(below)}"
                raise InputError(f"{key}={spelt(value)}: must be at least {spelt(low)}{limit}")


def check_one_of(key: str, value: Any, allowed: Sequence[Any]) -> None:
    if not any(value == a and type(value) is type(a) for a in allowed):  # 1 is not true
        *most, last = map(spelt, allowed)
        raise InputError(f"{key}={spelt(value)}: use {', '.join(most)} or {last}")


def spelt(value: Any) -> str:
    """A value as the command line spells it."""
    if value == MOST_SEED:
        return "2**63"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


# -- train.py ---------------------------------------------------------------------------------------------------------


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
    """A null or an empty list stands for what wandb's own variables say (WANDB_MODE, WANDB_PROJECT, ...)."""

    mode: str | None = field(default=None, metadata={"allowed": WANDB_MODES})
    """offline (without a variable) keeps everything in the run's folder, for `wandb sync`; online needs an account."""
    project: str | None = text_field(None)
    """Without a variable: nanogpt-mac."""
    entity: str | None = text_field(None)
    """The account or team; null: wandb's own default."""
    group: str | None = text_field(None)
    """Runs of one group are shown together."""
    name: str | None = text_field(None)
    """Of the run; without a variable: its folder's name."""
    tags: list[str] = text_field(list)
    """Beside the back end and the corpus, which every run has."""

    def mode_here(self, environment: Mapping[str, str] = os.environ) -> str:
        """The mode that the key, the environment or our default give, in this order. InputError for another one."""
        if self.mode is not None:
            return self.mode
        if environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
            return "disabled"
        given = environment.get("WANDB_MODE") or WANDB_MODES[0]
        mode = {"dryrun": "offline", "run": "online"}.get(given.lower(), given.lower())
        check_one_of("WANDB_MODE", mode if mode in WANDB_MODES else given, WANDB_MODES)
        return mode


@dataclass
class Config:
    """Everything that `python train.py` can be told. Names are nanoGPT's where nanoGPT has one."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    compile: Any = one_of("auto", True, False)
    """Compile the training step; auto: as a comparison here found faster, else on MLX and CUDA."""
    dtype: str = one_of(*DTYPES)
    """Of the matrix products; weights, moments and loss stay float32."""
    matmul_precision: str = one_of(*MATMUL_PRECISIONS)
    """Of float32 products; high and medium allow TF32 and the like."""
    checkpointing: bool = False
    """Keep only each block's input and compute its activations anew in the backward pass: less memory, more time."""
    seed: int = at_least(0, 1337, below=MOST_SEED)
    """Of initial weights, batches, dropout and samples."""

    init_from: str = path_field("scratch")
    """scratch, resume, gpt2 to gpt2-xl, a Hugging Face folder, nanoGPT's ckpt.pt, or a run or checkpoint of ours."""
    run: str | None = path_field(None)
    """The run or checkpoint to go on from, with init_from=resume."""
    run_dir: str = path_field("runs/{date}/{time}-{name}")
    """The folder of this run; {name} is the back end's."""
    data_dir: str = path_field("data")
    """Where prepared corpora are kept; short for data.dir."""
    path: str | None = path_field(None)
    """Short for data.path."""
    given: list[str] = field(default_factory=list)
    """Filled in by cli.py: the overrides of the command line."""

    max_iters: int = at_least(1, 5000)
    """The last iteration; one is an optimizer step."""
    batch_size: int = at_least(1, 64)
    """Windows of model.block_size tokens in one forward pass."""
    gradient_accumulation_steps: int = at_least(1, 1)
    """Forward passes of one iteration."""
    learning_rate: float = at_least(0, 1e-3)
    """The highest, which warm-up ends at."""
    decay_lr: bool = True
    """Warm up, then decay along a cosine; false: learning_rate throughout."""
    warmup_iters: int = at_least(0, 100)
    """Iterations of linear warm-up."""
    lr_decay_iters: int = 5000
    """The iteration at which min_lr is reached."""
    min_lr: float = at_least(0, 1e-4)
    """After the decay."""
    weight_decay: float = at_least(0, 0.1)
    """AdamW's, of matrices and embeddings alone."""
    beta1: float = at_least(0, 0.9, below=1)
    """AdamW's decay of the first moment, an iteration."""
    beta2: float = at_least(0, 0.99, below=1)
    """AdamW's decay of the second moment, an iteration."""
    grad_clip: float = at_least(0, 1.0)
    """The gradient's largest norm; 0: not clipped."""

    eval_interval: int = at_least(0, 250)
    """Iterations between evaluations; 0: none."""
    eval_iters: int = at_least(1, 200)
    """Batches of each split in an evaluation."""
    log_interval: int = at_least(1, 10)
    """Iterations between lines on the console."""
    checkpoint: bool = True
    """Keep `last` and `best`, at every evaluation and at the end."""

    sync: str = one_of("completion", "iteration", "interval")
    """When the host waits: one iteration behind, for each iteration, or once every log_interval."""
    timing_warmup: int = at_least(0, 5)
    """Iterations after the first that enter no statistic."""
    gemm_seconds: float = at_least(0, 1.0)
    """Seconds at the end, and at the first start here, on the fastest matrix product, for mfu_measured; 0: none."""
    sample_tokens: int = at_least(0, 300)
    """Tokens of text drawn at the end; 0: none."""
    fallbacks: str = one_of("report", "error", "off")
    """MPS only: before training, look for operators that leave the GPU; error ends the run where there are any."""
    objective: str = one_of("best_val_loss", "val_loss", "iter_ms", "tokens_per_s")
    """Of a sweep (-m): the figure of each member that its sweeper is given."""
    shared_machine: bool = False
    """Other runs slow this one down: its speed is recorded, but never ranked. A sweep whose members run side by side
    sets it."""

    @property
    def named(self) -> set[str]:
        """The keys and groups that the command line named."""
        return {key_of(override) for override in self.given}

    def write_hydra(self, folder: Path) -> None:
        """.hydra/ in a run's folder, as Hydra would leave it: the config, and the overrides that were given."""
        hydra = folder / ".hydra"
        hydra.mkdir(exist_ok=True)
        write(hydra / "config.yaml", yaml.safe_dump(asdict(self), sort_keys=False))
        write(hydra / "overrides.yaml", yaml.safe_dump(self.given))


@dataclass
class SampleConfig:
    """Everything that `python sample.py` can be told."""

    run: str = path_field("???")
    """What to sample from: a run, a checkpoint, or anything that init_from takes."""
    checkpoint: str = one_of("last", "best")
    """Which of the run's checkpoints."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    dtype: str = one_of(*DTYPES)
    """Of the matrix products."""
    matmul_precision: str = one_of(*MATMUL_PRECISIONS)
    """Of float32 products."""
    data: DataConfig = field(default_factory=lambda: DataConfig(name="text"))
    """The text that the model was trained on, where its file does not say what its tokens mean."""
    data_dir: str = path_field("data")
    """Where prepared corpora are kept; short for data.dir."""
    path: str | None = path_field(None)
    """Short for data.path."""
    prompt: str = text_field("\n")
    """The text to go on from; FILE:path reads a file, as nanoGPT does."""
    num_samples: int = at_least(1, 1)
    """How many texts."""
    max_new_tokens: int = at_least(1, 500)
    """Tokens of each text."""
    temperature: float = at_least(0, 0.8)
    """Below 1 the likely becomes likelier; 0: always the likeliest token."""
    top_k: int | None = at_least(1, 200)
    """Draw among so many likeliest tokens; null: among all."""
    seed: int = at_least(0, 1337, below=MOST_SEED)
    """Of the drawing."""


def validate(config: Config) -> None:
    """Raise InputError at the first value that cannot be meant."""
    _check_backend(config)
    check_fields(config)
    if config.decay_lr and config.lr_decay_iters <= config.warmup_iters:
        raise InputError(
            f"lr_decay_iters={config.lr_decay_iters}: must be more than warmup_iters={config.warmup_iters}"
        )
    if config.init_from == "resume" and config.run is None:
        raise InputError("run=null: init_from=resume needs the run to go on from (run=runs/DATE/TIME-NAME)")
    if config.init_from != "resume" and config.run is not None:
        raise InputError(
            f"run={config.run}: only init_from=resume takes a run (here init_from={config.init_from}); add "
            "init_from=resume"
        )


def validate_sample(config: SampleConfig) -> None:
    """As `validate`, for sample.py."""
    _check_backend(config)
    check_fields(config)


def _check_backend(config: Config | SampleConfig) -> None:
    check_one_of("backend", config.backend.name, ("auto", *kinds.KINDS))
    for key, (_, _, allowed) in kinds.settings().items():
        if allowed:
            check_one_of(f"backend.{key}", getattr(config.backend, key), allowed)


def model_spec(config: Config) -> GPTSpec:
    """The model of `config`. InputError where the corpus says how many tokens there are, and was never seen."""
    vocabulary = config.model.vocab_size or vocab_size(config.data)
    if vocabulary is None:
        raise InputError("model.vocab_size=null: this corpus has its own, which is not known yet; use a number")
    return GPTSpec(**asdict(config.model) | {"vocab_size": vocabulary})


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
        checkpointing=recipe.checkpointing,
        settings=kinds.own_settings(name, asdict(config.backend)),
    )
