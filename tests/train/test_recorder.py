"""Records: rows, summary, MFU and its denominators."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from nanogpt_mac.errors import InputError
from nanogpt_mac.train.clock import Completion
from nanogpt_mac.train.recorder import Recorder, Work, make_folder, write_json

WORK = Work(flops=2e9, tokens=1000, peaks={"mfu": None, "mfu_measured": 1e12, "mfu_a100": 312e12})
MEMORY = {"current": 5, "peak": 9}


def summarise(recorder, facts=()):
    summary = recorder.summary(dict(facts))
    recorder.close()
    return summary


def record(folder, times, work=WORK, left_out=()):
    recorder = Recorder(folder, work)
    for i, ms in enumerate(times):
        recorder.iteration(Completion(i, 2.0, 1.0, ms, 0.5, "first" if i in left_out else None), 1e-3, MEMORY)
    return recorder


def test_mfu_is_flops_over_time_over_each_named_peak(tmp_path):
    recorder = record(tmp_path, [10.0] * 8)
    summary = summarise(recorder)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[3]["mfu"] is None  # an unknown chip is never guessed
    assert rows[3]["mfu_measured"] == pytest.approx(0.2)
    assert rows[3]["mfu_a100"] == pytest.approx(0.2 / 312)
    assert rows[3]["tokens_per_s"] == pytest.approx(100_000)
    assert (summary["mfu"], summary["mfu_measured"]) == (None, pytest.approx(0.2))
    assert summary["mfu_denominators"] == WORK.peaks
    assert json.loads((tmp_path / "summary.json").read_text())["schema"] == 1


def test_more_than_the_measured_peak_is_an_error_and_no_figure(tmp_path):
    summary = summarise(record(tmp_path, [1.0] * 8))
    assert summary["mfu_measured"] is None
    assert "above 1 in 8 iterations: that is impossible" in summary["errors"][0]


def test_statistics_leave_out_what_the_clock_marks(tmp_path):
    times = [500.0, *np.linspace(9.0, 11.0, 101)]
    summary = summarise(record(tmp_path, times, left_out=[0]))
    assert summary["iter_ms"]["median"] == pytest.approx(10.0)
    assert summary["iter_ms"]["count"] == 101
    assert summary["first_iter_s"] == pytest.approx(0.5)
    assert summary["compile_s"] == pytest.approx(0.49)
    assert summary["left_out"] == {"first": 1}


def test_the_confidence_interval_covers_the_median_as_often_as_it_says(tmp_path):
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        (tmp_path / str(i)).mkdir()
        sample = rng.lognormal(size=40)  # median 1
        low, high = summarise(record(tmp_path / str(i), list(sample)))["iter_ms"]["ci95"]
        covered += low <= 1.0 <= high
    assert 180 <= covered <= 200


@pytest.mark.parametrize("count", [6, 7, 8, 9, 25, 100, 101, 999])
def test_the_confidence_interval_is_scipys(tmp_path, count):
    from scipy.stats import quantile_test

    times = np.random.default_rng(count).lognormal(size=count)
    expected = quantile_test(times, q=1.0, p=0.5).confidence_interval(0.95)
    assert summarise(record(tmp_path, list(times)))["iter_ms"]["ci95"] == [expected.low, expected.high]


def test_a_run_without_iterations_has_a_summary(tmp_path):
    summary = summarise(record(tmp_path, []), {"exit_state": "failed"})
    assert summary["iter_ms"] == {**dict.fromkeys(("median", "ci95", "mean", "min", "p10", "p90", "max")), "count": 0}
    assert summary["exit_state"] == "failed"


def test_json_stays_json_when_a_loss_is_none_any_more(tmp_path):
    recorder = Recorder(tmp_path, WORK)
    recorder.iteration(Completion(0, float("nan"), float("inf"), 10.0, 0.5, None), 1e-3, MEMORY)
    recorder.flush()
    recorder.close()

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad_norm"]) == ("nan", "inf")


def test_folders_are_named_by_the_pattern_and_never_shared(tmp_path):
    pattern = f"{tmp_path}/{{date}}/{{name}}"
    first, second = make_folder(pattern, "mps-compile"), make_folder(pattern, "mps-compile")
    assert first.name == "mps-compile"
    assert second.name == "mps-compile-2"
    assert len(first.parent.name) == len("2026-01-01")
    named = make_folder(f"{tmp_path}/mine", "cpu")
    assert named == tmp_path / "mine"
    (named / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="already holds a run"):
        make_folder(f"{tmp_path}/mine", "cpu")


def test_a_document_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())
