"""A seeded sample of torch's operator database, and the operators of a GPT, against the CPU."""

from __future__ import annotations

import random
import warnings
from collections import Counter

import pytest
import torch

from nanogpt_mac import simulator
from nanogpt_mac.simulator import opinfo

simulator.install()
torch.set_num_threads(1)

OF_A_GPT = {
    *("nn.functional.linear", "nn.functional.layer_norm", "nn.functional.gelu", "nn.functional.embedding", "matmul"),
    *("nn.functional.scaled_dot_product_attention", "nn.functional.cross_entropy", "softmax", "add", "split", "tril"),
    *("nn.functional.dropout", "masked_fill", "topk", "multinomial", "gather", "index_select", "transpose", "baddbmm"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, opinfo.Outcome]:
    database = opinfo.database()
    chosen = random.Random(2026).sample(database, 100)
    chosen += [op for op in database if op.name in OF_A_GPT and op not in chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {opinfo.full_name(op): opinfo.check(op, limit=6) for op in chosen}


def test_no_value_is_wrong_and_nothing_fails(outcomes: dict[str, opinfo.Outcome]) -> None:
    bad = [o for o in outcomes.values() if o.status in (opinfo.DIFFERENT, opinfo.ERROR)]
    assert not bad, bad
    counts = Counter(o.status for o in outcomes.values())
    print(counts)
    assert counts[opinfo.EQUAL] > 0.8 * len(outcomes)


def test_what_a_gpt_needs_is_equal(outcomes: dict[str, opinfo.Outcome]) -> None:
    needed = [o for name, o in outcomes.items() if name in OF_A_GPT]
    assert len(needed) >= len(OF_A_GPT) - 2
    assert {o.status for o in needed} == {opinfo.EQUAL}, needed


def test_every_skip_has_a_reason_and_every_missing_operator_is_in_the_table(
    outcomes: dict[str, opinfo.Outcome],
) -> None:
    missing = set(simulator.table().missing)
    for outcome in outcomes.values():
        assert bool(outcome.reason) == (outcome.status != opinfo.EQUAL), outcome
        if outcome.status == opinfo.MISSING:
            assert outcome.reason.removeprefix("aten::") in missing


def test_the_check_finds_a_planted_error() -> None:
    """By value, by gradient, and as an operator that is missing."""
    database = {opinfo.full_name(op): op for op in opinfo.database()}
    with simulator.planted("atan2", "wrong", 1.01):
        assert opinfo.check(database["atan2"]).status == opinfo.DIFFERENT
    with simulator.planted("gelu_backward", "wrong", 1.01):
        outcome = opinfo.check(database["nn.functional.gelu"], limit=6)
        assert (outcome.status, outcome.reason.split(":")[0]) == (opinfo.DIFFERENT, "gradient")
    with simulator.planted("gelu", "missing"):
        assert opinfo.check(database["nn.functional.gelu"], limit=6).reason == "aten::gelu.out"
    assert opinfo.check(database["nn.functional.gelu"], limit=6).status == opinfo.EQUAL
