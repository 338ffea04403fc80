"""The bar of a measurement, on a terminal and without one."""

import io

import pytest

from nanogpt_mac.measure import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def test_the_time_left_is_counted_down_until_a_run_is_overdue(now, monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    bar = progress.Bar()
    bar.run("round 0, CPU", 3, 12, 40.0, 300.0)
    task = bar._progress.tasks[0]
    left = progress._Left()
    shown = []
    for now[0] in (1000.0, 1030.0, 1040.0, 1090.0):
        left._renderable_cache.clear()
        shown.append(str(left(task)))
    assert shown == ["about 6 min left", "about 5 min left", "about 5 min left", "about 5 min left"]
    assert (task.description, task.completed, task.total) == ("round 0, CPU", 3, 12)
    bar.run("round 1, CPU", 11, 12, 20.0, 0.0)
    left._renderable_cache.clear()
    now[0] += 5
    assert str(left(task)) == "about 15 s left"


def test_it_is_shown_on_a_terminal_and_nowhere_else(monkeypatch):
    written = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", stream)
        with progress.Bar() as bar:
            bar.run("round 1, CPU", 3, 12, 40.0, 300.0)
            bar._progress.refresh()
        written.append(stream.getvalue())
    assert "round 1, CPU" in written[0]
    assert written[1] == ""
