"""`compare.py explain=true`: after the rounds the parts of each variant are measured, and a verdict gets its reason.

FOLDER/parts/bench.json             as `bench.py suite=parts` writes it; a comparison that has it is explained
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nanogpt_mac.compare import runs
from nanogpt_mac.config import Config
from nanogpt_mac.files import write_json
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.bench import Way
from nanogpt_mac.records.comparison import VariantResult
from nanogpt_mac.records.parts import Explanation, PartsBench
from nanogpt_mac.records.plan import Plan
from nanogpt_mac.suites.account import accounts, reason

SHARE = 0.3  # of a comparison's budget is for it
PLACE = "parts"


def seconds(plan: Plan) -> float:
    """Of the budget, kept for it."""
    return SHARE * 60 * plan.budget_minutes if plan.explain else 0.0


def carry_out(
    folder: Path,
    plan: Plan,
    configs: Mapping[str, Config],
    variants: Sequence[VariantResult],
    say: Callable[[str], None],
) -> None:
    """Measure the parts of those `variants` that were timed, unless that is done; raises only when it is stopped."""
    place = folder / PLACE
    try:
        if not plan.explain or PartsBench.load(place / "bench.json"):
            return
    except (DamagedError, FileNotFoundError):
        shutil.rmtree(place, ignore_errors=True)
    from nanogpt_mac.suites import parts
    from nanogpt_mac.suites.config import BenchConfig
    from nanogpt_mac.suites.run import Running

    scripts = {variant.name for variant in plan.variants if variant.script}
    ways = [_way(v) for v in variants if v.median and v.backend and v.name not in scripts and (v.ranked or not v.lever)]
    if not ways:
        return
    say(f"explain: the parts of {', '.join(way.label for way in ways)}")
    began, budget_s = time.monotonic(), seconds(plan)
    config = BenchConfig(suite="parts", seed=plan.seed, budget_minutes=budget_s / 60)
    planned = parts.plan_of(ways, {way.name: configs[way.name] for way in ways}, config)
    place.mkdir()
    running = Running(parts.SUITE, config, planned, place, began + budget_s)
    running.carry_out()
    write_json(place / "bench.json", running.bench(time.monotonic() - began).document())


def _way(variant: VariantResult) -> Way:
    able = variant.capabilities
    return Way(
        name=variant.name,
        label=variant.label,
        backend=variant.backend or "",
        device=variant.device or "",
        compiled=bool(variant.compile),
        accelerator=bool(able and able.accelerator),
        simulated=variant.simulated,
    )


def read(folder: Path, ranked: Sequence[VariantResult], problems: list[str]) -> Explanation | None:
    """What the parts say of why each of `ranked` is slower than the first; None where they were not measured."""
    bench = runs.load(PartsBench, folder / PLACE / "bench.json", problems, usual=False)
    if bench is None:
        return None
    found = {account.name: account for account in accounts(bench)}
    slower = [v for v in ranked[1:] if v.name in found and v.ratio and v.ratio.tie is not True]
    first = ranked[0] if ranked and ranked[0].name in found else None
    reasons = tuple(
        reason(found[first.name], found[v.name], f"{first.label} is {v.ratio.value:.3g} x as fast as {v.label}")
        for v in slower
        if first and v.ratio
    )
    return Explanation(accounts=tuple(found.values()), reasons=reasons, seconds=bench.seconds, complete=bench.complete)
