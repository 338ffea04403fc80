"""What a report of suite=ops says, against figures worked out by hand."""

import math
from statistics import fmean

import numpy as np
import pytest
import scipy.stats

from nanogpt_mac.records.bench import OpReading, OpsBench, State, Way
from nanogpt_mac.report import page, show, svg
from nanogpt_mac.suites.contents import HELD
from nanogpt_mac.suites.ops import contents
from nanogpt_mac.suites.ops.contents import Results

A, B, C = "Softmax 64x1000000 axis=-1", "Softmax 1000000x64 axis=-1", "ReLU 64x128x1024"
TIMES = {"fast": {A: 1.0, B: 10.0, C: 4.0}, "slow": {A: 2.0, B: 80.0, C: 1.0}}


def reading(row, way, number, ms=None, **more):
    times = {"median": ms, "ci95": (0.9 * ms, 1.2 * ms), "count": 9} if ms else None
    given = {"state": State.OK, "throughput": times, "latency": times and times | {"median": 2 * ms}} | more
    return OpReading(row=row, way=way, round=number, **given)


def made(*further, rounds=2, lost=()):
    readings = [
        reading(row, way, number, ms * (1 + 0.1 * number))
        for number in range(rounds)
        for way, rows in TIMES.items()
        for row, ms in rows.items()
        if (row, way) not in lost
    ]
    return OpsBench(
        suite="ops", created="2026-11-27T00:00:00", version="0.1", seconds=60, complete=True, seed=1, rounds=rounds,
        ways=tuple(Way(name=name, label=name.upper()) for name in TIMES), rows=(A, B, C),
        work={"scale": 1.0, "cache": "cold"}, readings=(*readings, *further),
    )  # fmt: skip


def table(bench, section, number=0):
    found = next(s for s in contents.report(bench).sections if s.id == section).tables[number]
    return {row.cells[0]: dict(zip(found.columns[1:], row.cells[1:], strict=True)) for row in found.rows}


def test_a_time_is_the_median_of_rounds_with_the_interval_that_rounds_allow():
    found = Results(made()).time(A, "fast", "throughput")
    assert found.value == pytest.approx(1.05)
    interval = scipy.stats.ttest_1samp(np.log([1.0, 1.1]), 0).confidence_interval(0.95)
    assert found.bounds == pytest.approx(np.exp(interval))
    assert Results(made(rounds=1)).time(A, "fast", "throughput").bounds is None


def test_speed_is_the_geometric_mean_over_rows_that_both_have():
    speed, count = Results(made()).speed("slow", "fast", "throughput", (A, B, C))
    assert speed == pytest.approx((1 / 2 * 1 / 8 * 4) ** (1 / 3))
    assert count == 3
    assert math.isclose(Results(made(lost={(B, "slow")})).speed("slow", "fast", "throughput", (A, B, C))[0], 2**0.5)


def test_the_verdict_and_the_first_table_name_the_count():
    report = contents.report(made())
    assert report.verdict == (
        "3 rows on 2 ways: 6 right, none wrong. By geometric mean SLOW is 0.630 times as fast as FAST (3 rows)."
    )
    assert table(made(), "overall")["SLOW"]["throughput, forward"] == "0.630 (3)"
    assert table(made(), "operations")["Softmax"]["SLOW: throughput"] == "0.250 (2)"


def test_the_arithmetic_mean_is_named_as_the_published_ones_and_leaves_out_rows_that_are_not_everywhere():
    means = table(made(), "means")["Softmax"]
    assert means["rows"] == "2 of 2"
    assert float(means["SLOW"]) == pytest.approx(fmean([4.2, 168]), abs=0.01)
    assert table(made(lost={(B, "slow")}), "means")["Softmax"]["rows"] == "1 of 2"


def test_the_published_table_stands_beside_ours_with_what_is_wrong():
    found = table(made(), "published")
    assert found[A]["published mlx_gpu"] == "5.810"
    assert found[A]["ours FAST"] == "2.100"
    assert "never got the axis" in found[A]["why it cannot be compared"]
    assert found[C]["why it cannot be compared"] == "—"


@pytest.mark.parametrize("state", [State.WRONG, State.FAILED, State.ABSENT, State.SKIPPED])
def test_what_has_no_time_is_named_with_its_reason(state):
    bench = made(reading(A, "slow", 2, state=state, reason="because"), lost={(A, "slow")})
    report = contents.report(bench)
    problems = next(s for s in report.sections if s.id == "problems")
    assert problems.items == [f"SLOW: {HELD[state]}: {A}: because"]
    assert problems.alarming is (state in (State.WRONG, State.FAILED))
    assert table(bench, "throughput")[A]["SLOW"] == HELD[state]
    assert "5 right" in report.verdict


def test_one_wrong_round_is_enough():
    bench = made(reading(A, "slow", 2, state=State.WRONG, reason="late"))
    assert Results(bench).time(A, "slow", "throughput") is None
    assert "1 wrong or failed" in contents.report(bench).verdict


def test_markdown_and_page_hold_all_of_it():
    bench = made(reading(B, "slow", 2, deterministic=False, ms=1.0))
    report = contents.report(bench)
    words = show.markdown(report)
    assert "two calls gave different bits" in words
    with svg.style():
        drawn = contents.charts(bench)
    assert {section: len(charts) for section, charts in drawn.items()} == {"overall": 1, "operations": 1}
    html = page.html(report, drawn)
    assert html.count("<figure") == 2
    assert "TristanBilot/mlx-benchmark" in html


def test_one_way_alone_and_nothing_measured_still_make_a_report():
    bench = made().model_copy(update={"ways": (Way(name="fast", label="FAST"),), "readings": ()})
    report = contents.report(bench)
    assert report.verdict == "3 rows on 1 way: 0 right, none wrong, 3 without a result."
    assert contents.charts(bench) == {}
    show.markdown(report)
