"""backend=auto and compile=auto: what the newest comparison of the same work on this machine found fastest.

compare.py leaves that in the cache folder's comparisons.json, so that looking costs milliseconds however many runs
there are. A comparison whose folder is gone counts no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from nanogpt_mac import files
from nanogpt_mac.backends import kinds
from nanogpt_mac.config import Config
from nanogpt_mac.corpus import vocab_size

if TYPE_CHECKING:  # a run that no comparison precedes has no time for them
    from nanogpt_mac.records.comparison import Comparison, Remembered, VariantResult, Work

MACHINE = ("chip", "gpu", "gpu_cores")


class Choice(NamedTuple):
    """How a run is computed. `why`: one line, where a comparison decided."""

    backend: str
    compile: bool
    settings: Mapping[str, Any] = {}
    why: str | None = None


def place() -> Path:
    return files.cache_folder("comparisons.json")


def remember(comparison: Comparison, folder: Path) -> None:
    """Let later runs know what a comparison found, where it has found a fastest variant."""
    from nanogpt_mac.records.base import update
    from nanogpt_mac.records.comparison import Comparisons, Contender, Remembered

    env, fastest = comparison.environment, comparison.verdict.fastest
    fit = sorted(
        filter(_fit, comparison.variants), key=lambda v: (v.name != fastest, v.ratio.value if v.ratio else 0.0)
    )
    if env is None or not fit or fit[0].name != fastest:
        return
    taken = (kinds.KINDS[variant.backend] for variant in fit if variant.backend in kinds.KINDS)
    programs = {program for kind in taken for program in kind.programs()} | {"nanogpt-mac"}
    one = Remembered(
        folder=str(folder.resolve()),
        **{key: getattr(env, key) for key in MACHINE},
        versions={program: env.versions.get(program) for program in sorted(programs)},
        work=comparison.work,
        contenders=tuple(
            Contender(label=v.label, backend=v.backend or "", compile=bool(v.compile), settings=_settings(v))
            for v in fit
        ),
    )
    update(Comparisons, place(), lambda known: known.with_one(one))


def choose(config: Config, environment: Callable[[], Mapping[str, Any]], launcher: str = "") -> Choice:
    """The back end and the way of computing that `config` means here; `environment` is probe.environment's answer.

    `launcher`: which has started several processes, and can do so with some back ends alone.
    InputError as of kinds.resolve and resolve_compile.
    """
    given = {"backend": config.backend.name, "compile": config.compile}
    auto = " ".join(f"{key}=auto" for key, value in given.items() if value == "auto")
    if auto and (found := _newest(config, environment)):
        for one in found.contenders:
            asked = given["backend"] in ("auto", one.backend) and given["compile"] in ("auto", one.compile)
            kind = kinds.KINDS.get(one.backend)
            if asked and kind and kind.is_for(launcher) and kinds.missing(one.backend) is None:
                why = f"{auto}: {one.label}, the fastest in {found.folder}"
                return Choice(one.backend, one.compile, one.settings, why)
    name = kinds.resolve(config.backend.name, launcher)
    return Choice(name, kinds.resolve_compile(config.compile, name))


def _newest(config: Config, environment: Callable[[], Mapping[str, Any]]) -> Remembered | None:
    """The newest comparison of the same work, if it was made by this machine and these programs."""
    by_hand = any(key.startswith("backend.") for key in config.named)  # other work for the back end than was compared
    if by_hand or config.init_from not in ("scratch", "resume"):  # another model's sizes are not known yet
        return None
    if not place().is_file():
        return None
    from nanogpt_mac.records.base import cached
    from nanogpt_mac.records.comparison import Comparisons

    for found in cached(Comparisons, place()).found:
        if not _same_work(config, found.work) or not Path(found.folder, "comparison.json").is_file():
            continue
        facts = environment()
        versions = facts.get("versions") or {}
        if any(facts.get(key) != getattr(found, key) for key in MACHINE):
            continue
        if all(versions.get(program) == version for program, version in found.versions.items()):
            return found
    return None


def _same_work(config: Config, work: Work) -> bool:
    sizes, wanted = work.sizes(), asdict(config.model)
    wanted["vocab_size"] = wanted["vocab_size"] or vocab_size(config.data) or sizes.get("vocab_size")
    keys = ("batch_size", "gradient_accumulation_steps", "dtype", "matmul_precision")
    return sizes == wanted and all(getattr(work, key) == getattr(config, key) for key in keys)


def _fit(variant: VariantResult) -> bool:
    from nanogpt_mac.records.comparison import VariantState
    from nanogpt_mac.records.plan import ParityState

    right = variant.state is VariantState.OK and variant.parity is ParityState.PASS and variant.same_work
    plain = all(override.startswith(("backend=", "compile=", "backend.")) for override in variant.overrides or ())
    timed = variant.ranked and variant.median is not None and not variant.shared_machine and not variant.simulated
    return right and plain and timed and variant.backend is not None


def _settings(variant: VariantResult) -> dict[str, Any]:
    given = (override.partition("=") for override in variant.overrides or () if override.startswith("backend."))
    return {key.removeprefix("backend."): yaml.safe_load(value) for key, _, value in given}
