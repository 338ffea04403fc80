"""The sections of a report that hold figures: times, losses, utilisation, phases, memory, energy, levers."""

from __future__ import annotations

from typing import Any

from nanogpt_mac.compare.report.sections import mark, ordered, rows_of, timed, work_facts
from nanogpt_mac.report.table import Row, Section, Table
from nanogpt_mac.report.words import (
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


def against_fastest(way: dict[str, Any], comparison: Any) -> str:
    """1.231 [1.225, 1.238], with the word tie where the interval contains 1."""
    found = way.get("ratio")
    if mark(way, comparison) == "fastest":
        return "tie" if get(comparison, "verdict", "ties") else "fastest"
    value = ratio(get(found, "value"))
    if value == DASH:
        return DASH
    return f"{value} {interval(get(found, 'ci'), ratio)}" + (" tie" if get(found, "tie") else "")


def ways_section(comparison: Any) -> Section:
    ways = ordered(comparison)
    confidences = {num(get(way, "ratio", "confidence")) for way in ways} - {None}
    confidence = f"{max(c for c in confidences if c):.0%} interval" if confidences else "interval"
    columns = [
        "way", "ms an iteration [95 %]", f"x the fastest [{confidence}]", "tokens/s", "MFU: chip", "MFU: measured",
        "peak memory", "full recipe", "parity", "rounds",
    ]  # fmt: skip
    rows = rows_of(
        comparison,
        ways,
        lambda way: _with(ms(get(way, "iter_ms", "median")), interval(get(way, "iter_ms", "ci95"))),
        lambda way: against_fastest(way, comparison),
        lambda way: count(way.get("tokens_per_s")),
        lambda way: percent(way.get("mfu")),
        lambda way: percent(way.get("mfu_measured")),
        lambda way: size(way.get("peak_memory")),
        lambda way: seconds(get(way, "recipe", "seconds")),
        lambda way: _parity(way),
        lambda way: _rounds(way),
    )
    said = work_facts(get(comparison, "work"))
    other = [label(way) for way in ways if way.get("same_work") is False and not way.get("lever")]
    every = f"Every way but {', '.join(other)}" if other else "Every way"
    trained = f"{every} trained the same" if timed(comparison) else "What was to be trained"
    notes = [f"{trained}: {said}." if said else "What was trained is not recorded."]
    formulas = dict.fromkeys(text(get(way, "recipe", "formula")) for way in ways if get(way, "recipe", "formula"))
    notes += [f"Full recipe: {formula}." for formula in list(formulas)[:1]]
    return Section(
        "ways", "Ways side by side", notes, [Table("Ways of training, the fastest first", columns, rows)], "No way ran."
    )


def _with(value: str, bounds: str) -> str:
    return value if DASH in (value, bounds) else f"{value} {bounds}"


def _parity(way: dict[str, Any]) -> str:
    return {"fail": "WRONG", "error": "could not be checked"}.get(str(way.get("parity")), text(way.get("parity")))


def _rounds(way: dict[str, Any]) -> str:
    failed = len(dicts(way.get("failed_runs")))
    return DASH if num(way.get("runs")) is None else count(way["runs"]) + (f", {failed} failed" if failed else "")


def times_section(comparison: Any) -> Section:
    ways = timed(comparison)

    def part(key: str) -> Any:
        return lambda way: ms(get(way, "iter_ms", key))

    spread = Table(
        "Milliseconds an iteration over all rounds; outliers are counted and kept",
        ["way", "median", "mean", "p10", "p90", "min", "max", "iterations", "outliers", "drift in a round", "between"],
        rows_of(
            comparison, ways, *(part(key) for key in ("median", "mean", "p10", "p90", "min", "max")),
            lambda way: count(get(way, "iter_ms", "count")),
            lambda way: _with(count(get(way, "outliers", "count")), f"({percent(get(way, 'outliers', 'share'), 2)})"),
            lambda way: _drift(way, "within_percent") + (" throttled" if get(way, "drift", "throttled") else ""),
            lambda way: _drift(way, "between_percent"),
        ),
    )  # fmt: skip
    medians = {id(way): {r["round"]: r.get("median") for r in _numbered(way)} for way in ways}
    rounds = sorted({r for found in medians.values() for r in found})
    by_round = Table(
        "Median milliseconds by round, in the order in which they ran",
        ["way", *(f"round {r}" for r in rounds)],
        rows_of(comparison, ways, *((lambda way, r=r: ms(medians[id(way)].get(r))) for r in rounds)) if rounds else [],
    )
    return Section("times", "Iteration times", [], [spread, by_round], "No iteration was timed.")


def _numbered(way: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in dicts(way.get("rounds")) if isinstance(part.get("round"), int)]


def _drift(way: dict[str, Any], key: str) -> str:
    value = num(get(way, "drift", key))
    return DASH if value is None else f"{value:+.1f} %"


def loss_section(comparison: Any) -> Section:
    rows = []
    for way in timed(comparison):
        found = dicts(way.get("evaluations"))
        last = found[-1] if found else {}
        values = [num(e.get("val_loss")) for e in found]
        best = min((v for v in values if v is not None), default=None)
        numbers = [count(last.get("iter")), loss(last.get("train_loss")), loss(last.get("val_loss")), loss(best)]
        rows.append(Row([label(way), *numbers], mark(way, comparison)))
    return Section(
        "loss",
        "Loss",
        [
            "Every way starts from the same weights and sees the same batches. Without dropout the curves lie "
            "together; with it each framework draws its own masks, and they agree in the mean."
        ],
        [
            Table(
                "Losses at the last evaluation", ["way", "iteration", "training", "validation", "best validation"], rows
            )
        ],
        "No loss was recorded.",
    )


_PEAKS = {
    "mfu": "this chip's peak",
    "mfu_measured": "best matmul measured here",
    "mfu_a100": "A100's 312 TFLOP/s",
}  # a way's key -> its denominator


def utilisation_section(comparison: Any) -> Section:
    ways = timed(comparison)
    columns, cells = ["way"], []
    for key, name in _PEAKS.items():
        columns += [f"share of {name}", "that peak"]
        cells.append(lambda way, key=key: percent(way.get(key), 2 if key == "mfu_a100" else 1))
        cells.append(lambda way, key=key: rate(get(way, "mfu_denominators", key), "FLOP/s"))
    shares = Table("Model FLOPs utilisation, each against its named peak", columns, rows_of(comparison, ways, *cells))
    roofs = [way for way in ways if num(get(way, "roofline", "floor_ms")) is not None]
    roofline = Table(
        "The floor of an iteration: the larger of matmul FLOPs over peak and bytes over bandwidth",
        ["way", "measured ms", "floor ms", "floor of measured", "bound by", "compute ms", "memory ms", "peak",
         "its source", "bandwidth", "its source"],
        rows_of(
            comparison, roofs,
            lambda way: ms(get(way, "iter_ms", "median")),
            lambda way: ms(get(way, "roofline", "floor_ms")),
            lambda way: percent(get(way, "roofline", "share")),
            lambda way: text(get(way, "roofline", "bound")),
            lambda way: ms(get(way, "roofline", "compute_ms")),
            lambda way: ms(get(way, "roofline", "memory_ms")),
            lambda way: rate(get(way, "roofline", "peak"), "FLOP/s"),
            lambda way: text(get(way, "roofline", "peak_source")),
            lambda way: rate(get(way, "roofline", "bandwidth"), "B/s"),
            lambda way: text(get(way, "roofline", "bandwidth_source")),
        ),
    )  # fmt: skip
    notes = []
    if roofs:
        notes.append("The floor is arithmetic, not a measurement.")
    elif ways:
        notes.append("No roofline: neither this chip's peak and bandwidth nor measured ones are known.")
    return Section("utilisation", "MFU and roofline", notes, [shares, roofline], "No iteration was timed.")


def phases_section(comparison: Any) -> Section:
    rows = rows_of(
        comparison,
        timed(comparison),
        lambda way: seconds(way.get("first_iter_s")),
        lambda way: _at_least_0(way.get("compile_s")),
        lambda way: seconds(way.get("eval_s")),
        lambda way: seconds(get(way, "recipe", "seconds")),
    )
    columns = ["way", "first iteration", "of it compiling", "one evaluation", "full recipe"]
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
    ways = [way for way in timed(comparison) if num(way.get("peak_memory")) is not None]
    rows = rows_of(
        comparison, ways, lambda way: size(way.get("peak_memory")), lambda way: text(way.get("device"))
    )  # fmt: skip
    notes = [
        "What is counted differs by back end: the allocator's peak (CUDA, MLX), the driver's pool (MPS), the process's "
        "resident set (CPU)."
    ]
    return Section(
        "memory",
        "Memory",
        notes if rows else [],
        [Table("Peak memory", ["way", "peak", "device"], rows)],
        "No way recorded its memory.",
    )


def energy_section(comparison: Any) -> Section:
    ways = [way for way in timed(comparison) if num(get(way, "energy", "joules_per_1000_tokens")) is not None]
    rows = rows_of(
        comparison,
        ways,
        lambda way: text(num(get(way, "energy", "joules_per_1000_tokens"))),
        lambda way: text(num(get(way, "energy", "watts"))),
        lambda way: text(get(way, "energy", "source")),
    )
    return Section(
        "energy",
        "Energy",
        [],
        [Table("Energy of training", ["way", "J per 1000 tokens", "W", "source"], rows)],
        "This machine did not tell its energy: Apple silicon does through zeus-apple-silicon, NVIDIA through NVML.",
    )


def _override(value: Any) -> str:
    """As the command line has it."""
    return str(value).lower() if isinstance(value, bool) else text(value)


def levers_section(comparison: Any) -> Section:
    known = {way.get("name"): way for way in dicts(get(comparison, "ways")) if isinstance(way.get("name"), str)}
    rows = []
    for lever in dicts(get(comparison, "levers")):
        name = lever.get("name")
        way = known.get(name, {}) if isinstance(name, str) else {}
        base = known.get(str(lever.get("base")))
        worth = num(lever.get("worth_percent"))
        marked = f" ({MARKS[state(way)]})" if way and state(way) != "ok" else ""
        cells = [
            text(lever.get("what") or name) + marked,
            label(base) if base else text(lever.get("base")),
            f"{text(lever.get('key'))}={_override(lever.get('value'))}",
            _with(ratio(get(lever, "ratio", "value")), interval(get(lever, "ratio", "ci"), ratio))
            + (" tie" if get(lever, "ratio", "tie") else ""),
            DASH if worth is None else f"{worth:+.1f} %",
        ]
        rows.append(Row(cells, state(way) if marked else ""))
    return Section(
        "levers",
        "Levers",
        ["One switch at a time against the same way without it. Below 1 the switch makes it faster."] if rows else [],
        [Table("What each switch is worth", ["lever", "on", "override", "time against without it", "worth"], rows)],
        "No lever was ablated; python compare.py levers=true does.",
    )
