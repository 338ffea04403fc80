"""What a comparison's report says first: its verdict, its variants in order, and what speaks against them.

Every key of a comparison may be missing or null: a cell becomes an em dash, a section a sentence that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanogpt_mac.compare.report.table import Row
from nanogpt_mac.compare.report.words import count, dicts, get, label, num, rate, size, state, text, when

_ORDER = {"ok": 0, "partial": 0, "wrong": 1, "waiting": 2, "failed": 3}


def ordered(comparison: Any) -> list[dict[str, Any]]:
    """The variants, the fastest first; wrong ones after all that may be ranked, failed ones last."""

    def key(variant: dict[str, Any]) -> tuple[int, float]:
        return _ORDER[state(variant)], num(get(variant, "iter_ms", "median")) or float("inf")

    return sorted(dicts(get(comparison, "variants")), key=key)


def plain(comparison: Any) -> list[dict[str, Any]]:
    """The variants without ablations of a lever, which have a section of their own."""
    variants = ordered(comparison)
    return [variant for variant in variants if not variant.get("lever") or variant.get("ranked") is True] or variants


def mark(variant: dict[str, Any], comparison: Any) -> str:
    """How a variant's row is set off: fastest, a state that is not ok, or nothing. Its label says the state too."""
    found = state(variant)
    if found in ("ok", "partial") and variant.get("name") and variant["name"] == get(comparison, "verdict", "fastest"):
        return "fastest"
    return "" if found == "ok" else found


def verdict(comparison: Any) -> str:
    """The sentence that stands first."""
    sentence = get(comparison, "verdict", "sentence")
    if sentence:
        return text(sentence)
    return "No verdict: this comparison has no finished runs." if not timed(comparison) else "No verdict was recorded."


def headline(comparison: Any) -> list[str]:
    """What was compared, where and when, in short pieces."""
    work, machine = get(comparison, "work"), get(comparison, "machine")
    cores = num(get(machine, "gpu_cores"))
    sizes = [
        text(get(machine, "name") or "machine not known"),
        f"{cores:.0f} GPU cores" if cores else None,
        size(get(machine, "memory_bytes")) if num(get(machine, "memory_bytes")) else None,
        text(get(machine, "os")) if get(machine, "os") else None,
        "SIMULATED DEVICE: no time here is a Mac's" if get(machine, "simulated") else None,
        text(get(work, "experiment")) if get(work, "experiment") else None,
        when(get(comparison, "created")) if get(comparison, "created") else None,
        None if get(comparison, "complete") is not False else "not complete",
    ]
    return [piece for piece in sizes if piece]


def work_facts(work: Any) -> str:
    """What an iteration computes, in one line; empty where nothing is known."""
    model = get(work, "model")
    parameters, tokens, flops = (num(get(work, key)) for key in ("parameters", "tokens_per_iter", "flops_per_iter"))
    pieces = [
        f"{rate(parameters, '')} parameters".replace("  ", " ") if parameters else None,
        f"{text(get(model, 'n_layer'))} layers, {text(get(model, 'n_head'))} heads, {text(get(model, 'n_embd'))} wide"
        if model
        else None,
        f"batch {text(get(work, 'batch_size'))} x accumulation "
        f"{text(get(work, 'gradient_accumulation_steps'))} x block {text(get(work, 'block_size'))}"
        if get(work, "batch_size")
        else None,
        f"dropout {text(get(model, 'dropout'))}" if get(model, "dropout") is not None else None,
        text(get(work, "dtype")) if get(work, "dtype") else None,
        f"matmul precision {text(get(work, 'matmul_precision'))}" if get(work, "matmul_precision") else None,
        f"corpus {text(get(work, 'corpus'))}" if get(work, "corpus") else None,
        f"{count(tokens)} tokens an iteration" if tokens else None,
        f"{rate(flops, 'FLOP')} an iteration" if flops else None,
    ]
    return ", ".join(piece for piece in pieces if piece)


def problems(comparison: Any) -> list[str]:
    """Every warning, and every variant that is wrong, failed or partial with its reason; the worst first."""
    lines = []
    for variant in ordered(comparison):
        if state(variant) == "wrong":
            lines.append(
                f"{label(variant)}: {text(variant.get('reason') or 'failed the parity check')}. Its times do not count."
            )
        elif state(variant) == "failed":
            lines.append(f"{label(variant)}: {text(variant.get('reason') or 'the reason was not recorded')}")
    general = get(comparison, "warnings")
    lines += [text(line) for line in general] if isinstance(general, list) else []
    for variant in ordered(comparison):
        lines += [
            f"{label(variant)}: round {text(run.get('round'))} {text(run.get('state'))}: {text(run.get('reason'))}"
            for run in dicts(variant.get("failed_runs"))
            if state(variant) != "failed"
        ]
        own = variant.get("warnings")
        lines += [f"{label(variant)}: {text(line)}" for line in own] if isinstance(own, list) else []
    return list(dict.fromkeys(lines))


def timed(comparison: Any) -> list[dict[str, Any]]:
    return [variant for variant in ordered(comparison) if (num(get(variant, "iter_ms", "median")) or 0) > 0]


def rows_of(comparison: Any, variants: Sequence[dict[str, Any]], *cells: Any) -> list[Row]:
    """A row a variant: its label, then each cell made from it."""
    return [
        Row([label(variant), *(cell(variant) for cell in cells)], mark(variant, comparison)) for variant in variants
    ]
