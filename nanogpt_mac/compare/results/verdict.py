"""Who is fastest, who ties, and the sentence that says so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanogpt_mac import simulator
from nanogpt_mac.measure import stats

Variant = dict[str, Any]
TELLS_LITTLE = 1.2  # an interval that reaches from 1 to this times as much does not show that variants are alike


def medians(variant: Variant) -> dict[int, float]:
    """Round -> median ms of its kept iterations."""
    return {r["round"]: r["median"] for r in variant.get("rounds") or [] if r.get("median")}


def is_simulated(variant: Variant) -> bool:
    return variant.get("device") == simulator.DEVICE_NAME


def may_win(variant: Variant) -> bool:
    """Timed, on a device whose times mean something, in the ranked work, and not known to compute something else."""
    return (
        bool(medians(variant))
        and not is_simulated(variant)
        and variant["ranked"]
        and variant["parity"] in ("pass", "not run")
    )


def rank(variants: Sequence[Variant]) -> list[Variant]:
    """The variants that may win, the fastest first: by their medians, unless the pairs of a round clearly say otherwise."""
    timed = sorted(
        (variant for variant in variants if may_win(variant)), key=lambda variant: variant["iter_ms"]["median"]
    )
    sure = confidence(variants)
    for variant in timed[1:]:
        found = ratio(variant, timed[0], sure)
        if found and found["tie"] is False and found["value"] < 1:  # medians of other rounds, or of a machine's moods
            timed.remove(variant)
            timed.insert(0, variant)
    return timed


def confidence(variants: Sequence[Variant]) -> float:
    return stats.confidence_for(
        sum(bool(medians(variant)) and variant["ranked"] and not is_simulated(variant) for variant in variants)
    )


def ratio(variant: Variant, base: Variant, sure: float) -> dict[str, Any] | None:
    found = stats.paired_ratio(medians(variant), medians(base), sure)
    return {"to": base["name"]} | found.model_dump() if found else None


def lever_table(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Every lever against its base, those with the largest effect first and ties last.

    worth_percent: share of the base's iteration time that the lever saves; below 0 it costs.
    """
    by_name = {variant["name"]: variant for variant in variants}
    pulled = [variant for variant in variants if variant.get("lever")]
    sure = max(stats.CONFIDENCE, 1 - stats.FAMILY_ERROR / max(len(pulled), 1))
    table = []
    for variant in pulled:
        lever = variant["lever"]
        base = by_name.get(lever.get("base"))
        found = ratio(variant, base, sure) if base else None
        row = {"name": variant["name"], **{key: lever.get(key) for key in ("base", "key", "value", "what")}}
        table.append(row | {"ratio": found, "worth_percent": 100 * (1 - found["value"]) if found else None})

    def effect(row: dict[str, Any]) -> tuple[int, float]:
        found = row["ratio"]
        if found is None:
            return 2, 0.0
        return int(found["tie"] is not False), -abs(float(np.log(found["value"])))

    return sorted(table, key=effect)


def verdict(variants: Sequence[Variant], ranked: Sequence[Variant], complete: bool) -> dict[str, Any]:
    """{"sentence", "fastest", "ties"}; the variants must have their `ratio` to the first of `ranked`."""
    sentences = [] if complete else ["The comparison is not complete; so far:"]
    fastest = ranked[0] if ranked else None
    ties = [variant for variant in ranked[1:] if _ties(variant)]
    if fastest is None:
        sentences.append(_nobody(variants))
    else:
        sentences.append(_winner(fastest, ranked, ties))
        sentences += _other_ties([variant for variant in ranked[1:] if variant not in ties], confidence(variants))
        sentences += _better_levers(variants, fastest)
    sentences += _reservations(variants)
    return {
        "sentence": " ".join(sentences),
        "fastest": fastest["name"] if fastest else None,
        "ties": [variant["name"] for variant in ties],
    }


def _ties(variant: Variant) -> bool:
    return (variant.get("ratio") or {}).get("tie") is True


def _nobody(variants: Sequence[Variant]) -> str:
    timed = [variant for variant in variants if medians(variant)]
    if timed and all(is_simulated(variant) for variant in timed):
        return "No variant is called fastest."
    if timed:
        return "No variant is called fastest: none that was timed is known to compute the right thing."
    return (
        "Nothing has been timed yet."
        if any(variant["state"] == "waiting" for variant in variants)
        else "Nothing was timed."
    )


def _winner(fastest: Variant, ranked: Sequence[Variant], ties: Sequence[Variant]) -> str:
    label = fastest["label"]
    others = [variant for variant in ranked[1:] if variant not in ties]
    if len(ranked) == 1:
        found = fastest["iter_ms"]
        bounds = "" if not found["ci95"] else " (95 % interval {:.4g} to {:.4g} ms)".format(*found["ci95"])
        return f"{label} is the only variant to rank here: {found['median']:.4g} ms an iteration{bounds}."
    if ties:
        names = _and([label, *(variant["label"] for variant in ties)])
        widest = max(ties, key=lambda variant: variant["ratio"]["ci"][1] / variant["ratio"]["ci"][0])
        low, high = widest["ratio"]["ci"]
        how = "tie as the fastest variants here" if high < TELLS_LITTLE * low else "cannot be told apart"
        text = f"{names} {how} ({_against(widest)})"
        if not others or not others[0].get("ratio") or others[0]["ratio"]["tie"] is None:
            return f"{text}."
        return f"{text}; {label} is {_times(others[0])} as fast as {others[0]['label']} ({_against(others[0])})."
    second = others[0]
    if (second.get("ratio") or {}).get("tie") is None:
        how = _times(second) if second.get("ratio") else "faster, in other rounds, than"
        versus = f"{how} as fast as {second['label']}" if second.get("ratio") else f"{how} {second['label']}"
        return f"{label} was the fastest variant here: {versus}, but too few rounds to be sure."
    return f"{label} is the fastest variant here: {_times(second)} as fast as {second['label']} ({_against(second)})."


def _times(variant: Variant) -> str:
    return f"{variant['ratio']['value']:.3g} x"


def _against(variant: Variant) -> str:
    """The interval of a ratio, in brackets after it."""
    found = variant["ratio"]
    low, high = found["ci"]
    count = len(found["pairs"])
    return (
        f"{100 * found['confidence']:.3g} % interval {low:.3g} to {high:.3g}, {count} round{'s' if count > 1 else ''}"
    )


def _other_ties(others: Sequence[Variant], sure: float) -> list[str]:
    """Neighbours behind the fastest that tie with each other."""
    said = []
    for one, other in itertools.pairwise(others):
        found = ratio(other, one, sure)
        if found and found["tie"]:
            said.append(f"{one['label']} and {other['label']} tie.")
    return said


def _better_levers(variants: Sequence[Variant], fastest: Variant) -> list[str]:
    """Settings of the same work that are faster still: they are no variant of their own, but worth a sentence."""
    better = [
        variant
        for variant in variants
        if variant.get("lever") and not variant["ranked"] and variant["parity"] in ("pass", "not run")
        and (found := variant.get("ratio")) and found["tie"] is False and found["value"] < 1
    ]  # fmt: skip
    if not better:
        return []
    best = min(better, key=lambda variant: variant["ratio"]["value"])
    return [f"A setting goes further: {best['label']} takes {best['ratio']['value']:.3g} of {fastest['label']}'s time."]


def _reservations(variants: Sequence[Variant]) -> list[str]:
    said = []
    simulated = [variant["label"] for variant in variants if is_simulated(variant)]
    if simulated:
        said.append(f"{_and(simulated)} ran on a simulated device: times mean nothing there.")
    said += [f"{variant['label']} is WRONG: {_cause(variant)}." for variant in variants if variant["parity"] == "fail"]
    said += [
        f"{variant['label']} is not ranked, its parity check failed to run."
        for variant in variants
        if variant["parity"] == "error"
    ]
    waiting = [variant["label"] for variant in variants if variant["state"] == "waiting"]
    if waiting and len(waiting) < len(variants):
        said.append(f"{_and(waiting)} {'has' if len(waiting) == 1 else 'have'} not been timed yet.")
    failed = [variant for variant in variants if variant["state"] == "failed"]
    said += [f"{variant['label']} did not run: {_cause(variant)}." for variant in failed]
    for variant in (variant for variant in variants if variant["state"] == "partial" and variant["failed_runs"]):
        lost = len(variant["failed_runs"])
        said.append(f"{variant['label']} failed in {lost} of {lost + variant['runs']} runs.")
    if variants and all(variant["parity"] == "not run" for variant in variants):
        said.append("Whether they compute the same was not checked.")
    return said


def _cause(variant: Variant) -> str:
    return str(variant.get("reason") or "no reason recorded").rstrip(".")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
