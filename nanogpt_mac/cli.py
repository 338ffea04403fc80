"""The command line: everything that knows Hydra and OmegaConf.

It turns overrides into a typed config, every kind of bad input into one line and exit code 2, and a multirun sweep
into one fresh process a member.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import key_of, quoted

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {  # conf/<command>.yaml -> what it must be; imported when it is that command's turn
    "config": "nanogpt_mac.config:Config",
    "sample": "nanogpt_mac.config:SampleConfig",
    "coverage": "nanogpt_mac.coverage.config:CoverageConfig",
    "compare": "nanogpt_mac.compare.config:CompareConfig",
    "report": "nanogpt_mac.compare.report.config:ReportConfig",
}
GLOBAL_GROUPS = ("experiment", "optim")  # groups whose keys lie at the top level


class _Terminated(BaseException):
    """SIGTERM came, and nobody further in has taken it for a request to end well."""


def _terminate(_signum: int, _frame: Any) -> None:
    raise _Terminated


def main(command: str, task: Callable[[Any], int]) -> int:
    """Compose conf/<command>.yaml with the command line, hand the typed config to `task`, return the exit code."""
    _store_schema(command)
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to the one place below that words them
    codes: list[int] = []
    mistakes: list[Exception] = []
    started: list[str] = []
    members: list[tuple[str, int]] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=command)
    def app(cfg: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            members.append(_run_member(len(members)))
            return
        try:
            if command == "config" and cfg.get("init_from") == "resume":
                cfg = _resumed(cfg)
            _refuse_new_keys(command, HydraConfig.get().overrides.task)
            config = _typed(cfg)
            _note_given(config, command, HydraConfig.get().overrides.task)
            started.append(command)
            codes.append(task(config))
        except (InputError, OmegaConfBaseException, BrokenPipeError) as error:  # Hydra would announce a crash
            mistakes.append(error)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text may hold what this terminal cannot show
    given, sys.argv = sys.argv, _tidied(sys.argv, command)
    handler = signal.signal(signal.SIGTERM, _terminate)  # dying of it would leave children behind
    try:
        app()
        if mistakes:
            raise mistakes[0]
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if traceback_wanted:
            raise
        print(f"{Path(sys.argv[0]).name}: {_one_line(error, command)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if started or members:
            raise
        print(f"{Path(sys.argv[0]).name}: {error.filename}: cannot be made: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before a run has begun; a run that has ends with a checkpoint instead
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated:
        print(f"{Path(sys.argv[0]).name}: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, handler)
        _restore("HYDRA_FULL_ERROR", traceback_wanted)
        sys.argv = given
    if members:
        return _report(members)
    return codes[-1] if codes else 0


def compose(overrides: Sequence[str], command: str = "config") -> Any:
    """The typed config that conf/<command>.yaml and `overrides` give, as the command line would; nothing is run.

    InputError, one line as on the command line, for an override that cannot be meant.
    """
    _store_schema(command)
    given, sys.argv = sys.argv, [f"{command}.py", *overrides]  # where _one_line finds what was written
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command's own, which comes back
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            cfg = hydra.compose(command, overrides=_tidied(sys.argv, command)[1:])
        _refuse_new_keys(command, overrides)
        config = _typed(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error, command)) from error
    finally:
        sys.argv = given
        GlobalHydra.instance().hydra = running
    _note_given(config, command, overrides)
    return config


def _note_given(config: Any, command: str, overrides: Sequence[str]) -> None:
    """A run needs to know which keys were named; a comparison passes what was written on to its runs."""
    if command in ("config", "compare"):
        config.given = list(overrides)


def _schema(command: str) -> Any:
    """The dataclass that a command's config must be."""
    module, _, name = SCHEMAS[command].partition(":")
    return getattr(importlib.import_module(module), name)


def _store_schema(command: str) -> None:
    ConfigStore.instance().store(name=f"{command}_schema", node=_schema(command))


def _tidied(argv: list[str], command: str) -> list[str]:
    """The command line as Hydra needs it: -m first, prompts quoted, hydra.run.dir as run_dir (made after checks)."""
    multirun = [a for a in argv[1:] if a in ("-m", "--multirun")]
    rest = [a for a in argv[1:] if a not in ("-m", "--multirun", "experiment=null")]  # Hydra takes no null for a group
    if command == "sample":
        rest = [quoted("prompt", a.removeprefix("prompt=")) if a.startswith("prompt=") else a for a in rest]
    if command in ("config", "compare"):
        rest = [a.replace("hydra.run.dir=", "run_dir=", 1) if a.startswith("hydra.run.dir=") else a for a in rest]
    if command == "compare":  # the key's name until 0.1
        rest = [a.replace("ways=", "variants=", 1) if a.startswith("ways=") else a for a in rest]
    if command == "report":
        rest = _listed(rest)
    return [argv[0], *multirun, *rest]


def _listed(arguments: list[str]) -> list[str]:
    """Bare paths, which Hydra does not take, as the one key `runs`."""
    paths = [a for a in arguments if not a.startswith("-") and ("=" not in a or Path(a).exists())]
    listed = ",".join(quoted("", path)[1:] for path in paths)
    return [*(a for a in arguments if a not in paths), *([f"runs=[{listed}]"] if paths else [])]


def _refuse_new_keys(command: str, overrides: Sequence[str]) -> None:
    """Hydra lets `+key=value` add a key that nothing reads."""
    for override in overrides:
        key = override.lstrip("+").split("=")[0]
        if override.startswith("+") and key not in _keys(command):
            raise InputError(f"{override.lstrip('+')}: there is no such key{_suggestion(key, command)}")


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _typed(cfg: DictConfig) -> Any:
    OmegaConf.resolve(cfg)
    return OmegaConf.to_object(cfg)


def _resumed(cfg: DictConfig) -> DictConfig:
    """The config of the run to go on from, with what this command line names laid over it."""
    from nanogpt_mac.train import checkpoint

    if cfg.run is None:
        return cfg  # validate() words it
    path = checkpoint.find(cfg.run)
    saved = checkpoint.read_meta(path).config
    resumed = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(_schema("config")), saved))
    for override in HydraConfig.get().overrides.task:
        key = key_of(override)
        if key in GLOBAL_GROUPS:
            raise InputError(f"{override}: a resumed run keeps its recipe; allowed are single keys, such as max_iters")
        key = {"logger": "wandb", "path": "data.path", "data_dir": "data.dir"}.get(key, key)
        OmegaConf.update(resumed, key, OmegaConf.select(cfg, key), merge=False)
    resumed.init_from, resumed.run, resumed.run_dir = "resume", cfg.run, cfg.run_dir
    return resumed


# -- sweeps -----------------------------------------------------------------------------------------------------------


def _run_member(number: int) -> tuple[str, int]:
    """Run one member of a sweep in a process of its own: nothing leaks to the next, and a crash ends only it."""
    hydra_cfg = HydraConfig.get()
    overrides = list(hydra_cfg.overrides.task)
    if not any(o.startswith("run_dir=") for o in overrides):
        overrides.append(quoted("run_dir", str(Path(hydra_cfg.sweep.dir) / f"{number}-{{name}}")))
    title = " ".join(hydra_cfg.overrides.task)
    print(f"== sweep member {number}: {title}", flush=True)
    received: list[int] = []
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    child = subprocess.Popen([sys.executable, sys.argv[0], *overrides], process_group=0, env=environment)

    def forward(signum: int, _frame: Any) -> None:
        received.append(signum)
        child.send_signal(signum)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        sys.exit(128 + received[0])  # the whole sweep was meant
    return title, code


def _report(members: list[tuple[str, int]]) -> int:
    """Say how every member ended; 0 when all did well, 2 when all that failed were given bad input, else 1."""
    print("== sweep")
    for number, (title, code) in enumerate(members):
        how = {0: "done", 2: "bad input (exit code 2)"}.get(code, f"FAILED (exit code {code})")
        print(f"{number}: {title}: {how}")
    failures = [code for _, code in members if code]
    if not failures:
        return 0
    print(f"{len(failures)} of {len(members)} failed", file=sys.stderr)
    return 2 if set(failures) == {2} else 1


# -- one line for every mistake ---------------------------------------------------------------------------------------


def _one_line(error: Exception, command: str) -> str:
    """Name the key, the value and what is allowed; Hydra's own words are kept where they already do."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return str(cause)
    text = str(error)
    given = {o.lstrip("+~").split("=")[0]: o for o in sys.argv[1:] if "=" in o}
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
        options = re.findall(r"^\t(\w+)$", text, re.MULTILINE)
        if found:
            return f"{found[1]}={found[2]}: allowed are {', '.join(options)}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: must be given ({cause.full_key}=...)"
    key = getattr(cause, "full_key", None) or next(iter(re.findall(r"Could not override '([^']+)'", text)), None)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        named = next((text for name, text in given.items() if f"{name}.".startswith(f"{key}.")), key)
        return f"{named}: there is no such key{_suggestion(str(key), command)}"
    if isinstance(cause, OverrideParseException):
        return f"{cause.override}: not an override; allowed is key=value, with quotes around anything unusual"
    words = " ".join(str(cause).split("\n    full_key")[0].split())
    return f"{given[key]}: {words}" if key in given else words


def _suggestion(key: str, command: str) -> str:
    keys = _keys(command)
    close = difflib.get_close_matches(key, keys, n=3, cutoff=0.5) or [k for k in keys if k.endswith(f".{key}")]
    return f"; did you mean {', '.join(close)}?" if close else "; allowed are those that --help lists"


def _keys(command: str) -> list[str]:
    """Every key of a command's schema, dotted."""
    schema = OmegaConf.structured(_schema(command))
    keys: list[str] = []
    for name in map(str, schema):
        keys.append(name)
        if not OmegaConf.is_missing(schema, name) and isinstance(value := schema[name], DictConfig):
            keys += [f"{name}.{inner!s}" for inner in value]
    return keys
