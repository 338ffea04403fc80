"""Comparisons to make reports of: of the fakes through `collect`, and altered in memory."""

import copy

import numpy as np
from fakes import comparisons as fakes

from nanogpt_mac.compare.results.collect import collect

EVIL = "<script>alert('x')</script> | `a` $x_1$ [b]"  # a label may be anything


def collected(folder):
    """Four variants of a Mac, one of them wrong, and a fifth that ran out of memory; 5 rounds."""
    variants = [dict(variant) for variant in fakes.VARIANTS]
    variants[0] |= {"energy": 21.5}
    variants[1] |= {"parity": "fail"}
    variants[3] |= {"outliers": 0.02, "drift": 0.05}
    variants.append({"name": "cpu-compile", "label": "CPU compiled", "fail": "oom"})
    return collect(fakes.write_comparison(folder, variants, 5, 40, 0.003, 1, experiment="quick"))


def many(comparison, variants=12, rounds=10, points=400):
    """The comparison with so many variants of so many rounds and points."""
    rng = np.random.default_rng(0)
    made = copy.deepcopy(comparison)
    base = next(variant for variant in made["variants"] if variant["name"] == "mlx")
    made["variants"] = []
    for i in range(variants):
        variant = copy.deepcopy(base) | {"name": f"variant-{i}", "label": f"Variant number {i}, with a long name"}
        iterations = list(range(0, 5 * points, 5))
        variant["series"] = [
            {
                "round": r,
                "iter": iterations,
                "iter_ms": (variant["iter_ms"]["median"] * rng.lognormal(0, 0.02, points)).tolist(),
                "loss": (4.2 * np.exp(-np.arange(points) / 150) + 0.05 * rng.normal(size=points)).tolist(),
                "seconds": np.linspace(0, 60 + i, points).tolist(),
            }
            for r in range(rounds)
        ]
        variant["rounds"] = [variant["rounds"][0] | {"round": r} for r in range(rounds)]
        variant["ratio"] = (
            {"value": 1 + 0.01 * i, "ci": [1, 1.2], "tie": i < 3, "pairs": [1.01] * rounds} if i else None
        )
        made["variants"].append(variant)
    made["verdict"] |= {"fastest": "variant-0", "ties": []}
    return made


def alone(comparison):
    """One variant and one round."""
    made = copy.deepcopy(comparison)
    made["variants"] = [variant for variant in made["variants"] if variant["name"] == "mlx"]
    for key in ("rounds", "series", "evaluations"):
        made["variants"][0][key] = made["variants"][0][key][:1]
    made["variants"][0]["ratio"] = None
    return made | {"levers": None, "published": []}


def sparse(comparison):
    """What an old version might have left: names and medians."""
    variants = [
        {"name": variant["name"], "iter_ms": {"median": get_median(variant)}} for variant in comparison["variants"]
    ]
    return {"variants": [*variants, {}]}


def get_median(variant):
    return (variant.get("iter_ms") or {}).get("median")


def with_levers(comparison):
    """The same with two ablations and an evil label."""
    made = copy.deepcopy(comparison)
    ratio = {"value": 0.91, "ci": [0.9, 0.92], "confidence": 0.99, "tie": False, "pairs": [0.91]}
    rows = [("mlx-bf16", "dtype", "bfloat16", ratio), ("mlx-sync", "sync", "iteration", ratio | {"tie": True})]
    made["levers"] = [
        {"name": n, "base": "mlx", "key": k, "value": v, "what": f"{k} {EVIL}", "ratio": r, "worth_percent": 9.0}
        for n, k, v, r in rows
    ]
    made["variants"][0]["label"] = EVIL
    made["variants"][0]["reason"] = EVIL
    made["variants"][0]["fallbacks"] = {"findings": [{"op": EVIL, "count": 2, "phase": "backward"}]}
    made["variants"][0]["compile_report"] = {"graph_breaks": 0, "launches": {EVIL: 3}}
    return made
