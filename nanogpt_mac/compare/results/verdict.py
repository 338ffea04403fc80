"""Who is fastest, who ties, and the sentence that says so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanogpt_mac import simulator
from nanogpt_mac.measure import stats

Way = dict[str, Any]
TELLS_LITTLE = 1.2  # an interval that reaches from 1 to this times as much does not show that ways are alike


def medians(way: Way) -> dict[int, float]:
    """Round -> median ms of its kept iterations."""
    return {r["round"]: r["median"] for r in way.get("rounds") or [] if r.get("median")}


def is_simulated(way: Way) -> bool:
    return way.get("device") == simulator.DEVICE_NAME


def may_win(way: Way) -> bool:
    """Timed, on a device whose times mean something, in the ranked work, and not known to compute something else."""
    return bool(medians(way)) and not is_simulated(way) and way["ranked"] and way["parity"] in ("pass", "not run")


def rank(ways: Sequence[Way]) -> list[Way]:
    """The ways that may win, the fastest first: by their medians, unless the pairs of a round clearly say otherwise."""
    timed = sorted((way for way in ways if may_win(way)), key=lambda way: way["iter_ms"]["median"])
    sure = confidence(ways)
    for way in timed[1:]:
        found = ratio(way, timed[0], sure)
        if found and found["tie"] is False and found["value"] < 1:  # medians of other rounds, or of a machine's moods
            timed.remove(way)
            timed.insert(0, way)
    return timed


def confidence(ways: Sequence[Way]) -> float:
    return stats.confidence_for(sum(bool(medians(way)) and way["ranked"] and not is_simulated(way) for way in ways))


def ratio(way: Way, base: Way, sure: float) -> dict[str, Any] | None:
    found = stats.paired_ratio(medians(way), medians(base), sure)
    return found and {"to": base["name"]} | found


def lever_table(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Every lever against its base, those with the largest effect first and ties last.

    worth_percent: share of the base's iteration time that the lever saves; below 0 it costs.
    """
    by_name = {way["name"]: way for way in ways}
    pulled = [way for way in ways if way.get("lever")]
    sure = max(stats.CONFIDENCE, 1 - stats.FAMILY_ERROR / max(len(pulled), 1))
    table = []
    for way in pulled:
        lever = way["lever"]
        base = by_name.get(lever.get("base"))
        found = ratio(way, base, sure) if base else None
        row = {"name": way["name"], **{key: lever.get(key) for key in ("base", "key", "value", "what")}}
        table.append(row | {"ratio": found, "worth_percent": 100 * (1 - found["value"]) if found else None})

    def effect(row: dict[str, Any]) -> tuple[int, float]:
        found = row["ratio"]
        if found is None:
            return 2, 0.0
        return int(found["tie"] is not False), -abs(float(np.log(found["value"])))

    return sorted(table, key=effect)


def verdict(ways: Sequence[Way], ranked: Sequence[Way], complete: bool) -> dict[str, Any]:
    """{"sentence", "fastest", "ties"}; the ways must have their `ratio` to the first of `ranked`."""
    sentences = [] if complete else ["The comparison is not complete; so far:"]
    fastest = ranked[0] if ranked else None
    ties = [way for way in ranked[1:] if _ties(way)]
    if fastest is None:
        sentences.append(_nobody(ways))
    else:
        sentences.append(_winner(fastest, ranked, ties))
        sentences += _other_ties([way for way in ranked[1:] if way not in ties], confidence(ways))
        sentences += _better_levers(ways, fastest)
    sentences += _reservations(ways)
    return {
        "sentence": " ".join(sentences),
        "fastest": fastest["name"] if fastest else None,
        "ties": [way["name"] for way in ties],
    }


def _ties(way: Way) -> bool:
    return (way.get("ratio") or {}).get("tie") is True


def _nobody(ways: Sequence[Way]) -> str:
    timed = [way for way in ways if medians(way)]
    if timed and all(is_simulated(way) for way in timed):
        return "No way is called fastest."
    if timed:
        return "No way is called fastest: none that was timed is known to compute the right thing."
    return "Nothing has been timed yet." if any(way["state"] == "waiting" for way in ways) else "Nothing was timed."


def _winner(fastest: Way, ranked: Sequence[Way], ties: Sequence[Way]) -> str:
    label = fastest["label"]
    others = [way for way in ranked[1:] if way not in ties]
    if len(ranked) == 1:
        found = fastest["iter_ms"]
        bounds = "" if not found["ci95"] else " (95 % interval {:.4g} to {:.4g} ms)".format(*found["ci95"])
        return f"{label} is the only way to rank here: {found['median']:.4g} ms an iteration{bounds}."
    if ties:
        names = _and([label, *(way["label"] for way in ties)])
        widest = max(ties, key=lambda way: way["ratio"]["ci"][1] / way["ratio"]["ci"][0])
        low, high = widest["ratio"]["ci"]
        how = "tie as the fastest ways here" if high < TELLS_LITTLE * low else "cannot be told apart"
        text = f"{names} {how} ({_against(widest)})"
        if not others or not others[0].get("ratio") or others[0]["ratio"]["tie"] is None:
            return f"{text}."
        return f"{text}; {label} is {_times(others[0])} as fast as {others[0]['label']} ({_against(others[0])})."
    second = others[0]
    if (second.get("ratio") or {}).get("tie") is None:
        how = _times(second) if second.get("ratio") else "faster, in other rounds, than"
        versus = f"{how} as fast as {second['label']}" if second.get("ratio") else f"{how} {second['label']}"
        return f"{label} was the fastest way here: {versus}, but too few rounds to be sure."
    return f"{label} is the fastest way here: {_times(second)} as fast as {second['label']} ({_against(second)})."


def _times(way: Way) -> str:
    return f"{way['ratio']['value']:.3g} x"


def _against(way: Way) -> str:
    """The interval of a ratio, in brackets after it."""
    found = way["ratio"]
    low, high = found["ci"]
    count = len(found["pairs"])
    return (
        f"{100 * found['confidence']:.3g} % interval {low:.3g} to {high:.3g}, {count} round{'s' if count > 1 else ''}"
    )


def _other_ties(others: Sequence[Way], sure: float) -> list[str]:
    """Neighbours behind the fastest that tie with each other."""
    said = []
    for one, other in itertools.pairwise(others):
        found = ratio(other, one, sure)
        if found and found["tie"]:
            said.append(f"{one['label']} and {other['label']} tie.")
    return said


def _better_levers(ways: Sequence[Way], fastest: Way) -> list[str]:
    """Settings of the same work that are faster still: they are no way of their own, but worth a sentence."""
    better = [
        way
        for way in ways
        if way.get("lever") and not way["ranked"] and way["parity"] in ("pass", "not run")
        and (found := way.get("ratio")) and found["tie"] is False and found["value"] < 1
    ]  # fmt: skip
    if not better:
        return []
    best = min(better, key=lambda way: way["ratio"]["value"])
    return [f"A setting goes further: {best['label']} takes {best['ratio']['value']:.3g} of {fastest['label']}'s time."]


def _reservations(ways: Sequence[Way]) -> list[str]:
    said = []
    simulated = [way["label"] for way in ways if is_simulated(way)]
    if simulated:
        said.append(f"{_and(simulated)} ran on a simulated device: times mean nothing there.")
    said += [f"{way['label']} is WRONG: {_cause(way)}." for way in ways if way["parity"] == "fail"]
    said += [
        f"{way['label']} is not ranked, its parity check failed to run." for way in ways if way["parity"] == "error"
    ]
    waiting = [way["label"] for way in ways if way["state"] == "waiting"]
    if waiting and len(waiting) < len(ways):
        said.append(f"{_and(waiting)} {'has' if len(waiting) == 1 else 'have'} not been timed yet.")
    failed = [way for way in ways if way["state"] == "failed"]
    said += [f"{way['label']} did not run: {_cause(way)}." for way in failed]
    for way in (way for way in ways if way["state"] == "partial" and way["failed_runs"]):
        lost = len(way["failed_runs"])
        said.append(f"{way['label']} failed in {lost} of {lost + way['runs']} runs.")
    if ways and all(way["parity"] == "not run" for way in ways):
        said.append("Whether they compute the same was not checked.")
    return said


def _cause(way: Way) -> str:
    return str(way.get("reason") or "no reason recorded").rstrip(".")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
