"""What the gate computes: shapes, weights, batches, and which tokens change."""

import dataclasses

import numpy as np
import pytest

from nanogpt_mac.corpus import prepare
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.parity import cases


def test_cases_are_the_runs_own_shape_and_an_odd_one(config):
    """The batch is always the run's; what shrinks is the number of windows that differ, and of steps."""
    spec = GPTSpec(6, 6, 384, 256, 65, dropout=0.1)
    full, odd = cases.cases(dataclasses.replace(config, batch_size=64), spec)
    assert (full.name, full.batch, full.accumulation, full.clip, full.steps) == ("full", 64, 1, 0.5, 1)
    assert full.distinct == int(1.5e11 / (spec.flops_per_token() * 256)) == 8
    assert full.spec == dataclasses.replace(spec, dropout=1e-12)  # the run's path of dropout, with nothing dropped
    assert (odd.name, odd.batch, odd.accumulation, odd.clip, odd.steps) == ("odd", 9, 2, 4.0, 3)
    assert odd.spec == dataclasses.replace(spec, block_size=11, dropout=1e-12)
    quick, _ = cases.cases(dataclasses.replace(config, batch_size=12), GPTSpec(4, 4, 128, 64, 65))
    assert (quick.batch, quick.steps, quick.spec.dropout) == (12, 3, 0.0)
    assert quick.distinct > 12
    large = GPTSpec(12, 12, 768, 1024, 50304)  # 0.85 TFLOP a window
    two, short = cases.cases(dataclasses.replace(config, batch_size=12, grad_clip=0.0), large)
    assert (two.batch, two.distinct, two.steps, two.looked_at, two.clip, short.clip) == (12, 2, 1, None, None, None)
    assert cases.cases(config, dataclasses.replace(spec, block_size=4))[1].spec.block_size == 4


def test_what_no_case_covers_is_said(config):
    spec = GPTSpec(12, 12, 768, 1024, 50304)
    assert cases.unchecked(dataclasses.replace(config, batch_size=12), spec) == ()
    more = dataclasses.replace(config, batch_size=64, gradient_accumulation_steps=40)
    accumulation, logits = cases.unchecked(more, spec)
    assert accumulation.startswith("accumulation over 40 batches")
    assert logits == "logits of 64 rows at once (of 19 they were)"
    (causality,) = cases.unchecked(config, GPTSpec(1, 1, 8, 8, 2))
    assert causality.startswith("causality in training")


def test_rows_repeat_windows_without_a_pattern(config):
    corpus = prepare(config.data)
    case = cases.Case("full", GPTSpec(1, 1, 8, 16, corpus.encoder.vocab_size), 64, 1, None, distinct=5)
    (rows,) = cases.windows(corpus, case, config, 0)
    assert rows.shape == (64,)
    assert len(set(rows)) == 5
    for shift in range(1, 64):  # rows that are mixed up, however, are other rows
        assert (np.roll(rows, shift) != rows).mean() > 0.5
    (every,) = cases.windows(corpus, dataclasses.replace(case, distinct=64), config, 0)
    assert len(set(every)) > 32


@pytest.mark.parametrize(("length", "rows"), [(256, 64), (17, 3), (2, 4), (9, 1)])
def test_tokens_are_changed_at_every_residue_and_at_the_last_place(length, rows):
    at = cases.places(length, rows, 3)
    assert at.shape[1] == rows
    assert at.min() >= 1
    assert at.max() == length - 1
    assert {int(t) % 8 for t in at.ravel()} == {t % 8 for t in range(1, length)}


def test_the_probe_keeps_later_tokens_apart(config):
    corpus = prepare(config.data)
    spec = GPTSpec(1, 1, 8, 16, corpus.encoder.vocab_size)
    asked = cases.probe(corpus, cases.Case("full", spec, 12, 1, None, distinct=6), config)
    assert asked.idx.shape == asked.targets.shape == (12, 16)
    assert not np.isin(asked.targets, asked.markers).any()
    for row, (old, new) in enumerate(zip(asked.targets, asked.other, strict=True)):
        (at,) = np.flatnonzero(old != new)  # one target of each row
        assert {old[at], new[at]}.isdisjoint(asked.markers)
        behind = np.isin(asked.idx[row], asked.markers)
        assert behind[at + 1 :].all()
        assert not behind[: at + 1].any()
    assert cases.probe(corpus, cases.Case("full", dataclasses.replace(spec, block_size=1), 12, 1, None), config) is None


def test_weights_that_are_no_fresh_models_are_a_case_of_their_own(config):
    spec = GPTSpec(2, 2, 16, 16, 30)
    full, _, own = cases.cases(dataclasses.replace(config, init_from="gpt2"), spec)
    assert own == dataclasses.replace(full, name="own", steps=1)


def test_drawn_weights_leave_every_operation_a_mark():
    spec = GPTSpec(1, 2, 64, 300, 500, bias=True)
    weights = cases.drawn_weights(spec, 3)
    spec.check(weights, "drawn")
    for name, array in weights.items():
        if array.ndim == 1:
            expected = (0.3, 1.0 if name.endswith(".weight") else 0.0)
        else:
            expected = ((2.0 if ".wte." in name or ".wpe." in name else 1.5) / np.sqrt(array.shape[1]), 0.0)
        assert (array.std(), array.mean()) == (
            pytest.approx(expected[0], rel=0.3),
            pytest.approx(expected[1], abs=0.15),
        )
    assert (cases.drawn_weights(spec, 4)["transformer.ln_f.weight"] != weights["transformer.ln_f.weight"]).all()


def test_windows_are_of_their_case_step_and_split(config):
    corpus = prepare(config.data)
    full, odd = cases.cases(config, GPTSpec(2, 2, 16, 16, corpus.encoder.vocab_size))
    drawn = [cases.windows(corpus, case, config, step) for case in (full, odd) for step in range(3)]
    assert [d.shape for d in drawn] == [(1, 3)] * 3 + [(2, 9)] * 3
    assert len({tuple(d.ravel()[:3]) for d in drawn}) == 6
    assert all(d.max() < len(corpus.train) - 11 for d in drawn)
    assert cases.val_windows(corpus, full, config).shape == (2, 3)
    assert cases.val_windows(corpus, full, config).max() < len(corpus.val) - 16
    assert set(cases.tokens_of(corpus, odd).splits) == {"train", "val"}
    assert cases.tokens_of(corpus, odd).block_size == 11
