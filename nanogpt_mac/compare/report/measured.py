"""The sections of a report that hold figures: times, losses, utilisation, phases, memory, energy, levers."""

from __future__ import annotations

from typing import Any

from nanogpt_mac.compare.report.sections import mark, ordered, rows_of, timed, work_facts
from nanogpt_mac.compare.report.table import Row, Section, Table
from nanogpt_mac.compare.report.words import (
    DASH,
    MARKS,
    count,
    dicts,
    get,
    interval,
    label,
    loss,
    ms,
    num,
    percent,
    rate,
    ratio,
    seconds,
    size,
    state,
    text,
)


def against_fastest(variant: dict[str, Any], comparison: Any) -> str:
    """1.231 [1.225, 1.238], with the word tie where the interval contains 1."""
    found = variant.get("ratio")
    if mark(variant, comparison) == "fastest":
        return "tie" if get(comparison, "verdict", "ties") else "fastest"
    value = ratio(get(found, "value"))
    if value == DASH:
        return DASH
    return f"{value} {interval(get(found, 'ci'), ratio)}" + (" tie" if get(found, "tie") else "")


def variants_section(comparison: Any) -> Section:
    variants = ordered(comparison)
    confidences = {num(get(variant, "ratio", "confidence")) for variant in variants} - {None}
    confidence = f"{max(c for c in confidences if c):.0%} interval" if confidences else "interval"
    columns = [
        "variant", "ms an iteration [95 %]", f"x the fastest [{confidence}]", "tokens/s", "MFU: chip", "MFU: measured",
        "peak memory", "full recipe", "parity", "rounds",
    ]  # fmt: skip
    rows = rows_of(
        comparison,
        variants,
        lambda variant: _with(ms(get(variant, "iter_ms", "median")), interval(get(variant, "iter_ms", "ci95"))),
        lambda variant: against_fastest(variant, comparison),
        lambda variant: count(variant.get("tokens_per_s")),
        lambda variant: percent(variant.get("mfu")),
        lambda variant: percent(variant.get("mfu_measured")),
        lambda variant: size(variant.get("peak_memory")),
        lambda variant: seconds(get(variant, "recipe", "seconds")),
        lambda variant: _parity(variant),
        lambda variant: _rounds(variant),
    )
    said = work_facts(get(comparison, "work"))
    other = [label(variant) for variant in variants if variant.get("same_work") is False and not variant.get("lever")]
    every = f"Every variant but {', '.join(other)}" if other else "Every variant"
    trained = f"{every} trained the same" if timed(comparison) else "What was to be trained"
    notes = [f"{trained}: {said}." if said else "What was trained is not recorded."]
    formulas = dict.fromkeys(
        text(get(variant, "recipe", "formula")) for variant in variants if get(variant, "recipe", "formula")
    )
    notes += [f"Full recipe: {formula}." for formula in list(formulas)[:1]]
    return Section(
        "variants",
        "Variants side by side",
        notes,
        [Table("Variants of training, the fastest first", columns, rows)],
        "No variant ran.",
    )


def _with(value: str, bounds: str) -> str:
    return value if DASH in (value, bounds) else f"{value} {bounds}"


def _parity(variant: dict[str, Any]) -> str:
    return {"fail": "WRONG", "error": "could not be checked"}.get(
        str(variant.get("parity")), text(variant.get("parity"))
    )


def _rounds(variant: dict[str, Any]) -> str:
    failed = len(dicts(variant.get("failed_runs")))
    return (
        DASH if num(variant.get("runs")) is None else count(variant["runs"]) + (f", {failed} failed" if failed else "")
    )


def times_section(comparison: Any) -> Section:
    variants = timed(comparison)

    def part(key: str) -> Any:
        return lambda variant: ms(get(variant, "iter_ms", key))

    spread = Table(
        "Milliseconds an iteration over all rounds; outliers are counted and kept",
        ["variant", "median", "mean", "p10", "p90", "min", "max", "iterations", "outliers", "drift in a round", "between"],
        rows_of(
            comparison, variants, *(part(key) for key in ("median", "mean", "p10", "p90", "min", "max")),
            lambda variant: count(get(variant, "iter_ms", "count")),
            lambda variant: _with(count(get(variant, "outliers", "count")), f"({percent(get(variant, 'outliers', 'share'), 2)})"),
            lambda variant: _drift(variant, "within_percent") + (" throttled" if get(variant, "drift", "throttled") else ""),
            lambda variant: _drift(variant, "between_percent"),
        ),
    )  # fmt: skip
    medians = {id(variant): {r["round"]: r.get("median") for r in _numbered(variant)} for variant in variants}
    rounds = sorted({r for found in medians.values() for r in found})
    by_round = Table(
        "Median milliseconds by round, in the order in which they ran",
        ["variant", *(f"round {r}" for r in rounds)],
        rows_of(comparison, variants, *((lambda variant, r=r: ms(medians[id(variant)].get(r))) for r in rounds))
        if rounds
        else [],
    )
    return Section("times", "Iteration times", [], [spread, by_round], "No iteration was timed.")


def _numbered(variant: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in dicts(variant.get("rounds")) if isinstance(part.get("round"), int)]


def _drift(variant: dict[str, Any], key: str) -> str:
    value = num(get(variant, "drift", key))
    return DASH if value is None else f"{value:+.1f} %"


def loss_section(comparison: Any) -> Section:
    rows = []
    for variant in timed(comparison):
        found = dicts(variant.get("evaluations"))
        last = found[-1] if found else {}
        values = [num(e.get("val_loss")) for e in found]
        best = min((v for v in values if v is not None), default=None)
        numbers = [count(last.get("iter")), loss(last.get("train_loss")), loss(last.get("val_loss")), loss(best)]
        rows.append(Row([label(variant), *numbers], mark(variant, comparison)))
    return Section(
        "loss",
        "Loss",
        [
            "Every variant starts from the same weights and sees the same batches. Without dropout the curves lie "
            "together; with it each framework draws its own masks, and they agree in the mean."
        ],
        [
            Table(
                "Losses at the last evaluation",
                ["variant", "iteration", "training", "validation", "best validation"],
                rows,
            )
        ],
        "No loss was recorded.",
    )


_PEAKS = {
    "mfu": "this chip's peak",
    "mfu_measured": "best matmul measured here",
    "mfu_a100": "A100's 312 TFLOP/s",
}  # a variant's key -> its denominator


def utilisation_section(comparison: Any) -> Section:
    variants = timed(comparison)
    columns, cells = ["variant"], []
    for key, name in _PEAKS.items():
        columns += [f"share of {name}", "that peak"]
        cells.append(lambda variant, key=key: percent(variant.get(key), 2 if key == "mfu_a100" else 1))
        cells.append(lambda variant, key=key: rate(get(variant, "mfu_denominators", key), "FLOP/s"))
    shares = Table(
        "Model FLOPs utilisation, each against its named peak", columns, rows_of(comparison, variants, *cells)
    )
    roofs = [variant for variant in variants if num(get(variant, "roofline", "floor_ms")) is not None]
    roofline = Table(
        "The floor of an iteration: the larger of matmul FLOPs over peak and bytes over bandwidth",
        ["variant", "measured ms", "floor ms", "floor of measured", "bound by", "compute ms", "memory ms", "peak",
         "its source", "bandwidth", "its source"],
        rows_of(
            comparison, roofs,
            lambda variant: ms(get(variant, "iter_ms", "median")),
            lambda variant: ms(get(variant, "roofline", "floor_ms")),
            lambda variant: percent(get(variant, "roofline", "share")),
            lambda variant: text(get(variant, "roofline", "bound")),
            lambda variant: ms(get(variant, "roofline", "compute_ms")),
            lambda variant: ms(get(variant, "roofline", "memory_ms")),
            lambda variant: rate(get(variant, "roofline", "peak"), "FLOP/s"),
            lambda variant: text(get(variant, "roofline", "peak_source")),
            lambda variant: rate(get(variant, "roofline", "bandwidth"), "B/s"),
            lambda variant: text(get(variant, "roofline", "bandwidth_source")),
        ),
    )  # fmt: skip
    notes = []
    if roofs:
        notes.append("The floor is arithmetic, not a measurement.")
    elif variants:
        notes.append("No roofline: neither this chip's peak and bandwidth nor measured ones are known.")
    return Section("utilisation", "MFU and roofline", notes, [shares, roofline], "No iteration was timed.")


def phases_section(comparison: Any) -> Section:
    rows = rows_of(
        comparison,
        timed(comparison),
        lambda variant: seconds(variant.get("first_iter_s")),
        lambda variant: _at_least_0(variant.get("compile_s")),
        lambda variant: seconds(variant.get("eval_s")),
        lambda variant: seconds(get(variant, "recipe", "seconds")),
    )
    columns = ["variant", "first iteration", "of it compiling", "one evaluation", "full recipe"]
    return Section(
        "phases",
        "Phases: compile, train, evaluate",
        [
            "Compiling is an estimate: the first iteration less the median. Neither the iteration times nor the full "
            "recipe's contain it; the chart adds it."
        ]
        if rows
        else [],
        [Table("First iteration, compiling and evaluation apart from training", columns, rows)],
        "No iteration was timed.",
    )


def _at_least_0(value: Any) -> str:
    """An estimate that noise has put below 0 is 0."""
    return "0 s" if (num(value) or 0) < 0 else seconds(value)


def memory_section(comparison: Any) -> Section:
    variants = [variant for variant in timed(comparison) if num(variant.get("peak_memory")) is not None]
    rows = rows_of(
        comparison, variants, lambda variant: size(variant.get("peak_memory")), lambda variant: text(variant.get("device"))
    )  # fmt: skip
    notes = [
        "What is counted differs by back end: the allocator's peak (CUDA, MLX), the driver's pool (MPS), the process's "
        "resident set (CPU)."
    ]
    return Section(
        "memory",
        "Memory",
        notes if rows else [],
        [Table("Peak memory", ["variant", "peak", "device"], rows)],
        "No variant recorded its memory.",
    )


def energy_section(comparison: Any) -> Section:
    variants = [
        variant for variant in timed(comparison) if num(get(variant, "energy", "joules_per_1000_tokens")) is not None
    ]
    rows = rows_of(
        comparison,
        variants,
        lambda variant: text(num(get(variant, "energy", "joules_per_1000_tokens"))),
        lambda variant: text(num(get(variant, "energy", "watts"))),
        lambda variant: text(get(variant, "energy", "source")),
    )
    return Section(
        "energy",
        "Energy",
        [],
        [Table("Energy of training", ["variant", "J per 1000 tokens", "W", "source"], rows)],
        "This machine did not tell its energy: Apple silicon does through zeus-apple-silicon, NVIDIA through NVML.",
    )


def _override(value: Any) -> str:
    """As the command line has it."""
    return str(value).lower() if isinstance(value, bool) else text(value)


def levers_section(comparison: Any) -> Section:
    known = {
        variant.get("name"): variant
        for variant in dicts(get(comparison, "variants"))
        if isinstance(variant.get("name"), str)
    }
    rows = []
    for lever in dicts(get(comparison, "levers")):
        name = lever.get("name")
        variant = known.get(name, {}) if isinstance(name, str) else {}
        base = known.get(str(lever.get("base")))
        worth = num(lever.get("worth_percent"))
        marked = f" ({MARKS[state(variant)]})" if variant and state(variant) != "ok" else ""
        cells = [
            text(lever.get("what") or name) + marked,
            label(base) if base else text(lever.get("base")),
            f"{text(lever.get('key'))}={_override(lever.get('value'))}",
            _with(ratio(get(lever, "ratio", "value")), interval(get(lever, "ratio", "ci"), ratio))
            + (" tie" if get(lever, "ratio", "tie") else ""),
            DASH if worth is None else f"{worth:+.1f} %",
        ]
        rows.append(Row(cells, state(variant) if marked else ""))
    return Section(
        "levers",
        "Levers",
        ["One switch at a time against the same variant without it. Below 1 the switch makes it faster."]
        if rows
        else [],
        [Table("What each switch is worth", ["lever", "on", "override", "time against without it", "worth"], rows)],
        "No lever was ablated; python compare.py levers=true does.",
    )
