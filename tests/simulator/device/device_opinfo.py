"""A seeded sample of torch's operator database, and the operators of a GPT, against the CPU.

The sweep is that of `mps_coverage.py scope=opinfo`, with narrower limits: the kernels are the same, so only
what decomposes differently may differ, by rounding.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from nanogpt_mac import simulator
from nanogpt_mac.coverage import device_child, op_samples

simulator.install()
torch.set_num_threads(1)

DTYPES = ("float32", "int64", "complex64")
ROUNDED = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
LIMITS = dict.fromkeys(ROUNDED, 2e-5)
OF_A_GPT = {
    *("nn.functional.linear", "nn.functional.layer_norm", "nn.functional.gelu", "nn.functional.embedding", "matmul"),
    *("nn.functional.scaled_dot_product_attention", "nn.functional.cross_entropy", "softmax", "add", "split", "tril"),
    *("nn.functional.dropout", "masked_fill", "topk", "multinomial", "gather", "index_select", "transpose", "baddbmm"),
}
Outcome = dict[str, str]


def check(op: Any, limit: int = 6) -> Outcome:
    """Forward, in place and gradient, in the first of `DTYPES` that the operator has on the CPU."""
    dtype = next((name for name in DTYPES if getattr(torch, name) in op.dtypes), None)
    if dtype is None:
        return {"status": "skipped", "reason": "no kernel for these dtypes on the CPU", "leg": "forward"}
    outcome = device_child.check(op, dtype, limit, LIMITS)
    return _in_place(op, dtype, limit) or outcome if outcome["status"] == "works" else outcome


def _in_place(op: Any, dtype: str, limit: int) -> Outcome | None:
    """What is wrong with the operator's in-place form; None where nothing is, or there is no such form."""

    def function(first: Any, *args: Any, **kwargs: Any) -> Any:
        return op.inplace_variant(first.detach(), *args, **kwargs).detach()

    for sample in list(op.sample_inputs("cpu", getattr(torch, dtype)))[: limit if op.inplace_variant else 0]:
        if sample.broadcasts_input:
            continue
        outcome = device_child.compare(function, sample, "forward", LIMITS)
        if outcome is not None and outcome["status"] != "works":
            return outcome
    return None


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    database = op_samples.database()
    chosen = random.Random(2026).sample(database, 100)
    chosen += [op for op in database if op.name in OF_A_GPT and op not in chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {op_samples.full_name(op): check(op) for op in chosen}


def test_no_value_is_wrong_and_nothing_fails(outcomes: dict[str, Outcome]) -> None:
    bad = {name: o for name, o in outcomes.items() if o["status"] in ("wrong value", "error")}
    assert not bad, bad
    counts = Counter(o["status"] for o in outcomes.values())
    print(counts)
    assert counts["works"] > 0.8 * len(outcomes)


def test_what_a_gpt_needs_is_equal(outcomes: dict[str, Outcome]) -> None:
    needed = {name: o for name, o in outcomes.items() if name in OF_A_GPT}
    assert len(needed) >= len(OF_A_GPT) - 2
    assert {o["status"] for o in needed.values()} == {"works"}, needed


def test_every_skip_has_a_reason_and_every_missing_operator_is_in_the_table(outcomes: dict[str, Outcome]) -> None:
    missing = set(simulator.table().missing)
    for outcome in outcomes.values():
        assert bool(outcome["reason"]) == (outcome["status"] != "works"), outcome
        if outcome["status"] == "missing":
            assert outcome["reason"].removeprefix("aten::") in missing


def test_the_check_finds_a_planted_error() -> None:
    """By value, by gradient, and as an operator that is missing."""
    database = {op_samples.full_name(op): op for op in op_samples.database()}
    gelu = database["nn.functional.gelu"]
    with simulator.planted("atan2", "wrong", 1.01):
        assert check(database["atan2"])["status"] == "wrong value"
    with simulator.planted("atan2_", "wrong", 1.01):
        assert check(database["atan2"])["status"] == "wrong value"  # its in-place form alone
    with simulator.planted("gelu_backward", "wrong", 1.01):
        assert (check(gelu)["status"], check(gelu)["leg"]) == ("wrong value", "gradient")
    with simulator.planted("gelu", "missing"):
        assert check(gelu)["reason"] == "aten::gelu.out"
    assert check(gelu)["status"] == "works"
