"""`python bench.py` as a user calls it: what is refused, what a crash costs, what is written down."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from fakes.faulty_arrays import VARIABLE
from fakes.support import ROOT

from nanogpt_mac import cli
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import Bench, OpsBench, Reading, State, Way
from nanogpt_mac.suites import run as running
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig, validate
from nanogpt_mac.suites.suite import Plan, asked, row_seconds


def bench(tmp_path, *overrides, **environment):
    """What a process gives: exit code, output, errors, bench.json if there is one."""
    command = [sys.executable, str(ROOT / "bench.py"), *overrides, f"run_dir={tmp_path / 'out'}"]
    given = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=tmp_path, check=False)
    file = tmp_path / "out" / "bench.json"
    return done.returncode, done.stdout, done.stderr, OpsBench.load(file) if file.exists() else None


def planned(overrides):
    config = cli.compose(overrides, "bench")
    validate(config)
    return running.suite_of(config.suite).plan(config)


@pytest.fixture
def registered(tmp_path):
    """PYTHONPATH on which the back end with faults is installed, as a package of its own would be."""
    place = tmp_path / "site" / "faulty-1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[nanogpt_mac.backends]\nfaulty = fakes.faulty_arrays:KIND\n")
    return os.pathsep.join([str(tmp_path / "site"), str(ROOT / "tests"), str(ROOT)])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["suite=foo"], "suite=foo: use ops, gemm, mlp, lm or parts"),
        (["ways=[gpu]"], "ways=[gpu]: there is no such way; use one of mlx"),
        (["ways=[cuda-compile]"], "ways=[cuda-compile]: cuda is not available here"),
        (["ways=[]"], "ways=[]: use a list such as [cpu,mlx]"),
        (["backend=cpu", "ways=[mlx]"], "backend=cpu compile=auto: leaves none of mlx"),
        (["rows=nonsense"], "rows=nonsense: no row is called so; use a part of a name such as Argmax, BCE"),
        (["rows=[relu,softmx]"], "rows=[relu,softmx]: no row is called softmx; use a part of a name such as"),
        (["rows=[relu,]"], "rows=[relu,]: has an empty part; use a part of a name, or a list of them"),
        (["suite=lm", "model.n_embd=30"], "model.n_embd=30: only read with suite=ops or suite=gemm or suite=parts;"),
        (["suite=gemm", "learning_rate=1"], "learning_rate=1: only read with suite=parts; leave it out"),
        (["matmul_precision=high"], "matmul_precision=high: only read with suite=parts; leave it out (here suite=ops)"),
        (["suite=ops", "dtypes=true", "rounds=3"], "rounds=3: not read with dtypes=true; leave it out"),
        (["dtypes=true", "model.n_embd=30"], "model.n_embd=30: not read with dtypes=true; leave it out"),
        (["scale=2"], "scale=2: use a number above 0, and at most 1"),
        (["rounds=0"], "rounds=0: must be at least 1"),
        (["budget_minutes=0"], "budget_minutes=0: use a number above 0"),
        (["cache=hot"], "cache=hot: use cold or warm"),
        (["max_iters=3"], "max_iters=3: bench.py trains nothing by this key; leave it out"),
        (["suite=gemm", "scale=0.1"], "scale=0.1: only read with suite=ops; leave it out (here suite=gemm)"),
        (["dtype=bfloat16"], "dtype=bfloat16: suite=ops times float32"),
        (["data=text", "data.path=x.txt"], "model.vocab_size=null: this corpus has its own"),
    ],
)
def test_bad_input_is_one_line(overrides, words, monkeypatch):
    if "cuda" in words and ways.here.look()[1].get("cuda"):
        pytest.skip("there is a CUDA device here")
    with pytest.raises(InputError) as refused:
        planned(overrides)
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)


def test_rows_are_a_part_of_a_name_or_a_list_of_them():
    names = "ReLU 8", "PReLU 64", "Softmax 8 axis=1", "Sum 8"
    assert asked("relu*8", names) == ["ReLU 8"]
    assert asked("[ softmax* , relu]", names) == list(names[:3])
    assert asked("'sum 8',prelu", names) == ["PReLU 64", "Sum 8"]
    assert asked("Sum 8", (*names, "Sum 8 axis=1")) == ["Sum 8"]
    assert asked("8", names, ends=True) == ["ReLU 8", "Sum 8"]


@pytest.mark.slow
def test_a_row_that_ends_its_process_is_lost_alone_and_named(tmp_path, registered):
    code, out, _, found = bench(
        tmp_path, "ways=[faulty]", "rows=64x1", "scale=0.0005", "budget_minutes=2",
        PYTHONPATH=registered, **{VARIABLE: "a crash"},
    )  # fmt: skip
    assert code == 1
    states = {r.row: r.state for r in found.readings}
    crashed = {row for row, state in states.items() if state is State.FAILED}
    assert crashed == {row for row in states if row.startswith("Softmax") and "gradient" not in row}
    assert all("SIGABRT" in r.reason for r in found.readings if r.state is State.FAILED)
    assert states["ReLU 64x128x1024"] is State.OK  # before them
    assert states["Sum 64x128x128x128 axis=3"] is State.OK  # and after
    assert set(states) == set(found.rows)
    assert "failed: Softmax" in out


@pytest.mark.slow
def test_a_wrong_back_end_of_another_package_is_refused(tmp_path, registered):
    code, out, _, found = bench(
        tmp_path, "ways=[faulty]", "rows=ReLU 64x128x1024", "scale=0.0005", "cache=warm",
        PYTHONPATH=registered, **{VARIABLE: "a wrong result"},
    )  # fmt: skip
    assert code == 1
    assert found.readings[0].state is State.WRONG
    assert "WRONG: ReLU 64x128x1024: wrong result" in " ".join(out.split())


def test_two_frameworks_two_rounds_and_all_that_is_written(tmp_path):
    code, out, errors, found = bench(
        tmp_path, "ways=[cpu,mlx-eager]", "rows=softmax 64x1000000", "scale=0.002", "rounds=2", "budget_minutes=5"
    )
    assert code == 0, out + errors
    assert {(r.row, r.way, r.round) for r in found.readings} == {
        (row, way, round) for row in found.rows for way in ("cpu", "mlx-eager") for round in (0, 1)
    }
    assert all(r.state is State.OK and r.throughput.median > 0 and r.error <= 1 for r in found.readings)
    assert found.complete
    assert found.environment.versions["torch"]
    page = (tmp_path / "out/report.html").read_text()
    assert "Softmax 64x1000000 axis=-1 with gradient" in page
    assert "MLX never got the axis" in page
    assert "<svg" in page
    assert "Softmax 64x1000000" in (tmp_path / "out/report.md").read_text()
    assert not (tmp_path / "out/shared").exists()
    assert json.loads((tmp_path / "out/bench.json").read_text())["schema"] == 1


# -- carrying out, without processes ----------------------------------------------------------------------------------


class Suite:
    reading, document = Reading, Bench
    environment = staticmethod(lambda way: None)


WAYS = tuple(Way(name=name, label=name) for name in "abc")
PLAN = Plan(WAYS, [("x", "y"), ("z",)], rounds=3, row_s=0.1)


def carried_out(tmp_path, monkeypatch, ask_lines, budget_s=100.0):
    now = [0.0]
    monkeypatch.setattr(running.child, "ask_lines", lambda question: ask_lines(question.task, now))
    one = running.Running(Suite(), BenchConfig(), PLAN, tmp_path, budget_s, clock=lambda: now[0])
    tmp_path.mkdir(exist_ok=True)
    one.carry_out()
    return one


def answered(task, now, lost=()):
    for row in task["rows"]:
        yield {"begun": row}
        now[0] += 1
        if row in lost:
            raise running.child.ChildError("killed by SIGSEGV")
        yield {"row": row, "way": task["way"]["name"], "round": task["round"], "state": "ok"}


def test_a_folder_in_which_another_is_at_work_is_refused(tmp_path, monkeypatch):
    (tmp_path / running.SHARED).mkdir()
    monkeypatch.setattr(running, "suite_of", lambda name: SimpleNamespace(plan=lambda config: PLAN))
    with pytest.raises(InputError, match=r"another bench\.py is at work there, or was killed"):
        running.run(BenchConfig(run_dir=str(tmp_path)))


STOPPED = """
import os, pathlib, signal, time
from nanogpt_mac import signals
from nanogpt_mac.suites import run as running
from nanogpt_mac.suites.config import BenchConfig
from suites.test_bench import PLAN, Suite

def report(folder, suite, bench):
    time.sleep(signals.GRACE_S + 1)
    pathlib.Path(folder, "report.html").write_text(" ".join(f"{r.row}: {r.reason}" for r in bench.readings))

Suite.plan, Suite.finished, running.publish = lambda *_: PLAN, lambda *_: None, report
running.suite_of = lambda name: Suite()
running.Running.carry_out = lambda self: os.kill(os.getpid(), signal.SIGTERM)
with signals.watched("bench.py"):  # as script.py does
    code = running.run(BenchConfig(run_dir="out"))
signals.leave(code)
"""


def test_a_stopped_run_has_the_time_to_report_what_it_lacks(tmp_path):
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", STOPPED], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert (tmp_path / "out/report.html").read_text().count("x: the run was stopped") == 3 * 3


def test_every_row_is_measured_on_every_way_in_every_round_in_an_order_that_changes(tmp_path, monkeypatch):
    found = carried_out(tmp_path, monkeypatch, answered)
    assert len(found.readings) == 3 * 3 * 3
    assert len({(r.row, r.way, r.round) for r in found.readings}) == 27
    assert [r.round for r in found.readings] == [0] * 9 + [1] * 9 + [2] * 9
    orders = [tuple(r.way for r in found.readings if r.row == row and r.round == n) for row in "xz" for n in range(3)]
    assert len(set(orders)) > 1
    assert found.complete


def test_after_a_crash_it_goes_on_behind_the_row(tmp_path, monkeypatch):
    found = carried_out(tmp_path, monkeypatch, lambda task, now: answered(task, now, lost=("x",)))
    assert {r.row: r.state for r in found.readings} == {"x": State.FAILED, "y": State.OK, "z": State.OK}
    assert len(found.readings) == 27


def test_a_process_that_never_comes_to_a_row_is_not_tried_again(tmp_path, monkeypatch):
    asked = []

    def nothing(task, now):
        asked.append(task["rows"])
        raise running.child.ChildError("no such framework")
        yield

    found = carried_out(tmp_path, monkeypatch, nothing)
    assert len(asked) == 3 * 3 * 2
    assert {(r.state, r.reason) for r in found.readings} == {(State.FAILED, "no such framework")}


def test_what_the_budget_leaves_out_is_skipped_and_named(tmp_path, monkeypatch):
    found = carried_out(tmp_path, monkeypatch, answered, budget_s=10.5)
    assert sum(r.state is State.OK for r in found.readings) in (10, 11)
    left = [r for r in found.readings if r.state is not State.OK]
    assert {r.state for r in left} == {State.SKIPPED}
    assert {r.reason for r in left} == {"budget_minutes=30 was spent"}
    assert len(found.readings) == 27
    assert not found.complete


def test_a_slow_way_leaves_the_others_their_share_and_takes_what_they_leave(tmp_path, monkeypatch):
    def ask(task, now):
        for line in answered(task, now):
            now[0] += 20 * (task["way"]["name"] == "a" and "row" in line)
            yield line

    found = carried_out(tmp_path, monkeypatch, ask, budget_s=180.0)
    right = Counter(r.way for r in found.readings if r.state is State.OK)
    assert right["b"] == right["c"] == 9
    assert 7 <= right["a"] < 9
    assert len({(r.row, r.way, r.round) for r in found.readings}) == len(found.readings) == 27


def test_what_is_left_is_shared_fairly_and_every_row_gets_its_least_first(tmp_path, monkeypatch):
    given = []

    def ask(task, now):
        given.append((task["round"], task["row_s"]))
        now[0] += 5 * len(task["rows"])  # beside what rows are timed for
        yield from answered(task, now)

    slow = carried_out(tmp_path / "slow", monkeypatch, ask, budget_s=100.0)
    assert all(row_s == pytest.approx(0.02) for _, row_s in given[1:])
    assert {r.row for r in slow.readings if r.state is State.OK} == {"x", "y", "z"}
    given.clear()
    rich = carried_out(tmp_path / "rich", monkeypatch, ask, budget_s=10_000.0)
    assert {row_s for _, row_s in given} == {PLAN.row_s}
    assert rich.spent()["starting processes"] == pytest.approx(5 * 27)


def test_a_rows_time_is_half_of_the_budget_over_all_of_them():
    config = BenchConfig(budget_minutes=10)
    assert row_seconds(config, rows=100, ways=4, rounds=2, most=9) == pytest.approx(0.375)
    assert row_seconds(config, rows=1, ways=1, rounds=1) == 1
