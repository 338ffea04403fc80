"""Who is fastest, who ties, and the sentence that says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt_mac.compare import doubts
from nanogpt_mac.measure import stats
from nanogpt_mac.records.comparison import LeverRow, RatioTo, VariantResult, VariantState, Verdict
from nanogpt_mac.report.words import listed, plural

TELLS_LITTLE = 1.2  # an interval that reaches from 1 to this times as much does not show that variants are alike


@dataclass(frozen=True)
class Ranking:
    """`variants`, those that may win with their ratio to the fastest; `ranked`: these, the fastest first."""

    variants: tuple[VariantResult, ...]
    ranked: tuple[VariantResult, ...]
    sure: float  # confidence of each ratio's interval


def rank(variants: Sequence[VariantResult]) -> Ranking:
    """By their medians, unless the pairs of a round clearly say otherwise.

    Counted are those timed in the comparison's work, no ablations, on a device whose times mean something.
    """
    counted = [v for v in variants if v.medians and v.ranked and not v.simulated]
    sure = stats.confidence_for(len(counted))
    order = sorted((v for v in counted if v.harmless), key=lambda v: v.median or math.inf)
    for one in order[1:]:
        found = stats.paired_ratio(one.medians, order[0].medians, sure)
        if found and found.tie is False and found.value < 1:  # medians of other rounds, or of a machine's moods
            order.remove(one)
            order.insert(0, one)
    best = order[0] if order else None

    def held(variant: VariantResult) -> VariantResult:
        if best is None or variant is best or not variant.same_work or variant.simulated:
            return variant
        return variant.model_copy(update={"ratio": ratio_to(best, variant, sure)})

    with_ratio = {variant.name: held(variant) for variant in variants}
    return Ranking(tuple(with_ratio.values()), tuple(with_ratio[v.name] for v in order), sure)


def ratio_to(base: VariantResult, variant: VariantResult, sure: float) -> RatioTo | None:
    found = stats.paired_ratio(variant.medians, base.medians, sure)
    return RatioTo(to=base.name, **dict(found)) if found else None


def lever_table(variants: Sequence[VariantResult]) -> tuple[LeverRow, ...]:
    """Every lever against its base, those with the largest effect first and ties last."""
    by_name = {variant.name: variant for variant in variants}
    pulled = [(variant, variant.lever) for variant in variants if variant.lever]
    sure = max(stats.CONFIDENCE, 1 - stats.FAMILY_ERROR / max(len(pulled), 1))
    table = []
    for variant, lever in pulled:
        base = by_name.get(lever.base)
        found = ratio_to(base, variant, sure) if base else None
        worth = 100 * (1 - found.value) if found else None
        table.append(LeverRow(name=variant.name, **dict(lever), ratio=found, worth_percent=worth))

    def effect(row: LeverRow) -> tuple[int, float]:
        return (2, 0.0) if row.ratio is None else (int(row.ratio.tie is not False), -abs(math.log(row.ratio.value)))

    return tuple(sorted(table, key=effect))


def verdict(ranking: Ranking, complete: bool, unchecked: Sequence[str] = ()) -> Verdict:
    """`unchecked`: what the parity gate left out of what the runs compute."""
    variants, ranked = ranking.variants, ranking.ranked
    sentences = [] if complete else ["The comparison is not complete; so far:"]
    ties = [variant for variant in ranked[1:] if variant.ratio and variant.ratio.tie]
    if ranked:
        sentences.append(_winner(ranked, ties))
        behind = [variant for variant in ranked[1:] if variant not in ties]
        for one, other in itertools.pairwise(behind):
            found = ratio_to(one, other, ranking.sure)
            sentences += [f"{one.label} and {other.label} tie."] if found and found.tie else []
        sentences += _better_levers(variants, ranked[0])
    else:
        sentences.append(_nobody(variants))
    return Verdict(
        sentence=" ".join([*sentences, *doubts.reservations(variants, unchecked)]),
        fastest=ranked[0].name if ranked else None,
        ties=tuple(variant.name for variant in ties),
    )


def _nobody(variants: Sequence[VariantResult]) -> str:
    timed = [variant for variant in variants if variant.medians]
    if timed and all(variant.simulated or variant.shared_machine for variant in timed):
        return "No configuration can be called fastest."
    if timed:
        return "No configuration can be called fastest: none that was timed is known to compute the right thing."
    waiting = any(variant.state is VariantState.WAITING for variant in variants)
    return "Nothing has been timed yet." if waiting else "Nothing was timed."


def _winner(ranked: Sequence[VariantResult], ties: Sequence[VariantResult]) -> str:
    fastest, label = ranked[0], ranked[0].label
    if len(ranked) == 1:
        times = fastest.times
        bounds = " (95 % interval {:.4g} to {:.4g} ms)".format(*times.ci95) if times and times.ci95 else ""
        return f"Only {label} could be ranked: {fastest.median:.4g} ms an iteration{bounds}."
    others = [variant for variant in ranked[1:] if variant not in ties]
    second = next(iter(others), None)
    if ties:
        widest = max(ties, key=lambda v: v.ratio.ci[1] / v.ratio.ci[0] if v.ratio and v.ratio.ci else 0.0)
        low, high = (widest.ratio and widest.ratio.ci) or (1.0, 1.0)
        names = listed([label, *(variant.label for variant in ties)])
        how = "tie as the fastest" if high < TELLS_LITTLE * low else "cannot be told apart"
        sentence = f"{names} {how} ({_against(widest.ratio)})"
        if second is None or second.ratio is None or second.ratio.tie is None:
            return f"{sentence}."
        return f"{sentence}; {label} is {_times_as_fast(second)} ({_against(second.ratio)})."
    if second is None or second.ratio is None:
        other = f" ({second.label} ran in other rounds)" if second else ""
        return f"{label} looks fastest{other}, but there are too few rounds to be sure."
    if second.ratio.tie is None:
        return f"{label} looks {_times_as_fast(second)}, but there are too few rounds to be sure."
    return f"{label} is fastest: {_times_as_fast(second)} ({_against(second.ratio)})."


def _times_as_fast(slower: VariantResult) -> str:
    """The ratio is the slower one's time over the fastest's, so the fastest is so many times as fast."""
    return f"{slower.ratio.value:.3g} x as fast as {slower.label}" if slower.ratio else ""


def _against(ratio: RatioTo | None) -> str:
    """The interval of a ratio, in brackets after it."""
    if ratio is None or ratio.ci is None:
        return "no interval"
    low, high = ratio.ci
    rounds = plural(len(ratio.pairs), "round")
    return f"{100 * ratio.confidence:.3g} % interval {low:.3g} to {high:.3g}, {rounds}"


def _better_levers(variants: Sequence[VariantResult], fastest: VariantResult) -> list[str]:
    """Settings of the same work that are faster still: ablations, which are not ranked, but worth a sentence."""
    better = [
        (variant.ratio.value, variant.label)
        for variant in variants
        if variant.lever and not variant.ranked and variant.harmless
        and variant.ratio and variant.ratio.tie is False and variant.ratio.value < 1
    ]  # fmt: skip
    if not better:
        return []
    value, label = min(better)
    return [f"One setting is faster still: {label} needs {100 * value:.3g} % of {fastest.label}'s time."]
