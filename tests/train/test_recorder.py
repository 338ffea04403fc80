"""Records: rows, summary, MFU and its denominators."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from nanogpt_mac.backends import kinds
from nanogpt_mac.records.capabilities import Capabilities
from nanogpt_mac.records.run import (
    CorpusFacts,
    Denominators,
    Ending,
    ExitState,
    LeftOut,
    ModelFacts,
    Row,
    RunFacts,
    RunSummary,
    Times,
)
from nanogpt_mac.train.clock import Completion
from nanogpt_mac.train.recorder import Recorder, Work, busy_peak
from nanogpt_mac.train.sinks import Folder, Sink

WORK = Work(flops=2e9, tokens=1000, peaks=Denominators(mfu_measured=1e12, mfu_a100=312e12))
MEMORY = {"current": 5, "peak": 9}
FACTS = RunFacts(
    backend="cpu",
    device="cpu",
    compile=False,
    dtype="float32",
    matmul_precision="highest",
    sync="completion",
    seed=1,
    model=ModelFacts(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=11),
    parameters=100,
    batch_size=4,
    gradient_accumulation_steps=1,
    max_iters=10,
    corpus="text",
    corpus_facts=CorpusFacts(name="text", label="text", sha256="0" * 64),
    init_from="scratch",
)


def summarise(recorder, state=ExitState.FINISHED):
    summary = recorder.summary(FACTS, Ending(exit_state=state))
    recorder.close()
    return summary


def record(folder, times, work=WORK, left_out=()):
    recorder = Recorder(work, [Folder(folder)])
    for i, ms in enumerate(times):
        why = LeftOut.FIRST if i in left_out else None
        recorder.iteration(Completion(i, 2.0, 1.0, ms, 0.5, why), 1e-3, MEMORY)
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
    assert (summary.mfu, summary.mfu_measured) == (None, pytest.approx(0.2))
    assert summary.mfu_denominators == WORK.peaks
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["schema"] == 2
    assert RunSummary.parse(written, "summary.json") == summary.model_copy(update={"schema_": 2})


def test_more_than_the_measured_peak_is_an_error_and_no_figure(tmp_path):
    summary = summarise(record(tmp_path, [1.0] * 8))
    assert summary.mfu_measured is None
    assert "above 1 in 8 iterations, which cannot be" in summary.errors[0]


@pytest.mark.parametrize(
    ("backend", "compiled", "ahead", "simulated", "dispatch", "lever"),
    [
        ("mps", False, True, False, 8.0, "compile=true"),
        ("mlx", True, True, False, 9.0, "a larger batch_size"),
        ("mps", False, True, False, 7.9, None),
        ("mps", False, True, True, 9.0, None),  # a simulated device's times mean nothing
        ("cpu", False, False, False, 10.0, None),  # a step of a CPU is done when it returns
    ],
)
def test_a_device_that_waits_for_the_host_is_said(tmp_path, backend, compiled, ahead, simulated, dispatch, lever):
    recorder = Recorder(WORK, [Folder(tmp_path)])
    for i in range(8):
        recorder.iteration(Completion(i, 2.0, 1.0, 10.0, dispatch, None), 1e-3, MEMORY)
    able = Capabilities("gpu", "torch", True, ahead, simulated=simulated)
    facts = FACTS.model_copy(update={"backend": backend, "compile": compiled, "capabilities": able})
    summary = recorder.summary(facts, Ending(exit_state=ExitState.FINISHED))
    recorder.close()
    said = f"the device waits for the host: {dispatch:.2f} of 10.00 ms went into enqueuing; use {lever}"
    assert summary.warnings == ([said] if lever else [])
    assert summary.dispatch_ms == dispatch


def test_cudas_lever_is_its_graph_where_the_registry_has_one(monkeypatch):
    monkeypatch.setattr(kinds, "settings", lambda: {"cuda_graph": (bool, True, ())})
    assert kinds.less_to_enqueue("cuda", False, {}) == "compile=true"
    assert kinds.less_to_enqueue("cuda", True, {}) == "backend.cuda_graph=true"
    assert kinds.less_to_enqueue("cuda", True, {"cuda_graph": True}) == "a larger batch_size"
    assert kinds.less_to_enqueue("mps", True, {}) == "a larger batch_size"
    assert kinds.less_to_enqueue("another package's", False, {}) == "a larger batch_size"


def test_a_doubtful_peak_is_said_and_the_best_is_what_counts(tmp_path):
    peaks = Denominators(mfu_measured=1e12, measured_here=7e11)
    summary = summarise(record(tmp_path, [10.0] * 8, replace(WORK, peaks=peaks)))
    assert summary.mfu_measured == pytest.approx(0.2)
    (said,) = summary.warnings
    assert said.startswith(
        "mfu_measured is doubtful: this run's own matmul reached 700 GFLOP/s, less than 80% of the 10"
    )
    assert RunSummary.load(tmp_path / "summary.json").mfu_denominators == peaks
    for own, best in ((8e11, 1e12), (None, 1e12), (1e9, None)):
        assert busy_peak(Denominators(mfu_measured=best, measured_here=own)) == []


def test_a_peak_that_turns_out_better_at_the_end_is_no_error(tmp_path):
    recorder = record(tmp_path, [1.0] * 8)  # twice the peak that is known at first
    recorder.work = replace(WORK, peaks=Denominators(mfu_measured=4e12, measured_here=4e12))
    summary = summarise(recorder)
    assert (summary.errors, summary.mfu_measured) == ([], pytest.approx(0.5))


def test_statistics_leave_out_what_the_clock_marks(tmp_path):
    times = [500.0, *np.linspace(9.0, 11.0, 101)]
    summary = summarise(record(tmp_path, times, left_out=[0]))
    assert summary.times.median == pytest.approx(10.0)
    assert summary.times.count == 101
    assert summary.first_iter_s == pytest.approx(0.5)
    assert summary.compile_s == pytest.approx(0.49)
    assert summary.left_out == {"first": 1}


def test_the_confidence_interval_covers_the_median_as_often_as_it_says(tmp_path):
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        (tmp_path / str(i)).mkdir()
        sample = rng.lognormal(size=40)  # median 1
        low, high = summarise(record(tmp_path / str(i), list(sample))).times.ci95
        covered += low <= 1.0 <= high
    assert 180 <= covered <= 200


@pytest.mark.parametrize("count", [6, 7, 8, 9, 25, 100, 101, 999])
def test_the_confidence_interval_is_scipys(tmp_path, count):
    from scipy.stats import quantile_test

    times = np.random.default_rng(count).lognormal(size=count)
    expected = quantile_test(times, q=1.0, p=0.5).confidence_interval(0.95)
    assert summarise(record(tmp_path, list(times))).times.ci95 == (expected.low, expected.high)


def test_a_run_without_iterations_has_a_summary(tmp_path):
    summary = summarise(record(tmp_path, []), ExitState.FAILED)
    assert summary.times == Times()
    assert summary.exit_state == "failed"


def test_json_stays_json_when_a_loss_is_none_any_more(tmp_path):
    recorder = Recorder(WORK, [Folder(tmp_path)])
    recorder.iteration(Completion(0, float("nan"), float("inf"), 10.0, 0.5, None), 1e-3, MEMORY)
    recorder.flush()
    recorder.close()

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad_norm"]) == ("nan", "inf")


def test_a_sink_that_drops_everything_takes_all_that_a_run_says(tmp_path):
    """What stands in wandb's place where it is disabled."""
    recorder = Recorder(WORK, [Sink()])
    recorder.iteration(Completion(0, 2.0, 1.0, 10.0, 0.5, None), 1e-3, MEMORY)
    recorder.evaluation(0, 1.0, 2.0, 0.1)
    recorder.event("pause", 0, power_source="mains")
    recorder.tick()
    assert not recorder.overdue()
    assert summarise(recorder).best_val_loss == 2.0
    assert not list(tmp_path.iterdir())


def test_rows_come_back_as_they_were_written(tmp_path):
    recorder = record(tmp_path, [10.0], left_out=[0])
    recorder.evaluation(1, 1.5, 2.5, 0.1)
    recorder.event("pause", 1, power_source="mains", thermal_state=None, gpu_utilisation=3.5)
    recorder.flush()
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    keys = {"kind", "iter", "loss", "lr", "grad_norm", "iter_ms", "dispatch_ms", "tokens_per_s", "memory", "left_out"}
    assert lines[0].keys() == keys | {"mfu", "mfu_measured", "mfu_a100"}
    assert lines[1] == {"kind": "evaluation", "iter": 1, "train_loss": 1.5, "val_loss": 2.5, "seconds": 0.1}
    facts = {"power_source": "mains", "thermal_state": None, "gpu_utilisation": 3.5}
    assert lines[2] == {"kind": "event", "iter": 1, "event": "pause", **facts}
    rows = [TypeAdapter(Row).validate_python(line) for line in lines]
    assert [row.kind for row in rows] == ["iteration", "evaluation", "event"]
    assert rows[0].left_out is LeftOut.FIRST


def test_a_summary_has_the_first_the_last_and_the_best_evaluation(tmp_path):
    recorder = record(tmp_path, [10.0] * 8)
    for i, (train, val) in enumerate([(5.0, 6.0), (3.0, 4.0), (2.0, 4.0), (1.0, 4.0 + 2.0**-40)]):
        recorder.evaluation(10 * i, train, val, 0.5 + i)
    summary = summarise(recorder)
    assert (summary.train_loss, summary.val_loss) == (1.0, 4.0 + 2.0**-40)
    assert (summary.best_val_loss, summary.best_iter) == (4.0, 10)  # the first of two that are equal
    assert (summary.evaluations, summary.eval_s, summary.first_eval_s) == (4, 8.0, 0.5)
    assert summary.tokens_per_s == pytest.approx(100_000)
    assert (summary.flops_per_iter, summary.peak_memory) == (2e9, 9)


def test_no_measured_peak_is_no_error(tmp_path):
    unknown = Work(2e9, 1000, Denominators(mfu_a100=312e12))
    summary = summarise(record(tmp_path, [0.001] * 8, unknown))
    assert summary.errors == []
    assert (summary.mfu, summary.mfu_measured) == (None, None)
