"""suite=gemm: its ladder, what it refuses by name, what it leaves out, and what it remembers."""

import json
import re
import time

import numpy as np
import pytest

from nanogpt_mac.backends import blas, kinds, torch_entry
from nanogpt_mac.machine import chips, peaks, probe
from nanogpt_mac.records.bench import GemmBench, GemmReading, State, Task, Way
from nanogpt_mac.records.run import Environment, Times
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.gemm import by_hand, check, contents, measured, suite
from nanogpt_mac.suites.gemm.suite import SUITE, Peak, Step, Work

SIZE = 100, 70, 90
ROW = "float32 odd"
WAY = Way(name="numpy", label="NumPy")


def work(**more):
    known = {"sizes": {ROW: ("float32", *SIZE)}, "seed": 1, "steps": {"numpy": Step()}, "gpu": {}, "cpu": {}}
    return Work(**(known | more))


def measuring(product=np.matmul, way=WAY, row_s=0.02, **more):
    known = work(**more)
    task = Task(suite="gemm", way=way, rows=tuple(known.sizes), round=0, row_s=row_s, folder="", work={})
    found = measured.Measuring(task, known)
    found.product = product
    return found


def test_a_right_product_is_timed_and_says_whose_it_is():
    found = measuring()(ROW)
    assert (found.state, found.reason) == (State.OK, "")
    assert found.throughput.median > 0
    assert found.latency.median > 0
    assert 0 < found.error < 1
    assert found.library == by_hand.blas()


def tiles(a, b):
    whole = np.zeros((len(a), b.shape[1]), a.dtype)
    rows, columns = len(a) // 64 * 64, b.shape[1] // 64 * 64
    whole[:rows, :columns] = a[:rows] @ b[:, :columns]
    return whole


def through(dtype):
    return lambda a, b: check.rounded(a, dtype) @ check.rounded(b, dtype)


class Cached:
    def __call__(self, a, b):
        if not hasattr(self, "known"):
            self.known = a @ b
        return self.known


class Sometimes:
    """Right when it is looked at, and later nothing at all."""

    calls = 0

    def __call__(self, a, b):
        self.calls += 1
        return a @ b if self.calls < 2 else np.zeros((len(a), b.shape[1]), a.dtype)


FAULTS = {
    "skips the last partial tile": (tiles, "off by .* times"),
    "float32 through bfloat16": (through("bfloat16"), "less precise than float32: computed in bfloat16"),
    "float32 through TF32": (through("tf32"), "less precise than float32: computed in tf32"),
    "returns float64": (lambda a, b: a.astype(np.float64) @ b, "it is float64, not float32"),
    "does nothing": (lambda a, b: np.zeros((len(a), b.shape[1]), a.dtype), "nothing was computed"),
    "is not finite": (lambda a, b: a @ b / np.float32(0), "not finite"),
    "has another shape": (lambda a, b: (a @ b)[1:], r"shape is \(99, 90\)"),
    "is cached": (Cached(), "of the last timed call( but one)?: cached"),
    "is right once": (Sometimes(), "of the last timed call: nothing was computed"),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault):
    product, words = FAULTS[fault]
    found = measuring(product)(ROW)
    assert found.state is State.WRONG, found.reason
    assert re.search(words, found.reason), found.reason
    assert found.throughput is None


@pytest.mark.parametrize(("product", "which"), [(lambda a, b: a.T @ b, "first"), (lambda a, b: a @ b.T, "second")])
def test_a_transposed_operand_is_named(product, which):
    found = measuring(product, sizes={ROW: ("float32", 80, 80, 80)})(ROW)
    assert (found.state, found.reason) == (State.WRONG, f"wrong result: the {which} operand is transposed")


def test_a_result_that_is_not_waited_for_is_refused(monkeypatch):
    class Late:
        """Complete 20 ms after it was asked for, whoever says that it is before."""

        def __init__(self, a, b):
            self.due, self.value, self.dtype = time.perf_counter() + 0.02, a @ b, a.dtype

        def read(self):
            time.sleep(max(0.0, self.due - time.perf_counter()))
            return self.value

    monkeypatch.setattr(by_hand.ByHand, "get", lambda self, late: late.read())
    monkeypatch.setattr(by_hand.ByHand, "peek", lambda self, late: float(late.read()[0, 0]))
    found = measuring(Late)(ROW)
    assert found.state is State.WRONG
    assert "the clock was read without waiting" in found.reason


def test_a_rate_above_the_units_peak_is_refused():
    slow = Peak(flops=1e3, most=2e3, source="nobody", link="")
    found = measuring(cpu={"float32": slow})(ROW)
    assert found.state is State.WRONG
    assert "faster than the unit" in found.reason
    assert "2 kFLOP/s is the peak (nobody)" in found.reason


def test_what_would_take_too_long_is_left_out_and_never_estimated():
    sizes = {"float32 8": ("float32", 8, 8, 8), "float32 4096": ("float32", 4096, 4096, 4096)}
    found = measuring(by_hand.in_python, sizes=sizes, way=WAY)
    found.arrays, found.library = by_hand.ByHand(None, "python", False), "none"
    assert found("float32 8").state is State.OK
    large = found("float32 4096")
    assert large.state is State.SKIPPED
    assert large.throughput is None
    assert "one takes more than 40 ms at the" in large.reason


def test_what_does_not_fit_or_is_not_there_is_said(monkeypatch):
    half = measuring(sizes={"float16 8": ("float16", 8, 8, 8)})("float16 8")
    assert (half.state, half.reason) == (State.ABSENT, "numpy has no BLAS for 16 bits, and Python no such numbers")
    monkeypatch.setattr(by_hand.ByHand, "free_memory", lambda self: 1000)
    found = measuring()(ROW)
    assert found.state is State.SKIPPED
    assert "more than half of the 1000 B that are free" in found.reason


def test_an_error_is_the_rows_own():
    def broken(a, b):
        raise ValueError("no such kernel")

    found = measuring(broken)(ROW)
    assert (found.state, found.reason) == (State.FAILED, "ValueError: no such kernel")


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ladder(monkeypatch):
    """The names of all ways of a machine with these, in order; the steps; why rungs are missing."""

    def of(given, config=None, cores=4):
        monkeypatch.setattr(suite, "usable", lambda: cores)
        steps, absent = {}, {}
        found = suite._ladder(config or BenchConfig(), {way.name: way for way in given}, steps, absent)
        assert set(found) <= set(steps)
        return list(found), steps, absent

    return of


CPU = Way(name="cpu", label="CPU eager", backend="cpu", device="cpu")
MPS = Way(name="mps", label="MPS eager", backend="mps", device="mps", accelerator=True)
CUDA = Way(name="cuda", label="CUDA eager", backend="cuda", device="cuda", accelerator=True)
MLX = Way(name="mlx-eager", label="MLX eager", backend="mlx", device="metal", accelerator=True)
MLX_CPU = Way(name="mlx-cpu-eager", label="MLX eager (CPU)", backend="mlx", device="cpu")


def test_the_ladder_of_a_mac(ladder):
    compiled = CPU.model_copy(update={"name": "cpu-compile", "compiled": True})
    names, steps, _ = ladder([MPS, MLX, CPU, compiled])
    assert names == ["python", "numpy-blocks", "numpy", "cpu-1", "cpu-2", "cpu", "mps-tiled", "mps", "mlx-eager"]
    assert [steps[name].threads for name in ("cpu-1", "cpu-2", "cpu")] == [1, 2, 0]
    assert steps["mps-tiled"].product == "nanogpt_mac.backends.product_metal:product"
    assert "cpu-compile" in ladder([CPU, compiled], BenchConfig(ways=["cpu-compile"]))[0]


def test_mlxs_own_blas_is_a_rung_where_another_is_lent(ladder, monkeypatch):
    monkeypatch.setattr(blas, "wanted", lambda: True)
    names, steps, _ = ladder([MLX_CPU], cores=1)
    assert names[3:] == ["mlx-cpu-own", "mlx-cpu-eager"]
    assert [steps[name].settings["blas"] for name in ("mlx-cpu-own", "mlx-cpu-eager")] == ["own", "auto"]
    monkeypatch.setattr(blas, "wanted", lambda: False)
    assert "mlx-cpu-own" in ladder([MLX_CPU])[2]


def test_without_triton_its_rung_is_missing_with_the_reason(ladder, monkeypatch):
    monkeypatch.setattr(torch_entry, "find_spec", lambda name: None)
    names, _, absent = ladder([CUDA])
    assert names[3:] == ["cuda"]
    assert absent == {"cuda-tiled": "the package triton is not installed"}
    monkeypatch.setattr(torch_entry, "find_spec", lambda name: True)
    assert ladder([CUDA])[0][3:] == ["cuda-tiled", "cuda"]


def test_rows_go_from_few_operations_to_many():
    sizes = suite._sizes(suite.model_spec(BenchConfig()), 64)
    flops = [np.prod(size[1:], dtype=float) for size in sizes.values() if size[0] == "float16"]
    assert flops == sorted(flops)
    assert len(sizes) == 3 * (len(suite.SQUARES) + 4)
    assert sizes["bfloat16 model MLP in 16384x384x1536"] == ("bfloat16", 16384, 384, 1536)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("dtype=bfloat16", "rows=bfloat16"),
        ("matmul_precision=high", "only read with suite=parts"),
        ("rows=tensor", "rows=tensor: no row is called so; use a part of a name such as float32 64"),
        ("ways=[abacus]", "use one of python, numpy-blocks, numpy"),
    ],
)
def test_bad_input_is_one_line(key, words, command):
    done = command("bench.py", "suite=gemm", key, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# -- what is published, and what is remembered ------------------------------------------------------------------------


def test_published_rates_have_a_link_and_peaks_are_the_highest_of_their_chip():
    for rate in chips.PRODUCTS:
        assert rate.link.startswith("https://")
        assert rate.status in ("theoretical", "measured", "by digest")
    for chip in ("Apple M1 Max", "Apple M4"):
        of_cpu = [r.flops["float32"] for r in chips.PRODUCTS if r.chip == chip and re.match("AMX|SME|NEON", r.what)]
        assert chips.cpu_peak(chip, "float32").flops["float32"] == max(of_cpu)
    assert chips.cpu_peak("Apple M1 Max", "float16").flops["float16"] == 6263e9
    assert chips.cpu_peak("Apple M1", "float32") is None  # never that of a similar one
    assert chips.cpu_peak("Apple M1 Max", "int8") is None


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def bench(readings, ways=(WAY, CPU), steps=None, sizes=None):
    known = work(
        steps=steps or {w.name: Step(settings=kinds.own_settings(w.backend, {}) if w.backend else {}) for w in ways},
        sizes=sizes or {ROW: ("float32", *SIZE)},
        cpu={"float32": Peak(flops=1e12, most=1e12, source="a book", link="https://b.example")},
    )
    return GemmBench(
        suite="gemm", created="2026-01-01T00:00:00", version="0", seconds=1.0, complete=True, seed=1, rounds=1,
        environment=Environment.model_validate(probe.environment(kinds.frameworks())), ways=ways,
        rows=tuple(known.sizes), work=known.model_dump(mode="json"), readings=tuple(readings),
    )  # fmt: skip


def reading(way, took, row=ROW, state=State.OK, number=0):
    times = Times(median=took, min=took / 2, ci95=(took * 0.9, took * 1.1), count=9)
    return GemmReading(row=row, way=way, round=number, state=state, throughput=times, latency=times, error=0.1)


@pytest.mark.usefixtures("cache")
def test_the_best_is_what_a_training_is_held_against(make):
    """Under the very key that session.py asks for."""
    from nanogpt_mac.train import session

    backend = make("cpu")
    settings = dict(backend.options.settings)
    tiled = CPU.model_copy(update={"name": "cpu-tiled"})
    steps = {"cpu": Step(settings=settings), "cpu-tiled": Step(settings=settings), "numpy": Step()}
    found = bench([reading("cpu", 2.0), reading("cpu-tiled", 1.0), reading("numpy", 0.1)], (WAY, CPU, tiled), steps)
    SUITE.finished(found)
    flops = 2 * SIZE[0] * SIZE[1] * SIZE[2]
    config = BenchConfig(gemm_seconds=1.0)
    peak = session._peak(config, backend.spec, backend, probe.environment(kinds.frameworks()))
    assert peak.own is None  # nothing had to be measured
    assert peak.best == pytest.approx(flops / 0.5e-3)
    slower = bench([reading("cpu", 8.0)], (CPU,), {"cpu": Step(settings=settings)})
    SUITE.finished(slower)
    assert peaks.best(peak.key) == peak.best


@pytest.mark.usefixtures("cache")
def test_what_is_wrong_or_simulated_is_not_remembered():
    simulated = MPS.model_copy(update={"simulated": True, "device": "mps-simulated"})
    SUITE.finished(bench([reading("cpu", 1.0, state=State.WRONG), reading("mps", 1.0)], (CPU, simulated)))
    assert not peaks.place().exists()


def test_the_report_has_the_ladder_with_shares_and_the_published_ends():
    python = Way(name="python", label="pure Python, in float64")
    found = bench([reading("cpu", 2.0), reading("cpu", 2.0, number=1), reading("python", 20.0)], (python, CPU))
    made = contents.report(found)
    rate = 2 * np.prod(SIZE) / 2e-3 / 1e9
    ladder = {row.cells[0]: row.cells for row in made.sections[0].tables[0].rows}
    assert ladder["CPU eager"][3].startswith(f"{rate:.3g} [")
    assert ladder["CPU eager"][4:] == [f"{100 * rate / 1000:.1f} %", "100.0 %", "10.0"]
    assert ladder["pure Python, in float64"][5] == "10.0 %"
    published = " ".join(" ".join(row.cells) for s in made.sections if s.id == "published" for row in s.tables[0].rows)
    assert "naive Swift 2.8" in published
    assert "tiled Metal 1,100" in published
    assert contents.charts(found)["ladder"][0].table.rows[1].cells[0] == "CPU eager"


def test_the_suite_runs_and_writes_its_folder(command, tmp_path):
    done = command(
        "bench.py", "suite=gemm", "ways=[python,numpy,cpu]", "rows=float32 64", "rounds=1", "run_dir=out", timeout=120
    )
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [reading["state"] for reading in document["readings"]] == ["ok"] * 3
    assert all(reading["error"] <= 1 for reading in document["readings"])
