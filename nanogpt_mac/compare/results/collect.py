"""A comparison's folder, in any state of completion, as one document: comparison.json."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import nanogpt_mac
from nanogpt_mac.compare.report.words import text
from nanogpt_mac.compare.results import figures, published, verdict
from nanogpt_mac.compare.results.runs import Run, document, read, work_key
from nanogpt_mac.errors import InputError
from nanogpt_mac.measure import stats

SCHEMA = 1
_ROUND = re.compile(r"(\d+|pilot)-(.+)")


def load_run(folder: Path) -> dict[str, Any]:
    """One run folder as a variant of comparison.json, with its work, machine and environment.

    Any schema and any state: what is missing is None, and `problems` says what could not be read. Further keys:
    folder, schema, created (the folder's own word, or None), problems, work, machine, environment. state: ok (it
    finished), partial (it did not, but was timed), failed. InputError for a folder that is no run at all.
    """
    folder = Path(folder)
    run = read(folder)
    found = figures.of_variant({0: run}, planned=1)
    if found["iter_ms"]:  # one process: iterations are all there is to go by
        told = run.summary.get("iter_ms")
        found["iter_ms"]["ci95"] = told.get("ci95") if isinstance(told, dict) else None
    backend, compiled = run.fact("backend"), run.fact("compile")
    done = run.state == "done"
    recipe = figures.projected(run.config, _median(found), found["eval_s"], found["eval_iters"])
    checked = _own_parity(folder)
    wrong = checked.get("state") == "fail"
    how = {True: " compiled", False: " eager"}.get(compiled, "") if isinstance(compiled, bool) else ""
    label = f"{str(backend).upper()}{how}" if backend else folder.name
    return {
        "name": folder.name,
        "label": label,
        "overrides": None,
        "lever": None,
        "state": "wrong" if wrong else "ok" if done else "partial" if found["iter_ms"] else "failed",
        "reason": _failed_parity(checked) if wrong else None if done else run.reason,
        "parity": checked.get("state") or "not run",
        "runs": int(done),
        "failed_runs": [] if done else [{"round": 0, "state": run.state, "reason": run.reason}],
        "ratio": None,
        **found,
        "recipe": recipe,
        "fallbacks": document(folder / "fallbacks.json") or None,
        "compile_report": None,
        "folder": str(folder),
        "schema": run.summary.get("schema"),
        "created": run.outcome.get("started"),
        "problems": run.problems,
        "work": run.work() | {"experiment": None},
        "machine": figures.machine(run.env, [run.fact("device")]),
        "environment": run.env or None,
    }


def collect(folder: Path) -> dict[str, Any]:
    """comparison.json of a comparison's folder, which may still be at work. InputError for any other folder."""
    folder = Path(folder)
    said_of_files: list[str] = []
    plan = _plan(folder, said_of_files)
    runs, pilots = _runs(folder)
    if not plan and not runs and not pilots:
        what = "holds no comparison" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder}: {what}; allowed is a folder that compare.py wrote, with plan.json and rounds/")
    parity = _parity(folder, said_of_files)
    planned = _planned_variants(plan, runs, pilots)
    work = _common_work([variant for variant in planned if not variant["lever"]] or planned, runs, pilots)
    recipe = _recipe(plan)
    count = len({r for r, _ in plan.get("order") or []}) or plan.get("rounds")
    complete = _complete(plan, runs, pilots)
    variants = [
        _variant(
            variant,
            runs.get(variant["name"], {}),
            pilots.get(variant["name"]),
            parity,
            recipe,
            count,
            work,
            folder,
            complete,
        )
        for variant in planned
    ]
    ranked = verdict.rank(variants)
    sure = verdict.confidence(variants)
    for variant in variants:
        others = ranked and variant is not ranked[0] and variant["same_work"] and not verdict.is_simulated(variant)
        variant["ratio"] = verdict.ratio(variant, ranked[0], sure) if others else None
    said = verdict.verdict(variants, ranked, complete)
    finished = [run for _, run in _finished(runs, pilots)]
    environment = next((run.env for run in finished if run.env), {})
    devices = [variant.get("device") for variant in variants]
    if work.get("stand_in"):
        said["sentence"] += " The corpus is the stand-in: losses say nothing about Shakespeare."
    return {
        "schema": SCHEMA,
        "created": plan.get("created"),
        "folder": str(folder),
        "version": plan.get("version") or nanogpt_mac.__version__,
        "complete": complete,
        "work": work | {"experiment": plan.get("experiment")},
        "machine": figures.machine(environment, devices),
        "environment": environment or None,
        "plan": _plan_facts(plan, runs, pilots, complete),
        "verdict": said,
        "warnings": said_of_files + _warnings(plan, variants, work, parity, finished),
        "parity": parity,
        "levers": verdict.lever_table(variants) if any(variant["lever"] for variant in variants) else None,
        "published": published.beside(work),
        "variants": variants,
    }


# -- what is in the folder --------------------------------------------------------------------------------------------


def _plan(folder: Path, said: list[str]) -> dict[str, Any]:
    """plan.json without what cannot be what its key says, which goes into `said`."""
    plan = document(folder / "plan.json", said)
    kinds: dict[str, Any] = {"variants": list, "order": list, "rounds": int, "iters": dict, "recipe": dict, "cut": dict,
                             "created": str, "version": str, "experiment": str}  # fmt: skip
    for key, kind in kinds.items():
        if plan.get(key) is not None and not isinstance(plan[key], kind):
            plan[key] = None
            said.append(f"plan.json: {key} cannot be read")
    if isinstance(schema := plan.get("schema"), int) and schema > SCHEMA:
        said.append(f"plan.json has schema {schema}, newer than this program's {SCHEMA}: something may be missing")
    for variant in (variants := plan.get("variants") or []):
        if not isinstance(variant, dict) or not isinstance(variant.get("name"), str):
            said.append("plan.json: a variant cannot be read")
    plan["variants"] = [
        variant for variant in variants if isinstance(variant, dict) and isinstance(variant.get("name"), str)
    ]
    if not all(_is_place(place) for place in plan.get("order") or []):
        plan["order"] = None
        said.append("plan.json: order cannot be read")
    return plan if plan["variants"] or len(plan) > 1 else {}


def _is_place(place: Any) -> bool:
    """Whether it is [round, name of a variant]."""
    return isinstance(place, list) and len(place) == 2 and isinstance(place[0], int) and isinstance(place[1], str)


def _parity(folder: Path, said: list[str]) -> dict[str, Any] | None:
    """parity.json; None where there is none. What it cannot mean is an error of that variant's check, never a pass."""
    if not (folder / "parity.json").exists():
        return None
    parity = document(folder / "parity.json", said)
    variants = parity.get("variants")
    if parity and not isinstance(variants, dict):
        said.append("parity.json: variants cannot be read")
        variants = parity["variants"] = {}
    for name, found in (variants or {}).items():
        if not isinstance(found, dict) or found.get("state") not in ("pass", "fail", "error"):
            parity["variants"][name] = {"state": "error", "reason": "parity.json does not say how it ended"}
    return parity or None


def _runs(folder: Path) -> tuple[dict[str, dict[int, Run]], dict[str, Run]]:
    """Every run that left a trace: variant -> round -> run, and variant -> pilot run."""
    runs: dict[str, dict[int, Run]] = {}
    pilots: dict[str, Run] = {}
    for path in sorted((folder / "rounds").glob("*-*")):
        matched = _ROUND.fullmatch(path.name)
        if not matched or not path.is_dir():
            continue
        try:
            run = read(path)
        except InputError:  # made, but nothing written yet
            continue
        if matched[1] == "pilot":
            pilots[matched[2]] = run
        else:
            runs.setdefault(matched[2], {})[int(matched[1])] = run
    return runs, pilots


def _planned_variants(plan: dict[str, Any], *found: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan's variants, then any that only a folder tells of."""
    planned = list(plan.get("variants") or [])
    names = {variant["name"] for variant in planned}
    for name in sorted({name for runs in found for name in runs} - names):
        planned.append({"name": name})
    return [
        {
            "name": variant["name"],
            "label": text(variant.get("label") or variant["name"], 80),
            "overrides": variant.get("overrides"),
            "lever": _lever(variant.get("lever")),
        }
        for variant in planned
    ]


def _lever(told: Any) -> dict[str, Any] | None:
    """A plan's lever; one that cannot be read is still no variant of its own."""
    if not told:
        return None
    lever = told if isinstance(told, dict) else {}
    return lever | {"base": lever["base"] if isinstance(lever.get("base"), str) else None}


def _finished(runs: dict[str, dict[int, Run]], pilots: dict[str, Run]) -> list[tuple[str, Run]]:
    """(variant, run) of all that ended well, by round, the pilots last."""
    rounds = sorted(((r, name) for name, some in runs.items() for r in some), key=lambda pair: (pair[0], pair[1]))
    ordered = [(name, runs[name][r]) for r, name in rounds] + sorted(pilots.items())
    return [(name, run) for name, run in ordered if run.state == "done"]


def _common_work(
    planned: list[dict[str, Any]], runs: dict[str, dict[int, Run]], pilots: dict[str, Run]
) -> dict[str, Any]:
    """The work that most of these variants' runs did; the first planned decides where as many did one as another."""
    works = []
    for name in (variant["name"] for variant in planned):
        some = [run.work() for _, run in _finished({name: runs.get(name, {})}, {})]
        works += some or ([pilots[name].work()] if name in pilots else [])
    if not works:
        return {}
    most = Counter(work_key(work) for work in works).most_common(1)[0][0]
    return next(work for work in works if work_key(work) == most)


def _recipe(plan: dict[str, Any]) -> dict[str, Any] | None:
    """How long the full recipe trains and evaluates: as planned, or of an older plan's experiment."""
    if isinstance(plan.get("recipe"), dict):
        return dict(plan["recipe"])
    if "experiment" not in plan:
        return None
    from nanogpt_mac import cli

    experiment = plan["experiment"]
    try:
        config = cli.compose([f"experiment={experiment}"] if experiment else [])
    except InputError:  # this version has no such experiment
        return None
    return {key: getattr(config, key) for key in ("max_iters", "eval_interval", "eval_iters")}


def _variant(
    variant: dict[str, Any],
    runs: dict[int, Run],
    pilot: Run | None,
    parity: dict[str, Any] | None,
    recipe: dict[str, Any] | None,
    planned: int | None,
    work: dict[str, Any],
    folder: Path,
    complete: bool,
) -> dict[str, Any]:
    ended = {r: run for r, run in runs.items() if run.state == "done"}
    timed = {r: run for r, run in ended.items() if len(run.kept)}
    keys = {r: work_key(run.work()) for r, run in timed.items()}
    own = work_key(work) if work_key(work) in keys.values() else next(iter(keys.values()), None)
    done = {r: run for r, run in timed.items() if keys[r] == own}
    failed = [(r, run.state, run.reason) for r, run in sorted(runs.items()) if run.state not in ("done", "unfinished")]
    failed += [
        (r, "unreadable", "; ".join(ended[r].problems) or "no timed iteration") for r in sorted(ended.keys() - timed)
    ]
    failed += [
        (r, "other_work", _difference(timed[r].work(), next(iter(done.values())).work()) or "not fully recorded")
        for r in sorted(timed.keys() - done)
    ]
    if pilot and pilot.state not in ("done", "unfinished"):
        failed.insert(0, (None, pilot.state, pilot.reason))  # type: ignore[arg-type]
    gate = (parity or {}).get("variants")
    checked = gate.get(variant["name"], {"state": "error", "reason": "parity.json does not name it"}) if gate else {}
    found = figures.of_variant(done, pilot, recipe, planned)
    told = next(iter(done.values()), pilot)
    same_work = told is not None and work_key(told.work()) == work_key(work)
    variant |= found
    variant |= {
        "parity": checked.get("state") or "not run",
        "runs": len(done),
        "failed_runs": [{"round": r, "state": state, "reason": reason} for r, state, reason in failed],
        "ratio": None,
        "same_work": same_work,
        # A lever is an ablation, ranked only where it is also a variant of its own: compiled or not.
        "ranked": same_work and (not variant["lever"] or variant["lever"].get("key") == "compile"),
        "fallbacks": document(folder / "fallbacks" / f"{variant['name']}.json") or None,
    }
    variant["compile_report"] = (variant["fallbacks"] or {}).get("compile_report")
    variant["state"], variant["reason"] = _state(variant, checked, complete)
    if done and not same_work and not variant["lever"]:
        variant["warnings"].append(f"not ranked: it does other work ({_difference(told.work(), work)})")  # type: ignore[union-attr]
    return variant


def _state(variant: dict[str, Any], checked: dict[str, Any], complete: bool) -> tuple[str, str | None]:
    failed = variant["failed_runs"]
    reason = f"{failed[0]['state'].replace('_', ' ')}: {failed[0]['reason']}" if failed else None
    if variant["parity"] == "fail":
        return "wrong", _failed_parity(checked)
    if not variant["runs"]:
        if variant["parity"] == "error" and not failed:
            reason = f"parity could not be checked: {checked.get('reason')}"
        if not complete and not reason:
            return "waiting", None
        return "failed", reason or "no run has finished"
    if failed:
        return "partial", reason
    return "ok", f"parity could not be checked: {checked.get('reason')}" if variant["parity"] == "error" else None


def _failed_parity(checked: dict[str, Any]) -> str:
    return f"failed parity: {checked.get('reason') or 'no reason recorded'}"


def _own_parity(folder: Path) -> dict[str, Any]:
    """What the gate said of a run that is a comparison's: rounds/2-mps. Empty for any other."""
    place = folder.resolve()
    matched = _ROUND.fullmatch(place.name) if place.parent.name == "rounds" else None
    variants = (_parity(place.parent.parent, []) or {}).get("variants") if matched else None
    return (variants or {}).get(matched[2], {}) if matched else {}


def _difference(work: dict[str, Any], other: dict[str, Any]) -> str:
    mine, theirs = ({**w, **(w.get("model") or {})} for w in (work, other))
    keys = [key for key in theirs if key != "model" and mine.get(key) != theirs[key]]
    return ", ".join(f"{key}={mine.get(key)}, not {theirs[key]}" for key in keys if not key.endswith("per_iter"))


# -- the comparison as a whole ----------------------------------------------------------------------------------------


def _median(found: dict[str, Any]) -> float | None:
    return found["iter_ms"]["median"] if found.get("iter_ms") else None


def _complete(plan: dict[str, Any], runs: dict[str, dict[int, Run]], pilots: dict[str, Run]) -> bool:
    """Whether every planned run has ended, well or not."""
    order = plan.get("order")
    if not order:  # nothing to time: complete when every variant's pilot has failed
        names = [variant["name"] for variant in plan.get("variants") or []]
        return order == [] and all(name in pilots for name in names)
    ended = {(r, name) for name, some in runs.items() for r, run in some.items() if run.state != "unfinished"}
    return all((r, name) in ended for r, name in order)


def _plan_facts(
    plan: dict[str, Any], runs: dict[str, dict[int, Run]], pilots: dict[str, Run], complete: bool
) -> dict[str, Any]:
    outcomes = [run.outcome for some in runs.values() for run in some.values()]
    outcomes += [run.outcome for run in pilots.values()]
    spans = [span for outcome in outcomes if (span := _span(outcome))]
    return {
        "rounds": plan.get("rounds"),
        "iters": plan.get("iters"),
        "budget_minutes": plan.get("budget_minutes"),
        "started": min(spans)[0].isoformat(timespec="seconds") if spans else plan.get("created"),
        "finished": max(end for _, end in spans).isoformat(timespec="seconds") if spans and complete else None,
    }


def _span(outcome: dict[str, Any]) -> tuple[datetime, datetime] | None:
    try:
        start = datetime.fromisoformat(outcome["started"]).astimezone()
        return start, start + timedelta(seconds=float(outcome.get("seconds") or 0))
    except (KeyError, TypeError, ValueError):
        return None


def _warnings(
    plan: dict[str, Any],
    variants: list[dict[str, Any]],
    work: dict[str, Any],
    parity: dict[str, Any] | None,
    finished: list[Run],
) -> list[str]:
    said = []
    if isinstance(cut := plan.get("cut"), dict):
        said.append(f"{plan.get('rounds')} of {cut.get('rounds')} rounds were run: {cut.get('reason')}")
    if any(verdict.is_simulated(variant) for variant in variants):
        said.append("simulated device: its times mean nothing about any Mac")
    if work.get("stand_in"):
        said.append("the corpus is the built-in stand-in: the work is the same, losses are those of another text")
    if parity is None:
        said.append("parity was not checked: the variants may compute different things")
    powers = {run.env.get("power_source") for run in finished}
    powers |= {event.get("power_source") for run in finished for event in run.events}
    if "battery" in powers:
        said.append("on battery: macOS may hold the chip back; plug the machine in")
    if any(run.env.get("low_power_mode") for run in finished):
        said.append("Low Power Mode is on: the chip is held back")
    heat = {str(event.get("thermal_state")) for run in finished for event in run.events}
    for run in finished:
        heat |= {str((run.outcome.get("heat") or {}).get(when)) for when in ("at_start", "after")}
    if hot := heat & {"moderate", "heavy", "trapping", "sleeping"}:
        said.append(f"thermal pressure was {' and '.join(sorted(hot))} at times: the chip was held back")
    throttled = [variant["label"] for variant in variants if (variant.get("drift") or {}).get("throttled")]
    if throttled:
        said.append(f"throttled: {', '.join(throttled)} became slower by more than {stats.THROTTLED_PERCENT:g} %")
    said += _mixed(finished)
    return said


def _mixed(finished: list[Run]) -> list[str]:
    """Runs of one comparison must come from one machine and one set of programs; a resumed one may not."""
    said = []
    for key, what in (
        ("versions", "versions of the programs"),
        ("chip", "machines"),
        ("git", "commits of this project"),
    ):
        if len({repr(run.env.get(key)) for run in finished if run.env.get(key)}) > 1:
            said.append(f"the runs come from different {what}")
    return said
