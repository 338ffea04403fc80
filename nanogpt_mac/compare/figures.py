"""The figures of one variant, from its run folders: what stands in comparison.json for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from nanogpt_mac.compare import doubts, roofline
from nanogpt_mac.compare.doubts import Doubt
from nanogpt_mac.compare.runs import Run, counts
from nanogpt_mac.machine import chips
from nanogpt_mac.measure import stats, times
from nanogpt_mac.records import comparison as record
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.records.plan import Recipe
from nanogpt_mac.records.run import Denominators, Environment, LeftOut
from nanogpt_mac.report.words import plural
from nanogpt_mac.train.recorder import busy_peak, waiting_device

MOST_POINTS = 400  # of one round's series
MFUS = ("mfu", "mfu_measured", "mfu_a100")


def of_variant(
    runs: Mapping[int, Run],
    pilot: Run | None = None,
    recipe: Recipe | None = None,
    planned: int | None = None,
) -> record.Figures:
    """What a variant's finished runs (round -> run) say.

    `pilot`: the cold run before the rounds, which has the measured matmul peak and enters no time statistic.
    `recipe`: of the full training; `planned`: how many rounds were.
    """
    rounds = dict(sorted(runs.items()))
    kept = {r: run.kept for r, run in rounds.items() if len(run.kept)}
    everything = ([pilot] if pilot else []) + list(rounds.values())
    first = next(iter(rounds.values()), pilot)
    facts, work = (first.facts, first.work) if first else (None, record.Work())
    spans = list(kept.values())
    summary = times.summary(np.concatenate(spans), stats.median_interval(spans)) if spans else None
    median = summary.median if summary else None
    tokens = work.tokens_per_iter
    left_out = sum((run.left_out() for run in rounds.values()), Counter[LeftOut]())
    peaks = _peaks(everything)
    shares = _shares(peaks, work.flops_per_iter, median)
    impossible = (shares["mfu_measured"] or 0) > 1
    roof = _roofline(first, peaks.mfu_measured, median) if first else None
    eval_s, first_eval_s, eval_iters = _evaluation(rounds, pilot)
    warnings = doubts.of_times(stats.steadiness(kept), left_out[LeftOut.SLEPT], facts.sync if facts else None, planned)
    cut = sum(bool(run.outcome and run.outcome.cut) for run in rounds.values())
    warnings += [Doubt.SHORTENED.say(runs=plural(cut, "run"))] if cut else []
    warnings += [Doubt.IMPOSSIBLE_MFU.say()] if impossible else []
    warnings += busy_peak(peaks)
    dispatch = [ms for run in rounds.values() if run.summary and (ms := run.summary.dispatch_ms) is not None]
    warnings += waiting_device(facts, float(np.median(dispatch)), median) if facts and dispatch else []
    warnings += [Doubt.BELOW_FLOOR.say()] if roof and (roof.share or 0) > 1 else []
    warnings += [error for run in rounds.values() if run.summary for error in run.summary.errors]
    warnings += [f"round {r}: {problem}" for r, run in rounds.items() for problem in run.problems]
    return record.Figures(
        backend=facts.backend if facts else None,
        device=facts.device if facts else None,
        compile=facts.compile if facts else None,
        dtype=facts.dtype if facts else None,
        sync=facts.sync if facts else None,
        shared_machine=any(run.facts.shared_machine for run in everything if run.facts),
        details=facts.details if facts else {},
        capabilities=first.capabilities if first else None,
        times=summary,
        rounds=tuple(_round(r, run) for r, run in rounds.items()),
        left_out=dict(left_out),
        drift=stats.drift(kept),
        outliers=stats.outliers(spans),
        warnings=tuple(dict.fromkeys(warnings)),
        **_first_iterations(rounds, pilot, median),
        eval_s=eval_s,
        first_eval_s=first_eval_s,
        eval_iters=eval_iters,
        peak_memory=max((m for run in rounds.values() if run.summary and (m := run.summary.peak_memory)), default=None),
        tokens_per_s=tokens / median * 1e3 if tokens and median else None,
        **shares | ({"mfu_measured": None} if impossible else {}),
        mfu_denominators=peaks,
        recipe=projected(recipe, median, eval_s, eval_iters),
        energy=_energy(list(rounds.values()), tokens, median),
        roofline=roof,
        series=tuple(_series(r, run) for r, run in rounds.items() if len(run.kept)),
        evaluations=_evaluations(rounds, pilot),
        world=next((run.summary.world for run in rounds.values() if run.summary and run.summary.world), None),
    )


def machine(env: Environment | None, of_variants: Sequence[Capabilities | None]) -> record.Machine:
    """Name and size of the machine: the GPU's name where a variant ran on one, else the processor's."""
    simulated = any(c.simulated for c in of_variants if c)
    if env is None:
        return record.Machine(simulated=simulated)
    on_gpu = any(c.accelerator for c in of_variants if c)
    system = "macOS" if env.os == "Darwin" else env.os
    version = env.macos_version or env.os_version
    return record.Machine(
        name=(env.gpu if on_gpu else None) or env.chip,
        gpu_cores=env.gpu_cores,
        memory_bytes=env.memory_bytes,
        os=f"{system} {version}" if system and version else system,
        simulated=simulated,
    )


def projected(
    recipe: Recipe | None, median_ms: float | None, eval_s: float | None, eval_iters: int | None
) -> record.Projection | None:
    """Time of the whole recipe from the measured median and evaluation; None where a part of it is not known.

    Evaluations are at 0, every eval_interval and at the end; one of `eval_iters` batches a split took `eval_s`.
    """
    if recipe is None or not recipe.max_iters or not median_ms:
        return None
    iters, interval, batches = recipe.max_iters, recipe.eval_interval, recipe.eval_iters
    count = math.ceil(iters / interval) + 1 if interval else 0
    seconds = iters * median_ms / 1e3
    formula = f"{iters} iterations x median"
    if count:
        if eval_s is None or not batches or not eval_iters:
            return None
        seconds += count * eval_s * batches / eval_iters
        scaled = "" if batches == eval_iters else f", scaled from 2 x {eval_iters} measured"
        formula += f" + {count} evaluations x time of 2 x {batches} batches{scaled}"
    formula += "; without start-up, compilation and checkpoints"
    return record.Projection(iters=iters, evaluations=count, seconds=seconds, formula=formula)


def _round(number: int, run: Run) -> record.RoundFigures:
    kept, started = run.kept, run.outcome.started if run.outcome else None
    median = float(np.median(kept)) if len(kept) else None
    return record.RoundFigures(
        round=number, median=median, count=len(kept), started=started, first_iter_s=run.first_iter_s
    )  # fmt: skip


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


def _evaluation(rounds: Mapping[int, Run], pilot: Run | None) -> tuple[float | None, float | None, int | None]:
    """Seconds of one evaluation, of the first, and how many batches a split it took.

    A process's first one compiles: it counts only where there is no other.
    """
    runs = [run for run in (*rounds.values(), *([pilot] if pilot else [])) if run.evaluations]
    first = [run.evaluations[0].seconds for run in runs]
    batches = runs[0].config.eval_iters if runs else None
    later = [row.seconds for run in runs if run.config.eval_iters == batches for row in run.evaluations[1:]]
    seconds = [s for s in later if s] or [s for s in first if s]
    return float(np.median(seconds)) if seconds else None, next((s for s in first if s), None), batches


def _evaluations(rounds: Mapping[int, Run], pilot: Run | None) -> tuple[record.Evaluated, ...]:
    some: list[tuple[int | None, Run]] = [(r, run) for r, run in rounds.items() if run.evaluations]
    if not some and pilot:
        some = [(None, pilot)]
    return tuple(record.Evaluated(round=r, **dict(row)) for r, run in some for row in run.evaluations)


def _peaks(runs: Sequence[Run]) -> Denominators:
    """Denominators from whichever run has one, the pilot first."""
    found = [run.summary.mfu_denominators for run in runs if run.summary]
    keys = *MFUS, "measured_here"
    return Denominators(**{key: next((v for d in found if (v := getattr(d, key)) is not None), None) for key in keys})


def _shares(peaks: Denominators, flops: float | None, median: float | None) -> dict[str, float | None]:
    """The three utilisations of the median."""
    known = flops / (median / 1e3) if flops and median else None
    return {key: known / peak if known and (peak := getattr(peaks, key)) else None for key in MFUS}


def _roofline(run: Run, measured: float | None, median: float | None) -> record.Roofline | None:
    able = run.capabilities
    if able is None or able.simulated:
        return None
    name = (run.env.gpu or run.env.chip) if run.env else None
    chip = chips.find(name, run.env.gpu_cores) if name and run.env else None
    roof = roofline.of_run(run.work, chip, able.accelerator, measured)
    return roof and roof.model_copy(update={"share": roof.floor_ms / median if median else None})


def _energy(runs: Sequence[Run], tokens: int | None, median: float | None) -> record.EnergyFigures | None:
    """Mean power of the runs, and what that makes of 1000 tokens at the median.

    Of the metered time, what was not iterations (the first, evaluations) drew its own power: hence `share`.
    """
    metered = [(run, run.summary.energy) for run in runs if run.summary and run.summary.energy]
    joules, seconds = sum(e.joules for _, e in metered), sum(e.seconds for _, e in metered)
    if not joules or not seconds:
        return None
    watts = joules / seconds
    return record.EnergyFigures(
        joules_per_1000_tokens=watts * median / tokens if tokens and median else None,  # W x ms/token = J/1000 tokens
        watts=watts,
        source=metered[0][1].source,
        share=sum(float(run.kept.sum()) for run, _ in metered) / 1e3 / seconds,
    )


def _series(round_number: int, run: Run) -> record.Series:
    """The kept iterations; of a long run, each stretch's fastest and slowest, so that no outlier is lost."""
    rows = [(row, end) for row, end in zip(run.iterations, run.ends(), strict=True) if counts(row)]
    if len(rows) > MOST_POINTS:
        chosen: list[int] = []
        for stretch in np.array_split(np.arange(len(rows)), MOST_POINTS // 2):
            by_time = sorted(stretch, key=lambda i: rows[i][0].iter_ms)
            chosen += sorted({int(by_time[0]), int(by_time[-1])})
        rows = [rows[i] for i in chosen]
    return record.Series(
        round=round_number,
        iter=tuple(row.iter for row, _ in rows),
        ms=tuple(_digits(row.iter_ms) for row, _ in rows),
        loss=tuple(_digits(row.loss) for row, _ in rows),
        seconds=tuple(_digits(end) for _, end in rows),
    )


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
