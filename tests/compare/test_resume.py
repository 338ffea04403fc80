"""A comparison that was stopped, killed, damaged or out of room, and goes on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from fakes.comparisons import outcomes, started
from fakes.support import ROOT

from nanogpt_mac import supervise
from nanogpt_mac.compare import plan as plans
from nanogpt_mac.compare import run as command
from nanogpt_mac.compare.config import CompareConfig
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.plan import Parity, ParityResult, Plan


def test_nothing_that_has_been_done_is_done_again(plan):
    runner = plan(rounds=2, a="works", b="later-raises")
    runner.carry_out()
    before = started(runner)
    shutil.rmtree(runner.folder / "rounds/1-a")
    (runner.folder / "rounds/0-a/outcome.json").unlink()  # half-finished: its records are there, its ending is not
    plan.again(runner.folder).carry_out()
    assert sorted(started(runner)[len(before) :]) == ["0-a", "1-a"]
    assert outcomes(runner)["0-a"] == ("done", None)
    assert len((runner.folder / "rounds/0-a/metrics.jsonl").read_text().splitlines()) == 12


PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, a shell ignores it
from pathlib import Path
from nanogpt_mac.compare import plan, run
from nanogpt_mac.compare.config import CompareConfig
from nanogpt_mac.config import Config
plan.configs_of = lambda document: {variant.name: Config() for variant in document.variants}
sys.exit(run.run(CompareConfig(run=sys.argv[1])))
"""


@pytest.fixture
def in_a_process(plan):
    """A comparison in a process of its own, caught in the middle of its second round."""
    runner = plan(rounds=2, iters=60, a="works", b="later-slow")
    made = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(runner.folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    running = None
    try:
        deadline = time.monotonic() + 100
        while not any(name == "0-b" for name in started(runner)):
            assert made.poll() is None, made.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running = psutil.Process(int((runner.folder.parent / "starts.txt").read_text().split()[-1]))
        yield runner, made, running
    finally:
        with suppress(psutil.NoSuchProcess):
            if running:
                running.kill()
        made.kill()
        made.wait()
        made.stderr.close()


def test_a_killed_comparison_goes_on_and_its_orphan_is_ended(in_a_process, plan):
    runner, made, running = in_a_process
    made.kill()
    made.wait()
    before = started(runner)
    assert running.is_running()  # nobody was left to end it
    again = plan.again(runner.folder)
    again._limits = lambda name: supervise.Limits(60, 60, 60)
    again.carry_out()
    assert not running.is_running() or running.status() == psutil.STATUS_ZOMBIE
    assert set(outcomes(runner).values()) == {("done", None)}
    done_before = before[:-1]
    assert not set(started(runner)[len(before) :]) & set(done_before)
    assert started(runner).count("0-b") == 2
    assert len((runner.folder / "rounds/0-b/metrics.jsonl").read_text().splitlines()) == 60  # not of two runs


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_comparison_says_how_to_go_on(in_a_process, signum):
    runner, made, running = in_a_process
    with pytest.raises(InputError, match="another process is using it"), command._alone(runner.folder):
        pass
    made.send_signal(signum)
    _, errors = made.communicate(timeout=30)
    assert made.returncode == 128 + signum
    assert f"go on with: python compare.py run={runner.folder}" in errors
    assert "Traceback" not in errors
    assert not running.is_running()
    assert not (runner.folder / "rounds/0-b/outcome.json").exists()


def test_an_orphans_number_that_another_process_has_is_left_alone(tmp_path):
    folder = tmp_path / "0-a"
    folder.mkdir()
    (folder / "process.json").write_text(json.dumps({"pid": os.getpid(), "arguments": ["train.py"]}))
    supervise.clear(folder)  # would have ended this test
    assert not folder.exists()


def test_an_orphan_is_ended_though_the_clock_has_been_set(tmp_path, monkeypatch):
    argv = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(argv, start_new_session=True) as orphan:
        supervise._note(orphan.pid, argv, tmp_path)
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
        supervise.clear(tmp_path)
        assert orphan.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("outcome.json", "{"),
        ("outcome.json", "{}"),
        ("outcome.json", '{"state": "done", "seconds": "1"}'),
        ("outcome.json", '{"variant": "a", "round": 7, "state": "done", "seconds": 1}'),
        ("outcome.json", '{"variant": "z", "round": 0, "state": "done", "seconds": 1}'),
        ("summary.json", None),
        ("summary.json", '{"iter_ms": 1}'),
        ("metrics.jsonl", "{\n1"),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", None),
    ],
)
def test_a_run_whose_records_are_damaged_is_run_again(plan, file, text):
    runner = plan(rounds=1, a="works", b="works")
    runner.carry_out()
    before = started(runner)
    for run in ("pilot-a", "0-b"):
        path = runner.folder / "rounds" / run / file
        path.unlink() if text is None else path.write_text(text)
    again = plan.again(runner.folder)
    assert [line.split(": ")[:2] for line in again.said] == [
        [f"rounds/{run}", "its records are damaged"] for run in ("0-b", "pilot-a")
    ]
    assert all(line.endswith("; it is run again") for line in again.said)
    again.carry_out()
    assert sorted(started(runner)[len(before) :]) == ["0-b", "pilot-a"]
    assert set(outcomes(runner).values()) == {("done", None)}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"seconds": 1}', '{"seconds": 1, "variants": {}}', '{"seconds": 1, "variants": {"a": {}}}']
)
def test_a_gate_that_cannot_be_read_or_lacks_a_variant_is_passed_again(plan, monkeypatch, text):
    runner = plan(rounds=1, parity=True, a="works")
    (runner.folder / "parity.json").write_text(text)
    failed = Parity(seconds=1.0, variants={"a": ParityResult(state="fail", reason="logits")})
    monkeypatch.setattr("nanogpt_mac.parity.gate.check", lambda *_: failed)
    runner.carry_out()
    assert outcomes(runner) == {"pilot-a": ("skipped", "failed the parity gate: logits")}


DECIDED = {"order": [[0, "a"]], "rounds": 1, "iters": {"a": 9}, "warmup": {"a": 1}, "share": {"a": 1.0}}


def test_only_a_comparison_that_can_be_read_goes_on(plan, tmp_path):
    def go_on(folder):
        with pytest.raises(InputError) as caught:
            command.run(CompareConfig(run=str(folder), given=[f"run={folder}"]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no plan.json; use a comparison's folder" in go_on(tmp_path)
    runner = plan(a="works")
    path = runner.folder / "plan.json"
    whole = json.loads(path.read_text())
    for broken, words in (
        ("{", "plan.json: cannot be read: JSONDecodeError; start a new comparison"),
        ("[1]", "plan.json: not a JSON object"),
        (json.dumps(whole | {"schema": 99}), "plan.json has schema 99, this program's is 3; use the newer nanogpt-mac"),
        (json.dumps({k: v for k, v in whole.items() if k != "variants"}), "plan.json: has no variants"),
        (json.dumps(whole | {"cwd": str(tmp_path / "gone")}), "gone, which is gone; make that folder again"),
        (json.dumps(whole | {"cwd": 5}), "plan.json: cwd=5: "),
        (json.dumps(whole | {"variants": []}), "plan.json: variants must have names of their own"),
        (json.dumps(whole | {"variants": whole["variants"] * 2}), "plan.json: variants must have names of their own"),
        (json.dumps(whole | {"variants": [{"name": "a"}]}), "plan.json: has no variants.0.label"),
        (json.dumps(whole | {"asked": None}), "plan.json: asked=None: "),
        (json.dumps(whole | {"overrides": 5}), "plan.json: overrides=5: "),
        (json.dumps(whole | {"budget_minutes": "x"}), "plan.json: budget_minutes='x': "),
        (json.dumps(whole | {"stall_seconds": float("inf")}), "plan.json: stall_seconds=inf: "),
        (json.dumps(whole | DECIDED | {"order": [[0, "b"]]}), "plan.json: iters, warmup or share lacks 'b'"),
        (json.dumps(whole | DECIDED | {"iters": {}}), "plan.json: iters, warmup or share lacks 'a'"),
        (json.dumps(whole | DECIDED | {"rounds": None}), "plan.json: order has round 0 of rounds=None"),
        (json.dumps(whole | DECIDED | {"iters": {"a": 0}}), "plan.json: iters.a=0: "),
    ):
        path.write_text(broken)
        assert words in go_on(runner.folder)


def test_a_new_comparison_takes_no_folder_that_another_has(plan, monkeypatch):
    runner = plan(rounds=1, a="works")
    monkeypatch.setattr(plans, "make", lambda config: (runner.plan.model_copy(update={"seed": 99}), {}))
    with pytest.raises(InputError, match=r"run_dir=.*: is not empty; use a new or an empty folder"):
        command.run(CompareConfig(run_dir=str(runner.folder)))
    assert Plan.load(runner.folder / "plan.json") == runner.plan


def test_a_full_disk_is_one_line_that_says_how_to_go_on(plan, monkeypatch, capsys):
    runner = plan(rounds=1, a="works")
    monkeypatch.setattr(plans, "configs_of", lambda document: {"a": Config()})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(runner.folder / "outcome.json"))

    monkeypatch.setattr("nanogpt_mac.measure.runner.write_json", full)
    assert command.run(CompareConfig(run=str(runner.folder))) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{runner.folder / 'outcome.json'}: No space left on device; make room, then go on with: ")
    assert said.count("\n") == 1


def test_a_run_that_a_full_disk_has_failed_is_none_of_the_variants_failures(plan, monkeypatch):
    runner = plan(rounds=1, a="raises")
    monkeypatch.setattr("nanogpt_mac.child.ROOM", sys.maxsize)
    with pytest.raises(OSError, match="No space left on device"):
        runner.carry_out()
    assert outcomes(runner) == {}
    monkeypatch.undo()
    plan.again(runner.folder).carry_out()
    assert outcomes(runner)["pilot-a"] == ("failed", "RuntimeError: the first line")
