"""The typed config of `mps_coverage.py` and its checks. Plain dataclass: the command line is cli.py's business."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from nanogpt_mac.backends.base import DTYPES
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import ModelConfig

NIGHTLY_INDEX = "https://download.pytorch.org/whl/nightly/cpu"  # PyTorch's own
SCOPES = ("model", "ops", "surface")
FORMATS = ("table", "json", "markdown")


@dataclass
class CoverageConfig:
    """Everything that `python mps_coverage.py` can be told."""

    torch: str = "installed"  # installed | nightly | a release such as 2.15.0 | the path of a macOS arm64 wheel
    against: str | None = None  # a second torch: what was gained and lost since
    scope: str = "model"  # whose operators are listed and judged: this model's, those in `op`, or the whole surface
    op: Any = None  # scope=ops: a name such as gelu, or op=[gelu,linalg_svd.U]; a bare name means all its overloads
    format: str = "table"  # table | json | markdown
    binary: bool = False  # also decode libtorch_cpu.dylib (100 MB where it is not on this machine)

    model: ModelConfig = field(default_factory=ModelConfig)  # scope=model: the model whose training step is traced
    dtype: str = "float32"

    python: str = "3.12"  # the Python whose wheel is looked at
    nightly_index: str = NIGHTLY_INDEX


def operators(config: CoverageConfig) -> list[str]:
    """The names in `op`, without `aten::`."""
    names = config.op if isinstance(config.op, list) else [] if config.op is None else [config.op]
    return [str(name).removeprefix("aten::") for name in names]


def validate(config: CoverageConfig) -> None:
    """Raise InputError at the first value that cannot be meant."""
    for key, allowed in (("scope", SCOPES), ("format", FORMATS), ("dtype", DTYPES)):
        if getattr(config, key) not in allowed:
            raise InputError(f"{key}={getattr(config, key)}: allowed are {', '.join(allowed)}")
    if not re.fullmatch(r"3\.\d+", config.python):
        raise InputError(f"python={config.python}: allowed are versions such as 3.12")
    if config.scope == "ops" and not operators(config):
        raise InputError("op=null: scope=ops needs the operators to look at (op=gelu or op=[gelu,linalg_svd])")
    if config.scope != "ops" and config.op is not None:
        raise InputError(f"op={config.op}: only scope=ops takes operators (here scope={config.scope})")
