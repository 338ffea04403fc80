"""What a comparison will do: its variants, the work that all of them share, and what is written of it to plan.json."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import nanogpt_mac
from nanogpt_mac import cli
from nanogpt_mac.backends import kinds
from nanogpt_mac.compare import levers
from nanogpt_mac.compare.config import BUDGET_MINUTES, LEVER_MINUTES, CompareConfig, entries
from nanogpt_mac.compare.variants import (
    BACKENDS,
    KNOWN,
    NARROWING,
    Machine,
    Variant,
    look_around,
    parse,
    setting,
    unique,
)
from nanogpt_mac.config import Config
from nanogpt_mac.config import validate as validate_run
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import write_json
from nanogpt_mac.overrides import key_of, merged

SCHEMA = 1
OWN_KEYS = {f.name for f in dataclasses.fields(CompareConfig)} - {f.name for f in dataclasses.fields(Config)}
KEYS = {"variants", "order", "asked", "overrides", "experiment", "quick_by_default", "seed", "budget_minutes", "levers"}
KEYS |= {"gate", "cooldown_seconds", "heat_wait_seconds", "stall_seconds", "missing", "cwd"}  # what a plan must have
NOT_PASSED_ON = {*OWN_KEYS, *NARROWING, "run", "run_dir"}
SAME_WORK = ("batch_size", "gradient_accumulation_steps", "seed", "init_from", "data")  # and the model, but its dropout


def make(config: CompareConfig) -> tuple[dict[str, Any], dict[str, Config]]:
    """plan.json, but for what only the pilot runs can tell, and every variant's config; InputError for bad input."""
    machine = look_around()
    if any(key_of(override) == "backend.blas" for override in config.given):
        machine = dataclasses.replace(machine, lends_blas=False)
    common, experiment = _common(config, machine)
    if config.levers:
        variants = levers.variants(machine, _backends(config, machine), lambda variant: _compose(variant, common))
    else:
        variants = _variants(config, machine)
    variants = list(unique(variants))
    configs = {variant.name: _checked(variant, common) for variant in variants}
    common = _settle_corpus(next(iter(configs.values())), common)
    configs = {variant.name: _checked(variant, common) for variant in variants}
    _refuse_other_work(variants, configs, common)
    recipe = next(iter(configs.values()))
    extra = max(0, len(variants) - 4) * LEVER_MINUTES if config.levers else 0.0
    plan = {
        "schema": SCHEMA,
        "version": nanogpt_mac.__version__,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "variants": [variant.to_json() for variant in variants],
        "rounds": None,  # these three are known after the pilot runs
        "iters": None,
        "order": None,
        "asked": {"rounds": config.rounds, "iters": config.iters},
        "overrides": common,
        "experiment": experiment,
        "quick_by_default": experiment == "quick" and not any(key_of(o) == "experiment" for o in config.given),
        "recipe": {key: getattr(recipe, key) for key in ("max_iters", "eval_interval", "eval_iters")},
        "seed": config.seed,
        "budget_minutes": config.budget_minutes or BUDGET_MINUTES + extra,
        "levers": config.levers,
        "gate": {"parity": config.parity, "time_wrong": config.time_wrong},
        "cooldown_seconds": config.cooldown_seconds,
        "heat_wait_seconds": config.heat_wait_seconds,
        "stall_seconds": config.stall_seconds,
        "missing": machine.missing,
        "cwd": str(Path.cwd()),
    }
    return plan, configs


def damaged(plan: dict[str, Any]) -> str | None:
    """The first key of a plan read back that does not hold what `make` and the pilot runs write; None if all do."""

    def count(value: Any) -> bool:
        return isinstance(value, int) and value > 0

    def seconds(value: Any) -> bool:
        return isinstance(value, int | float) and 0 <= value < math.inf

    def variants(value: Any) -> bool:
        try:
            names = [Variant.from_json(variant).name for variant in value]
        except (KeyError, TypeError):
            return False
        return len(names) == len(set(names)) > 0 and all(isinstance(name, str) for name in names)

    def order(value: Any) -> bool:
        names = {variant.name for variant in variants_of(plan)}
        return value is None or all(
            isinstance(e, list) and len(e) == 2 and type(e[0]) is int and e[1] in names for e in value
        )

    def of_variants(number: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """A number for each variant in the order."""
        return lambda value: not plan["order"] or all(number((value or {}).get(name)) for _, name in plan["order"])

    checks: dict[str, Callable[[Any], bool]] = {
        "variants": variants,
        "asked": lambda value: all(value[key] is None or count(value[key]) for key in ("rounds", "iters")),
        "overrides": lambda value: isinstance(value, list) and all(isinstance(o, str) for o in value),
        "gate": lambda value: all(isinstance(value[key], bool) for key in ("parity", "time_wrong")),
        "recipe": lambda value: value is None or isinstance(value, dict),
        "missing": lambda value: isinstance(value, dict),
        "cwd": lambda value: isinstance(value, str),
        "seed": lambda value: isinstance(value, int),
        **dict.fromkeys(("budget_minutes", "cooldown_seconds", "heat_wait_seconds", "stall_seconds"), seconds),
        "order": order,
        "rounds": lambda value: plan["order"] is None or isinstance(value, int),
        "iters": of_variants(count),
        "warmup": of_variants(lambda value: isinstance(value, int)),
        "share": of_variants(seconds),
    }
    for key, holds in checks.items():
        try:
            if not holds(plan.get(key)):
                return key
        except (KeyError, TypeError, AttributeError):
            return key
    return None


def configs_of(plan: dict[str, Any]) -> dict[str, Config]:
    """Every variant's config, of a plan read back."""
    return {variant.name: _checked(variant, plan["overrides"]) for variant in variants_of(plan)}


def variants_of(plan: dict[str, Any]) -> list[Variant]:
    return [Variant.from_json(variant) for variant in plan["variants"]]


def write(folder: Path, plan: dict[str, Any]) -> None:
    write_json(folder / "plan.json", plan)


def order(rounds: dict[str, list[int]], seed: int) -> list[list[Any]]:
    """[[round, variant], ...]: round by round, the variants of each (those that take part in it) in a drawn order."""
    drawn = random.Random(f"order-{seed}")
    planned: list[list[Any]] = []
    for number in range(max(max(numbers) for numbers in rounds.values()) + 1):
        taking_part = [name for name, numbers in rounds.items() if number in numbers]
        drawn.shuffle(taking_part)
        planned += [[number, name] for name in taking_part]
    return planned


# -- the variants ---------------------------------------------------------------------------------------------------------


def _backends(config: CompareConfig, machine: Machine) -> list[str]:
    """The back ends that are meant: all that are there, or the one that `backend=` names."""
    name = config.backend.name
    if name == "auto":
        return [backend for backend in BACKENDS if backend not in machine.missing]
    return [kinds.resolve(name)]


def _variants(config: CompareConfig, machine: Machine) -> list[Variant]:
    backends = _backends(config, machine)
    texts = entries(config.variants)
    if texts is None:
        texts = [name for name, (backend, _, _) in KNOWN.items() if backend in backends]
    variants = [parse(text, machine) for text in texts]
    variants = [variant for variant in variants if setting(variant, "backend") in backends]
    if config.compile != "auto":
        variants = [variant for variant in variants if setting(variant, "compile") == str(config.compile).lower()]
    if not variants:
        narrowing = [o for o in config.given if key_of(o) in NARROWING]
        raise InputError(f"{' '.join(narrowing)}: leaves none of the variants {', '.join(texts)}")
    return variants


# -- the work ---------------------------------------------------------------------------------------------------------


def _common(config: CompareConfig, machine: Machine) -> tuple[list[str], str | None]:
    """What every run is told, and the experiment's name: the full recipe needs an accelerator to be done in minutes."""
    common = [override for override in config.given if key_of(override) not in NOT_PASSED_ON]
    keys = {key_of(override) for override in common}
    if not keys & {"experiment", "model"} and not machine.accelerated:
        common.insert(0, "experiment=quick")
    common = merged(common)
    experiment = next((o.partition("=")[2] for o in common if key_of(o) == "experiment"), None)
    return common, None if experiment in (None, "full") else experiment


def _compose(variant: Variant, common: Sequence[str]) -> Config:
    return copy.deepcopy(_composed(tuple(merged(common, variant.overrides))))


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    """Composing takes a tenth of a second, and every variant is looked at more than once."""
    config: Config = cli.compose(overrides)
    return config


def _checked(variant: Variant, common: Sequence[str]) -> Config:
    config = _compose(variant, common)
    config.given = [key_of(override) for override in common]  # of the work: the same for all
    validate_run(config)
    return config


def _settle_corpus(config: Config, common: list[str]) -> list[str]:
    """Prepare the corpus once, before many processes want it, and see that the model fits it.

    Where the stand-in had to take over, all runs are told so: none may find the network again halfway through.
    """
    from nanogpt_mac.corpus import prepare
    from nanogpt_mac.train.source import open_source

    corpus = prepare(config.data)
    open_source(config, corpus)
    if not corpus.stand_in or config.data.name == "stand_in":
        return common
    kept = [o for o in common if not key_of(o).startswith("data.") or key_of(o) == "data.dir"]
    return merged(kept, ["data=stand_in"])


def _refuse_other_work(variants: Sequence[Variant], configs: dict[str, Config], common: Sequence[str]) -> None:
    """Times of different work cannot be compared. (Dropout changes what is learnt, but neither FLOPs nor sizes.)"""

    def work(config: Config) -> dict[str, Any]:
        model = {f"model.{k}": v for k, v in dataclasses.asdict(config.model).items() if k != "dropout"}
        return {key: getattr(config, key) for key in SAME_WORK} | model

    expected = work(_checked(Variant("", "", ()), common))
    for variant in variants:
        for key, value in work(configs[variant.name]).items():
            if value != expected[key]:
                said = next((o for o in variant.overrides if key_of(o).startswith(key)), f"{key}={value}")
                raise InputError(
                    f"variants=[{variant.label}]: {said}: all variants do the same work; allowed is {said} for all of them"
                )
