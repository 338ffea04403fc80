"""The schedule of a comparison, against sums made by hand. All times are binary fractions, so that sums are exact."""

import pytest

from nanogpt_mac.measure.rounds import Cost, schedule

# A run of n iterations: 0.5 s of pause, 1 s of start, n / 8 s; and once 2 s of evaluation.
ONE = {"a": Cost(1.0, 0.125, 2.0)}


def planned(budget_s, **asked):
    """(rounds, iterations of a run, seconds)"""
    made = schedule(ONE, budget_s, pause_s=0.5, **asked)
    assert made.rounds["a"] == list(range(made.count))
    return made.count, made.iters["a"], made.seconds


@pytest.mark.parametrize(
    ("budget_s", "expected"),
    [
        (462.0, (40, 80, 462.0)),  # forty rounds of ten seconds: 40 * 11.5 + 2
        (461.9, (39, 82, 39 * (1.5 + 82 / 8) + 2)),
        (151.5, (13, 80, 151.5)),
        (151.4, (12, 87, 12 * (1.5 + 87 / 8) + 2)),  # twelve rounds of three seconds come before that, and get longer
        (56.0, (12, 24, 56.0)),
        (55.9, (11, 27, 11 * (1.5 + 27 / 8) + 2)),
        (55.625, (11, 27, 55.625)),  # to the last iteration
        (33.5, (7, 24, 33.5)),
        (29.0, (6, 24, 29.0)),
        (28.9, (6, 23, 6 * (1.5 + 23 / 8) + 2)),  # six shorter rounds rather than five of three seconds
        (22.25, (6, 15, 22.25)),  # 1 + 5 of warm-up + 8 that count + 1 at the end
        (22.2, (5, 20, 5 * (1.5 + 20 / 8) + 2)),
        (15.5, (4, 15, 15.5)),
        (15.4, (3, 15, 12.125)),
        (0.0, (3, 15, 12.125)),  # the smallest plan takes longer than there is
    ],
)
def test_what_fits_is_taken(budget_s, expected):
    assert planned(budget_s) == expected


def test_the_longest_runs_and_the_shortest():
    rounds, iters, _ = planned(1e6)
    assert rounds == 40
    assert 475 < iters <= 480  # sixty seconds
    fast = schedule({"a": Cost(1.0, 1 / 64, 2.0)}, 5.0, pause_s=0.5)
    assert (fast.count, fast.iters["a"], fast.seconds) == (3, 64, 9.5)  # one second
    assert schedule({"a": Cost(1.0, 1e-4)}, 1e5).iters["a"] == 2000


def test_rounds_and_iterations_that_are_asked_for():
    assert planned(73.5, iters=40) == (11, 40, 73.5)  # 11 * 6.5 + 2
    assert planned(73.4, iters=40) == (10, 40, 67.0)
    assert planned(80.0, iters=40) == (12, 40, 80.0)
    assert planned(1e6, iters=40) == (12, 40, 80.0)
    assert planned(21.5, iters=40) == (3, 40, 21.5)
    assert planned(56.0, rounds=12) == (12, 24, 56.0)
    assert planned(80.0, iters=40, rounds=12) == (12, 40, 80.0)
    assert planned(1e6, iters=9, rounds=2) == (2, 9, 2 * (1.5 + 9 / 8) + 2)  # though so few are too few
    assert planned(1e6, iters=5000, rounds=1) == (1, 5000, 1.5 + 625 + 2)


@pytest.mark.parametrize(
    ("budget_s", "asked", "expected"),
    [
        (79.9, {"rounds": 12, "iters": 40}, (11, 40, 73.5)),  # first fewer rounds
        (21.5, {"rounds": 12, "iters": 40}, (3, 40, 21.5)),
        (21.4, {"rounds": 12, "iters": 40}, (3, 39, 21.125)),  # then fewer iterations
        (1.0, {"rounds": 12, "iters": 40}, (3, 15, 12.125)),  # as few as count, whatever time that takes
        (1.0, {"rounds": 2, "iters": 40}, (2, 15, 2 * (1.5 + 15 / 8) + 2)),  # as many rounds as were asked for
        (1.0, {"rounds": 2, "iters": 9}, (2, 9, 2 * (1.5 + 9 / 8) + 2)),
        (1.0, {"iters": 40}, (3, 15, 12.125)),
        (21.4, {"iters": 40}, (3, 39, 21.125)),
        (29.9, {"rounds": 12}, (8, 15, 8 * (1.5 + 15 / 8) + 2)),
        (1.0, {"rounds": 2}, (2, 15, 2 * (1.5 + 15 / 8) + 2)),
        (1.0, {"rounds": 12}, (3, 15, 12.125)),
    ],
)
def test_what_is_asked_for_keeps_to_the_budget(budget_s, asked, expected):
    assert planned(budget_s, **asked) == expected


def test_slow_iterations_are_warmed_up_and_counted_less():
    slow = schedule({"a": Cost(1.0, 0.5)}, 0.0)
    assert (slow.iters["a"], slow.warmup["a"]) == (7, 1)  # 1 + 1 + 4 + 1
    assert slow.seconds == 3 * 4.5  # neither a pause nor an evaluation unless there is one
    faster = schedule({"a": Cost(1.0, 0.4375)}, 0.0)
    assert (faster.iters["a"], faster.warmup["a"]) == (15, 5)
    asked = schedule({"a": Cost(1.0, 0.5)}, 100.0, iters=20)
    assert (asked.iters["a"], asked.warmup["a"]) == (20, 5)
    assert schedule({"a": Cost(1.0, 0.5)}, 0.0, warmup=0).iters["a"] == 6


def test_a_variant_of_more_than_twice_the_time_takes_part_in_fewer_rounds():
    def rounds(start_s, count=12):
        made = schedule({"fast": Cost(1.0, 0.125), "slow": Cost(start_s, 0.125)}, 0.0, iters=8, rounds=None)
        assert made.count == 3  # nothing fits
        budget_s = count * (2 + 1 + start_s)
        made = schedule({"fast": Cost(1.0, 0.125), "slow": Cost(start_s, 0.125)}, budget_s, iters=8)
        assert made.count == count
        total = 2 * len(made.rounds["fast"]) + (start_s + 1) * len(made.rounds["slow"])
        assert made.seconds == total
        return made.rounds["slow"]

    assert rounds(3.0) == list(range(12))  # four seconds a run, twice two: all of them
    assert rounds(3.5) == [k * 12 // 11 for k in range(11)]  # 12 * 4 / 4.5 is 10.7
    assert rounds(7.0) == [0, 2, 4, 6, 8, 10]
    assert rounds(31.0) == [0, 4, 8]  # three at least
    both = {"fast": Cost(1.0, 0.125), "slow": Cost(31.0, 0.125)}
    assert schedule(both, 1e3, iters=8, rounds=4).rounds["slow"] == [
        0,
        1,
        2,
        3,
    ]  # rounds that are asked for are for all
