"""What a command says when something goes wrong: one line that names the key, the value and what to do."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

from nanogpt_mac.backends import kinds
from nanogpt_mac.errors import InputError, cleaned, reason

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit of the shell
EXTRAS = {"optuna": "sweep", "joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"}
"""Hydra's plugins and the extra of this package that brings each."""
WANTED = {
    "a valid bool": "true or false",
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "is not Optional": "a value other than null",
}
"""What OmegaConf says of a value that it cannot convert, and what to use."""


def mistake(error: Exception, typed: Sequence[str], keys: Sequence[str]) -> str:
    """Of an error that `typed`, the arguments of a command with these keys, have led to.

    Hydra's own words are kept where they name the key, the value and what to use.
    """
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return str(cause)
    text = str(error)
    given = {o.lstrip("+~").split("=")[0]: o for o in typed if "=" in o}
    if isinstance(error, MissingConfigException):
        absent = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
        options = re.findall(r"^\t(\w+)$", text, re.MULTILINE)
        if absent and absent[1] in ("hydra/launcher", "hydra/sweeper") and absent[2] in EXTRAS:
            return f"{absent[1]}={absent[2]}: needs pip install 'nanogpt-mac[{EXTRAS[absent[2]]}]'"
        if absent:
            return f"{absent[1]}={absent[2]}: use one of {', '.join(options)}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: must be given ({cause.full_key}=...)"
    key = getattr(cause, "full_key", None) or next(iter(re.findall(r"Could not override '([^']+)'", text)), None)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        named = next((text for name, text in given.items() if f"{name}.".startswith(f"{key}.")), key)
        return f"{named}: there is no such key{suggestion(str(key), keys)}"
    if isinstance(cause, OverrideParseException):
        return f"{cause.override}: not an override; use key=value, with quotes around anything unusual"
    words = cleaned(str(cause).split("\n    full_key")[0]) or type(cause).__name__
    words = next((f"use {wanted}" for said, wanted in WANTED.items() if said in words), words)
    return f"{given[key]}: {words}" if key in given else words


def suggestion(key: str, keys: Sequence[str]) -> str:
    """The end of a line that says that there is no such key."""
    close = difflib.get_close_matches(key, keys, n=3, cutoff=0.5) or [k for k in keys if k.endswith(f".{key}")]
    return f"; did you mean {', '.join(close)}?" if close else "; --help lists the keys"


def failure(error: Exception, config: Any) -> str | None:
    """What to say of memory or a disk that is full; None for any other error."""
    if isinstance(error, OSError) and error.errno in FULL:
        named = Path(error.filename) if error.filename else Path.cwd()
        where = next(place for place in (*named.absolute().parents, Path("/")) if place.is_dir())  # of what is left
        return f"{where}: {error.strerror}; make room there, or name another folder (run_dir=...), and start again"
    from nanogpt_mac import supervise  # only now: pydantic, for which `--help` has no time

    words = f"{type(error).__name__}: {reason(error)}"
    signs = (supervise.OOM, kinds.signs().get("oom"))
    if not isinstance(error, MemoryError) and not any(sign.search(f"{words}\n{error}") for sign in signs if sign):
        return None
    sizes = {"batch_size": getattr(config, "batch_size", 1)}
    if hasattr(config, "model"):
        sizes["model.block_size"] = config.model.block_size
    lower = " or ".join(f"{key} below {value}" for key, value in sizes.items() if value > 1)
    return f"out of memory ({words}); use {lower or 'a smaller model'}"
