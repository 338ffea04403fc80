"""The figures of one variant, from its run folders: what stands in comparison.json for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac import simulator
from nanogpt_mac.compare import roofline
from nanogpt_mac.compare.results.runs import Run, number
from nanogpt_mac.machine import chips
from nanogpt_mac.measure import stats
from nanogpt_mac.measure.times import summary

ON_GPU = ("mps", "cuda", "metal")  # device names of back ends that compute on the GPU
MOST_POINTS = 400  # of one round's series
BINS = 40
MFUS = ("mfu", "mfu_measured", "mfu_a100")


def of_variant(
    runs: Mapping[int, Run], pilot: Run | None = None, recipe: dict[str, Any] | None = None, planned: int | None = None
) -> dict[str, Any]:
    """Everything that a variant's finished runs (round -> run) tell; keys as in comparison.json, None where unknown.

    `pilot`: the cold run before the rounds, which has the measured matmul peak and enters no time statistic.
    `recipe`: max_iters (or iters), eval_interval and eval_iters of the full recipe.
    """
    rounds = dict(sorted(runs.items()))
    times = {r: run.kept for r, run in rounds.items() if len(run.kept)}
    everything = ([pilot] if pilot else []) + list(rounds.values())
    any_run = next(iter(rounds.values()), pilot) or Run(Path(), {}, {}, {}, {})
    iter_ms = None
    if times:
        pooled = np.concatenate(list(times.values()))
        iter_ms = summary(pooled, stats.median_interval(list(times.values()))).model_dump()
    median = iter_ms["median"] if iter_ms else None
    work = any_run.work()
    left_out = _sum(run.left_out() for run in rounds.values())
    utilisation = _mfu(everything, work["flops_per_iter"], median)
    roof = _roofline(any_run, work, utilisation["mfu_denominators"]["mfu_measured"], median)
    evaluation = _evaluation(rounds, pilot)
    tokens = work["tokens_per_iter"]
    return {
        "backend": any_run.fact("backend"),
        "device": any_run.fact("device"),
        "compile": any_run.fact("compile"),
        "dtype": any_run.fact("dtype"),
        "sync": any_run.fact("sync"),
        "details": any_run.fact("details"),
        "iter_ms": iter_ms,
        "rounds": [_round(r, run) for r, run in rounds.items()],
        "left_out": left_out,
        "drift": (found := stats.drift(times)) and found.model_dump(),
        "outliers": (wild := stats.outliers(list(times.values()))) and wild.model_dump(),
        "warnings": _warnings(rounds, times, left_out, utilisation, roof, planned),
        **_first_iterations(rounds, pilot, median),
        **evaluation,
        "peak_memory": max(
            (m for run in rounds.values() if (m := number(run.summary.get("peak_memory")))), default=None
        ),
        "tokens_per_s": tokens / median * 1e3 if tokens and median else None,
        **utilisation,
        "recipe": projected(recipe, median, evaluation["eval_s"], evaluation["eval_iters"]),
        "energy": _energy(list(rounds.values()), tokens, median),
        "roofline": roof,
        "series": [_series(r, run) for r, run in rounds.items() if len(run.kept)],
        "evaluations": _evaluations(rounds, pilot),
        "histogram": _histogram(times),
    }


def machine(env: dict[str, Any], devices: Sequence[str | None]) -> dict[str, Any]:
    """Name and size of the machine: the GPU's name where a variant ran on one, else the processor's."""
    on_gpu = any(device in ON_GPU for device in devices)
    name = (env.get("gpu") if on_gpu else None) or env.get("chip")
    system = "macOS" if env.get("os") == "Darwin" else env.get("os")
    version = env.get("macos_version") or env.get("os_version")
    return {
        "name": name,
        "gpu_cores": env.get("gpu_cores"),
        "memory_bytes": env.get("memory_bytes"),
        "os": f"{system} {version}" if system and version else system,
        "simulated": simulator.DEVICE_NAME in devices,
    }


def projected(
    recipe: dict[str, Any] | None, median_ms: float | None, eval_s: float | None, eval_iters: float | None
) -> dict[str, Any] | None:
    """Time of the whole recipe from the measured median and evaluation; None where a part of it is not known.

    Evaluations are at 0, every eval_interval and at the end; one of `eval_iters` batches a split took `eval_s`.
    """
    if not recipe or not median_ms:
        return None
    iters = number(recipe.get("max_iters") or recipe.get("iters"))
    interval, batches = number(recipe.get("eval_interval")), number(recipe.get("eval_iters"))
    if not iters or iters < 0 or (interval or 0) < 0 or (batches or 0) < 0:
        return None
    count = math.ceil(iters / interval) + 1 if interval else 0
    seconds = iters * median_ms / 1e3
    formula = f"{iters:.0f} iterations x median"
    if count:
        if eval_s is None or not batches or not eval_iters:
            return None
        seconds += count * eval_s * batches / eval_iters
        scaled = "" if batches == eval_iters else f", scaled from 2 x {eval_iters:.0f} measured"
        formula += f" + {count} evaluations x time of 2 x {batches:.0f} batches{scaled}"
    formula += "; without start-up, compilation and checkpoints"
    return {"iters": int(iters), "evaluations": count, "seconds": seconds, "formula": formula}


def _sum(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in counts:
        for key, value in some.items():
            total[key] = total.get(key, 0) + value
    return total


def _round(number_: int, run: Run) -> dict[str, Any]:
    kept = run.kept
    return {
        "round": number_,
        "median": float(np.median(kept)) if len(kept) else None,
        "count": len(kept),
        "started": run.outcome.get("started"),
        "first_iter_s": run.first_iter_s,
    }


def _first_iterations(rounds: Mapping[int, Run], pilot: Run | None, median: float | None) -> dict[str, float | None]:
    """Cold is the pilot run, or the first round where there was none; warm is the median of the (other) rounds.

    compile_s is the first iteration less the median: an estimate, which holds allocation too.
    """
    ordered = [run.first_iter_s for run in rounds.values()]
    cold, rest = (pilot.first_iter_s, ordered) if pilot else (ordered[0] if ordered else None, ordered[1:])
    known = [s for s in rest if s is not None]
    warm = float(np.median(known)) if known else None

    def compiling(first_s: float | None) -> float | None:
        return first_s - median / 1e3 if first_s is not None and median else None

    return {
        "first_iter_s": cold,
        "compile_s": compiling(cold),
        "first_iter_warm_s": warm,
        "compile_warm_s": compiling(warm),
    }


def _evaluation(rounds: Mapping[int, Run], pilot: Run | None) -> dict[str, float | None]:
    """Seconds of one evaluation, and how many batches a split it took. A process's first one compiles: it counts only
    where there is no other."""
    runs = [*rounds.values(), *([pilot] if pilot else [])]
    first = [s for run in runs for row in run.evaluations[:1] if (s := row.get("seconds"))]
    later = [(s, run) for run in runs for row in run.evaluations[1:] if (s := row.get("seconds"))]
    batches = next((number(run.config.get("eval_iters")) for run in runs if run.evaluations), None)
    seconds = [s for s, run in later if number(run.config.get("eval_iters")) == batches] or first
    return {
        "eval_s": float(np.median(seconds)) if seconds else None,
        "first_eval_s": first[0] if first else None,
        "eval_iters": batches,
    }


def _evaluations(rounds: Mapping[int, Run], pilot: Run | None) -> list[dict[str, Any]]:
    keys = ("iter", "train_loss", "val_loss", "seconds")
    some: list[tuple[int | None, Run]] = [(r, run) for r, run in rounds.items() if run.evaluations]
    if not some and pilot:
        some = [(None, pilot)]
    return [{"round": r} | {key: row.get(key) for key in keys} for r, run in some for row in run.evaluations]


def _mfu(runs: Sequence[Run], flops: float | None, median: float | None) -> dict[str, Any]:
    """The three utilisations of the median; denominators from whichever run has one, the pilot first."""
    peaks: dict[str, float | None] = dict.fromkeys(MFUS)
    for run in runs:
        told = run.summary.get("mfu_denominators")
        for key in MFUS:
            if peaks[key] is None and isinstance(told, dict):
                peaks[key] = number(told.get(key))
    shares: dict[str, Any] = {
        key: flops / (median / 1e3) / peak if flops and median and peak else None for key, peak in peaks.items()
    }
    if (shares["mfu_measured"] or 0) > 1:
        shares["mfu_measured"] = None  # impossible: _warnings says so
    return shares | {"mfu_denominators": peaks}


def _roofline(run: Run, work: dict[str, Any], measured: float | None, median: float | None) -> dict[str, Any] | None:
    device = run.fact("device")
    if device == simulator.DEVICE_NAME:
        return None
    name = run.env.get("gpu") or run.env.get("chip")
    chip = chips.find(str(name), run.env.get("gpu_cores")) if name else None
    roof = roofline.of_run(work, chip, device in ON_GPU, measured)
    return roof and roof | {"share": roof["floor_ms"] / median if median else None}


def _energy(runs: Sequence[Run], tokens: int | None, median: float | None) -> dict[str, Any] | None:
    """Mean power of the runs, and what that makes of 1000 tokens at the median. `share`: of the metered time that was
    iterations; the rest (first iteration, evaluations) drew its own power, so a low share makes the figure a guess."""
    metered = [run for run in runs if isinstance(run.summary.get("energy"), dict)]
    joules, seconds = (
        sum(number(run.summary["energy"].get(key)) or 0.0 for run in metered) for key in ("joules", "seconds")
    )
    if not joules or not seconds:
        return None
    watts = joules / seconds
    iterating = sum(float(run.kept.sum()) for run in metered) / 1e3
    return {
        "joules_per_1000_tokens": watts * median / tokens
        if tokens and median
        else None,  # W x ms/token = J/1000 tokens
        "watts": watts,
        "source": metered[0].summary["energy"].get("source"),
        "share": iterating / seconds,
    }


def _series(round_number: int, run: Run) -> dict[str, Any]:
    """The kept iterations; of a long run, each stretch's fastest and slowest, so that no outlier is lost."""
    ends = run.seconds()
    rows = [(row, end) for row, end in zip(run.iterations, ends, strict=True) if not row.get("left_out")]
    rows = [(row, end) for row, end in rows if (row.get("iter_ms") or 0) > 0]
    if len(rows) > MOST_POINTS:
        chosen: list[int] = []
        for stretch in np.array_split(np.arange(len(rows)), MOST_POINTS // 2):
            by_time = sorted(stretch, key=lambda i: rows[i][0]["iter_ms"])
            chosen += sorted({int(by_time[0]), int(by_time[-1])})
        rows = [rows[i] for i in chosen]
    return {
        "round": round_number,
        "iter": [row["iter"] for row, _ in rows],
        "iter_ms": [_digits(row["iter_ms"]) for row, _ in rows],
        "loss": [_digits(row.get("loss")) for row, _ in rows],
        "seconds": [_digits(end) for _, end in rows],
    }


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _histogram(times: Mapping[int, np.ndarray]) -> dict[str, Any] | None:
    """Bins from the fastest iteration to the 99th percentile; `above` counts those beyond, which would flatten it."""
    if not times:
        return None
    pooled = np.concatenate(list(times.values()))
    counts, edges = np.histogram(pooled, BINS, (float(pooled.min()), float(np.percentile(pooled, 99))))
    return {
        "edges": [_digits(float(e)) for e in edges],
        "counts": [int(c) for c in counts],
        "above": len(pooled) - int(counts.sum()),
    }


def _warnings(
    rounds: Mapping[int, Run],
    times: Mapping[int, np.ndarray],
    left_out: Mapping[str, int],
    utilisation: dict[str, Any],
    roof: dict[str, Any] | None,
    planned: int | None,
) -> list[str]:
    sync = next((run.fact("sync") for run in rounds.values()), None)
    said = doubts(times, left_out.get("slept", 0), sync, planned)
    peaks = utilisation["mfu_denominators"]
    if peaks["mfu_measured"] and times and utilisation["mfu_measured"] is None:
        said.append("mfu_measured would be above 100 %, which is impossible: the measured peak or the time is wrong")
    if roof and (roof["share"] or 0) > 1:
        said.append("faster than its roofline: the peak or bandwidth is wrong, or the model fits in a cache")
    said += [error for run in rounds.values() for error in run.summary.get("errors") or [] if isinstance(error, str)]
    said += [f"round {r}: {problem}" for r, run in rounds.items() for problem in run.problems]
    return list(dict.fromkeys(said))


UNSTABLE = 0.02  # log standard deviation of round medians
SHORT_SECONDS, FEW_ITERATIONS, FEW_ROUNDS = 0.5, 10, 5
SLOW_START = 0.05
MANY_OUTLIERS = 0.05


def doubts(
    rounds: Mapping[int, np.ndarray], slept: int = 0, sync: str | None = None, planned: int | None = None
) -> list[str]:
    """What a reader should know before believing these times, each a sentence.

    `slept`: iterations left out because the machine slept; `sync`: the run's policy; `planned`: rounds that were.
    """
    figures = stats.steadiness(rounds)
    if figures is None:
        return []
    said = []
    if figures.rounds < FEW_ROUNDS and planned != 1:
        said.append(f"too few rounds: {figures.rounds}; {FEW_ROUNDS} or more give intervals that mean something")
    noise = figures.noise
    if noise is not None and noise > UNSTABLE:
        seen = figures.detectable or 0
        least = f"differences of {100 * seen:.0f} % and more" if seen < 1 else "no difference below a factor of two"
        said.append(
            f"unstable: the rounds' medians vary by {100 * noise:.1f} % (standard deviation); unless the other variants "
            f"varied with them, {figures.rounds} rounds find {least}"
        )
    count, seconds, start, wild = figures.iterations, figures.seconds, figures.slow_start, figures.outliers
    if seconds < SHORT_SECONDS or count < FEW_ITERATIONS:
        said.append(f"too short: a round has {count:.0f} timed iterations in {seconds:.2g} s; iters=... takes more")
    if start is not None and start > SLOW_START:
        said.append(
            f"slow start: the first tenth of the timed iterations is {100 * start:.0f} % slower than the "
            "rest; timing_warmup=... leaves more out"
        )
    if wild.share > MANY_OUTLIERS:
        said.append(
            f"outliers: {100 * wild.share:.0f} % of the iterations are far above their round's median, the worst "
            f"{wild.worst_ms:.4g} ms; something else was running"
        )
    if slept:
        said.append(f"slept: the machine slept in {slept} iterations, which are left out")
    if sync == "interval":
        said.append("clock: sync=interval shares time out evenly over iterations; single ones are not known")
    elif figures.coarse:
        said.append("clock: too coarse; more than half of a round's times are duplicates")
    return said
