"""The gate's limits: what the unit roundoffs ask of them, not a second copy of the table."""

import pytest

from nanogpt_mac.parity import tolerances

ROUNDOFF = {"float32": 6e-8, "float32 high": 5e-4, "float32 medium": 4e-3, "float16": 5e-4, "bfloat16": 4e-3}
EXACT = {"causality", "causality, gradients", "update rule"}  # the same sums, and float32 in every dtype


def column(name):
    dtype, _, precision = name.partition(" ")
    return tolerances.limits(dtype, precision or "highest")


@pytest.mark.parametrize("name", ROUNDOFF)
def test_limits_are_above_rounding_and_below_what_a_fault_does(name):
    limits = column(name)
    assert limits["causality"] == 0.0
    assert limits["update rule"] == 2e-4
    for quantity, limit in limits.items():
        if quantity not in EXACT:
            share = 10 if quantity == "evaluation" else 4  # of a mean over many tokens there is less left
            assert ROUNDOFF[name] / share < limit <= 0.5, quantity
    assert limits["logits, factor"] < 0.01  # one operator off by 1 % is above one of these at least
    assert limits["gradients, factor"] < 0.01


def test_limits_go_with_the_roundoff():
    """TF32 rounds as float16 does, and its worst case as bfloat16 does; fewer bits never get a stricter limit."""
    assert column("float32 high") == column("float16")
    assert column("float32 medium") == column("bfloat16")
    for quantity in column("float32"):
        strict, middle, loose = (column(n)[quantity] for n in ("float32", "float16", "bfloat16"))
        assert strict <= middle <= loose
        if quantity not in EXACT:
            assert strict < 0.01
            assert loose < 20 * middle


def test_precision_is_about_float32_alone():
    assert tolerances.precision("float32", "highest") == "float32"
    assert tolerances.precision("float32", "high") == "float32 high"
    assert tolerances.precision("bfloat16", "high") == "bfloat16"


def test_rows_are_the_columns_with_their_reasons():
    rows = tolerances.rows(["float16", "float32"])
    for name in ("float16", "float32"):
        part = {r["quantity"]: r["limit"] for r in map(as_dict, rows) if r["dtype"] == name}
        assert part == column(name)
    assert len(rows) == 2 * len(column("float32"))
    assert all(f"u = {ROUNDOFF[r['dtype']]:.0e}".replace("e-0", "e-") in r["reason"] for r in map(as_dict, rows))


def as_dict(row):
    return row if isinstance(row, dict) else row.model_dump()
