"""How far a variant may be off from the reference, in one table with its reasons.

u is the unit roundoff of the type that matrix products are rounded to. Rounding errors of a deep model add up like a
random walk, so a tensor of gradients is off by a few u; limits stand at several times what correct back ends were
measured at, and a planted factor of 1.01 on any one operator stays above at least one of them (docs/method.md).

The measures:
- logits: the largest absolute difference over the largest logit.
- loss: relative; of every step and of an evaluation.
- gradients: per tensor, 2-norm of the difference over that of the reference; taken from AdamW's first moments after
  step 1, so they are those of the very graph that is timed.
- factor: the least-squares factor between ours and the reference, less 1. Noise averages out of it, an operator that
  is off by 1 % stays, so it sees in 16 bits what the norms cannot. For gradients: the mean over a kind's layers.
- gradient norm: relative, as the steps report it before clipping.
- weights after 3 steps: per tensor, 2-norm of the difference in change over that of the reference's change, where
  each element counts as much as its gradient (AdamW's root of v). AdamW moves an element by its gradient's sign, and
  where the true gradient is smaller than rounding the sign is chance: unweighted, those elements would dominate.
- update rule: per tensor and step, the change of the weights against AdamW in float64 from the variant's own moments.
- causality: the largest change of a logit when a later token changes; of a later token's gradient when a target does,
  over the largest. Where the same call varies by itself, ten times as much counts as nothing.

A limit is raised where a model magnifies rounding (layer norms of two channels, beta2=0), which the reference finds out
by computing its own formulas in float32, and with weights rounded to bfloat16; and for a factor of few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanogpt_mac.records.plan import Tolerance

PRECISIONS = ("float32", "float32 high", "float32 medium", "float16", "bfloat16")
_PRODUCTS = {  # what the matrix products are rounded to, and its unit roundoff
    "float32": "float32, u = 6e-8",
    "float32 high": "TF32 where there is such hardware, u = 5e-4",
    "float32 medium": "TF32 or bfloat16 where there is such hardware, u = 4e-3",
    "float16": "float16, u = 5e-4",
    "bfloat16": "bfloat16, u = 4e-3",
}
_TABLE: dict[str, tuple[tuple[float, ...], str]] = {  # quantity -> limit for each of PRECISIONS, reason
    "logits": ((2e-5, 8e-3, 6e-2, 8e-3, 6e-2), "single elements: tails of the rounding noise"),
    "logits, factor": ((1e-6, 3e-4, 2e-3, 3e-4, 2e-3), "noise averages out over all logits"),
    "loss": ((1e-5, 2e-3, 6e-3, 2e-3, 6e-3), "a mean in float32; later steps add what earlier ones moved"),
    "evaluation": (
        (2e-6, 2e-4, 1e-3, 2e-4, 1e-3),
        "the loss of its own logits; compilers round less often",
    ),
    "gradients": ((3e-5, 2e-2, 1e-1, 2e-2, 1e-1), "rounding of each layer, passed back through all others"),
    "gradients, factor": (
        (1e-5, 2e-3, 4e-3, 2e-3, 4e-3),
        "case full; noise averages out over a kind's elements and layers",
    ),
    "gradient norm": ((2e-3, 3e-3, 6e-3, 3e-3, 6e-3), "one float32 sum of millions of squares, by some in a row"),
    "gradient norm, later steps": ((5e-3, 3e-2, 2e-1, 3e-2, 2e-1), "case full; what the first step moved, magnified"),
    "weights after 3 steps": ((2e-3, 3e-1, 5e-1, 3e-1, 5e-1), "elements whose gradient is rounding move either way"),
    "update rule": ((2e-4,) * 5, "AdamW is float32 in every dtype; a weight of 1 is rounded by 1e-4 of its change"),
    "causality": ((0.0,) * 5, "the same sums of the same numbers"),
    "causality, gradients": ((1e-6,) * 5, "the same numbers, which some add in an order that varies"),
}


def precision(dtype: str, matmul_precision: str) -> str:
    """The column of the table: `matmul_precision` matters in float32 alone."""
    return f"float32 {matmul_precision}" if dtype == "float32" and matmul_precision != "highest" else dtype


def limits(dtype: str, matmul_precision: str) -> dict[str, float]:
    """Each quantity's limit, in the order in which failures are reported."""
    return limits_of(precision(dtype, matmul_precision))


def limits_of(precision: str) -> dict[str, float]:
    """As `limits`, of one of PRECISIONS."""
    column = PRECISIONS.index(precision)
    return {quantity: limits[column] for quantity, (limits, _) in _TABLE.items()}


def rows(precisions: Iterable[str]) -> tuple[Tolerance, ...]:
    """The table's part for `precisions`."""
    return tuple(
        Tolerance(
            dtype=name,
            quantity=quantity,
            limit=limits[PRECISIONS.index(name)],
            reason=f"{why} ({_PRODUCTS[name]})",
        )
        for name in precisions
        for quantity, (limits, why) in _TABLE.items()
    )
