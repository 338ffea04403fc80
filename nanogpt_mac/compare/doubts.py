"""Every warning of a comparison in one place: its words, what to do about it, and when it is said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

from nanogpt_mac.measure import stats
from nanogpt_mac.records.comparison import Comparison, VariantResult, VariantState, Work
from nanogpt_mac.records.figures import Steadiness
from nanogpt_mac.records.plan import ParityState, Plan
from nanogpt_mac.records.run import Environment, EventRow, Heat, RunState
from nanogpt_mac.report.words import listed, plural, text

MARKS = {
    VariantState.WRONG: "WRONG",
    VariantState.IN_DOUBT: "in doubt",
    VariantState.FAILED: "FAILED",
    VariantState.PARTIAL: "partial",
    VariantState.WAITING: "not timed yet",
}
"""What follows a variant's label everywhere."""
PARITY = {ParityState.FAIL: "WRONG", ParityState.ERROR: "could not be checked"}
"""How a state of the gate is worded where not by its own name."""

UNSTABLE = 0.02  # log standard deviation of round medians
SHORT_SECONDS, FEW_ITERATIONS, FEW_ROUNDS = 0.5, 10, 5
SLOW_START = 0.05
MANY_OUTLIERS = 0.05
MIXED = {"versions": "program versions", "chip": "machines", "git": "commits of this project"}
HOT = ("moderate", "heavy", "trapping", "sleeping")


class Doubt(Enum):
    """A warning: what was seen, and what to do about it."""

    # of a variant's times
    FEW_ROUNDS = "too few rounds: {rounds}; intervals need {few} or more", "Raise rounds= or budget_minutes=."
    UNSTABLE = (
        "unstable: the rounds' medians vary by {noise:.1f} % (standard deviation); with this noise {rounds} rounds can "
        "only detect {least}",
        "Close other programs or raise rounds=.",
    )
    SHORT = "too short: a round has {iterations:.0f} timed iterations in {seconds:.2g} s", "Raise iters=."
    SLOW_START = (
        "slow start: the first tenth of the timed iterations is {percent:.0f} % slower than the rest",
        "Raise timing_warmup=.",
    )
    OUTLIERS = (
        "outliers: {percent:.0f} % of the iterations are far above their round's median, the slowest took "
        "{worst:.4g} ms",
        "Something else was running: close other programs.",
    )
    SLEPT = "slept: the machine slept during {iterations}, which are left out", "Keep it awake and plugged in."
    SHORTENED = (
        "cut: {runs} took longer than planned, or than budget_minutes allows, and ended early; what was done counts",
        "Close other programs or raise budget_minutes=.",
    )
    SHARED_CLOCK = (
        "clock: sync=interval spreads time evenly over several iterations, so single ones are not known",
        "Use sync=completion to see them.",
    )
    COARSE_CLOCK = (
        "clock: too coarse; more than half of a round's times are duplicates",
        "Iterations are too short for this clock: use a larger model or batch_size=.",
    )
    IMPOSSIBLE_MFU = (
        "mfu_measured is above 100 %, which is impossible: the measured peak or the time is wrong",
        "Raise gemm_seconds= to measure the peak for longer.",
    )
    BELOW_FLOOR = (
        "faster than its roofline: the peak or bandwidth is wrong, or the model fits in a cache",
        "Check the rates under MFU and roofline against the chip's data sheet.",
    )
    SHARED_MACHINE = (
        "not ranked: other runs used this machine at the same time (shared_machine=true)",
        "Run it alone, in a sweep with hydra/launcher=basic.",
    )
    OTHER_WORK = "not ranked: it does other work ({difference})", ""

    # of the comparison
    CUT = "only {done} of {rounds} rounds were run: {reason}", "Raise budget_minutes= for all of them."
    SPARED = (
        "slow, and so in fewer rounds, for the others to have theirs: {slow}",
        "Raise budget_minutes= for narrower intervals.",
    )
    FEWER = "iters={asked} do not fit budget_minutes: runs have {iters}", "Raise budget_minutes= for all of them."
    SIMULATED = "simulated device: its times say nothing about a Mac", ""
    STAND_IN = "the corpus is the built-in stand-in: times are of the same work, losses are of another text", ""
    UNCHECKED = "parity was not checked: the variants may compute different things", "Use parity=true."
    BATTERY = "on battery: macOS may slow the chip down", "Plug the machine in."
    LOW_POWER = "Low Power Mode is on: it slows the chip down", "Turn it off in System Settings, Battery."
    HOT = "thermal pressure was {states} at times: the chip was slowed down", "Let it cool or raise cooldown_seconds=."
    THROTTLED = (
        "throttled: {labels} slowed down by more than {percent:g} % during the runs",
        "Let the machine cool or raise cooldown_seconds=.",
    )
    MIXED = "the runs come from different {what}", "Start a new comparison so that they match."
    NEWER = (
        "{file} has schema {schema}, newer than this program's {known}: something may be missing",
        "Update nanogpt-mac.",
    )

    def __init__(self, words: str, hint: str) -> None:
        self.words, self.hint = words, hint

    def say(self, **facts: object) -> str:
        """The warning as a line, with what to do about it."""
        return f"{self.words.format(**facts)}. {self.hint}" if self.hint else self.words.format(**facts)


# -- when each is said ------------------------------------------------------------------------------------------------


def of_times(
    steady: Steadiness | None, slept: int = 0, sync: str | None = None, planned: int | None = None
) -> list[str]:
    """What a reader should know before believing a variant's times.

    `slept`: iterations left out because the machine slept; `sync`: the run's policy; `planned`: rounds that were.
    """
    if steady is None:
        return []
    lines = []
    if steady.rounds < FEW_ROUNDS and planned != 1:
        lines.append(Doubt.FEW_ROUNDS.say(rounds=steady.rounds, few=FEW_ROUNDS))
    if steady.noise is not None and steady.noise > UNSTABLE:
        share = steady.detectable or 0.0
        least = f"differences of {100 * share:.0f} % or more" if share < 1 else "differences beyond a factor of two"
        lines.append(Doubt.UNSTABLE.say(noise=100 * steady.noise, rounds=steady.rounds, least=least))
    if steady.seconds < SHORT_SECONDS or steady.iterations < FEW_ITERATIONS:
        lines.append(Doubt.SHORT.say(iterations=steady.iterations, seconds=steady.seconds))
    if steady.slow_start is not None and steady.slow_start > SLOW_START:
        lines.append(Doubt.SLOW_START.say(percent=100 * steady.slow_start))
    if steady.outliers.share > MANY_OUTLIERS:
        lines.append(Doubt.OUTLIERS.say(percent=100 * steady.outliers.share, worst=steady.outliers.worst_ms))
    if slept:
        lines.append(Doubt.SLEPT.say(iterations=plural(slept, "iteration")))
    if sync == "interval":
        lines.append(Doubt.SHARED_CLOCK.say())
    elif steady.coarse:
        lines.append(Doubt.COARSE_CLOCK.say())
    return lines


def of_work(plan: Plan | None, work: Work, variants: Sequence[VariantResult]) -> list[str]:
    """What to know of the comparison as it was planned and carried out."""
    lines = []
    if plan and plan.cut:
        lines.append(Doubt.CUT.say(done=plan.rounds, rounds=plan.cut.rounds, reason=plan.cut.reason))
    spared = {name: share for name, share in (plan.share or {}).items() if share < 1} if plan else {}
    if plan and spared:
        counts = {name: (plan.iters or {}).get(name, 0) for name in spared}
        slow = [
            f"{next((v.label for v in variants if v.name == name), name)} in {round(share * (plan.rounds or 0))} of "
            f"{plan.rounds} (of {plural(counts[name], 'iteration')})"
            for name, share in spared.items()
        ]
        lines.append(Doubt.SPARED.say(slow=listed(slow)))
    if plan and plan.asked.iters and any(n < plan.asked.iters for n in (plan.iters or {}).values()):
        iters = listed([f"{n} ({name})" for name, n in (plan.iters or {}).items()])
        lines.append(Doubt.FEWER.say(asked=plan.asked.iters, iters=iters))
    if any(variant.simulated for variant in variants):
        lines.append(Doubt.SIMULATED.say())
    if any(variant.shared_machine for variant in variants):
        lines.append(Doubt.SHARED_MACHINE.say())
    if work.stand_in:
        lines.append(Doubt.STAND_IN.say())
    if all(variant.parity is ParityState.NOT_RUN for variant in variants):
        lines.append(Doubt.UNCHECKED.say())
    throttled = [variant.label for variant in variants if variant.drift and variant.drift.throttled]
    if throttled:
        lines.append(Doubt.THROTTLED.say(labels=listed(throttled), percent=stats.THROTTLED_PERCENT))
    return lines


def of_machine(
    environments: Sequence[Environment], events: Iterable[EventRow], heats: Iterable[Heat | None]
) -> list[str]:
    """What the machine was doing besides: of its finished runs' environments, events and heat."""
    events, lines = list(events), []
    if "battery" in {e.power_source for e in environments} | {event.power_source for event in events}:
        lines.append(Doubt.BATTERY.say())
    if any(e.low_power_mode for e in environments):
        lines.append(Doubt.LOW_POWER.say())
    states = {event.thermal_state for event in events}
    states |= {state for heat in heats if heat for state in (heat.at_start, heat.after)}
    if hot := [state for state in HOT if state in states]:
        lines.append(Doubt.HOT.say(states=listed(hot)))
    # Runs of one comparison must come from one machine and one set of programs; a resumed one's may not.
    for key, what in MIXED.items():
        if len({repr(value) for e in environments if (value := getattr(e, key))}) > 1:
            lines.append(Doubt.MIXED.say(what=what))
    return lines


# -- what is said of variants that are wrong, failed or not checked ---------------------------------------------------


def state_of(
    parity: ParityState, parity_reason: str | None, runs: int, failed: Sequence[tuple[RunState, str]], complete: bool
) -> tuple[VariantState, str | None]:
    """A variant's state and the reason for it: `runs` ended well, `failed` did not."""
    reason = f"{failed[0][0].replace('_', ' ')}: {failed[0][1]}" if failed else None
    unchecked = f"parity could not be checked: {parity_reason}" if parity is ParityState.ERROR else None
    if parity is ParityState.FAIL:
        return VariantState.WRONG, f"failed parity: {parity_reason or 'no reason recorded'}"
    if runs:
        return (VariantState.PARTIAL, reason) if failed else (VariantState.OK, unchecked)
    reason = reason or unchecked
    if not complete and not reason:
        return VariantState.WAITING, None
    return VariantState.FAILED, reason or "no run has finished"


def reservations(variants: Sequence[VariantResult], unchecked: Sequence[str] = ()) -> list[str]:
    """Sentences that follow the verdict."""
    lines = []
    if simulated := [variant.label for variant in variants if variant.simulated]:
        lines.append(f"{listed(simulated)} ran on a simulated device: times mean nothing there.")
    lines += [f"{v.label} is WRONG: {_cause(v)}." for v in variants if v.state is VariantState.WRONG]
    lines += [f"{v.label} is not ranked: {_cause(v)}." for v in variants if v.state is VariantState.IN_DOUBT]
    if unknown := [v.label for v in variants if v.parity is ParityState.ERROR]:
        are = "is" if len(unknown) == 1 else "are"
        lines.append(f"{listed(unknown)} {are} not ranked: the parity check itself failed.")
    waiting = [v.label for v in variants if v.state is VariantState.WAITING]
    if waiting and len(waiting) < len(variants):
        lines.append(f"{listed(waiting)} {'has' if len(waiting) == 1 else 'have'} not been timed yet.")
    lines += [f"{v.label} failed: {_cause(v)}." for v in variants if v.state is VariantState.FAILED]
    for variant in (v for v in variants if v.state is VariantState.PARTIAL and v.failed_runs):
        lost = len(variant.failed_runs)
        lines.append(f"{variant.label} failed in {lost} of {lost + variant.runs} runs.")
    if variants and all(v.parity is ParityState.NOT_RUN for v in variants):
        lines.append("Whether they compute the same was not checked.")
    elif unchecked:
        lines.append(f"Parity was not checked for {listed(unchecked)}.")
    return lines


def label(variant: VariantResult) -> str:
    """A variant's name for people, with what is to be said against it: MPS compiled (WRONG)."""
    name = text(variant.label or variant.name, 80)
    return f"{name} ({MARKS[variant.state]})" if variant.state in MARKS else name


def problems(comparison: Comparison, variants: Sequence[VariantResult]) -> list[str]:
    """Every warning, and every one of `variants` that is wrong, failed or partial with its reason; the worst first."""
    lines = []
    for variant in variants:
        if variant.state is VariantState.WRONG:
            lines.append(f"{label(variant)}: {text(variant.reason)}. Its times do not count.")
        elif variant.state in (VariantState.FAILED, VariantState.IN_DOUBT):
            lines.append(f"{label(variant)}: {text(variant.reason)}")
    lines += [text(line) for line in comparison.warnings]
    for variant in variants:
        lines += [
            f"{label(variant)}: {'pilot' if run.round is None else f'round {run.round}'} {run.state}: "
            f"{text(run.reason)}"
            for run in variant.failed_runs
            if variant.state is not VariantState.FAILED
        ]
    same: dict[str, list[str]] = {}
    for variant in variants:
        for line in variant.warnings:
            same.setdefault(text(line), []).append(label(variant))
    lines += [f"{', '.join(labels)}: {line}" for line, labels in same.items()]
    return list(dict.fromkeys(lines))


def alarms(comparison: Comparison, variants: Sequence[VariantResult]) -> list[str]:
    """What must stand under the verdict because its sentence does not say it."""
    sentence = comparison.verdict.sentence
    said = (VariantState.WRONG, VariantState.IN_DOUBT, VariantState.FAILED)
    bad = [v for v in variants if v.state in said and v.label not in sentence]
    lines = [f"{label(variant)}: {text(variant.reason)}" for variant in bad]
    if comparison.machine.simulated and "simulated" not in sentence:
        lines.insert(0, "The MPS device here is simulated on a CPU: its times say nothing about a Mac.")
    return lines


def _cause(variant: VariantResult) -> str:
    return (variant.reason or "no reason recorded").rstrip(".")
