"""Carrying a plan out, on fake runs that take milliseconds: every failure is a row, and nothing is done twice."""

import json
import re
import signal

import psutil
import pytest
from fakes.comparisons import outcomes, started

from nanogpt_mac import supervise
from nanogpt_mac.measure.rounds import Cost, drawn_order, fewest
from nanogpt_mac.measure.runner import Runner
from nanogpt_mac.records.plan import Asked, Cut, Parity, ParityResult, ParityState
from nanogpt_mac.records.run import Outcome


def overrides_of(folder):
    """What the run was told, from the log of a script that prints it."""
    return json.loads((folder / "log.txt").read_text())


def test_every_variant_runs_once_a_round_after_its_pilot(plan):
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
    keys = {"schema", "variant", "round", "state", "code", "reason", "seconds", "started", "heat", "cut"}
    assert keys == record.keys()
    assert (record["variant"], record["round"], record["code"]) == ("a", 0, 0)


def test_what_a_run_is_told(plan, tmp_path, monkeypatch):
    runner = plan(rounds=2, a="works")
    script = tmp_path / "a.py"
    script.write_text(
        "import json, os, sys\nprint(json.dumps([json.load(open(sys.argv[2])), dict(os.environ)]))\n"
        + script.read_text()
    )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    runner.carry_out()
    told = {name: overrides_of(runner.folder / "rounds" / name) for name in ("pilot-a", "0-a", "1-a")}
    pilot, first, second = (document["config"] for document, _ in told.values())
    for some, expected in (
        (pilot, {"gemm_seconds": 1.0, "eval_interval": 0, "max_iters": 12}),
        (first, {"gemm_seconds": 0, "eval_interval": 12, "eval_iters": 5, "max_iters": 12, "timing_warmup": 5}),
        (second, {"gemm_seconds": 0, "eval_interval": 0, "max_iters": 12}),
    ):
        expected |= {"checkpoint": False, "sample_tokens": 0, "fallbacks": "off"}
        assert {key: some[key] for key in expected} == expected
        assert (some["wandb"]["mode"], some["backend"]["name"]) == ("disabled", "cpu")
        spelt = {"checkpoint=false", "sample_tokens=0", "wandb.mode=disabled", "backend=cpu", "max_iters=12"}
        assert spelt <= set(some["given"])  # as .hydra/overrides.yaml has them
    environments = [environment for _, environment in told.values()]
    caches = {environment["TORCHINDUCTOR_CACHE_DIR"] for environment in environments}
    assert caches == {str(runner.folder / "cache" / "a" / "inductor")}
    assert not any("HYDRA_FULL_ERROR" in environment for environment in environments)


FAILURES = {
    "segfault": ("failed", "crashed (SIGSEGV)"),
    "killed": ("oom", "killed by SIGKILL, probably out of memory"),
    "memory": ("oom", "MemoryError"),
    "mps-memory": ("oom", "RuntimeError: MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 GB)"),
    "missing-op": (
        "missing_op",
        "NotImplementedError: The operator 'aten::foo' is not currently implemented for the MPS device. More words.",
    ),
    "bad-input": ("failed", "backend.fused_adamw=true: torch has none"),
    "diverged": ("failed", "iter 7: loss is nan: training has diverged and stops here"),
    "nothing": ("failed", "left no summary: it printed nothing"),
    "raises": ("failed", "RuntimeError: the first line"),
}


def test_every_failure_of_a_pilot_is_a_row_and_ends_that_variant_alone(plan):
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
    limits = {
        "still": supervise.Limits(60, 0.6, 60),
        "endless": supervise.Limits(60, 60, 4),
        "fine": supervise.Limits(60, 60, 60),
    }
    monkeypatch.setattr(Runner, "_limits", lambda self, name: limits[name])
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
    limits = runner._limits("a")
    took = json.loads((runner.folder / "rounds/pilot-a/outcome.json").read_text())["seconds"]
    assert limits.stall >= 30
    assert limits.total > 20 * took


def test_a_slow_pilot_is_asked_to_end_once_it_has_shown_enough(plan, monkeypatch):
    runner = plan(rounds=1, iters=10, a="slow")
    monkeypatch.setattr("nanogpt_mac.measure.runner.PILOT_S", 0.2)
    runner.carry_out()
    rows = (runner.folder / "rounds/pilot-a/metrics.jsonl").read_text().splitlines()
    assert supervise.FEWEST_PILOT <= len(rows) < 10
    assert json.loads((runner.folder / "rounds/pilot-a/outcome.json").read_text())["code"] == 143
    assert outcomes(runner)["pilot-a"] == ("done", None)
    assert len((runner.folder / "rounds/0-a/metrics.jsonl").read_text().splitlines()) == 10  # rounds run to their end


def test_a_pilot_that_was_done_when_it_was_asked_to_end_counts(plan, monkeypatch):
    runner = plan(rounds=1, a="lingers")
    monkeypatch.setattr("nanogpt_mac.measure.runner.PILOT_S", 0.2)
    runner.carry_out()
    assert json.loads((runner.folder / "rounds/pilot-a/outcome.json").read_text())["code"] == -signal.SIGTERM
    assert set(outcomes(runner).values()) == {("done", None)}


def test_two_failed_rounds_end_a_variant(plan):
    runner = plan(rounds=4, a="later-raises", b="works")
    runner.carry_out()
    found = outcomes(runner)
    states = [found[f"{n}-a"][0] for n in range(4)]
    assert states == ["failed", "failed", "skipped", "skipped"]
    assert found["3-a"][1] == "2 runs of it had failed"
    assert {found[f"{n}-b"][0] for n in range(4)} == {"done"}


@pytest.mark.parametrize("time_wrong", [False, True])
def test_variants_that_failed_the_gate_are_timed_on_request_alone(plan, time_wrong):
    runner = plan(rounds=1, parity=True, time_wrong=time_wrong, right="works", wrong="works", broken="works")
    variants = {
        "right": {"state": "pass", "reason": None},
        "wrong": {"state": "fail", "reason": "gradients 1.0e-02"},
        "broken": {"state": "error", "reason": "it crashed"},
    }
    (runner.folder / "parity.json").write_text(json.dumps({"schema": 1, "variants": variants, "seconds": 1.0}))
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


@pytest.mark.parametrize(("minutes", "seconds"), [(1.0, 300.0), (60.0, 1200.0)])
def test_a_variant_that_is_checked_without_end_leaves_time_for_the_others(plan, monkeypatch, minutes, seconds):
    asked, late = [], ParityResult(state=ParityState.ERROR, reason="no answer within 300 s")
    found = Parity(seconds=1.0, variants={"works": ParityResult(state=ParityState.PASS), "late": late})
    monkeypatch.setattr("nanogpt_mac.parity.gate.check", lambda *given: asked.append(given[2]) or found)
    runner = plan(rounds=1, parity=True, works="works", late="works")
    runner._replan(budget_minutes=minutes)
    assert runner._gate() == {"late": "parity could not be checked: no answer within 300 s"}
    assert asked == [seconds]


def test_a_pilot_in_which_nothing_could_be_counted_is_run_twice_and_then_a_row(plan, tmp_path):
    runner = plan(rounds=1, a="works", b="works")
    script = tmp_path / "a.py"
    text = script.read_text().replace('"median": 10.0, "min": 10.0, "count": ', '"count": 0, "ignored": ')
    script.write_text(text.replace('"memory": 0}', '"memory": 0, "left_out": "slept"}'))
    runner.carry_out()
    assert outcomes(runner)["pilot-a"] == ("failed", "none of its iterations could be counted")
    assert outcomes(runner)["0-b"] == ("done", None)
    assert started(runner) == ["pilot-a", "pilot-a", "pilot-b", "0-b"]


def test_time_that_is_up_cuts_whole_rounds_off(plan, monkeypatch):
    runner = plan(rounds=8, a="works", b="works")
    runner._pilots({})
    runner._replan(rounds=8, iters={"a": 12, "b": 12}, warmup={"a": 5, "b": 5}, share={"a": 1.0, "b": 1.0})
    order = drawn_order({"a": list(range(8)), "b": list(range(8))}, 1)
    runner._replan(asked=Asked(), budget_minutes=0.0, order=order)
    runner._rounds()
    document = json.loads((runner.folder / "plan.json").read_text())
    assert document["rounds"] == 5  # so many are kept whatever the time
    assert {number for number, _ in document["order"]} == set(range(5))
    assert document["cut"]["rounds"] == 8
    assert len([name for name in outcomes(runner) if not name.startswith("pilot")]) == 10


def test_a_round_far_over_its_time_is_cut_and_what_it_has_done_counts(plan, monkeypatch):
    runner = plan(rounds=2, iters=40, a="later-crawls", b="works")
    monkeypatch.setattr("nanogpt_mac.measure.runner.SLACK_S", 0.2)
    runner.carry_out()
    assert set(outcomes(runner).values()) == {("done", None)}
    cut = {
        path.parent.name: json.loads(path.read_text())["cut"] for path in runner.folder.glob("rounds/*/outcome.json")
    }
    assert cut == {"pilot-a": False, "pilot-b": False, "0-a": True, "0-b": False, "1-a": True, "1-b": False}
    for number in range(2):
        rows = (runner.folder / f"rounds/{number}-a/metrics.jsonl").read_text().splitlines()
        assert fewest(Cost(0, 0.01), 5) == 15 <= len(rows) < 40
    assert any("s, cut: far over its time)" in line for line in runner.said)


def test_a_share_of_the_time_left_is_what_a_run_may_take(plan):
    runner = plan(rounds=2, iters=100, a="works", b="works")
    runner._pilots({})
    runner._decide()
    name = runner.plan.order[0][1]
    cost = runner._cost(name)
    planned = cost.start_s + 100 * cost.iteration_s
    runner._elapsed = lambda: 0.0
    assert runner._enough_s(0) == pytest.approx(2 * planned + 5 - cost.start_s + cost.evaluation_s)
    expected = sum(runner._expected_s(name) for name in "abab")
    runner._elapsed = lambda: 66 - expected / 2  # 1.1 minutes are allowed: half of what is needed is left
    half = runner._expected_s(name) / 2 - cost.start_s + cost.evaluation_s
    assert runner._enough_s(0) == pytest.approx(max(half, 0.0))
    runner._elapsed = lambda: 1000.0
    assert runner._enough_s(0) == pytest.approx(max(0.0, cost.evaluation_s - cost.start_s))
    for number in range(2):  # what a run took counts for more than what its pilot promised
        runner.outcomes[number, "a"] = Outcome(variant="a", round=number, state="done", seconds=20.0 + 10 * number)
    assert runner._expected_s("a") == 25.0


def test_what_was_asked_for_and_does_not_fit_is_said_at_once(plan):
    runner = plan(rounds=500, iters=12, a="works")
    runner._pilots({})
    runner._decide()
    first, second = runner.said[-2:]
    assert re.fullmatch(
        r"rounds=500 iters=12: does not fit budget_minutes=1, of which about \d+ s are left; "
        r"raise budget_minutes= for all of it",
        first,
    )
    made = runner.plan.rounds
    assert 3 <= made < 500
    assert second.startswith(f"{made} rounds in a drawn order, of iterations: a 12; about ")
    assert runner.plan.cut == Cut(rounds=500, reason="more do not fit budget_minutes")
    assert runner.plan.expected_seconds <= 60


def test_time_that_is_left_adds_rounds(plan):
    runner = plan(rounds=None, a="works", b="later-raises", c="works")
    runner._pilots({})
    runner._replan(rounds=3, iters=dict.fromkeys("abc", 12), warmup=dict.fromkeys("abc", 5))
    runner._replan(order=drawn_order({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 2]}, 1))
    runner._replan(share={"a": 1.0, "b": 1.0, "c": 2 / 3}, budget_minutes=0.5)
    elapsed = iter([*[0.0] * 12, *[14.0] * 4, *[1000.0] * 50])  # of 30 seconds; 15 are the report's
    runner._elapsed = lambda: next(elapsed)
    runner._rounds()
    document = json.loads((runner.folder / "plan.json").read_text())
    counts = {variant: [number for number, name in document["order"] if name == variant] for variant in "abc"}
    assert document["rounds"] > 3
    assert counts["a"] == list(range(document["rounds"]))
    assert counts["b"] == [0, 1, 2]  # it had failed
    assert len(counts["c"]) == document["rounds"] * 2 // 3
    names = {f"{number}-{name}" for number, name in document["order"]}
    assert names == {name for name in outcomes(runner) if not name.startswith("pilot")}
    runner = plan.again(runner.folder)
    runner._replan(budget_minutes=0.0)
    before = started(runner)
    runner._rounds()  # nothing is left to do, and no time
    assert started(runner) == before


def test_a_hot_machine_is_waited_for_within_bounds(plan, monkeypatch):
    runner = plan(rounds=1, a="works")
    states = iter(["heavy", "heavy", "nominal", "nominal"])
    runner.thermal_state = lambda: next(states)
    monkeypatch.setattr("nanogpt_mac.measure.runner.HEAT_POLL_S", 0.05)
    heat = runner._cool_down(60)
    assert (heat.before, heat.at_start) == ("heavy", "nominal")
    assert 0.1 <= heat.waited_s < 1
    runner.thermal_state = lambda: "heavy"
    heat = runner._cool_down(0.2)
    assert heat.at_start == "heavy"
    assert 0.2 <= heat.waited_s < 1


def test_no_variant_left_is_no_crash(plan):
    runner = plan(a="raises")
    runner.carry_out()
    document = json.loads((runner.folder / "plan.json").read_text())
    assert (document["rounds"], document["order"]) == (0, [])
