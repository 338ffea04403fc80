"""When and where rows are written: a run's folder, and wandb's run, which is stood in for."""

import json
import os
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanogpt_mac.config import Config, WandbConfig
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.run import Denominators, EvaluationRow, EventRow, IterationRow
from nanogpt_mac.train.clock import Completion
from nanogpt_mac.train.recorder import Recorder, Work
from nanogpt_mac.train.sinks import Folder, Sink, Wandb, open_wandb
from nanogpt_mac.train.sinks import _figures as figures_of


class Run:
    """wandb's run, as far as it is used."""

    def __init__(self):
        self.logged, self.finished = [], 0
        self.summary = {}

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic() as a test sets it."""
    now = [1000.0]
    monkeypatch.setattr("nanogpt_mac.train.sinks.time.monotonic", lambda: now[0])
    return now


WORK = Work(2e9, 1000, Denominators(mfu=None, mfu_measured=1e12, mfu_a100=312e12))


def evaluation(i):
    return EvaluationRow(kind="evaluation", iter=i, train_loss=3.0, val_loss=4.0, seconds=0.25)


def written(folder):
    return [json.loads(line)["iter"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_wait_for_two_seconds_and_are_written_once(tmp_path, clock):
    with closing(Folder(tmp_path)) as folder:
        folder.row(evaluation(0))
        clock[0] = 1002.0
        folder.tick()
        assert written(tmp_path) == []
        clock[0] = 1002.5
        folder.tick()
        assert written(tmp_path) == [0]
        folder.row(evaluation(1))
        clock[0] = 1004.0  # 1.5 s after the last time
        folder.tick()
        assert written(tmp_path) == [0]
        folder.flush()
        assert written(tmp_path) == [0, 1]
        assert not folder.overdue()
    assert written(tmp_path) == [0, 1]


def test_wandb_gets_rows_while_the_clock_stands_and_asks_for_that_after_a_minute(clock):
    run = Run()
    wandb = Wandb(run)
    wandb.row(evaluation(5))
    wandb.row(EventRow(kind="event", iter=6, event="nothing"))
    clock[0] = 1060.0
    assert not wandb.overdue()
    clock[0] = 1060.5
    assert wandb.overdue()
    wandb.tick()
    assert run.logged == []
    wandb.flush()
    assert run.logged == [(5, {"val/loss": 4.0, "val/train_loss": 3.0, "val/seconds": 0.25})]
    assert not wandb.overdue()
    wandb.flush()
    assert len(run.logged) == 1
    wandb.close()
    wandb.wait()
    assert run.finished == 1


def test_wandb_finishes_behind_what_follows_and_is_waited_for():
    run, go_on = Run(), threading.Event()
    run.finish = lambda: go_on.wait(10) and setattr(run, "finished", 1)
    wandb = Wandb(run)
    wandb.wait()  # nothing has begun
    wandb.close()  # returns at once
    assert run.finished == 0
    go_on.set()
    wandb.wait()
    assert run.finished == 1


def test_where_wandb_cannot_finish_it_is_not_hidden():
    run = Run()
    run.finish = lambda: 1 / 0
    wandb = Wandb(run)
    wandb.close()
    with pytest.raises(ZeroDivisionError):
        wandb.wait()


def iteration(i):
    return IterationRow(
        kind="iteration", iter=i, loss=2.0, lr=1e-3, grad_norm=1.5, iter_ms=10.0, dispatch_ms=0.5, tokens_per_s=7.0,
        mfu=None, mfu_measured=0.2, mfu_a100=0.1, memory=5,
    )  # fmt: skip


def test_wandb_is_opened_behind_the_first_iteration_and_gets_all_that_waited(clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda columns, data: data))
    monkeypatch.setattr("nanogpt_mac.train.sinks.report.rows", lambda document: document.findings)
    runs = []
    wandb = Wandb(lambda: runs.append(Run()) or runs[-1])
    wandb.fallbacks(SimpleNamespace(findings=["a"], complete=True), 0)
    wandb.row(evaluation(0))
    wandb.flush()
    assert not wandb.overdue()
    assert runs == []
    wandb.row(iteration(0))
    wandb.tick()
    assert wandb.overdue()  # so the loop stops its clock
    assert runs == []
    wandb.flush()
    assert not wandb.overdue()
    wandb.flush()
    (run,) = runs
    assert [(step, next(iter(figures))) for step, figures in run.logged] == [
        (0, "fallbacks"),
        (0, "val/loss"),
        (0, "train/loss"),
    ]
    wandb.close()
    wandb.wait()
    assert run.finished == 1


def test_a_run_that_ends_before_its_first_iteration_is_in_wandb_too():
    runs = []
    wandb = Wandb(lambda: runs.append(Run()) or runs[-1])
    wandb.row(evaluation(0))
    wandb.summary(SimpleNamespace(document=lambda: {"times": None, "exit_state": "failed"}))
    (run,) = runs
    assert run.summary["summary/exit_state"] == "failed"
    assert len(run.logged) == 1


def test_wandbs_names():
    row = IterationRow(
        kind="iteration", iter=3, loss=2.0, lr=1e-3, grad_norm=1.5, iter_ms=10.0, dispatch_ms=0.5, tokens_per_s=7.0,
        mfu=None, mfu_measured=0.2, mfu_a100=0.1, memory=5,
    )  # fmt: skip
    assert figures_of(row) == {
        "train/loss": 2.0,
        "train/lr": 1e-3,
        "train/grad_norm": 1.5,
        "perf/iter_ms": 10.0,
        "perf/dispatch_ms": 0.5,
        "perf/tokens_per_s": 7.0,
        "perf/mfu_measured": 0.2,
        "perf/mfu_a100": 0.1,
        "system/memory": 5,
    }
    event = EventRow(kind="event", iter=3, event="pause", power_source="battery", gpu_utilisation=3)
    assert figures_of(event) == {"system/gpu_utilisation": 3}


def test_fallbacks_are_a_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda columns, data: list(data)))
    monkeypatch.setattr("nanogpt_mac.train.sinks.report.rows", lambda document: document.findings)
    run = Run()
    Wandb(run).fallbacks(SimpleNamespace(findings=["a", "b"], complete=True), 7)
    assert run.logged == [(7, {"fallbacks": ["a", "b"], "fallbacks/findings": 2, "fallbacks/complete": True})]


class Kept(Sink):
    def __init__(self, overdue=False):
        self.calls, self._overdue = [], overdue

    def row(self, row):
        self.calls.append(row)

    def tick(self):
        self.calls.append("tick")

    def flush(self):
        self.calls.append("flush")

    def fallbacks(self, document, iteration):
        self.calls.append((document, iteration))

    def overdue(self):
        return self._overdue

    def close(self):
        self.calls.append("close")


def test_every_sink_gets_everything_and_one_that_is_overdue_is_enough():
    sinks = [Kept(), Kept(overdue=True)]
    recorder = Recorder(WORK, sinks)
    recorder.fallbacks("document", 4)
    recorder.tick()
    recorder.iteration(Completion(0, 2.0, 1.0, 500.0, 0.5, "first"), 1e-3, {"current": 5, "peak": 9})
    recorder.evaluation(0, 3.0, 4.0, 0.25)
    recorder.event("pause", 0, heat=3)
    recorder.iteration(Completion(1, 3.0, 1.0, 10.0, 0.5, None), 2e-3, {"current": 7, "peak": 11})
    recorder.flush()
    assert recorder.overdue()
    assert not Recorder(WORK, [Kept()]).overdue()
    recorder.close()
    for sink in sinks:
        (document, tick, first, evaluated, event, second, flush, close) = sink.calls
        assert (document, tick, flush, close) == (("document", 4), "tick", "flush", "close")
        assert (first.left_out, first.memory, first.iter_ms) == ("first", 5, 500.0)
        assert (second.left_out, second.lr, second.loss, second.grad_norm, second.dispatch_ms) == (
            None,
            2e-3,
            3.0,
            1.0,
            0.5,
        )
        assert second.tokens_per_s == pytest.approx(100_000)
        assert (evaluated.train_loss, evaluated.val_loss, evaluated.seconds) == (3.0, 4.0, 0.25)
        assert (event.event, event.iter) == ("pause", 0)


def test_just_the_measured_peak_is_possible():
    work = Work(2e9, 1000, Denominators(mfu=None, mfu_measured=2e9 / 0.0078125, mfu_a100=312e12))
    assert work.mfu(7.8125).mfu_measured == 1.0
    assert work.mfu(7.8).mfu_measured is None
    assert set(dict(work.mfu(None)).values()) == {None}


class RefusedError(Exception):
    """wandb.errors.Error."""


class FakeWandb:
    """wandb, as far as it is opened here; `fault` is what `init` raises."""

    errors = SimpleNamespace(Error=RefusedError)
    Settings = dict

    def __init__(self, fault=None):
        self.fault, self.asked = fault, []

    def init(self, **asked):
        self.asked.append(asked)
        if self.fault:
            raise self.fault
        return Run()


FACTS = SimpleNamespace(backend="cpu", corpus="verse", model_dump=lambda: {"cores": 2})


def opened(monkeypatch, folder, wandb, **given):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = Config()
    config.wandb = replace(config.wandb, **{"mode": "offline", "tags": ["mine"]} | given)
    return open_wandb(config, folder, FACTS)


@pytest.mark.parametrize(("given", "name"), [("", "run"), ("best", "best")])
def test_wandb_is_opened_as_the_config_asks(monkeypatch, tmp_path, given, name):
    wandb = FakeWandb()
    assert type(opened(monkeypatch, tmp_path / "run", wandb, mode="disabled")) is Sink
    assert wandb.asked == []
    assert isinstance(opened(monkeypatch, tmp_path / "run", wandb, name=given), Wandb)
    (asked,) = wandb.asked
    assert (asked["name"], asked["mode"], asked["dir"]) == (name, "offline", tmp_path / "run")
    assert asked["tags"] == ["mine", "cpu", "verse"]
    assert asked["config"]["facts"] == {"cores": 2}
    assert asked["config"]["max_iters"] == Config().max_iters
    assert asked["settings"] == {"console": "off", "silent": True, "x_disable_stats": True}


@pytest.mark.parametrize(
    ("given", "environment", "late"),
    [
        ({}, {}, True),
        ({"project": "my project", "entity": "team_1", "tags": ["a.b"]}, {"WANDB_RUN_GROUP": "g"}, True),
        ({"mode": "online"}, {}, False),  # an account may be missing
        ({"project": "what?"}, {}, False),
        ({"tags": ["x" * 65]}, {}, False),
        ({}, {"WANDB_NAME": "a/b"}, False),
        ({}, {"WANDB_BASE_URL": "nowhere"}, False),
    ],
)
def test_only_what_wandb_cannot_refuse_is_opened_late(monkeypatch, tmp_path, given, environment, late):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = Config()
    config.wandb = replace(config.wandb, **{"mode": "offline"} | given)
    sink = open_wandb(config, tmp_path / "run", FACTS, late=True)
    assert len(wandb.asked) == (0 if late else 1)
    sink.row(iteration(0))
    sink.flush()
    (asked,) = wandb.asked
    assert asked["project"] == given.get("project", "nanogpt-mac")


@pytest.mark.parametrize(("words", "line"), [("no key\nlog in first", "no key"), ("", "RefusedError")])
def test_where_wandb_refuses_nothing_is_left(monkeypatch, tmp_path, words, line):
    folder, wandb = tmp_path / "run", FakeWandb(RefusedError(words))
    (folder / "wandb").mkdir(parents=True)
    with pytest.raises(InputError, match=f"^wandb.mode=offline: {line}; without an account use offline or disabled$"):
        opened(monkeypatch, folder, wandb)
    assert not folder.exists()
    folder.mkdir()
    (folder / "own.txt").touch()
    with pytest.raises(InputError):  # nor is what is not ours removed
        opened(monkeypatch, folder, wandb)
    assert [file.name for file in folder.iterdir()] == ["own.txt"]


def test_a_summary_is_wandbs_own_and_fallbacks_are_a_file(tmp_path):
    run = Run()
    Wandb(run).summary(SimpleNamespace(document=lambda: {"times": {"median": 2.0}, "best": 1.5}))
    assert run.summary == {"summary/iter_ms": {"median": 2.0}, "summary/best": 1.5}
    with closing(Folder(tmp_path)) as sink:
        sink.fallbacks(SimpleNamespace(document=lambda: {"findings": []}), 3)
    assert json.loads((tmp_path / "fallbacks.json").read_text()) == {"findings": []}


def test_the_environment_counts_where_no_key_says_otherwise(monkeypatch, tmp_path, capsys):
    for name, value in {"PROJECT": "mine", "NAME": "first", "TAGS": "a,b", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_RUN_ID", "left-over")
    wandb = FakeWandb()
    seen = []
    monkeypatch.setattr(wandb, "init", lambda **asked: seen.append((asked, "WANDB_RUN_ID" in os.environ)))
    opened(monkeypatch, tmp_path / "run", wandb, tags=[])
    opened(monkeypatch, tmp_path / "run", wandb, project="key", name="key", tags=["key"])
    monkeypatch.setenv("WANDB_SWEEP_ID", "an agent's")
    opened(monkeypatch, tmp_path / "run", wandb)
    (first, first_id), (second, second_id), (_, agents_id) = seen
    assert (first["project"], first["name"], first["dir"]) == ("mine", "first", None)
    assert first["tags"] == ["a", "b", "cpu", "verse"]
    assert (second["project"], second["name"], second["tags"][0]) == ("key", "key", "key")
    assert (first_id, second_id, agents_id) == (False, False, True)
    assert os.environ["WANDB_RUN_ID"] == "left-over"
    assert capsys.readouterr().err.count("WANDB_RUN_ID: left out; every run here has an id of its own in wandb") == 2


@pytest.mark.parametrize(
    ("key", "environment", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_MODE": "online"}, "online"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        (None, {"WANDB_MODE": ""}, "offline"),
        (None, {"WANDB_DISABLED": "true"}, "disabled"),
        (None, {"WANDB_DISABLED": "false", "WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "offline"),
        ("disabled", {"WANDB_MODE": "nonsense"}, "disabled"),
    ],
)
def test_the_mode_is_the_keys_else_the_environments_else_ours(key, environment, mode):
    assert WandbConfig(mode=key).mode_here(environment) == mode


def test_a_mode_that_wandb_has_not_is_one_line():
    with pytest.raises(InputError, match="WANDB_MODE=on: use offline, online or disabled"):
        WandbConfig().mode_here({"WANDB_MODE": "on"})


def test_wandbs_own_reader_finds_what_the_environment_said(monkeypatch, tmp_path):
    """Two runs of one shell, with an id left in it: two runs in wandb, of the project and the group that it names."""
    given = {"WANDB_PROJECT": "mine", "WANDB_RUN_GROUP": "together", "WANDB_TAGS": "a", "WANDB_RUN_ID": "left"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    ids = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        wandb = open_wandb(Config(), tmp_path / name, FACTS)
        wandb.close()
        wandb.wait()
        (log,) = (tmp_path / name).glob("wandb/offline-run-*/run-*.wandb")
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        said = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
        assert '"mine"' in said
        assert '"together"' in said
        ids.add(log.stem)
    os.environ.pop("WANDB_SERVICE", None)  # or the commands of later tests would share its process
    assert len(ids) == 2
    assert "run-left" not in ids
