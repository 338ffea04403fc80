"""The command line, by way of Hydra and OmegaConf.

It turns overrides into a typed config, every kind of bad input into one line (diagnostics.py) and exit code 2, and a
multirun sweep into one fresh process a member (sweep/).
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from string import Template
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nanogpt_mac import composed, diagnostics, nanogpt_keys, ranks, signals
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import (
    GIVEN,
    escaped,
    exists,
    flags,
    for_hydra,
    found_again,
    key_of,
    listed,
    literal,
    mapped,
    refuse,
    text_keys,
    unescaped,
)

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {  # conf/<command>.yaml -> what it must be; imported when it is that command's turn
    "config": "nanogpt_mac.config:Config",
    "sample": "nanogpt_mac.config:SampleConfig",
    "coverage": "nanogpt_mac.coverage.config:CoverageConfig",
    "compare": "nanogpt_mac.compare.config:CompareConfig",
    "report": "nanogpt_mac.compare.config:ReportConfig",
    "bench": "nanogpt_mac.suites.config:BenchConfig",
}
SCRIPTS = {"config": "train.py", "coverage": "mps_coverage.py"}  # others have the name of their config
OPTIONS = ("help", "version", "cfg", "resolve", "package", "run", "multirun", "info")  # Hydra's, of one word
GLOBAL_GROUPS = ("experiment", "optim")  # groups whose keys lie at the top level

_search_path: list[str] = []  # where the configs of the command under way lie, beside conf/


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
        self.name, self.program, self.typed = name, argv[0], _tidied(argv[1:], name)
        self.texts = text_keys(_schema(name))
        self.arguments = for_hydra(self.typed, self.texts, sweeps="--multirun" in self.typed)
        self.code = 0
        self.mistake: Exception | None = None
        self.traceback_wanted = False
        self.failure: str | None = None  # one line, of what is neither a mistake nor a fault of ours
        self.started = False  # whether a task, or a sweep, has run: an OSError is then no longer the user's
        store = ConfigStore.instance()
        store.store(name=f"{name}_schema", node=_schema(name))
        for backend in ("auto", *KINDS):
            store.store(group="backend", name=backend, node={"name": backend})

    def run(self, task: Callable[[Any], int]) -> int:
        """Run `task`, or a sweep over it; the exit code."""

        def once(cfg: DictConfig) -> None:
            hydra_config = HydraConfig.get()
            _search_path[:] = _beside_conf(hydra_config)
            overrides = [self._as_typed(override) for override in hydra_config.overrides.task]
            try:
                config = self._config(cfg, overrides, groups=hydra_config.runtime.choices)
            except (InputError, OmegaConfBaseException) as error:
                self.mistake = error
            else:
                self._perform(task, config)

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a text may hold what this terminal cannot show
        self.traceback_wanted = os.environ.get("HYDRA_FULL_ERROR", "") not in ("", "0")
        try:
            with signals.watched(self.program), _hydras_process([self.program, *self.arguments]):
                if composed.FLAG in self.typed:
                    config, _search_path[:] = composed.read(self.typed[-1], _schema(self.name))
                    self._perform(task, config)
                else:
                    self._refuse()
                    if not _helped(self.name, self.arguments):
                        ranks.launched() if self.name == "config" else ranks.refuse_several()
                        if (cfg := self._plain()) is not None:
                            once(cfg)
                            return self._ended()
                        ranks.refuse_several()  # a sweep starts processes itself
                        main = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=self.name)
                        self._through_hydra(main(_Job(self.name, str(Path(self.program).absolute()), Path.cwd(), once)))
            return self._ended()
        except (InputError, HydraException, OmegaConfBaseException) as error:
            if self.traceback_wanted:
                raise
            line = self._one_line(error)
            return self._say(line, 2) if ranks.says(line) else 2
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            if self.started:
                raise
            return self._say(f"{error.filename}: cannot be made: {error.strerror}", 2)
        except signals.Stop as stop:  # before a run has begun; a run that has ends with a checkpoint instead
            words = signals.words(stop.signum)  # a launcher ends all ranks where one has had something to say
            return self._say(words, stop.code) if ranks.says(words, unless_any=True) else stop.code

    def _ended(self) -> int:
        """The exit code of what has run; a mistake in it is raised."""
        if self.failure:
            return self._say(self.failure, 1)
        if self.mistake:
            raise self.mistake
        return self.code

    def _plain(self) -> DictConfig | None:
        """The config of one run, composed once, where Hydra does it twice and imports what only sweeps need.

        None where Hydra must be asked: for its flags and its own keys.
        """
        if any(argument.startswith(("-", "hydra", "+hydra", "~hydra")) for argument in self.arguments):
            return None
        cfg = _composed(self.name, self.arguments)
        if cfg.hydra.mode == RunMode.MULTIRUN or cfg.hydra.run.dir != ".":
            return None
        HydraConfig.instance().set_config(cfg)
        return cfg

    def _through_hydra(self, app: Callable[[], None]) -> None:
        """One run, or a sweep, which is summed up however it ended."""
        gc.enable()
        failure: BaseException | None = None
        try:
            app()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        from nanogpt_mac.sweep.plugin import Announced, say  # only now: it costs what `--help` has no time for

        running, Announced.current = Announced.current, None
        if running is None:
            if isinstance(failure, ValueError) and not self.started:  # flags that exclude each other
                raise InputError(str(failure)) from failure
            if failure:
                raise failure
            return
        self.started = True
        sweep = running.close(complete=failure is None)
        if failure and not sweep.members and running.signum is None:
            running.board.remove()
            raise failure
        self.code = say(sweep, running.board.folder)
        if running.signum is not None:
            self.code = 128 + running.signum
        elif failure is not None:
            if self.traceback_wanted:
                raise failure
            self._say(f"hydra/sweeper={sweep.sweeper}: {' '.join(str(failure).split())}", 1)
            self.code = self.code or 1

    def composed(self) -> Any:
        """The typed config; nothing is run. InputError as `compose`."""
        self._refuse()
        running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a command's own, which comes back
        try:
            beside = ",".join(map(literal, _search_path))
            cfg = _composed(self.name, [*self.arguments, *([f"hydra.searchpath=[{beside}]"] if beside else [])])
            return self._config(cfg, self.typed, resume=False, groups=cfg.hydra.runtime.choices)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(self._one_line(error)) from error
        finally:
            GlobalHydra.instance().hydra = running

    def _perform(self, task: Callable[[Any], int], config: Any) -> None:
        """Run `task`. A mistake and a failure are kept: Hydra would announce a crash."""
        self.started = True
        gc.enable()
        try:
            self.code = task(config)
        except (InputError, OmegaConfBaseException, BrokenPipeError) as error:
            self.mistake = error
        except Exception as error:
            self.failure = diagnostics.failure(error, config)
            if self.failure is None:
                raise

    def _refuse(self) -> None:
        script = SCRIPTS.get(self.name, f"{self.name}.py")
        nanogpt_keys.refuse(script, self.typed, {*_keys(self.name), "experiment", "sweep"}, OPTIONS)
        refuse(self.typed, flags(_schema(self.name)))

    def _config(
        self, cfg: DictConfig, overrides: Sequence[str], resume: bool = True, groups: Collection[str] = ()
    ) -> Any:
        _refuse_new_keys(self.name, overrides, groups)
        with open_dict(cfg):
            cfg.pop("hydra", None)
        config: Any = mapped(OmegaConf.to_object(cfg), found_again)  # resolves the interpolations of files
        if resume and self.name == "config" and config.init_from == "resume" and config.run is not None:
            config = _resumed(config, overrides)
        if hasattr(config, "given"):
            config.given = list(overrides)
        return config

    def _as_typed(self, override: str) -> str:
        """An override in Hydra's grammar as it may be typed, with its text as it is."""
        match = GIVEN.fullmatch(override)
        if match is None or match[2] not in self.texts:
            return override
        value = OverridesParser.create().parse_override(override).value()
        if isinstance(value, list):
            return f"{match[1]}{match[2]}={listed([unescaped(str(element)) for element in value])}"
        return f"{match[1]}{match[2]}={unescaped(str(value))}" if value is not None else override

    def _one_line(self, error: Exception) -> str:
        return diagnostics.mistake(error, self.typed, _keys(self.name))

    def _say(self, words: str, code: int) -> int:
        print(f"{Path(self.program).name}: {words}", file=sys.stderr)
        return code


@dataclass(frozen=True)
class _Job:
    """What Hydra calls: `once` for a single run; for each member of a sweep, wherever a launcher runs it, its process.

    It is pickled for a launcher's workers, without `once`, which is this process's own.
    """

    command: str
    program: str
    cwd: Path
    once: Callable[[DictConfig], None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Job, (self.command, self.program, self.cwd)

    def __call__(self, cfg: DictConfig) -> float | None:
        hydra_config = HydraConfig.get()
        if hydra_config.mode != RunMode.MULTIRUN:
            assert self.once is not None
            self.once(cfg)
            return None
        from nanogpt_mac.sweep import board, member, plugin

        place, subdir = Path(self.cwd, hydra_config.sweep.dir), hydra_config.sweep.subdir
        command = Command(self.command, [self.program])
        overrides = tuple(command._as_typed(override) for override in hydra_config.overrides.task)
        command.typed = list(overrides)
        if self.once is None:
            member.ignore_interrupts()
        job = member.Job(
            number=hydra_config.job.num,
            overrides=overrides,
            folder=f"{hydra_config.sweep.dir}/{f'{hydra_config.job.num}-{{name}}' if subdir == '.' else subdir}",
            program=self.program,
            cwd=str(self.cwd),
            search_path=tuple(_beside_conf(hydra_config)),
            shared_machine=plugin.side_by_side(hydra_config.launcher),
        )
        try:
            config = command._config(cfg, overrides, groups=hydra_config.runtime.choices)
        except (InputError, OmegaConfBaseException) as error:
            command._say(command._one_line(error), 2)
            found = member.refused(job, board.Board(place))
        else:
            found = member.run(job, config, board.Board(place))
        if subdir != ".":
            with suppress(OSError):  # Hydra made it for a run that was refused
                (place / subdir).rmdir()
        return member.returned(found, basic=plugin.name_of(hydra_config.sweeper) == "basic")


def _composed(command: str, overrides: Sequence[str]) -> DictConfig:
    """conf/<command>.yaml with `overrides`, and Hydra's own config in it."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return hydra.compose(command, overrides=list(overrides), return_hydra_config=True)


def _beside_conf(hydra_config: HydraConf) -> list[str]:
    """The folders of configs that --config-dir and hydra.searchpath have added."""
    sources = hydra_config.runtime.config_sources
    named = (s for s in sources if s.provider == "command-line" or s.provider.startswith("hydra.searchpath"))
    return [f"{source.schema}://{source.path}" for source in named]


def _helped(command: str, arguments: Sequence[str]) -> bool:
    """Print what Hydra prints for --help, in a third of its time: it copies all of its configs once a group.

    False where Hydra must be asked: for other flags beside it, folders of other configs, a template with more in it.
    """
    overrides = [a for a in arguments if a not in ("--help", "-h")]
    if len(overrides) == len(arguments) or any(a.startswith(("-", "hydra.")) for a in overrides):
        return False
    cfg = _composed(command, overrides)
    template = Template(cfg.hydra.help.template)
    with open_dict(cfg):
        del cfg["hydra"]
    groups = {d.name: {f.stem for f in d.glob("*.yaml")} for d in (ROOT / "conf").iterdir() if d.is_dir()}
    groups["backend"] = {"auto", *KINDS}
    lines = (f"{group}: {', '.join(sorted(options))}\n" for group, options in sorted(groups.items()))
    print(template.substitute(APP_CONFIG_GROUPS="".join(lines), CONFIG=OmegaConf.to_yaml(cfg)))
    return True


@contextmanager
def _hydras_process(argv: list[str]) -> Iterator[None]:
    """What Hydra takes from the process, for as long as it runs: its arguments, and to let exceptions through to us."""
    given, sys.argv = sys.argv, argv
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
        sys.argv = given


def _schema(command: str) -> Any:
    """The dataclass that a command's config must be."""
    module, _, name = SCHEMAS[command].partition(":")
    return getattr(importlib.import_module(module), name)


def _tidied(typed: Sequence[str], command: str) -> list[str]:
    """The arguments with --multirun first, and keys by the names that they have here: hydra.run.dir is run_dir, which
    is made after all checks."""
    multirun = ["--multirun"] if {"-m", "--multirun"} & set(typed) else []
    rest = [a for a in typed if a not in ("-m", "--multirun", "experiment=null")]  # Hydra takes no null for a group
    if command in ("config", "compare", "bench"):
        rest = [a.replace("hydra.run.dir=", "run_dir=", 1) if a.startswith("hydra.run.dir=") else a for a in rest]
    if command == "compare":  # the key's name until 0.1
        rest = [a.replace("ways=", "variants=", 1) if a.startswith("ways=") else a for a in rest]
    if command == "report":  # bare paths, which Hydra does not take, are the one key `runs`
        paths = [a for a in rest if not a.startswith("-") and ("=" not in a or exists(a))]
        rest = [*(a for a in rest if a not in paths), *([f"runs={listed(paths)}"] if paths else [])]
    return [*multirun, *rest]


def _refuse_new_keys(command: str, overrides: Sequence[str], groups: Collection[str]) -> None:
    """Hydra lets `+key=value` add a key that nothing reads; `groups` are those that were chosen from."""
    keys = _keys(command)
    for override in overrides:
        key = override.lstrip("+").split("=")[0]
        if override.startswith("+") and key not in groups and key not in keys:
            raise InputError(f"{override.lstrip('+')}: there is no such key{diagnostics.suggestion(key, keys)}")


def _resumed(given: Any, overrides: Sequence[str]) -> Any:
    """The config of the run to go on from, with what this command line names laid over it."""
    from nanogpt_mac.train import checkpoint

    folder = checkpoint.find(given.run)
    meta = checkpoint.read_meta(folder)
    saved = mapped(meta.config, escaped)
    resumed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_schema("config")), saved))
    resumed = mapped(resumed, found_again)
    for key in ("path", "dir", "symbols"):
        setattr(resumed.data, key, checkpoint.anchored(getattr(resumed.data, key), folder, meta))
    for override in overrides:
        key = key_of(override)
        if key in GLOBAL_GROUPS:
            raise InputError(f"{override}: a resumed run keeps its recipe; use single keys, such as max_iters")
        *places, name = {"logger": "wandb", "path": "data.path", "data_dir": "data.dir"}.get(key, key).split(".")
        source, target = (reduce(getattr, places, config) for config in (given, resumed))
        setattr(target, name, getattr(source, name))
    resumed.init_from, resumed.run, resumed.run_dir = "resume", given.run, given.run_dir
    resumed.shared_machine = given.shared_machine  # of this run, not of the sweep that it may come from
    return resumed


def _keys(command: str) -> list[str]:
    """Every key of a command's schema, dotted."""
    schema = OmegaConf.structured(_schema(command))
    keys: list[str] = []
    for name in map(str, schema):
        keys.append(name)
        if not OmegaConf.is_missing(schema, name) and isinstance(value := schema[name], DictConfig):
            keys += [f"{name}.{inner!s}" for inner in value]
    return keys
