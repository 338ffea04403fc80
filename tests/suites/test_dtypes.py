"""The dtype matrix: each outcome is told from the others, with what is true of numpy's own operations as reference."""

import os
import subprocess
import sys

import numpy as np
import pytest
from fakes.faulty_arrays import FUNCTIONS, VARIABLE
from fakes.support import ROOT

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.arrays import Op
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import DtypeBench, DtypeReading, Outcome, State, Task, Way
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.dtypes import contents, probe
from nanogpt_mac.suites.dtypes.suite import SUITE, operations
from nanogpt_mac.suites.gemm.by_hand import ByHand

WAY = Way(name="numpy", label="NumPy")


class Numpy(ByHand):
    def __init__(self, **functions):
        super().__init__(None, "numpy", False)
        self.functions = FUNCTIONS | {"argmax": lambda x, axis: x.argmax(axis)} | functions

    def op(self, name):
        return Op(self.functions[name]) if name in self.functions else None


def probed(cell, arrays=None, **functions):
    task = Task(suite="dtypes", way=WAY, rows=(cell,), round=0, row_s=0, folder="", work={})
    return probe.Probing(task, arrays or Numpy(**functions), operations(), 1)(cell)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [d for d in probe.DTYPES if d != "bfloat16"])
def test_numpys_own_operations_are_right_in_every_dtype(name, dtype):
    found = probed(f"{name} {dtype}")
    if name == "softmax" and dtype not in probe.FLOATS:
        refused = dtype == "bool"  # "numpy boolean subtract, the `-` operator, is not supported"
        assert found.outcome is (Outcome.REFUSED if refused else Outcome.PROMOTES), found.reason
    elif (name, dtype) == ("relu", "bool"):
        assert found.outcome is Outcome.PROMOTES
    elif name == "sum" and dtype in ("int8", "int16", "int32", "bool"):
        assert (found.outcome, found.became) == (Outcome.PROMOTES, "int64")
    else:
        assert (found.outcome, found.became) == (Outcome.OK, dtype), found.reason
    assert found.state is State.OK


def test_an_index_is_no_promotion_and_any_of_equal_numbers_is_right():
    assert probed("argmax float16").outcome is Outcome.OK
    last = {"argmax": lambda x, axis: x.shape[axis] - 1 - np.flip(x, axis).argmax(axis)}
    assert probed("argmax bool", **last).outcome is Outcome.OK
    both = {"sort_with_indices": lambda x, axis: (np.sort(x, axis), np.argsort(-x.astype(float), axis))}
    assert probed("sort_with_indices float32", **both).reason == "wrong indices"
    same = {"sort_with_indices": lambda x, axis: (np.sort(x, axis), np.zeros(x.shape, int))}
    assert probed("sort_with_indices bool", **same).reason == "not every index is there once"


def refuses(kind, words):
    def function(*inputs, **settings):
        raise kind(words)

    return function


# As the frameworks say it.
REFUSALS = [
    (NotImplementedError, "\"softmax_lastdim_kernel_impl\" not implemented for 'Char'"),
    (NotImplementedError, "The operator 'aten::foo' is not currently implemented for the MPS device."),
    (TypeError, "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"),
    (ValueError, "[matmul] Only inexact types are supported but int8 and int8 were provided"),
    (ValueError, "[layer_norm] Received unsupported type int8."),
    (ValueError, "float64 is not supported on the GPU"),
    (RuntimeError, "expected m1 and m2 to have the same dtype, but got: float != long int"),
    (RuntimeError, "MPS device does not support linear for non-float inputs"),
    (RuntimeError, "Boolean inputs not supported for relu"),
    (RuntimeError, "argmax(): does not support bool input"),
]


@pytest.mark.parametrize(("kind", "words"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_what_is_refused_is_no_error_and_keeps_its_text(kind, words):
    found = probed("relu float64", relu=refuses(kind, words))
    assert (found.outcome, found.state) == (Outcome.REFUSED, State.OK)
    assert found.reason == f"{kind.__name__}: {words}"


@pytest.mark.parametrize(
    ("error", "outcome", "state"),
    [
        (RuntimeError("cuBLAS error 7"), Outcome.ERROR, State.FAILED),
        (TypeError("relu() missing 1 argument: 'x'"), Outcome.ERROR, State.FAILED),
        (KeyError("x"), Outcome.ERROR, State.FAILED),
        (MemoryError("failed to allocate"), Outcome.MEMORY, State.SKIPPED),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Outcome.MEMORY, State.SKIPPED),
    ],
)
def test_anything_else_is_an_error_or_memory(error, outcome, state):
    def function(x):
        raise error

    found = probed("relu int8", relu=function)
    assert (found.outcome, found.state) == (outcome, state)


def test_a_wrong_value_is_wrong_in_every_dtype():
    for dtype in probe.DTYPES[:2] + probe.DTYPES[3:]:
        found = probed(f"relu {dtype}", relu=lambda x: np.where(np.arange(x.shape[-1]) == 3, x | True if x.dtype == bool
                                                               else x + x.dtype.type(1), np.maximum(x, 0)))  # fmt: skip
        assert (found.outcome, found.state) == (Outcome.WRONG, State.WRONG), dtype
    cut = probed("softmax int32", softmax=lambda x, axis: FUNCTIONS["softmax"](x, axis).astype(x.dtype))
    assert (cut.outcome, cut.reason) == (Outcome.WRONG, "the result is no integer, but comes as int32")
    assert probed("sum float32", sum=lambda x, axis: x.sum(axis)[None]).outcome is Outcome.WRONG


def test_float64_that_is_computed_in_float32_is_told():
    def inside(a, b):
        return (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype)

    assert probed("matmul float64", matmul=inside).outcome is Outcome.COARSER
    assert probed("matmul float32", matmul=inside).outcome is Outcome.OK
    silent = probed("matmul float64", matmul=lambda a, b: a.astype(np.float32) @ b.astype(np.float32))
    assert (silent.outcome, silent.became) == (Outcome.PROMOTES, "float32")


def test_what_went_to_the_cpu_is_counted():
    class Falling(Numpy):
        def watched(self, call):
            return call(), 2

    found = probed("relu float32", Falling())
    assert (found.outcome, found.reason) == (Outcome.ON_CPU, "2 of its operations ran on the CPU")
    assert SUITE.environment(Way(name="mps", label="", backend="mps"))["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert SUITE.environment(Way(name="cpu", label="", backend="cpu")) is None


def test_what_is_not_written_for_a_way_is_absent():
    assert probed("gelu float32").state is State.ABSENT


@pytest.mark.parametrize("name", operations())
def test_inputs_are_what_the_dtype_has_exactly(name):
    row = operations()[name]
    for dtype in probe.DTYPES:
        for array, given in zip(probe.numbers(row, dtype, 1), row.inputs, strict=True):
            assert array.shape == given.shape
            assert np.isfinite(array).all()
            if dtype in probe.INTEGERS and not given.below:
                assert array.dtype == dtype
                assert np.abs(array).max() <= 8
    fine = [a for a, g in zip(probe.numbers(row, "float64", 1), row.inputs, strict=True) if a.dtype == np.float64]
    assert all((a != a.astype(np.float32)).any() for a in fine if np.abs(a).min() > 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BenchConfig(dtypes=True, dtype="bfloat16"), "dtype=bfloat16: dtypes=true has all of them; leave it out"),
        (
            BenchConfig(dtypes=True, rows="tensor"),
            "rows=tensor: no operation is called so; use a part of a name such as argmax",
        ),
    ],
)
def test_bad_input_is_one_line(config, words):
    with pytest.raises(InputError, match=words):
        SUITE.plan(config)


def test_the_report_answers_the_complaint():
    mps = Way(name="mps", label="MPS", backend="mps", device="mps")
    rows = tuple(f"{op} {d}" for op in ("matmul", "linear") for d in probe.DTYPES)
    of = {"linear": Outcome.REFUSED, "matmul": Outcome.OK}
    found = [
        DtypeReading(row=row, way="mps", round=0, state=State.OK, outcome=of[row.split()[0]], became=row.split()[1],
                     reason="only floats" if "linear" in row else "")
        for row in rows
        if row != "matmul float64"
    ]  # fmt: skip
    lost = DtypeReading(row="matmul float64", way="mps", round=0, state=State.FAILED, reason="killed by SIGABRT")
    bench = DtypeBench(
        suite="dtypes", created="2026-01-01T00:00:00", version="0", seconds=1.0, complete=True, seed=1, rounds=1,
        ways=(mps,), rows=rows, readings=(*found, lost),
    )  # fmt: skip
    made = contents.report(bench)
    answer = made.sections[0].items[0]
    assert answer.startswith("MPS: matmul ok in integers; linear refused in integers; bfloat16 in all but linear;")
    assert "4 of 8 cells of integers give a right result" in answer
    table = {row.cells[0]: row.cells[1:] for row in made.sections[1].tables[0].rows}
    assert table["matmul"] == ["ok", "ok", "ok", "crashed", *["ok"] * 5]
    assert set(table["linear"]) == {"refused"}
    sections = {section.id: section for section in made.sections}
    assert sections["problems"].items == ["MPS: crashed: matmul float64: killed by SIGABRT"]
    assert sections["refusals"].tables[0].rows[0].cells == ["MPS", "linear", ", ".join(probe.DTYPES), "only floats"]


@pytest.mark.slow
def test_a_crash_costs_one_cell(tmp_path):
    place = tmp_path / "site" / "faulty-1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[nanogpt_mac.backends]\nfaulty = fakes.faulty_arrays:KIND\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, str(ROOT / "bench.py"), "dtypes=true", "ways=[faulty]", "rows=so*", "run_dir=out"]
    env = os.environ | {"PYTHONPATH": path, VARIABLE: "a crash"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = {r.row: r for r in DtypeBench.load(tmp_path / "out" / "bench.json").readings}
    assert len(found) == 4 * len(probe.DTYPES)  # softmax, softplus, sort, sort_with_indices
    for row, reading in found.items():
        crashed = row.startswith("softmax ") and row != "softmax bfloat16"
        assert (reading.outcome is Outcome.CRASHED and "SIGABRT" in reading.reason) == crashed, reading
    assert found["sort int8"].outcome is Outcome.OK
    assert kinds.KINDS["cpu"].falls_back == {}
