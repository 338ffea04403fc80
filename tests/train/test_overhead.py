"""What recording costs: the loop's clock, rows, lines and file writes against the bare step, interleaved in one run."""

import contextlib
import io
import time
from functools import partial

import numpy as np
import pytest

from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.config import Config
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.run import Denominators
from nanogpt_mac.train.clock import Clock
from nanogpt_mac.train.display import Lines
from nanogpt_mac.train.loop import Loop
from nanogpt_mac.train.recorder import Recorder, Work
from nanogpt_mac.train.sinks import Folder, Sink

QUICK = GPTSpec(4, 4, 128, 64, 65)


@pytest.mark.slow
def test_recording_costs_under_one_percent_of_a_quick_iteration(make, tmp_path):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 65, 100_000).astype(np.uint16)
    backend = make("cpu", spec=QUICK, tokens=Tokens({"train": data}, 64))
    config = Config(batch_size=12, log_interval=1)
    work = Work(1e9, 768, Denominators(mfu_measured=1e15, mfu_a100=312e12))
    recorder = Recorder(work, [Folder(tmp_path), Sink(), Lines(1)])
    loop = Loop(config, backend, Tokens({"train": data}, 64), recorder)
    clock = Clock(backend.wait, "completion", 1, 0, backend.runs_ahead)

    def bare(i):
        backend.wait(backend.step(loop._starts("train", i, 1), 1e-3))

    def recorded(i):
        loop._record(clock.submit(i, partial(backend.step, loop._starts("train", i, 1), 1e-3)))

    seconds = {bare: [], recorded: []}
    with contextlib.redirect_stdout(io.StringIO()):
        for i in range(20):
            bare(i), recorded(i)
        for block in range(60):
            for run in (bare, recorded) if block % 2 else (recorded, bare):
                begin = time.perf_counter()
                for i in range(5):
                    run(1000 + block * 10 + i)
                seconds[run].append((time.perf_counter() - begin) / 5)
    recorder.close()
    ratios = np.array(seconds[recorded]) / np.array(seconds[bare])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(f"\nrecorded / bare: median {middle:.4f} (quartiles {low:.4f}, {high:.4f})", end=", ")
    print(f"bare {np.median(seconds[bare]) * 1e3:.1f} ms")
    assert middle < 1.01
