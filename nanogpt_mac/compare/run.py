"""`python compare.py`: plan, carry out, collect, report; or go on with a comparison that was stopped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanogpt_mac.compare import plan as plans
from nanogpt_mac.compare.config import CompareConfig, chips, validate
from nanogpt_mac.compare.runner import Runner
from nanogpt_mac.config import Config
from nanogpt_mac.config import validate as validate_run
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import run_folder, write_json
from nanogpt_mac.machine import probe
from nanogpt_mac.train.display import say

LOCK = ".lock"


class Stopped(BaseException):
    """A signal has asked for the end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def run(config: CompareConfig) -> int:
    """Compare as `config` says; the exit code: 0 something was timed, 1 nothing was, 128 + signal stopped."""
    validate(config)
    if names := chips(config):
        from nanogpt_mac.compare import roofline

        validate_run(config)
        roofline.show(config, names)
        return 0
    stack = contextlib.ExitStack()
    with stack:
        if config.run is None:
            plan, configs = plans.make(config)
            folder = run_folder(config.run_dir, "compare").resolve()
            stack.enter_context(_alone(folder))
            _refuse_taken(folder, config.run_dir)
            plans.write(folder, plan)
        else:
            folder = _find(config.run)
            stack.enter_context(_alone(folder))
            plan = _read(folder)
        again = _again(folder)
        if config.run is not None:
            stack.enter_context(contextlib.chdir(plan["cwd"]))
            configs = plans.configs_of(plan)
        try:
            with _signals(), probe.awake():
                return _compare(folder, plan, configs)
        except Stopped as stopped:
            name = signal.Signals(stopped.signum).name
            print(f"\n{name}: stopped; go on with: {again}", file=sys.stderr, flush=True)
            return 128 + stopped.signum
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or folder
            print(f"{where}: {error.strerror}; make room, then go on with: {again}", file=sys.stderr, flush=True)
            return 1


def _compare(folder: Path, plan: dict[str, Any], configs: dict[str, Config]) -> int:
    from nanogpt_mac.compare.report import render
    from nanogpt_mac.compare.results import collect

    _announce(folder, plan, configs)
    Runner(folder, plan, configs).carry_out()
    comparison = collect.collect(folder)
    write_json(folder / "comparison.json", comparison)
    (folder / "report.md").write_text(render.markdown(comparison), encoding="utf-8")
    (folder / "report.html").write_text(render.html(comparison), encoding="utf-8")
    render.show(comparison)
    say(f"report: {folder / 'report.html'}")
    return 0 if any(variant["iter_ms"] for variant in comparison["variants"]) else 1


def _announce(folder: Path, plan: dict[str, Any], configs: dict[str, Config]) -> None:
    """What is about to happen, and for how long."""
    config = next(iter(configs.values()))
    labels = [variant["label"] for variant in plan["variants"] if not (plan["levers"] and variant["lever"])]
    say(f"{len(plan['variants'])} variants: {', '.join(labels)}" + (", and their levers" if plan["levers"] else ""))
    recipe = f"experiment={plan['experiment']}" if plan["experiment"] else "the full recipe"
    if plan["experiment"] == "quick" and plan["quick_by_default"]:
        recipe += " (no accelerator here: experiment=full is nanoGPT's full recipe)"
    model = f"{config.model.n_layer} layers of {config.model.n_embd}"
    say(f"work: {recipe}: {model}, batch {config.batch_size} x {config.model.block_size}, {config.dtype}")
    for variant in plan["variants"]:
        if variant["lever"]:
            say(f"lever: {variant['label']}: {variant['lever']['what']}")
    for backend, reason in plan["missing"].items():
        say(f"not here: {backend}: {reason}")
    asked = plan["asked"]
    if asked["rounds"] or asked["iters"]:
        say(f"as asked, {asked['rounds'] or 'some'} rounds of {asked['iters'] or 'some'} iterations -> {folder}")
    else:
        say(f"in about {plan['budget_minutes']:g} minutes -> {folder}")


# -- going on ---------------------------------------------------------------------------------------------------------


def _find(text: str) -> Path:
    folder = Path(text)
    if not (folder / "plan.json").is_file():
        raise InputError(
            f"run={text}: holds no plan.json; allowed is a comparison's folder (run=runs/DATE/TIME-compare)"
        )
    return folder.resolve()


def _read(folder: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        schema, lacking = plan["schema"], sorted(plans.KEYS - plan.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"run={folder}: its plan.json cannot be read ({' '.join(str(error).split())})") from error
    if schema != plans.SCHEMA:
        raise InputError(f"run={folder}: its plan has schema {schema}; allowed is {plans.SCHEMA}")
    if lacking:
        raise InputError(f"run={folder}: its plan.json has no {', '.join(lacking)}")
    if damaged := plans.damaged(plan):
        value = str(plan.get(damaged))[:80]
        raise InputError(f"run={folder}: its plan.json is damaged: {damaged}={value}; allowed is what compare.py wrote")
    if not Path(plan["cwd"]).is_dir():
        raise InputError(f"run={folder}: was started in {plan['cwd']}, which is not there any more")
    return plan


def _refuse_taken(folder: Path, named: str) -> None:
    """What lies in a folder counts as done, so a new comparison must not find another one's runs there."""
    if any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(
            f"run_dir={named}: is not empty; allowed is a new or an empty folder (run=... goes on with one)"
        )


def _again(folder: Path) -> str:
    with contextlib.suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    return f"python compare.py run={folder}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process a comparison: a second would end the first one's runs. The lock ends with its process."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"run={folder}: another process is at work there; allowed is one at a time") from error
        yield


@contextmanager
def _signals() -> Iterator[None]:
    meant = [
        s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN
    ]  # nohup

    def handle(signum: int, _frame: Any) -> None:
        for one in meant:
            signal.signal(one, signal.SIG_IGN)  # a second one must not interrupt the tidying up
        raise Stopped(signum)

    previous = {s: signal.signal(s, handle) for s in meant}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
