"""The command line: everything that knows Hydra and OmegaConf.

It turns overrides into a typed config, every kind of bad input into one line and exit code 2, and a multirun sweep
into one fresh process a member (sweep.py).
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import key_of, quoted

if TYPE_CHECKING:
    from nanogpt_mac.sweep import Member

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {  # conf/<command>.yaml -> what it must be; imported when it is that command's turn
    "config": "nanogpt_mac.config:Config",
    "sample": "nanogpt_mac.config:SampleConfig",
    "coverage": "nanogpt_mac.coverage.config:CoverageConfig",
    "compare": "nanogpt_mac.compare.config:CompareConfig",
    "report": "nanogpt_mac.compare.config:ReportConfig",
}
GLOBAL_GROUPS = ("experiment", "optim")  # groups whose keys lie at the top level


class _Terminated(BaseException):
    """SIGTERM came, and nobody further in has taken it for a request to end well."""


def _terminate(_signum: int, _frame: Any) -> None:
    raise _Terminated


def main(command: str, task: Callable[[Any], int]) -> int:
    """Compose conf/<command>.yaml with the command line, hand the typed config to `task`, return the exit code."""
    return Command(command, sys.argv).run(task)


def compose(overrides: Sequence[str], command: str = "config") -> Any:
    """The typed config that conf/<command>.yaml and `overrides` give, as the command line would; nothing is run.

    InputError, one line as on the command line, for an override that cannot be meant.
    """
    return Command(command, [f"{command}.py", *overrides]).composed()


class Command:
    """One command line: conf/<name>.yaml, the arguments as they were typed, and what has become of them."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name, self.program, self.typed = name, argv[0], list(argv[1:])
        self.arguments = _tidied(self.typed, name)
        self.code = 0
        self.mistake: Exception | None = None
        self.started = False  # whether a task, or a member of a sweep, has run: an OSError is then no longer the user's
        self.members: list[Member] = []
        store = ConfigStore.instance()
        store.store(name=f"{name}_schema", node=_schema(name))
        for backend in ("auto", *KINDS):
            store.store(group="backend", name=backend, node={"name": backend})

    def run(self, task: Callable[[Any], int]) -> int:
        """Run `task`, or a sweep over it; the exit code."""

        @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=self.name)
        def app(cfg: DictConfig) -> None:
            hydra_config = HydraConfig.get()
            overrides = list(hydra_config.overrides.task)
            if hydra_config.mode == RunMode.MULTIRUN:
                from nanogpt_mac import sweep  # only now: `--help` answers at once

                self.started = True
                self.members.append(sweep.run_member(len(self.members), overrides, hydra_config.sweep.dir))
                return
            try:
                config = self._config(cfg, overrides)
                self.started = True
                self.code = task(config)
            except (InputError, OmegaConfBaseException, BrokenPipeError) as error:  # Hydra would announce a crash
                self.mistake = error

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a text may hold what this terminal cannot show
        traceback_wanted = os.environ.get("HYDRA_FULL_ERROR")
        try:
            with _hydras_process([self.program, *self.arguments]):
                app()
            if self.mistake:
                raise self.mistake
        except (InputError, HydraException, OmegaConfBaseException) as error:
            if traceback_wanted:
                raise
            return self._say(self._one_line(error), 2)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            if self.started:
                raise
            return self._say(f"{error.filename}: cannot be made: {error.strerror}", 2)
        except KeyboardInterrupt:  # before a run has begun; a run that has ends with a checkpoint instead
            return self._say("interrupted", 128 + signal.SIGINT)
        except _Terminated:
            return self._say("terminated", 128 + signal.SIGTERM)
        if self.members:
            from nanogpt_mac import sweep

            return sweep.report(self.members)
        return self.code

    def composed(self) -> Any:
        """The typed config; nothing is run. InputError as `compose`."""
        running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command's own, which comes back
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
                cfg = hydra.compose(self.name, overrides=self.arguments)
            return self._config(cfg, self.typed, resume=False)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(self._one_line(error)) from error
        finally:
            GlobalHydra.instance().hydra = running

    def _config(self, cfg: DictConfig, overrides: Sequence[str], resume: bool = True) -> Any:
        if resume and self.name == "config" and cfg.get("init_from") == "resume":
            cfg = _resumed(cfg, overrides)
        _refuse_new_keys(self.name, overrides)
        OmegaConf.resolve(cfg)
        config: Any = OmegaConf.to_object(cfg)
        if hasattr(config, "given"):
            config.given = list(overrides)
        return config

    def _say(self, words: str, code: int) -> int:
        print(f"{Path(self.program).name}: {words}", file=sys.stderr)
        return code

    def _one_line(self, error: Exception) -> str:
        """Name the key, the value and what to use instead; Hydra's own words are kept where they already do."""
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if isinstance(cause, InputError):
            return str(cause)
        text = str(error)
        given = {o.lstrip("+~").split("=")[0]: o for o in self.arguments if "=" in o}
        if isinstance(error, MissingConfigException):
            absent = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
            options = re.findall(r"^\t(\w+)$", text, re.MULTILINE)
            if absent:
                return f"{absent[1]}={absent[2]}: use one of {', '.join(options)}"
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key}: must be given ({cause.full_key}=...)"
        key = getattr(cause, "full_key", None) or next(iter(re.findall(r"Could not override '([^']+)'", text)), None)
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            named = next((text for name, text in given.items() if f"{name}.".startswith(f"{key}.")), key)
            return f"{named}: there is no such key{_suggestion(str(key), self.name)}"
        if isinstance(cause, OverrideParseException):
            return f"{cause.override}: not an override; use key=value, with quotes around anything unusual"
        words = " ".join(str(cause).split("\n    full_key")[0].split())
        return f"{given[key]}: {words}" if key in given else words


@contextmanager
def _hydras_process(argv: list[str]) -> Iterator[None]:
    """What Hydra takes from the process, for as long as it runs: its arguments, and to let exceptions through to us.

    SIGTERM raises `_Terminated` here: dying of it would leave children behind.
    """
    given, sys.argv = sys.argv, argv
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
        sys.argv = given


def _schema(command: str) -> Any:
    """The dataclass that a command's config must be."""
    module, _, name = SCHEMAS[command].partition(":")
    return getattr(importlib.import_module(module), name)


def _tidied(typed: Sequence[str], command: str) -> list[str]:
    """The arguments as Hydra needs them: -m first, prompts quoted, hydra.run.dir as run_dir (made after checks)."""
    multirun = [a for a in typed if a in ("-m", "--multirun")]
    rest = [a for a in typed if a not in ("-m", "--multirun", "experiment=null")]  # Hydra takes no null for a group
    if command == "sample":
        rest = [quoted("prompt", a.removeprefix("prompt=")) if a.startswith("prompt=") else a for a in rest]
    if command in ("config", "compare"):
        rest = [a.replace("hydra.run.dir=", "run_dir=", 1) if a.startswith("hydra.run.dir=") else a for a in rest]
    if command == "compare":  # the key's name until 0.1
        rest = [a.replace("ways=", "variants=", 1) if a.startswith("ways=") else a for a in rest]
    if command == "report":
        rest = _listed(rest)
    return [*multirun, *rest]


def _listed(arguments: Sequence[str]) -> list[str]:
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


def _resumed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the run to go on from, with what this command line names laid over it."""
    from nanogpt_mac.train import checkpoint

    if cfg.run is None:
        return cfg  # validate() words it
    folder = checkpoint.find(cfg.run)
    meta = checkpoint.read_meta(folder)
    resumed = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(_schema("config")), meta.config))
    for key in ("path", "dir", "symbols"):
        resumed.data[key] = checkpoint.anchored(resumed.data[key], folder, meta)
    for override in overrides:
        key = key_of(override)
        if key in GLOBAL_GROUPS:
            raise InputError(f"{override}: a resumed run keeps its recipe; use single keys, such as max_iters")
        key = {"logger": "wandb", "path": "data.path", "data_dir": "data.dir"}.get(key, key)
        OmegaConf.update(resumed, key, OmegaConf.select(cfg, key), merge=False)
    resumed.init_from, resumed.run, resumed.run_dir = "resume", cfg.run, cfg.run_dir
    return resumed


def _suggestion(key: str, command: str) -> str:
    keys = _keys(command)
    close = difflib.get_close_matches(key, keys, n=3, cutoff=0.5) or [k for k in keys if k.endswith(f".{key}")]
    return f"; did you mean {', '.join(close)}?" if close else "; --help lists the keys"


def _keys(command: str) -> list[str]:
    """Every key of a command's schema, dotted."""
    schema = OmegaConf.structured(_schema(command))
    keys: list[str] = []
    for name in map(str, schema):
        keys.append(name)
        if not OmegaConf.is_missing(schema, name) and isinstance(value := schema[name], DictConfig):
            keys += [f"{name}.{inner!s}" for inner in value]
    return keys
