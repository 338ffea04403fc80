"""A sweep's report: what is best, what is swept, how it is drawn."""

import json
import sys

import pytest

from nanogpt_mac import cli
from nanogpt_mac.compare import leaderboard
from nanogpt_mac.files import write_json
from nanogpt_mac.records.sweep import Sweep
from nanogpt_mac.report.table import Mark
from nanogpt_mac.sweep.report import charts, report, swept, verdict


def sweep(**given):
    rows = [("1e-4", "16", "mlx", 2.5), ("1e-3", "32", "cpu", 1.5), ("'1e-2'", "16", "cpu", None)]
    members = [
        {"number": i, "state": "done" if objective else "failed", "objective": objective, "folder": f"s/{i}-cpu",
         "overrides": [f"learning_rate={rate}", f"batch_size={batch}", f"backend={name}", "max_iters=9"]}
        for i, (rate, batch, name, objective) in enumerate(rows)
    ]  # fmt: skip
    return Sweep.model_validate({"objective": "best_val_loss", "members": members} | given)


def test_the_swept_keys_are_those_that_differ():
    assert swept(sweep()) == {
        "learning_rate": ["1e-4", "1e-3", "1e-2"], "batch_size": ["16", "32", "16"], "backend": ["mlx", "cpu", "cpu"],
    }  # fmt: skip


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1), ("maximize", 0)])
def test_the_best_is_the_lowest_or_the_highest(direction, best):
    found = sweep(direction=direction)
    assert verdict(found).startswith(f"Member {best} has the ")
    marks = [row.mark for row in report(found).sections[0].tables[0].rows]
    assert marks.index(Mark.BEST) == best
    assert marks[2] is Mark.FAILED


@pytest.mark.parametrize("objective", ["iter_ms", "tokens_per_s"])
def test_no_speed_is_best_where_members_ran_side_by_side(objective):
    shared = sweep(objective=objective, shared_machine=True)
    assert shared.found_best() is None
    assert "none can be called best" in verdict(shared)
    assert sweep(shared_machine=True).found_best().number == 1  # a loss is


def test_each_key_is_drawn_numbers_on_an_axis_and_words_as_places():
    drawn = {chart.title: chart for chart in charts(sweep())["keys"]}
    assert list(drawn) == [f"best_val_loss against {k}" for k in ("learning_rate", "batch_size", "backend")]
    rate, batch, backend = (chart.svg for chart in drawn.values())
    assert "learning_rate, logarithmic" in rate  # a decade apart
    assert "logarithmic" not in batch
    assert all(f">{name}</text>" in backend for name in ("mlx", "cpu"))
    table = drawn["best_val_loss against learning_rate"].table
    assert [row.cells for row in table.rows] == [["1e-4", "2.5"], ["1e-3", "1.5"]]


def test_report_py_shows_a_sweep(tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "sweep.json", sweep().document())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "."])
    assert cli.main("report", leaderboard.run) == 0
    assert capsys.readouterr().out.startswith("Member 1 has the lowest best_val_loss, 1.5: learning_rate=1e-3")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "| **1** | 1e-3 | 32 | cpu | done | 1.5 |" in (tmp_path / "report.md").read_text()
    (tmp_path / "sweep.json").write_text(json.dumps({"members": 3}))
    assert cli.main("report", leaderboard.run) == 2
    assert "sweep.json: members=3" in capsys.readouterr().err
