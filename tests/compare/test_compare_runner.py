"""Carrying a plan out, on fake runs that take milliseconds: every failure is a row, and nothing is done twice."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support import ROOT

from nanogpt_mac.compare import child
from nanogpt_mac.compare import plan as plans
from nanogpt_mac.compare import run as command
from nanogpt_mac.compare.config import CompareConfig
from nanogpt_mac.compare.runner import Runner
from nanogpt_mac.compare.ways import Way
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.machine import probe

FAKE = Path(__file__).with_name("compare_fake_train.py")


@pytest.fixture
def plan(tmp_path):
    """A plan of fake ways, written to a comparison's folder: plan(works="works", crash="segfault") -> Runner."""

    def make(rounds=2, iters=12, parity=False, time_wrong=False, stall=60.0, **behaviours):
        ways = []
        for name, behaviour in behaviours.items():
            script = tmp_path / f"{name}.py"
            script.write_text(FAKE.read_text().replace('BEHAVIOUR = "works"', f'BEHAVIOUR = "{behaviour}"'))
            ways.append(Way(name, name.upper(), ("backend=cpu",), script=str(script)).to_json())
        document = {
            "schema": 1,
            "ways": ways,
            "rounds": None,
            "iters": None,
            "order": None,
            "asked": {"rounds": rounds, "iters": iters},
            "overrides": [],
            "experiment": None,
            "quick_by_default": False,
            "seed": 1,
            "budget_minutes": 1.0,
            "levers": False,
            "gate": {"parity": parity, "time_wrong": time_wrong},
            "cooldown_seconds": 0.0,
            "heat_wait_seconds": 1.0,
            "stall_seconds": stall,
            "missing": {},
            "cwd": str(tmp_path),
        }
        folder = tmp_path / "comparison"
        folder.mkdir()
        plans.write(folder, document)
        return runner(folder)

    def runner(folder):
        document = json.loads((folder / "plan.json").read_text())
        said = []
        made = Runner(folder, document, {way["name"]: Config() for way in document["ways"]}, said.append)
        made.said = said
        return made

    make.again = runner
    return make


def outcomes(runner):
    found = {path.parent.name: json.loads(path.read_text()) for path in runner.folder.glob("rounds/*/outcome.json")}
    return {name: (o["state"], o["reason"]) for name, o in found.items()}


def started(runner):
    file = runner.folder.parent / "starts.txt"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def overrides_of(folder):
    """What the run was told, from the log of a script that prints it."""
    return json.loads((folder / "log.txt").read_text())


def test_every_way_runs_once_a_round_after_its_pilot(plan):
    runner = plan(rounds=3, a="works", b="works")
    runner.carry_out()
    assert set(outcomes(runner).values()) == {("done", None)}
    names = started(runner)
    assert names[:2] == ["pilot-a", "pilot-b"]
    assert [sorted(names[i : i + 2]) for i in (2, 4, 6)] == [[f"{n}-a", f"{n}-b"] for n in range(3)]
    document = json.loads((runner.folder / "plan.json").read_text())
    assert [f"{number}-{name}" for number, name in document["order"]] == names[2:]
    assert document["rounds"] == 3
    assert document["iters"] == {"a": 12, "b": 12}
    assert not (runner.folder / "cache").exists()
    record = json.loads((runner.folder / "rounds/0-a/outcome.json").read_text())
    assert {"way", "round", "state", "code", "reason", "seconds", "started", "heat"} == record.keys()
    assert (record["way"], record["round"], record["code"]) == ("a", 0, 0)


def test_what_a_run_is_told(plan, tmp_path, monkeypatch):
    runner = plan(rounds=2, a="works")
    script = tmp_path / "a.py"
    script.write_text(
        "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n" + script.read_text()
    )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    runner.carry_out()
    told = {name: overrides_of(runner.folder / "rounds" / name) for name in ("pilot-a", "0-a", "1-a")}
    pilot, first, second = (set(overrides) for overrides, _ in told.values())
    assert {"gemm_seconds=1.0", "eval_interval=0", "max_iters=12"} <= pilot
    assert {"gemm_seconds=0", "eval_interval=12", "eval_iters=5", "max_iters=12", "timing_warmup=5"} <= first
    assert {"gemm_seconds=0", "eval_interval=0", "max_iters=12"} <= second
    for some in (pilot, first, second):
        assert {"checkpoint=false", "sample_tokens=0", "wandb.mode=disabled", "backend=cpu"} <= some
    environments = [environment for _, environment in told.values()]
    caches = {environment["TORCHINDUCTOR_CACHE_DIR"] for environment in environments}
    assert caches == {str(runner.folder / "cache" / "a" / "inductor")}
    assert not any("HYDRA_FULL_ERROR" in environment for environment in environments)


FAILURES = {
    "segfault": ("failed", "crashed (SIGSEGV)"),
    "killed": ("oom", "killed (SIGKILL) from outside, which systems do when memory runs out"),
    "memory": ("oom", "MemoryError"),
    "mps-memory": ("oom", "RuntimeError: MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 GB)"),
    "missing-op": (
        "missing_op",
        "NotImplementedError: The operator 'aten::foo' is not currently implemented for the MPS device. More words.",
    ),
    "bad-input": ("failed", "backend.fused_adamw=true: torch has none"),
    "diverged": ("failed", "iter 7: loss is nan: training has diverged and stops here"),
    "nothing": ("failed", "left no summary: it said nothing"),
    "raises": ("failed", "RuntimeError: the first line"),
}


def test_every_failure_of_a_pilot_is_a_row_and_ends_that_way_alone(plan):
    runner = plan(rounds=1, fine="works", **{name.replace("-", "_"): name for name in FAILURES})
    runner.carry_out()
    found = outcomes(runner)
    assert {name: found[f"pilot-{name.replace('-', '_')}"] for name in FAILURES} == FAILURES
    assert [name for name in found if not name.startswith("pilot")] == ["0-fine"]
    assert found["0-fine"] == ("done", None)
    assert any("MEMORY: OOM" in line and "not timed" in line for line in runner.said)


def test_a_pilot_that_hangs_is_ended(plan):
    runner = plan(rounds=1, stall=1.0, a="hangs")
    runner.carry_out()
    state, reason = outcomes(runner)["pilot-a"]
    assert state == "timeout"
    assert re.fullmatch(r"no sign of life for \d+ s, before the first iteration was recorded: ended as hung", reason)


def test_a_round_that_hangs_or_never_ends_is_ended_with_all_that_it_started(plan, monkeypatch):
    runner = plan(rounds=1, still="later-hangs-later", endless="later-endless", fine="works")
    limits = {"still": child.Limits(60, 0.6, 60), "endless": child.Limits(60, 60, 4), "fine": child.Limits(60, 60, 60)}
    monkeypatch.setattr(Runner, "_round_limits", lambda self, name: limits[name])
    runner.carry_out()
    found = outcomes(runner)
    assert found["0-still"][0] == found["0-endless"][0] == "timeout"
    assert re.fullmatch(r"no sign of life for \d+ s, after 3 recorded iterations: ended as hung", found["0-still"][1])
    assert re.match(r"not done within \d+ s, after \d+ recorded iterations: ended", found["0-endless"][1])
    assert found["0-fine"] == ("done", None)
    pids = [int(line.split()[1]) for line in (runner.folder.parent / "starts.txt").read_text().splitlines()]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_limits_leave_a_slow_machine_alone(plan):
    runner = plan(a="works")
    runner.carry_out()
    limits = runner._round_limits("a")
    took = json.loads((runner.folder / "rounds/pilot-a/outcome.json").read_text())["seconds"]
    assert limits.stall >= 30
    assert limits.total > 20 * took


def test_a_slow_pilot_is_asked_to_end_once_it_has_shown_enough(plan, monkeypatch):
    runner = plan(rounds=1, iters=10, a="slow")
    monkeypatch.setattr("nanogpt_mac.compare.runner.PILOT_S", 0.2)
    runner.carry_out()
    rows = (runner.folder / "rounds/pilot-a/metrics.jsonl").read_text().splitlines()
    assert child.FEWEST_PILOT <= len(rows) < 10
    assert json.loads((runner.folder / "rounds/pilot-a/outcome.json").read_text())["code"] == 143
    assert outcomes(runner)["pilot-a"] == ("done", None)
    assert len((runner.folder / "rounds/0-a/metrics.jsonl").read_text().splitlines()) == 10  # rounds run to their end


def test_a_pilot_that_was_done_when_it_was_asked_to_end_counts(plan, monkeypatch):
    runner = plan(rounds=1, a="lingers")
    monkeypatch.setattr("nanogpt_mac.compare.runner.PILOT_S", 0.2)
    runner.carry_out()
    assert json.loads((runner.folder / "rounds/pilot-a/outcome.json").read_text())["code"] == -signal.SIGTERM
    assert set(outcomes(runner).values()) == {("done", None)}


def test_two_failed_rounds_end_a_way(plan):
    runner = plan(rounds=4, a="later-raises", b="works")
    runner.carry_out()
    found = outcomes(runner)
    states = [found[f"{n}-a"][0] for n in range(4)]
    assert states == ["failed", "failed", "skipped", "skipped"]
    assert found["3-a"][1] == "2 runs of it had failed"
    assert {found[f"{n}-b"][0] for n in range(4)} == {"done"}


@pytest.mark.parametrize("time_wrong", [False, True])
def test_ways_that_failed_the_gate_are_timed_on_request_alone(plan, time_wrong):
    runner = plan(rounds=1, parity=True, time_wrong=time_wrong, right="works", wrong="works", broken="works")
    ways = {
        "right": {"state": "pass", "reason": None},
        "wrong": {"state": "fail", "reason": "gradients 1.0e-02"},
        "broken": {"state": "error", "reason": "it crashed"},
    }
    (runner.folder / "parity.json").write_text(json.dumps({"schema": 1, "ways": ways, "seconds": 1.0}))
    runner.carry_out()
    found = outcomes(runner)
    assert found["0-right"] == ("done", None)
    if time_wrong:
        assert found["0-wrong"] == found["0-broken"] == ("done", None)
    else:
        assert found["pilot-wrong"] == ("skipped", "failed the parity gate: gradients 1.0e-02")
        assert found["pilot-broken"] == ("skipped", "parity could not be checked: it crashed")
        assert "0-wrong" not in found
    assert any("WRONG: FAIL" in line for line in runner.said)


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
plan.configs_of = lambda document: {way["name"]: Config() for way in document["ways"]}
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
    again._round_limits = lambda name: child.Limits(60, 60, 60)
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
    with pytest.raises(InputError, match="another process is at work there"), command._alone(runner.folder):
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
    child.clear(folder)  # would have ended this test
    assert not folder.exists()


def test_an_orphan_is_ended_though_the_clock_has_been_set(tmp_path, monkeypatch):
    argv = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(argv, start_new_session=True) as orphan:
        child._note(orphan.pid, argv, tmp_path)
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
        child.clear(tmp_path)
        assert orphan.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("outcome.json", "{"),
        ("outcome.json", "{}"),
        ("outcome.json", '{"state": "done", "seconds": "1"}'),
        ("summary.json", None),
        ("summary.json", '{"iter_ms": 1}'),
        ("metrics.jsonl", "{\n1"),
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
    plan.again(runner.folder).carry_out()
    assert sorted(started(runner)[len(before) :]) == ["0-b", "pilot-a"]
    assert set(outcomes(runner).values()) == {("done", None)}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"seconds": 1}', '{"seconds": 1, "ways": {}}', '{"seconds": 1, "ways": {"a": {}}}']
)
def test_a_gate_that_cannot_be_read_or_lacks_a_way_is_passed_again(plan, monkeypatch, text):
    runner = plan(rounds=1, parity=True, a="works")
    (runner.folder / "parity.json").write_text(text)
    failed = {"seconds": 1.0, "ways": {"a": {"state": "fail", "reason": "logits"}}}
    monkeypatch.setattr("nanogpt_mac.compare.parity.gate.check", lambda *_: failed)
    runner.carry_out()
    assert outcomes(runner) == {"pilot-a": ("skipped", "failed the parity gate: logits")}


def test_a_pilot_in_which_nothing_could_be_counted_is_run_twice_and_then_a_row(plan, tmp_path):
    runner = plan(rounds=1, a="works", b="works")
    script = tmp_path / "a.py"
    script.write_text(script.read_text().replace('"median": 10.0, "min": 10.0', '"median": None, "min": None'))
    runner.carry_out()
    assert outcomes(runner)["pilot-a"] == ("failed", "none of its iterations could be counted")
    assert outcomes(runner)["0-b"] == ("done", None)
    assert started(runner) == ["pilot-a", "pilot-a", "pilot-b", "0-b"]


def test_time_that_is_up_cuts_whole_rounds_off(plan, monkeypatch):
    runner = plan(rounds=8, a="works", b="works")
    runner.plan["asked"] = {"rounds": None, "iters": None}
    runner._pilots({})
    runner.plan |= {"rounds": 8, "iters": {"a": 12, "b": 12}, "warmup": {"a": 5, "b": 5}}
    runner.plan["order"] = plans.order({"a": list(range(8)), "b": list(range(8))}, 1)
    runner.plan |= {"budget_minutes": 0.0, "share": {"a": 1.0, "b": 1.0}}
    runner._rounds()
    document = json.loads((runner.folder / "plan.json").read_text())
    assert document["rounds"] == 5  # so many are kept whatever the time
    assert {number for number, _ in document["order"]} == set(range(5))
    assert document["cut"]["rounds"] == 8
    assert len([name for name in outcomes(runner) if not name.startswith("pilot")]) == 10


def test_time_that_is_left_adds_rounds(plan):
    runner = plan(rounds=None, a="works", b="later-raises", c="works")
    runner._pilots({})
    runner.plan |= {"rounds": 3, "iters": dict.fromkeys("abc", 12), "warmup": dict.fromkeys("abc", 5)}
    runner.plan |= {"order": plans.order({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 2]}, 1)}
    runner.plan |= {"share": {"a": 1.0, "b": 1.0, "c": 2 / 3}, "budget_minutes": 0.5}
    plans.write(runner.folder, runner.plan)
    elapsed = iter([*[0.0] * 12, *[14.0] * 4, *[1000.0] * 50])  # of 30 seconds; 15 are the report's
    runner._elapsed = lambda: next(elapsed)
    runner._rounds()
    document = json.loads((runner.folder / "plan.json").read_text())
    counts = {way: [number for number, name in document["order"] if name == way] for way in "abc"}
    assert document["rounds"] > 3
    assert counts["a"] == list(range(document["rounds"]))
    assert counts["b"] == [0, 1, 2]  # it had failed
    assert len(counts["c"]) == document["rounds"] * 2 // 3
    names = {f"{number}-{name}" for number, name in document["order"]}
    assert names == {name for name in outcomes(runner) if not name.startswith("pilot")}
    runner = plan.again(runner.folder)
    runner.plan["budget_minutes"] = 0.0
    before = started(runner)
    runner._rounds()  # nothing is left to do, and no time
    assert started(runner) == before


def test_a_hot_machine_is_waited_for_within_bounds(plan, monkeypatch):
    runner = plan(rounds=1, a="works")
    states = iter(["heavy", "heavy", "nominal", "nominal"])
    monkeypatch.setattr(probe, "thermal_state", lambda: next(states))
    monkeypatch.setattr("nanogpt_mac.compare.runner.HEAT_POLL_S", 0.05)
    heat = runner._cool_down(60)
    assert (heat["before"], heat["at_start"]) == ("heavy", "nominal")
    assert 0.1 <= heat["waited_s"] < 1
    monkeypatch.setattr(probe, "thermal_state", lambda: "heavy")
    heat = runner._cool_down(0.2)
    assert heat["at_start"] == "heavy"
    assert 0.2 <= heat["waited_s"] < 1


def test_no_way_left_is_no_crash(plan):
    runner = plan(a="raises")
    runner.carry_out()
    document = json.loads((runner.folder / "plan.json").read_text())
    assert (document["rounds"], document["order"]) == (0, [])


def test_only_a_comparison_that_can_be_read_goes_on(plan, tmp_path):
    def go_on(folder):
        with pytest.raises(InputError) as caught:
            command.run(CompareConfig(run=str(folder), given=[f"run={folder}"]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no plan.json; allowed is a comparison's folder" in go_on(tmp_path)
    runner = plan(a="works")
    path = runner.folder / "plan.json"
    whole = json.loads(path.read_text())
    for broken, words in (
        ("{", "its plan.json cannot be read"),
        ("[1]", "its plan.json cannot be read"),
        (json.dumps(whole | {"schema": 99}), "its plan has schema 99; allowed is 1"),
        (json.dumps({k: v for k, v in whole.items() if k != "ways"}), "its plan.json has no ways"),
        (json.dumps(whole | {"cwd": str(tmp_path / "gone")}), "which is not there any more"),
        (json.dumps(whole | {"cwd": 5}), "is damaged: cwd=5; allowed is what compare.py wrote"),
        (json.dumps(whole | {"ways": []}), "is damaged: ways=[]"),
        (json.dumps(whole | {"ways": [{"name": "a"}]}), "is damaged: ways="),
        (json.dumps(whole | {"asked": None}), "is damaged: asked=None"),
        (json.dumps(whole | {"overrides": 5}), "is damaged: overrides=5"),
        (json.dumps(whole | {"budget_minutes": "x"}), "is damaged: budget_minutes=x"),
        (json.dumps(whole | {"order": [[0, "b"]], "rounds": 1}), "is damaged: order=[[0, 'b']]"),
        (json.dumps(whole | {"order": [[0, "a"]], "rounds": 1}), "is damaged: iters=None"),
    ):
        path.write_text(broken)
        assert words in go_on(runner.folder)


def test_a_new_comparison_takes_no_folder_that_another_has(plan, monkeypatch):
    runner = plan(rounds=1, a="works")
    monkeypatch.setattr(plans, "make", lambda config: ({"made": "anew"}, {}))
    with pytest.raises(InputError, match=r"run_dir=.*: is not empty; allowed is a new or an empty folder"):
        command.run(CompareConfig(run_dir=str(runner.folder)))
    assert json.loads((runner.folder / "plan.json").read_text()) == runner.plan


def test_a_full_disk_is_one_line_that_says_how_to_go_on(plan, monkeypatch, capsys):
    runner = plan(rounds=1, a="works")
    monkeypatch.setattr(plans, "configs_of", lambda document: {"a": Config()})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(runner.folder / "outcome.json"))

    monkeypatch.setattr("nanogpt_mac.compare.runner.write_json", full)
    assert command.run(CompareConfig(run=str(runner.folder))) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{runner.folder / 'outcome.json'}: No space left on device; make room, then go on with: ")
    assert said.count("\n") == 1


def test_a_run_that_a_full_disk_has_failed_is_none_of_the_ways_failures(plan, monkeypatch):
    runner = plan(rounds=1, a="raises")
    monkeypatch.setattr(child, "ROOM", sys.maxsize)
    with pytest.raises(OSError, match="No space left on device"):
        runner.carry_out()
    assert outcomes(runner) == {}
    monkeypatch.undo()
    plan.again(runner.folder).carry_out()
    assert outcomes(runner)["pilot-a"] == ("failed", "RuntimeError: the first line")
