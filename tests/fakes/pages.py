"""Comparisons to make reports of: of the fakes through `collect`, and altered as documents."""

import numpy as np
from fakes import comparisons as fakes

from nanogpt_mac.compare.collect import collect
from nanogpt_mac.records.comparison import Comparison

EVIL = "<script>alert('x')</script> | `a` $x_1$ [b]"  # a label may be anything


def collected(folder):
    """Four variants of a Mac, one of them wrong, and a fifth that ran out of memory; 5 rounds."""
    variants = [dict(variant) for variant in fakes.VARIANTS]
    variants[0] |= {"energy": 21.5}
    variants[1] |= {"parity": "fail"}
    variants[3] |= {"outliers": 0.02, "drift": 0.05}
    variants.append({"name": "cpu-compile", "label": "CPU compiled", "fail": "oom"})
    return collect(fakes.write_comparison(folder, variants, 5, 40, 0.003, 1, experiment="quick"))


def edited(comparison, edit):
    """The comparison after `edit(document, variants by name)` changed its document in place."""
    document = comparison.document()
    edit(document, {variant["name"]: variant for variant in document["variants"]})
    return Comparison.parse(document, "comparison.json")


def many(comparison, variants=12, rounds=10, points=400):
    """The comparison with so many variants of so many rounds and points."""
    rng = np.random.default_rng(0)

    def edit(document, named):
        base = named["mlx"]
        document["variants"] = []
        for i in range(variants):
            series = [
                {
                    "round": r,
                    "iter": list(range(0, 5 * points, 5)),
                    "ms": (base["times"]["median"] * rng.lognormal(0, 0.02, points)).tolist(),
                    "loss": (4.2 * np.exp(-np.arange(points) / 150) + 0.05 * rng.normal(size=points)).tolist(),
                    "seconds": np.linspace(0, 60 + i, points).tolist(),
                }
                for r in range(rounds)
            ]
            ratio = {"value": 1 + 0.01 * i, "ci": [1, 1.2], "tie": i < 3, "pairs": [1.01] * rounds, "to": "variant-0"}
            more = {"rounds": list(range(rounds)), "confidence": 0.99}
            document["variants"].append(
                base
                | {"name": f"variant-{i}", "label": f"Variant number {i}, with a long name", "series": series}
                | {"rounds": [base["rounds"][0] | {"round": r} for r in range(rounds)]}
                | {"ratio": ratio | more if i else None}
            )
        document["verdict"] |= {"fastest": "variant-0", "ties": []}

    return edited(comparison, edit)


def alone(comparison):
    """One variant and one round."""

    def edit(document, named):
        one = named["mlx"]
        one |= {key: one[key][:1] for key in ("rounds", "series", "evaluations")} | {"ratio": None}
        document |= {"variants": [one], "levers": None, "published": []}

    return edited(comparison, edit)


def sparse(comparison):
    """The least that validates: names and medians, and a variant without."""
    variants = [
        {"name": v.name, "label": v.name, "state": v.state, "times": {"median": v.median}} for v in comparison.variants
    ]
    nothing = {"name": "nothing", "label": "nothing", "state": "failed"}
    document = {"schema": 2, "verdict": {"sentence": "No verdict."}, "variants": [*variants, nothing]}
    return Comparison.parse(document, "comparison.json")


def empty():
    """Not even a variant."""
    return Comparison.parse({"schema": 2, "verdict": {"sentence": "Nothing ran."}, "variants": []}, "comparison.json")


def with_levers(comparison):
    """The same with two ablations and an evil label."""
    ratio = {"value": 0.91, "ci": [0.9, 0.92], "confidence": 0.99, "tie": False, "pairs": [0.91], "rounds": [0]}
    ratio["to"] = "mlx"
    rows = [("mlx-bf16", "dtype", "bfloat16", ratio), ("mlx-sync", "sync", "iteration", ratio | {"tie": True})]

    def edit(document, named):
        document["levers"] = [
            {"name": n, "base": "mlx", "key": k, "value": v, "what": f"{k} {EVIL}", "ratio": r, "worth_percent": 9.0}
            for n, k, v, r in rows
        ]
        document["variants"][0] |= {
            "label": EVIL,
            "note": EVIL,
            "reason": EVIL,
            "fallbacks": {"findings": [{"op": EVIL, "count": 2, "phase": "backward"}]},
            "compile_report": {"graph_breaks": 0, "launches": {EVIL: 3}},
        }

    return edited(comparison, edit)
