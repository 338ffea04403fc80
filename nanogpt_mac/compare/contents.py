"""What a comparison's report holds: its verdict, its variants side by side, and their figures section by section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from nanogpt_mac.compare import doubts, evidence
from nanogpt_mac.compare.doubts import label
from nanogpt_mac.config import spelt
from nanogpt_mac.records.comparison import (
    AgreementState,
    Comparison,
    LeverRow,
    Machine,
    VariantResult,
    VariantState,
    Work,
)
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table
from nanogpt_mac.report.words import (
    DASH,
    beside,
    compared,
    count,
    interval,
    listed,
    loss,
    ms,
    number,
    percent,
    plural,
    rate,
    seconds,
    size,
    text,
    when,
)  # fmt: skip

Cell = Callable[[VariantResult], str]

_ORDER = {VariantState.IN_DOUBT: 1, VariantState.WRONG: 1, VariantState.WAITING: 2, VariantState.FAILED: 3}
_MARKS = {
    VariantState.WRONG: Mark.WRONG,
    VariantState.FAILED: Mark.FAILED,
    VariantState.IN_DOUBT: Mark.PARTIAL,
    VariantState.PARTIAL: Mark.PARTIAL,
    VariantState.WAITING: Mark.QUIET,
}


def report(comparison: Comparison) -> Report:
    """The whole report, in order; the terminal's first screen is the verdict, one table and the first warnings."""
    timed = [variant for variant in ordered(comparison) if variant.median]
    where = headline(comparison)
    return Report(
        "Comparison",
        "Comparison: " + ", ".join(where),
        comparison.verdict.sentence,
        [
            _variants(comparison),
            evidence.problems(doubts.problems(comparison, ordered(comparison))),
            *([_why(comparison)] if comparison.explanation else []),
            *([_together(comparison)] if any(v.ranks > 1 for v in comparison.variants) else []),
            _times(comparison, timed),
            _losses(comparison, timed),
            _utilisation(comparison, timed),
            _phases(comparison, timed),
            _memory(comparison, timed),
            _energy(comparison, timed),
            _levers(comparison),
            evidence.parity(comparison.parity, ordered(comparison)),
            evidence.fallbacks(ordered(comparison)),
            evidence.compile_report(ordered(comparison)),
            evidence.published(comparison.published),
            evidence.environment(comparison, ordered(comparison)),
        ],
        where,
        _figures(comparison),
        doubts.alarms(comparison, ordered(comparison)),
        comparison.version,
        first_screen=("variants", "problems"),
    )


# -- the variants in order --------------------------------------------------------------------------------------------


def ordered(comparison: Comparison) -> list[VariantResult]:
    """The variants, the fastest first; wrong ones after all that may be ranked, failed ones last."""
    return sorted(comparison.variants, key=lambda v: (_ORDER.get(v.state, 0), v.median or float("inf")))


def plain(comparison: Comparison) -> list[VariantResult]:
    """The variants without ablations of a lever, which have a section of their own."""
    variants = ordered(comparison)
    return [variant for variant in variants if not variant.lever or variant.ranked] or variants


def mark(variant: VariantResult, comparison: Comparison) -> Mark:
    """How a variant's row is set off. Its label says the state too."""
    good = variant.state in (VariantState.OK, VariantState.PARTIAL)
    if good and variant.name == comparison.verdict.fastest:
        return Mark.BEST
    return _MARKS.get(variant.state, Mark.NONE)


def headline(comparison: Comparison) -> list[str]:
    """What was compared, where and when, in short pieces."""
    machine = comparison.machine
    pieces = [
        *where(machine),
        text(machine.os) if machine.os else "",
        "SIMULATED DEVICE: no time here is a Mac's" if machine.simulated else "",
        text(comparison.work.experiment) if comparison.work.experiment else "",
        when(comparison.created) if comparison.created else "",
        "" if comparison.complete else "not complete",
    ]
    return [piece for piece in pieces if piece]


def where(machine: Machine) -> list[str]:
    """The machine in a few words."""
    pieces = [text(machine.name or "machine not known")]
    pieces += [f"{machine.gpu_cores} GPU cores"] if machine.gpu_cores else []
    return pieces + ([size(machine.memory_bytes)] if machine.memory_bytes else [])


def work_facts(work: Work) -> str:
    """What an iteration computes, in one line; empty where nothing is known."""
    model = work.model
    accumulation = text(work.gradient_accumulation_steps)
    pieces = [
        f"{rate(work.parameters, '').strip()} parameters" if work.parameters else "",
        f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide" if model else "",
        f"batch {work.batch_size} x accumulation {accumulation} x block {text(work.block_size)}"
        if work.batch_size
        else "",
        f"dropout {text(model.dropout)}" if model else "",
        text(work.dtype) if work.dtype else "",
        f"matmul precision {text(work.matmul_precision)}" if work.matmul_precision else "",
        f"corpus {text(work.corpus)}" if work.corpus else "",
        f"{count(work.tokens_per_iter)} tokens an iteration" if work.tokens_per_iter else "",
        f"{rate(work.flops_per_iter, 'FLOP')} an iteration" if work.flops_per_iter else "",
    ]
    return ", ".join(piece for piece in pieces if piece)


def relative(variant: VariantResult, comparison: Comparison) -> str:
    """1.231 [1.225, 1.238]: time over the fastest's, with the word tie where the interval contains 1."""
    if mark(variant, comparison) is Mark.BEST:
        return "tie" if comparison.verdict.ties else "fastest"
    return compared(variant.ratio)


def _table(
    caption: str, comparison: Comparison, variants: Sequence[VariantResult], columns: Mapping[str, Cell]
) -> Table:
    """A row a variant: its label, then each column's cell made from it."""
    rows = [Row([label(v), *(cell(v) for cell in columns.values())], mark(v, comparison)) for v in variants]
    return Table(caption, ["variant", *columns], rows)


def _figures(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The fastest variant's own figures, as far as they are known; of variants that tie, the first's, by name."""
    variant = comparison.named(comparison.verdict.fastest)
    if variant is None or variant.times is None or mark(variant, comparison) is not Mark.BEST:
        return []
    bounds = interval(variant.times.ci95)
    share, of = variant.mfu, "MFU, of this chip's peak"
    if share is None:
        share, of = variant.mfu_measured, "MFU, of the best matmul measured here"
    found = [
        (f"{ms(variant.median)} ms", f"an iteration of {label(variant)}", "" if bounds == DASH else f"95 % {bounds}"),
        (count(variant.tokens_per_s), "tokens a second", ""),
        (percent(share), of, ""),
        (seconds(variant.recipe.seconds if variant.recipe else None), "for the full recipe", "projected"),
        (size(variant.peak_memory), "peak memory", ""),
    ]
    return [figure for figure in found if figure[0] != DASH]


# -- sections ---------------------------------------------------------------------------------------------------------


def _variants(comparison: Comparison) -> Section:
    variants = [variant for variant in ordered(comparison) if variant.ranks == 1]
    confidences = [variant.ratio.confidence for variant in variants if variant.ratio]
    sure = f"{100 * max(confidences):.3g} %" if confidences else "interval"
    table = _table("Variants, the fastest first", comparison, variants, {
        "ms an iteration [95 %]": median,
        f"time relative to fastest [{sure}]": lambda v: relative(v, comparison),
        "tokens/s": _of("tokens_per_s", count),
        "MFU: chip": _of("mfu", percent),
        "MFU: measured": _of("mfu_measured", percent),
        "peak memory": _of("peak_memory", size),
        "full recipe": _of("recipe.seconds", seconds),
        "rounds": lambda v: count(v.runs) + (f", {len(v.failed_runs)} failed" if v.failed_runs else ""),
        "parity": lambda v: doubts.PARITY.get(v.parity, v.parity),
    })  # fmt: skip
    work = work_facts(comparison.work)
    other = [label(variant) for variant in variants if not variant.same_work and not variant.lever and variant.median]
    every = f"Same work for all but {listed(other)}" if other else "Same work for every variant"
    trained = every if any(variant.median for variant in variants) else "Work that was planned"
    notes = [f"{trained}: {work}." if work else "What was trained is not recorded."]
    notes += [f"Full recipe: {variant.recipe.formula}." for variant in variants if variant.recipe][:1]
    of_note: dict[str, list[str]] = {}
    for variant in variants:
        if variant.note:
            of_note.setdefault(variant.note, []).append(text(variant.label, 80))
    notes += [f"{listed(labels)}: {note}." for note, labels in of_note.items()]
    return Section("variants", "Variants side by side", notes, [table], "Nothing ran.", matters=True)


def median(variant: VariantResult) -> str:
    """24.5 [24.1, 24.9]"""
    return beside(ms(variant.median), interval(variant.times.ci95)) if variant.times else DASH


def _of(path: str, words: Callable[[object], str] = text) -> Cell:
    """The cell of a variant's figure, by its place in the record: "roofline.floor_ms"."""

    def cell(variant: VariantResult) -> str:
        found: object = variant
        for name in path.split("."):
            found = None if found is None else getattr(found, name)
        return words(found)

    return cell


def _signed(value: object) -> str:
    return DASH if (known := number(value)) is None else f"{known:+.1f} %"


def _times(comparison: Comparison, timed: Sequence[VariantResult]) -> Section:
    drift = _of("drift.within_percent", _signed)
    spread = _table("Milliseconds an iteration over all rounds; outliers are counted and kept", comparison, timed, {
        **{key: _of(f"times.{key}", ms) for key in ("median", "mean", "p10", "p90", "min", "max")},
        "iterations": _of("times.count", count),
        "outliers": lambda v: f"{v.outliers.count} ({percent(v.outliers.share, 2)})" if v.outliers else DASH,
        "drift in a round": lambda v: drift(v) + (" throttled" * bool(v.drift and v.drift.throttled)),
        "between": _of("drift.between_percent", _signed),
    })  # fmt: skip
    rounds = sorted({r for variant in timed for r in variant.medians})
    by_round = Table(
        "Median milliseconds by round, in the order in which they ran",
        ["variant", *(f"round {r}" for r in rounds)],
        [Row([label(v), *(ms(v.medians.get(r)) for r in rounds)], mark(v, comparison)) for v in timed if rounds],
    )
    return Section("times", "Iteration times", [], [spread, by_round], "No iteration was timed.", folded=True)


def _losses(comparison: Comparison, timed: Sequence[VariantResult]) -> Section:
    def last(key: str, words: Callable[[object], str]) -> Cell:
        return lambda v: words(getattr(v.evaluations[-1], key) if v.evaluations else None)

    def best(v: VariantResult) -> str:
        return loss(min((x for e in v.evaluations if (x := number(e.val_loss)) is not None), default=None))

    table = _table("Losses at the last evaluation", comparison, timed, {
        "iteration": last("iter", count), "training": last("train_loss", loss), "validation": last("val_loss", loss),
        "best validation": best, "held against the others": _held,
    })  # fmt: skip
    note = (
        "Every variant starts from the same weights and sees the same batches. Without dropout the curves lie "
        "together; with it each framework draws its own masks, and they agree in the mean. Those that compute the "
        "same are held against each other, round by round: the limit is the most that rounding and masks explain."
    )
    return Section("loss", "Loss", [note], [table], "No loss was recorded.", folded=True)


def _held(variant: VariantResult) -> str:
    """agree: 2 others, 400 iterations, at most 12.0 % of the limit"""
    losses = variant.losses
    if losses.state is AgreementState.NOT_COMPARED:
        return "nothing computes the same"
    if losses.state is not AgreementState.AGREE:
        return f"{doubts.MARKS[VariantState(losses.state)]}: {text(losses.reason)}"
    others = plural(len(losses.against), "other")
    return f"{others}, {plural(losses.iterations, 'iteration')}, at most {percent(losses.share)} of the limit"


def _why(comparison: Comparison) -> Section:
    """The reasons, and what each variant's iteration consists of."""
    from nanogpt_mac.suites.parts import section

    assert comparison.explanation is not None
    found = section(comparison.explanation.accounts, "why")
    found.title, found.items = "Why: where each iteration goes", [r.sentence for r in comparison.explanation.reasons]
    if not comparison.explanation.complete:
        found.notes.append("The budget was spent before all parts were measured. Raise budget_minutes= for them.")
    return found


def _together(comparison: Comparison) -> Section:
    """Several processes beside the same in one."""
    several = sorted((v for v in comparison.variants if v.ranks > 1), key=lambda v: (v.alone or "", v.ranks))
    rows = [v for each in dict.fromkeys(v.alone for v in several) for v in [comparison.named(each)] if v]
    rows = sorted([*rows, *several], key=lambda v: (v.alone or v.name, v.ranks))

    def efficiency(variant: VariantResult) -> str:
        one = comparison.named(variant.alone)
        if one is None or not one.tokens_per_s or not variant.tokens_per_s:
            return DASH
        return percent(variant.tokens_per_s / one.tokens_per_s / variant.ranks)

    table = _table("Processes that train together, of this machine", comparison, rows, {
        "processes": lambda v: count(v.ranks),
        "ms an iteration [95 %]": median,
        "tokens/s": _of("tokens_per_s", count),
        "efficiency": efficiency,
        "communication not overlapped": _of("world.exposed_share", percent),
        "of it, ms": _of("world.exposed_ms", ms),
        "the sum alone, ms": _of("world.alone_ms", ms),
        "bytes an iteration": _of("world.bytes_per_iter", size),
        "by": _of("world.by"),
    })  # fmt: skip
    notes = [
        "Efficiency: tokens a second over the number of processes times those of one. Processes that share the cores "
        "of one CPU cannot reach 100 %. They are never ranked with single runs."
    ]
    return Section("together", "Several processes", notes, [table], "Nothing was timed.")


# A variant's key -> its denominator.
_PEAKS = {"mfu": "this chip's peak", "mfu_measured": "best matmul measured here", "mfu_a100": "A100's 312 TFLOP/s"}


def _utilisation(comparison: Comparison, timed: Sequence[VariantResult]) -> Section:
    columns: dict[str, Cell] = {}
    for key, name in _PEAKS.items():
        columns[f"share of {name}"] = _of(key, partial(percent, digits=2 if key == "mfu_a100" else 1))
        columns[name] = _of(f"mfu_denominators.{key}", partial(rate, unit="FLOP/s"))
    shares = _table("Model FLOPs utilisation, each against its named peak", comparison, timed, columns)
    roofs = [variant for variant in timed if variant.roofline]
    floor = "The floor of an iteration: the larger of matmul FLOPs over peak and bytes over bandwidth"
    roofline = _table(floor, comparison, roofs, {
        "measured ms": _of("median", ms),
        "floor ms": _of("roofline.floor_ms", ms),
        "floor of measured": _of("roofline.share", percent),
        "bound by": _of("roofline.bound"),
        "compute ms": _of("roofline.compute_ms", ms),
        "memory ms": _of("roofline.memory_ms", ms),
        "peak": _of("roofline.peak", partial(rate, unit="FLOP/s")),
        "source of the peak": _of("roofline.peak_source"),
        "bandwidth": _of("roofline.bandwidth", partial(rate, unit="B/s")),
        "source of the bandwidth": _of("roofline.bandwidth_source"),
    })  # fmt: skip
    notes = ["The floor is arithmetic, not a measurement."] if roofs else []
    if timed and not roofs:
        notes = ["No roofline: neither this chip's peak and bandwidth nor measured ones are known."]
    empty = "No iteration was timed."
    return Section("utilisation", "MFU and roofline", notes, [shares, roofline], empty, folded=True)


def _phases(comparison: Comparison, timed: Sequence[VariantResult]) -> Section:
    table = _table("First iteration, compiling and evaluation apart from training", comparison, timed, {
        "first iteration": _of("first_iter_s", seconds),
        # An estimate that noise has put below 0 is 0.
        "of it compiling": lambda v: seconds(v.compile_s) if v.compile_s is None or v.compile_s > 0 else "0 s",
        "one evaluation": _of("eval_s", seconds),
        "full recipe": _of("recipe.seconds", seconds),
    })  # fmt: skip
    note = (
        "Compiling is an estimate: the first iteration less the median. Neither the iteration times nor the full "
        "recipe's contain it."
    )
    title, empty = "Phases: compile, train, evaluate", "No iteration was timed."
    return Section("phases", title, [note], [table], empty, folded=True)


def _memory(comparison: Comparison, timed: Sequence[VariantResult]) -> Section:
    columns = {
        "peak": _of("peak_memory", size),
        "device": _of("device"),
        "what is counted": _of("capabilities.memory"),
    }
    table = _table("Peak memory", comparison, [v for v in timed if v.peak_memory is not None], columns)
    notes = ["Back ends count different things, so compare like with like."]
    return Section("memory", "Memory", notes, [table], "No variant recorded its memory.", folded=True)


def _energy(comparison: Comparison, timed: Sequence[VariantResult]) -> Section:
    columns = {"J per 1000 tokens": "joules_per_1000_tokens", "W": "watts", "source": "source"}
    known = [variant for variant in timed if variant.energy and variant.energy.joules_per_1000_tokens is not None]
    cells = {title: _of(f"energy.{key}") for title, key in columns.items()}
    empty = "No energy figures: Apple silicon gives them through zeus-apple-silicon, NVIDIA through NVML."
    return Section("energy", "Energy", [], [_table("Energy of training", comparison, known, cells)], empty, folded=True)


def _levers(comparison: Comparison) -> Section:
    rows = [_lever(lever, comparison) for lever in comparison.levers or ()]
    columns = ["lever", "on", "override", "time relative to without it", "saves"]
    table = Table("What each switch is worth", columns, rows)
    note = "One switch at a time against the same variant without it. Below 1 the switch makes it faster."
    empty = "No lever was tried; use python compare.py levers=true."
    return Section("levers", "Levers", [note], [table], empty)


def _lever(lever: LeverRow, comparison: Comparison) -> Row:
    variant, base = comparison.named(lever.name), comparison.named(lever.base)
    bad = variant is not None and variant.state in doubts.MARKS
    said = f" ({doubts.MARKS[variant.state]})" if variant and bad else ""
    value = spelt(lever.value) if isinstance(lever.value, bool) else text(lever.value)
    cells = [
        text(lever.what or lever.name) + said,
        label(base) if base else text(lever.base),
        f"{text(lever.key)}={value}",
        compared(lever.ratio),
        _signed(lever.worth_percent),
    ]
    return Row(cells, _MARKS[variant.state] if variant and bad else Mark.NONE)
