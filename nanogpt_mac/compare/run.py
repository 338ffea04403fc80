"""`python compare.py`: plan, carry out, collect, report; or go on with a comparison that was stopped."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from pathlib import Path

from nanogpt_mac import signals
from nanogpt_mac.compare import plan as plans
from nanogpt_mac.compare.config import CompareConfig, chips, validate
from nanogpt_mac.compare.runner import ComparisonRunner
from nanogpt_mac.config import Config
from nanogpt_mac.config import validate as validate_run
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import lock, run_folder, write_json
from nanogpt_mac.machine import probe
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.plan import Plan
from nanogpt_mac.report.words import plural
from nanogpt_mac.train import chosen
from nanogpt_mac.train.display import say

LOCK = ".lock"  # held by the process at work: a second one would end the first one's runs


def run(config: CompareConfig) -> int:
    """Compare as `config` says; the exit code: 0 something was timed, 1 nothing was, 128 + signal stopped."""
    validate(config)
    if names := chips(config):
        from nanogpt_mac.compare import roofline

        validate_run(config)
        roofline.show(config, names)
        return 0
    with contextlib.ExitStack() as stack:
        if config.run is None:
            plan, configs = plans.make(config)
            folder = run_folder(config.run_dir, "compare").resolve()
            stack.enter_context(_alone(folder))
            _refuse_taken(folder, config.run_dir)
            write_json(folder / "plan.json", plan.document())
        else:
            folder = _find(config.run)
            stack.enter_context(_alone(folder))
            plan = _read(folder)
        again = _again(folder)  # before the working folder changes
        if config.run is not None:
            stack.enter_context(contextlib.chdir(plan.cwd))
            configs = plans.configs_of(plan)
        try:
            with signals.watched("compare.py"), probe.awake():
                return _compare(folder, plan, configs)
        except signals.Stop as stopped:
            name = signal.Signals(stopped.signum).name
            print(f"\n{name}: stopped; go on with: {again}", file=sys.stderr, flush=True)
            return stopped.code
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or folder
            print(f"{where}: {error.strerror}; make room, then go on with: {again}", file=sys.stderr, flush=True)
            return 1


def _compare(folder: Path, plan: Plan, configs: dict[str, Config]) -> int:
    from nanogpt_mac.compare import collect, contents, explain, page  # matplotlib: not before the rounds are done
    from nanogpt_mac.report.show import show

    _announce(folder, plan, next(iter(configs.values())))
    ComparisonRunner(folder, plan, configs).carry_out()
    if plan.explain:
        explain.carry_out(folder, plan, configs, collect.collect(folder).variants, say)
    comparison = collect.collect(folder)
    page.publish(folder, comparison)
    chosen.remember(comparison, folder)
    show(contents.report(comparison))
    say(f"everything: python report.py {folder} details=true")
    say(f"report: {folder / 'report.html'}")
    return 0 if any(variant.times for variant in comparison.variants) else 1


def _announce(folder: Path, plan: Plan, config: Config) -> None:
    """What is about to happen, and for how long."""
    labels = [variant.label for variant in plan.variants if not (plan.levers and variant.lever)]
    say(f"{len(plan.variants)} variants: {', '.join(labels)}" + (", and their levers" if plan.levers else ""))
    recipe = f"experiment={plan.experiment}" if plan.experiment else "the full recipe"
    if plan.quick_by_default:
        recipe += " (no accelerator here: experiment=full is nanoGPT's full recipe)"
    model = f"{plural(config.model.n_layer, 'layer')} of {config.model.n_embd}"
    times = f"{many} times " if (many := config.gradient_accumulation_steps) > 1 else ""
    say(f"work: {recipe}: {model}, {times}batch {config.batch_size} x {config.model.block_size}, {config.dtype}")
    for variant in plan.variants:
        if variant.lever:
            say(f"lever: {variant.label}: {variant.lever.what}")
    several = {variant.alone for variant in plan.variants if variant.ranks > 1}
    if alone := [v.label for v in plan.variants if several and v.ranks == 1 and v.name not in several]:
        say(f"in one process alone: {', '.join(alone)}")
    for backend, reason in plan.missing.items():
        say(f"not here: {backend}: {reason}")
    asked = plan.asked
    said = ""
    if asked.rounds or asked.iters:
        said = f"as asked, {asked.rounds or 'some'} rounds of {asked.iters or 'some'} iterations, as far as they fit "
    if plan.explain:
        say("explain=true: after the rounds the parts of each variant are measured")
    say(f"{said}in about {plan.budget_minutes:g} minutes -> {folder}")


# -- going on ---------------------------------------------------------------------------------------------------------


def _find(text: str) -> Path:
    folder = Path(text)
    if not (folder / "plan.json").is_file():
        raise InputError(f"run={text}: holds no plan.json; use a comparison's folder (run=runs/DATE/TIME-compare)")
    return folder.resolve()


def _read(folder: Path) -> Plan:
    try:
        plan = Plan.load(folder / "plan.json")
    except DamagedError as error:
        raise InputError(f"run={folder}: {error}; start a new comparison") from error
    if plan.schema_ > Plan.SCHEMA:
        raise InputError(
            f"run={folder}: plan.json has schema {plan.schema_}, this program's is {Plan.SCHEMA}; use the newer "
            "nanogpt-mac that wrote it"
        )
    if not Path(plan.cwd).is_dir():
        raise InputError(
            f"run={folder}: was started in {plan.cwd}, which is gone; make that folder again or start a new comparison"
        )
    return plan


def _refuse_taken(folder: Path, named: str) -> None:
    """What lies in a folder counts as done, so a new comparison must not find another one's runs there."""
    if any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(f"run_dir={named}: is not empty; use a new or an empty folder (run=... goes on with one)")


def _again(folder: Path) -> str:
    with contextlib.suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    return f"python compare.py run={folder}"


def _alone(folder: Path) -> contextlib.AbstractContextManager[None]:
    return lock(folder / LOCK, refuse=f"run={folder}: another process is using it; wait until it ends")
