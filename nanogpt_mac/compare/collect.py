"""A comparison's folder, in any state of completion, as one document: comparison.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

import nanogpt_mac
from nanogpt_mac.backends import kinds
from nanogpt_mac.compare import doubts, explain, figures, losses, published, runs, verdict
from nanogpt_mac.compare.runs import Run
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.comparison import (
    Comparison,
    FailedRun,
    PlanFacts,
    VariantResult,
    Work,
)
from nanogpt_mac.records.plan import Parity, ParityResult, ParityState, Plan, Recipe, Variant
from nanogpt_mac.records.run import Outcome, RunState
from nanogpt_mac.report.words import text

ROUND = re.compile(r"(\d+|pilot)-(.+)")  # a run's folder: its round and its variant


def read(folder: Path) -> Comparison:
    """A comparison: collected from its runs, or its comparison.json where they were not kept."""
    if (folder / "rounds").is_dir() or not (folder / "comparison.json").is_file():
        return collect(folder)
    problems: list[str] = []
    try:
        found = Comparison.load(folder / "comparison.json")
    except DamagedError as error:
        raise InputError(f"{folder}: {error}; use a folder with its rounds/ or a whole comparison.json") from error
    if found.schema_ > Comparison.SCHEMA:
        facts = {"file": "comparison.json", "schema": found.schema_, "known": Comparison.SCHEMA}
        problems.append(doubts.Doubt.NEWER.say(**facts))
    variants = tuple(
        variant.model_copy(update={"capabilities": kinds.recorded(variant.backend, variant.device)})
        if variant.capabilities is None and variant.backend and variant.device
        else variant
        for variant in found.variants
    )
    return found.model_copy(update={"warnings": (*problems, *found.warnings), "variants": variants})


def collect(folder: Path) -> Comparison:
    """What a comparison's folder says, which may still be at work. InputError for any other folder."""
    files = _Files.read(Path(folder))
    peers = {variant.name for variant in files.planned if variant.script}  # which draw batches of their own
    ours = {name: rounds for name, rounds in files.runs.items() if name not in peers}
    ranking = verdict.rank(losses.hold([_variant(variant, files) for variant in files.planned], ours))
    variants = ranking.variants
    said = verdict.verdict(ranking, files.complete, files.parity.unchecked if files.parity else ())
    if files.work.stand_in:
        more = "The corpus is the stand-in: losses say nothing about Shakespeare."
        said = said.model_copy(update={"sentence": f"{said.sentence} {more}"})
    explanation = explain.read(files.folder, ranking.ranked, files.problems)
    if explanation and explanation.reasons:  # against the second: what the verdict is about
        said = said.model_copy(update={"sentence": f"{said.sentence} Why: {explanation.reasons[0].sentence}"})
    finished = files.finished()
    environments = [run.env for run in finished if run.env]
    heats = [run.outcome.heat for run in finished if run.outcome]
    plan = files.plan
    warnings = files.problems + doubts.of_work(plan, files.work, variants)
    warnings += doubts.of_machine(environments, (event for run in finished for event in run.events), heats)
    return Comparison(
        created=plan.created if plan else None,
        folder=str(folder),
        version=(plan.version if plan else "") or nanogpt_mac.__version__,
        complete=files.complete,
        work=files.work.model_copy(update={"experiment": plan.experiment if plan else None}),
        machine=figures.machine(next(iter(environments), None), [variant.capabilities for variant in variants]),
        environment=next(iter(environments), None),
        plan=files.plan_facts(),
        verdict=said,
        warnings=tuple(warnings),
        parity=files.parity,
        levers=verdict.lever_table([v for v in variants if not v.shared_machine])
        if any(variant.lever for variant in variants)
        else None,
        published=published.beside(files.work),
        explanation=explanation,
        variants=variants,
    )


# -- what is in the folder --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """A comparison's folder, read once."""

    folder: Path
    plan: Plan | None
    parity: Parity | None
    runs: Mapping[str, Mapping[int, Run]]  # variant -> round -> every run that left a trace
    pilots: Mapping[str, Run]
    problems: list[str]

    @classmethod
    def read(cls, folder: Path) -> _Files:
        problems: list[str] = []
        plan = runs.load(Plan, folder / "plan.json", problems)
        parity = runs.load(Parity, folder / "parity.json", problems, usual=False)
        found: dict[str, dict[int, Run]] = {}
        pilots: dict[str, Run] = {}
        for path in sorted((folder / "rounds").glob("*-*")):
            matched = ROUND.fullmatch(path.name)
            if not matched or not runs.is_run(path):  # made, but nothing written yet
                continue
            if matched[1] == "pilot":
                pilots[matched[2]] = runs.read(path)
            else:
                found.setdefault(matched[2], {})[int(matched[1])] = runs.read(path)
        if not plan and not found and not pilots:
            what = "; ".join(problems) if folder.is_dir() else "is not a folder"
            raise InputError(f"{folder}: {what}; use a folder that compare.py wrote, with plan.json and rounds/")
        by_round = {name: dict(sorted(rounds.items())) for name, rounds in found.items()}
        return cls(folder, plan, parity, by_round, pilots, problems)

    @cached_property
    def planned(self) -> tuple[Variant, ...]:
        """The plan's variants, then any that only a folder tells of."""
        planned = self.plan.variants if self.plan else ()
        rest = sorted({*self.runs, *self.pilots} - {variant.name for variant in planned})
        return (*planned, *(Variant(name=name, label=name) for name in rest))

    def checked(self, name: str) -> ParityResult:
        """What the gate said of a variant; what cannot be read is an error, never a pass."""
        if self.parity is None and not (self.folder / "parity.json").exists():
            return ParityResult(state=ParityState.NOT_RUN)
        lacking = "parity.json does not name it" if self.parity else "parity.json cannot be read"
        found = self.parity.variants.get(name) if self.parity else None
        return found or ParityResult(state=ParityState.ERROR, reason=lacking)

    @property
    def rounds(self) -> int | None:
        """How many were planned."""
        order = self.plan.order if self.plan else None
        return len({r for r, _ in order}) if order else self.plan.rounds if self.plan else None

    def finished(self) -> list[Run]:
        """All that ended well, by round, the pilots last."""
        by_round = sorted((r, name) for name, some in self.runs.items() for r in some)
        ordered = [self.runs[name][r] for r, name in by_round] + [run for _, run in sorted(self.pilots.items())]
        return [run for run in ordered if run.state is RunState.DONE]

    @cached_property
    def work(self) -> Work:
        """The work that most of the variants' runs did; the first planned decides where as many did one as another."""
        works: list[Work] = []
        for variant in [v for v in self.planned if not v.lever] or self.planned:
            rounds = self.runs.get(variant.name, {}).values()
            some = [run.work for run in rounds if run.state is RunState.DONE]
            works += some or ([self.pilots[variant.name].work] if variant.name in self.pilots else [])
        if not works:
            return Work()
        most = Counter(work.key() for work in works).most_common(1)[0][0]
        return next(work for work in works if work.key() == most)

    @cached_property
    def complete(self) -> bool:
        """Whether every planned run has ended, well or not."""
        order = self.plan.order if self.plan else None
        if not order:  # nothing to time: complete when every variant's pilot has failed
            return order == () and all(v.name in self.pilots for v in self.plan.variants) if self.plan else False
        ended = {(r, n) for n, some in self.runs.items() for r, run in some.items() if run.state != RunState.UNFINISHED}
        return all(place in ended for place in order)

    @cached_property
    def recipe(self) -> Recipe | None:
        """How long the full recipe trains and evaluates: as planned, or of an older plan's experiment."""
        if self.plan is None:
            return None
        if self.plan.recipe:
            return self.plan.recipe
        from nanogpt_mac import cli

        try:
            return Recipe.model_validate(
                cli.compose([f"experiment={self.plan.experiment}"] if self.plan.experiment else [])
            )
        except InputError:  # this version has no such experiment
            return None

    def plan_facts(self) -> PlanFacts:
        plan = self.plan
        every = [run.outcome for some in self.runs.values() for run in some.values()]
        every += [run.outcome for run in self.pilots.values()]
        spans = [span for outcome in every if outcome and (span := _span(outcome))]
        start = min(s for s, _ in spans).isoformat(timespec="seconds") if spans else plan.created if plan else None
        end = max(e for _, e in spans).isoformat(timespec="seconds") if spans and self.complete else None
        shared = {"rounds": plan.rounds, "iters": plan.iters, "budget_minutes": plan.budget_minutes} if plan else {}
        return PlanFacts.model_validate(shared | {"started": start, "finished": end})


def _span(outcome: Outcome) -> tuple[datetime, datetime] | None:
    try:
        start = datetime.fromisoformat(outcome.started or "").astimezone()
        return start, start + timedelta(seconds=outcome.seconds)
    except (ValueError, OverflowError):
        return None


# -- one variant ------------------------------------------------------------------------------------------------------


def _variant(variant: Variant, files: _Files) -> VariantResult:
    """Everything about one variant but its ratio to the fastest."""
    name, pilot = variant.name, files.pilots.get(variant.name)
    checked = files.checked(variant.alone or name)  # each rank computes what one process does
    done, failed = _sorted(files.runs.get(name, {}), pilot, files.work)
    found = figures.of_variant(done, pilot, files.recipe, files.rounds)
    one = next(iter(done.values()), pilot)
    same_work = one is not None and one.work.key() == files.work.key()
    said = [(run.state, run.reason or "") for run in failed]
    state, reason = doubts.state_of(checked.state, checked.reason, len(done), said, files.complete)
    warnings = found.warnings
    if one and done and not same_work and not variant.lever:
        warnings = (*warnings, doubts.Doubt.OTHER_WORK.say(difference=one.work.difference(files.work)))
    fallbacks = runs.free(files.folder / "fallbacks" / f"{name}.json", files.problems)
    compiled = (fallbacks or {}).get("compile_report")
    return VariantResult(
        **dict(found) | {"warnings": warnings},
        name=name,
        label=text(variant.label, 80),
        note=text(variant.note, 80) if variant.note else "",
        overrides=variant.overrides,
        lever=variant.lever,
        state=state,
        reason=reason,
        parity=checked.state,
        runs=len(done),
        failed_runs=failed,
        same_work=same_work,
        # A lever is an ablation, ranked only where it is also a variant of its own: compiled or not.
        ranked=same_work
        and not found.shared_machine
        and variant.ranks == 1
        and (variant.lever is None or variant.lever.key == "compile"),
        ranks=variant.ranks,
        alone=variant.alone,
        fallbacks=fallbacks,
        compile_report=compiled if isinstance(compiled, dict) else None,
    )


def _sorted(some: Mapping[int, Run], pilot: Run | None, wanted: Work) -> tuple[dict[int, Run], tuple[FailedRun, ...]]:
    """A variant's runs that count, all of the same work (the `wanted` one if there is one), and those that do not."""
    ended = {r: run for r, run in some.items() if run.state is RunState.DONE}
    timed = {r: run for r, run in ended.items() if len(run.kept)}
    keys = {r: run.work.key() for r, run in timed.items()}
    own = wanted.key() if wanted.key() in keys.values() else next(iter(keys.values()), None)
    done = {r: run for r, run in timed.items() if keys[r] == own}
    one = next(iter(done.values()), pilot)
    every: list[tuple[int | None, Run]] = [(None, pilot)] if pilot else []
    failed = [
        (r, run.state, run.reason)
        for r, run in [*every, *some.items()]
        if run.state not in (RunState.DONE, RunState.UNFINISHED)
    ]
    for r, run in ended.items():
        if r not in timed:
            failed.append((r, RunState.UNREADABLE, "; ".join(run.problems) or "no timed iteration"))
    for r, run in timed.items():
        if r not in done:
            other = (one and run.work.difference(one.work)) or "not fully recorded"
            failed.append((r, RunState.OTHER_WORK, other))
    return done, tuple(FailedRun(round=r, state=state, reason=reason) for r, state, reason in failed)
