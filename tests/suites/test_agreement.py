"""`python report.py A B` over folders of bench.py: which figures agree, counted by hand."""

import json
import math
import subprocess
import sys

import pytest
import scipy.stats
from fakes.support import ROOT

from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import NetBench, NetReading, OpReading, OpsBench, State, Way
from nanogpt_mac.report import show
from nanogpt_mac.suites import agreement
from nanogpt_mac.suites.ops.suite import SUITE

ROWS = ("ReLU 64x128x1024", "Softmax 64x1000000 axis=-1", "Sort 64x128x1024 axis=0")


def reading(row, ms, number=0, **more):
    times = {"median": ms, "count": 9, "ci95": (0.99 * ms, 1.01 * ms)}
    return OpReading(row=row, way="cpu", round=number, state=State.OK, throughput=times, **more)


def twice(row, ms, spread=0.05):
    """Two rounds, whose interval by Student's t is `ms` within `spread`."""
    apart = math.log(1 + spread) / scipy.stats.t.ppf(0.975, 1)
    return [reading(row, ms * math.exp(sign * apart), number) for number, sign in enumerate((-1, 1))]


def made(*readings, **more):
    given = {
        "suite": "ops", "created": "2026-11-27T00:00:00", "version": "0.1", "seconds": 60, "complete": True, "seed": 1,
        "rounds": 2, "ways": (Way(name="cpu", label="CPU"),), "rows": ROWS, "work": {"scale": 1.0, "bandwidth": 1e9},
        "readings": readings,
    }  # fmt: skip
    return OpsBench(**given | more)


def written(folder, bench):
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(bench.document()))
    return str(folder)


def reported(tmp_path, one, other):
    return agreement.report([written(tmp_path / "one", one), written(tmp_path / "other", other)])[0]


def test_figures_agree_where_intervals_have_times_in_common(tmp_path):
    one = made(*twice(ROWS[0], 1.0), reading(ROWS[1], 1.0), reading(ROWS[1], 1.3, 1), *twice(ROWS[2], 1.0))
    other = made(*twice(ROWS[0], 1.09), *twice(ROWS[1], 1.4), *twice(ROWS[2], 1.2))
    report = reported(tmp_path, one, other)
    assert report.verdict == "2 of 3 figures agree within their intervals: 66.7 %, fewer than 95 %."
    ways, apart = report.sections
    assert ways.tables[0].rows[0].cells[:5] == ["CPU", "throughput", "3", "3", "66.7 %"]
    assert [row.cells[0] for row in apart.tables[0].rows] == [ROWS[2]]
    assert not report.alarms


def test_what_has_no_interval_or_is_wrong_in_a_round_is_not_judged(tmp_path):
    wrong = OpReading(row=ROWS[1], way="cpu", round=1, state=State.WRONG, reason="late")
    one = made(*twice(ROWS[0], 1.0), reading(ROWS[1], 1.0), wrong, reading(ROWS[2], 1.0))
    other = made(*(each for row in ROWS for each in twice(row, 1.0)))
    report = reported(tmp_path, one, other)
    assert report.verdict == "1 of 1 figures agree within their intervals: 100.0 %, 95 % and more."
    assert report.sections[0].tables[0].rows[0].cells[2:4] == ["2", "1"]


def test_runs_of_other_sizes_or_cut_short_are_named(tmp_path):
    other = made(reading(ROWS[0], 1.0), work={"scale": 0.5, "bandwidth": 2e9}, complete=False)
    report = reported(tmp_path, made(reading(ROWS[0], 1.0)), other)
    assert [alarm.split(":")[0] for alarm in report.alarms] == [
        "They are of different sizes or settings", "The second is not complete."
    ]  # fmt: skip


def test_where_nothing_can_be_judged_nothing_is_said_to_agree(tmp_path):
    one, other, apart = made(reading(ROWS[0], 1.0)), made(*twice(ROWS[0], 1.0)), made(reading(ROWS[1], 1.0))
    for second, words in ((other, "No figure has an interval in both runs"), (apart, "They have no figure in common")):
        report = agreement._compared(one, second)
        assert report.verdict.startswith(words)
        assert "agree in every" not in show.markdown(report)


def test_epochs_are_figures_too(tmp_path):
    def nets(second):
        given = {"row": "784-128-10 batch 8", "way": "cpu", "state": State.OK}
        runs = [NetReading(**given, round=i, epochs_s=[second + 0.01 * i] * 8) for i in range(2)]
        return NetBench(**made().model_dump() | {"suite": "mlp", "readings": runs})

    report = reported(tmp_path, nets(1.0), nets(1.03))
    assert report.sections[0].tables[0].rows[0].cells[1:5] == ["epoch", "1", "1", "100.0 %"]


def test_one_folder_is_its_report_made_anew(tmp_path):
    bench = made(reading(ROWS[0], 1.0))
    report, charts = agreement.report([written(tmp_path / "one", bench)])
    assert (report.verdict, charts) == (SUITE.report(bench).verdict, {})


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["{}", None], "bench.json cannot be read ('suite'); run the suite again"),
        ([made(), None], "has no bench.json; use folders of bench.py alone"),
        ([made(), made(), made()], "two runs of bench.py are held against each other; name two folders"),
        ([made(), NetBench(**made().model_dump() | {"suite": "mlp"})], "is of suite=mlp, not of suite=ops"),
    ],
)
def test_what_cannot_be_held_against_each_other_is_one_line(files, words, tmp_path):
    paths = []
    for number, file in enumerate(files):
        (place := tmp_path / str(number)).mkdir()
        if file is not None:
            (place / "bench.json").write_text(file if isinstance(file, str) else json.dumps(file.document()))
        paths.append(str(place))
    with pytest.raises(InputError) as refused:
        agreement.report(paths)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_from_the_command_line(tmp_path):
    one, other = (written(tmp_path / name, made(*twice(ROWS[0], 1.0))) for name in ("one", "other"))
    command = [sys.executable, str(ROOT / "report.py"), one, other, f"output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 figures agree" in done.stdout
    assert "Two runs" in (tmp_path / "out/report.html").read_text()
