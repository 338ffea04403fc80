"""What a comparison will do: its variants, and the work that all of them share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

import nanogpt_mac
from nanogpt_mac import cli, memory
from nanogpt_mac.backends import kinds
from nanogpt_mac.compare import levers
from nanogpt_mac.compare.config import BUDGET_MINUTES, FEW, LEVER_MINUTES, CompareConfig, entries, sizes
from nanogpt_mac.compare.variants import (
    BACKENDS,
    KNOWN,
    NARROWING,
    Machine,
    look_around,
    parse,
    setting,
    unique,
)
from nanogpt_mac.config import Config
from nanogpt_mac.config import validate as validate_run
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import key_of, merged
from nanogpt_mac.records.plan import Asked, GateOptions, Plan, Recipe, Variant

OWN_KEYS = {f.name for f in dataclasses.fields(CompareConfig)} - {f.name for f in dataclasses.fields(Config)}
NOT_PASSED_ON = {*OWN_KEYS, *NARROWING, "run", "run_dir"}
SAME_WORK = ("batch_size", "gradient_accumulation_steps", "seed", "init_from", "data")  # and the model, but its dropout


def make(config: CompareConfig) -> tuple[Plan, dict[str, Config]]:
    """The plan, but for what only the pilot runs can tell, and every variant's config; InputError for bad input."""
    machine = look_around()
    common, experiment = _common(config, machine)
    if config.levers:
        variants = levers.variants(machine, _backends(config, machine), lambda variant: _compose(variant, common))
    else:
        variants = _variants(config, machine)
    variants = list(unique(variants))
    several = [_together(variant, size) for size in sizes(config) for variant in variants if _has_world(variant)]
    if config.ranks and not several:
        able = ", ".join(name for name, kind in kinds.KINDS.items() if kind.world and name not in machine.missing)
        raise InputError(f"ranks={config.ranks}: these variants train in one process; use some of {able}")
    variants += several
    configs = {variant.name: _checked(variant, common) for variant in variants}
    common = _settle_corpus(next(iter(configs.values())), common)
    configs = {variant.name: _checked(variant, common) for variant in variants}
    _refuse_other_work(variants, configs, common)
    work = next(iter(configs.values()))
    extra = max(0, len(variants) - FEW) * LEVER_MINUTES if config.levers or config.ranks else 0.0
    plan = Plan(
        version=nanogpt_mac.__version__,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        variants=tuple(v.model_copy(update={"config": dataclasses.asdict(configs[v.name])}) for v in variants),
        asked=Asked(rounds=config.rounds, iters=config.iters),
        overrides=tuple(common),
        experiment=experiment,
        quick_by_default=experiment == "quick" and not any(key_of(o) == "experiment" for o in config.given),
        recipe=Recipe.model_validate(work),
        seed=config.seed,
        budget_minutes=config.budget_minutes or BUDGET_MINUTES + extra,
        levers=config.levers,
        explain=config.explain,
        gate=GateOptions(parity=config.parity, time_wrong=config.time_wrong),
        cooldown_seconds=config.cooldown_seconds,
        heat_wait_seconds=config.heat_wait_seconds,
        stall_seconds=config.stall_seconds,
        missing=machine.missing,
        cwd=str(Path.cwd()),
    )
    return plan, configs


def configs_of(plan: Plan) -> dict[str, Config]:
    """Every variant's config, of a plan read back: as it was composed then, wherever its text came from."""
    return {
        v.name: TypeAdapter(Config).validate_python(v.config) if v.config else _checked(v, plan.overrides)
        for v in plan.variants
    }


# -- the variants -----------------------------------------------------------------------------------------------------


def _backends(config: CompareConfig, machine: Machine) -> list[str]:
    """The back ends to compare: all that this machine has, or the one that `backend=` names."""
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
        raise InputError(f"{' '.join(narrowing)}: leaves none of the variants {', '.join(texts)}; leave it out")
    return variants


def _has_world(variant: Variant) -> bool:
    kind = kinds.KINDS.get(str(setting(variant, "backend")))
    return kind is not None and bool(kind.world)


def _together(variant: Variant, size: int) -> Variant:
    """The same by `size` processes."""
    name, label = f"{variant.name}-x{size}", f"{variant.label}, {size} processes"
    return variant.model_copy(update={"name": name, "label": label, "ranks": size, "alone": variant.name})


# -- the work ---------------------------------------------------------------------------------------------------------


def _common(config: CompareConfig, machine: Machine) -> tuple[list[str], str | None]:
    """The overrides of every run, and the experiment's name: the full recipe takes an accelerator to end in minutes."""
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
    memory.check(config, config.backend.name)
    return config


def _settle_corpus(config: Config, common: list[str]) -> list[str]:
    """Prepare the corpus once, before many processes want it, and see that the model fits it.

    Where the stand-in had to take over, every run uses it: none may find the network again halfway through.
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

    def work(config: Config) -> dict[str, object]:
        model = {f"model.{k}": v for k, v in dataclasses.asdict(config.model).items() if k != "dropout"}
        return {key: getattr(config, key) for key in SAME_WORK} | model

    expected = work(_checked(Variant(name="common", label=""), common))
    for variant in variants:
        for key, value in work(configs[variant.name]).items():
            if value != expected[key]:
                own = next((o for o in variant.overrides if key_of(o).startswith(key)), f"{key}={value}")
                raise InputError(
                    f"variants=[{variant.label}]: {own}: all variants do the same work; use {own} for all of them"
                )
