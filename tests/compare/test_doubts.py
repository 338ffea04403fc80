"""What gives reason to doubt a variant's times, and its words."""

import numpy as np

from nanogpt_mac.compare import doubts
from nanogpt_mac.measure import stats
from nanogpt_mac.records.comparison import VariantResult, Work
from nanogpt_mac.records.plan import Plan


def noisy(rng, rounds, iters=40, noise=0.01, level=100.0):
    """Rounds of heavy-tailed iteration times around `level`."""
    return [level * np.exp(rng.normal(0, noise) + 0.005 * rng.standard_t(3, iters)) for _ in range(rounds)]


def as_rounds(arrays):
    return dict(enumerate(arrays))


def doubted(rounds, **facts):
    return doubts.of_times(stats.steadiness(rounds), **facts)


def test_doubts_are_raised_where_there_is_reason():
    rng = np.random.default_rng(4)
    quiet = as_rounds(noisy(rng, 8, 60, 0.003))
    assert doubted(quiet) == []
    assert doubted({}) == []
    some_of = {
        "too few rounds: 3": (as_rounds(noisy(rng, 3, 60, 0.003)), {}),
        "unstable": (as_rounds(noisy(rng, 8, 60, 0.06)), {}),
        "too short: a round has 4": (as_rounds(noisy(rng, 8, 4, 0.003)), {}),
        "in 0.06 s": (as_rounds([r / 100 for r in noisy(rng, 8, 60, 0.003)]), {}),
        "slow start": (as_rounds([r * np.where(np.arange(60) < 6, 1.3, 1) for r in noisy(rng, 8, 60, 0.003)]), {}),
        "outliers: 10 %": (as_rounds([r * np.where(np.arange(60) % 10 == 5, 3, 1) for r in quiet.values()]), {}),
        "slept": (quiet, {"slept": 2}),
        "sync=interval": (quiet, {"sync": "interval"}),
        "coarse": (as_rounds([np.round(r / 10) * 10 for r in quiet.values()]), {}),
    }
    for words, (rounds, options) in some_of.items():
        said = doubted(rounds, **options)
        assert words in " ".join(said), (words, said)
        assert len(said) == (2 if words == "slow start" else 1), said  # its slow iterations are outliers, too
    assert doubted(as_rounds(noisy(rng, 1, 60)), planned=1) == []  # one run was asked for


def test_unstable_says_what_can_still_be_found():
    (said,) = doubted(as_rounds(noisy(np.random.default_rng(4), 8, 60, 0.04)))
    noise = float(said.split("vary by ")[1].split(" %")[0]) / 100
    least = f"{100 * stats.detectable(noise, 8):.0f} %"
    assert f"8 rounds can only detect differences of {least} or more. Close other programs or raise rounds=." in said


def test_a_variant_that_was_spared_for_its_slowness_is_named():
    plan = Plan.model_construct(
        asked=Plan.model_fields["asked"].annotation(),
        cut=None,
        rounds=12,
        share={"cpu": 1.0, "slow": 0.25},
        iters={"cpu": 60, "slow": 7},
    )
    variants = [VariantResult.model_construct(name=name, label=name.upper()) for name in ("cpu", "slow")]
    said = doubts.of_work(plan, Work.model_construct(stand_in=False), variants)
    assert "slow, and so in fewer rounds, for the others to have theirs: SLOW in 3 of 12 (of 7 iterations)" in said[0]
    plan = plan.model_copy(update={"share": {"cpu": 1.0, "slow": 1.0}})
    assert not any(
        "fewer rounds" in line for line in doubts.of_work(plan, Work.model_construct(stand_in=False), variants)
    )
