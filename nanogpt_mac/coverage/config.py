"""The typed config of `mps_coverage.py` and its checks. Plain dataclass: the command line is cli.py's business."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from nanogpt_mac.backends.base import DTYPES
from nanogpt_mac.coverage import page
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.operators.wheel import NIGHTLY_INDEX
from nanogpt_mac.overrides import path_field, text_field

SCOPES = ("model", "ops", "surface", "opinfo")
FORMATS = ("table", "json", "markdown")
# Keys that only some tasks read, where the others would ignore them in silence.
STATIC = "a table of operators"
READ_BY = {
    "samples": ("scope=opinfo",),
    "batch_size": ("compiled=true", "run=true", "verify=true", "verify=predict", "bisect"),
    "python": (STATIC, "verify=true", "verify=predict", "script", "history", "bisect"),
    "nightly_index": (STATIC, "run=true", "script", "history", "bisect"),
    "good": ("bisect",),
    "bad": ("bisect",),
    "steps": ("script", "history", "bisect"),
    "limit_s": ("script", "history", "bisect"),
    "map": ("script", "history", "bisect"),
}


@dataclass
class CoverageConfig:
    """What `python mps_coverage.py` can be asked."""

    torch: str = path_field("installed")  # installed | nightly | a release such as 2.15.0 | a macOS arm64 wheel
    against: str | None = path_field(None)  # a second torch: what was gained and lost since
    # model, ops (those in `op`), surface (all): whose operators are listed and judged; opinfo: torch's own samples, run
    scope: str = "model"
    op: Any = None  # scope=ops or opinfo: a name such as gelu, or op=[gelu,linalg_svd.U]; a bare one: all its overloads
    samples: int = 10  # scope=opinfo: of each operator and dtype, at most
    format: str = "table"  # table | json | markdown
    binary: bool = False  # also decode libtorch_cpu.dylib (100 MB where it is not on this machine)

    run: bool = False  # also run the training step with that torch, in an environment of its own
    compiled: bool = False  # what torch.compile makes of the training step
    verify: Any = False  # true: do the predictions made off a Mac hold? predict: write the predictions down
    output: str | None = path_field(None)  # verify: the JSON to write; by default mps-verify-TORCH-DATE.json
    html: str | None = path_field(None)  # also write the report as a page of HTML to this file

    script: str | None = text_field(None)  # any PyTorch program and its arguments, run on MPS and watched
    steps: int | None = None  # script: stop it after so many optimizer steps
    limit_s: float | None = None  # script: stop it after so many seconds
    map: str | None = text_field(None)  # script: cuda:mps gives a program that asks for CUDA the MPS device

    bisect: str | None = text_field(None)  # the first nightly that differs in an operator, or for model or script
    good: str | None = text_field(None)  # bisect: the torch before the change
    bad: str | None = text_field(None)  # bisect: a nightly after it, or the newest: nightly
    history: str | None = text_field(None)  # every overload in every torch of a range: 2.5..nightly

    model: ModelConfig = field(default_factory=ModelConfig)  # scope=model: the model whose training step is traced
    dtype: str = "float32"
    batch_size: int = 64  # compiled, run, verify: sequences in the iteration

    python: str = text_field("3.12")  # the Python whose wheel is looked at
    nightly_index: str = text_field(NIGHTLY_INDEX)


def operators(config: CoverageConfig) -> list[str]:
    """The names in `op`, without `aten::`."""
    names = config.op if isinstance(config.op, list) else [] if config.op is None else [config.op]
    return [str(name).removeprefix("aten::") for name in names]


def validate(config: CoverageConfig) -> None:
    """Raise InputError at the first value that cannot be meant."""
    for key, allowed in (("scope", SCOPES), ("format", FORMATS), ("dtype", DTYPES)):
        if getattr(config, key) not in allowed:
            raise InputError(f"{key}={getattr(config, key)}: use {', '.join(allowed[:-1])} or {allowed[-1]}")
    if not re.fullmatch(r"3\.\d+", config.python):
        raise InputError(f"python={config.python}: use a version such as 3.12")
    if config.scope == "ops" and not operators(config):
        given = "null" if config.op is None else config.op
        raise InputError(f"op={given}: scope=ops needs the operators to look at (op=gelu or op=[gelu,linalg_svd])")
    if config.scope not in ("ops", "opinfo") and config.op is not None:
        raise InputError(f"op={config.op}: only scope=ops and scope=opinfo take operators (here scope={config.scope})")
    if config.map not in (None, "cuda:mps"):
        raise InputError(f"map={config.map}: use cuda:mps")
    if config.limit_s is not None and not config.limit_s > 0:
        raise InputError(f"limit_s={config.limit_s}: use a number of seconds above 0")
    for key in ("samples", "batch_size", "steps"):
        if getattr(config, key) is not None and getattr(config, key) < 1:
            raise InputError(f"{key}={getattr(config, key)}: use a whole number from 1")
    if config.verify not in (False, True, "predict"):
        raise InputError(f"verify={config.verify}: use true, false or predict")
    if config.output is not None and not config.verify:
        raise InputError(f"output={config.output}: only verify writes a file of its own; leave it out")
    if config.html is not None:
        page.writable("html", config.html)
    _one_task(config)
    GPTSpec(**asdict(config.model) | {"vocab_size": 1 if config.model.vocab_size is None else config.model.vocab_size})


def _one_task(config: CoverageConfig) -> None:
    """The combinations that mean something."""
    tasks = {
        "history": config.history is not None,
        "bisect": config.bisect is not None,
        "script": config.script is not None and config.history is None and config.bisect != "script",
        "scope=opinfo": config.scope == "opinfo",
        "run=true": config.run and config.bisect is None,
        "compiled=true": config.compiled,
        f"verify={str(config.verify).lower()}": bool(config.verify),
    }
    asked = [task for task, wanted in tasks.items() if wanted]
    if len(asked) > 1:
        raise InputError(f"{asked[0]} {asked[1]}: use one at a time")
    for key, readers in READ_BY.items():
        default = CoverageConfig.__dataclass_fields__[key].default
        if getattr(config, key) != default and (asked or [STATIC])[0] not in readers:
            raise InputError(f"{key}={getattr(config, key)}: only read with {' or '.join(readers)}")
    if not asked:
        return
    task = asked[0]
    if config.scope not in ("model", "opinfo"):
        raise InputError(f"scope={config.scope}: {task} looks at this model; use scope=model")
    if task in ("history", "bisect") and config.torch != "installed":
        raise InputError(f"torch={config.torch}: {task} has all of its range; leave torch= out")
    if task == "bisect":
        _bisection(config)
    if task in ("script", "history", "bisect"):
        if config.against is not None:
            raise InputError(f"against={config.against}: {task} takes no second torch; leave it out")
        return
    if config.binary and task != "verify=true":
        raise InputError(f"binary=true: {task} reads no binary; leave it out")
    if config.run:
        if config.torch == "installed":
            raise InputError(
                "torch=installed: run=true needs another torch: use torch=nightly, a release, or a wheel's path"
            )
    elif config.torch != "installed":
        raise InputError(f"torch={config.torch}: {task} runs the torch that is installed; leave torch= out")
    if config.against is not None:
        raise InputError(f"against={config.against}: {task} compares with what is installed; leave against= out")


def _bisection(config: CoverageConfig) -> None:
    for key in ("bisect", "good", "bad"):
        if not (given := getattr(config, key)):
            given = "null" if given is None else given
            raise InputError(f"{key}={given}: use a name and both ends, as in bisect=gelu good=2.13.0 bad=nightly")
    if (config.bisect == "script") != (config.script is not None):
        raise InputError(
            f"bisect={config.bisect} script={config.script}: use bisect=script with the program in script="
        )
    if config.run and config.bisect not in ("model", "script"):
        raise InputError(f"bisect={config.bisect}: run=true runs bisect=model or bisect=script; leave run out")
