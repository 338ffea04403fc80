"""Whatever is wrong with a result or its time is refused by name, in small rows and in large ones."""

import itertools
import re
from contextlib import nullcontext
from tempfile import TemporaryDirectory

import pytest
from fakes.faulty_arrays import FAULTS, FaultyArrays

from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.bench import State, Task, Way
from nanogpt_mac.suites.ops import measured
from nanogpt_mac.suites.ops.measured import Measuring, Work
from nanogpt_mac.suites.ops.rows import all_rows

SPEC = GPTSpec(1, 1, 8, 8, 11)
AXIS = "Sort 64x128x1024 axis=1", "Sum 64x128x128x128 axis=1"
PLAIN = ("ReLU 64x128x1024", "Concat 64x1000000 64x1000000 axis=0", "MatMul 1000x64x256 256x32", *AXIS)
SIZES = {"small": 0.0005, "large": 0.04}


def measure(fault, row, size, monkeypatch, cache="cold", row_s=0.05, folder=None):
    """What is read of `row` where `fault` is planted; large: beyond the last cache, which is made small for it."""
    with TemporaryDirectory() if folder is None else nullcontext(folder) as shared:
        return _measure(fault, row, size, monkeypatch, cache, row_s, shared)


def _measure(fault, row, size, monkeypatch, cache, row_s, folder):
    monkeypatch.setattr(measured, "FEW_COPIES", 64)
    if size == "large":
        monkeypatch.setattr(measured, "LAST_CACHE", 1 << 17)
        monkeypatch.setattr(measured, "NEW_BYTES", 0)  # the floor alone
    work = Work(sizes={}, batch=1, scale=SIZES[size], seed=1, cache=cache, bandwidth=0, backend={})
    way = Way(name="faulty", label="Faulty")
    task = Task(suite="ops", way=way, rows=(row,), round=0, row_s=row_s, folder=str(folder), work={})
    rows = all_rows(SPEC, 1, work.scale)
    return Measuring(task, FaultyArrays(fault=fault), rows, work, 20e9 if size == "large" else 1e15, 0.4)(row)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", PLAIN)
def test_without_a_fault_it_is_measured(row, size, monkeypatch):
    found = measure("", row, size, monkeypatch)
    assert found.state is State.OK, found.reason
    assert found.throughput.median > 0
    assert found.latency.median > 0
    assert found.error <= 1
    assert found.deterministic


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[fault for fault, _ in FAULTS])
def test_a_fault_is_refused_by_name(fault, words, size, monkeypatch):
    rows = AXIS if "axis" in fault else PLAIN
    for row in rows:
        found = measure(fault, row, size, monkeypatch, row_s=0.4 if "come again" in fault else 0.05)
        assert found.state is State.WRONG, f"{row}: {found}"
        assert re.search(words, found.reason), f"{row}: {found.reason}"
        assert found.throughput is None


@pytest.mark.parametrize(("looks", "state"), [(1, State.OK), (2, State.WRONG)])
def test_a_right_row_whose_core_another_had_for_a_while_is_not_refused(looks, state, monkeypatch):
    numbers = itertools.count()

    def once(call, arrays):
        call()
        number = next(numbers)  # every second one has new inputs
        return 0.01 if number % 2 and number < looks * 2 * measured.TRIES else 0.001

    monkeypatch.setattr(measured.calls, "once", once)
    found = measure("", PLAIN[0], "small", monkeypatch)
    assert found.state is state, found.reason


@pytest.mark.parametrize("fault", ["a cached result", "a no-op", "a wrong result"])
def test_faults_are_refused_where_inputs_stay_the_same(fault, monkeypatch):
    assert measure(fault, PLAIN[0], "small", monkeypatch, cache="warm").state is State.WRONG


def test_a_scatter_whose_result_is_dropped_is_refused_as_the_published_ones_are(monkeypatch):
    found = measure("a result thrown away", "Scatter 1024x32 1000", "small", monkeypatch)
    assert re.search("thrown away: it is input 1 as it was", found.reason)


def test_what_a_framework_does_not_have_or_cannot_do_is_said(monkeypatch):
    found = measure("", "Argmax 64x1024x128 axis=0", "small", monkeypatch)
    assert (found.state, found.reason) == (State.ABSENT, "not written for Faulty")
    found = measure("", "ReLU 64x128x1024 with gradient", "small", monkeypatch)
    assert found.state is State.ABSENT
    assert "VJP not implemented" in found.reason
    found = measure("no memory", "Softmax 64x1000000 axis=-1", "small", monkeypatch)
    assert found.state is State.SKIPPED


def test_a_row_that_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(FaultyArrays, "free_memory", lambda self: 1000)
    found = measure("", PLAIN[0], "small", monkeypatch)
    assert found.state is State.SKIPPED
    assert "more than half of the 1000 B that are free" in found.reason


def test_a_result_with_the_bits_of_one_that_was_right_is_not_computed_again(monkeypatch, tmp_path):
    asked = []
    expected = measured.reference.expected
    monkeypatch.setattr(measured.reference, "expected", lambda *given: asked.append(1) or expected(*given))
    first = measure("", PLAIN[0], "small", monkeypatch, cache="warm", folder=tmp_path)
    assert len(asked) == 2  # of the first call and of the last
    again = measure("", PLAIN[0], "small", monkeypatch, cache="warm", folder=tmp_path)
    assert len(asked) == 2
    assert (again.state, again.error) == (State.OK, first.error)
    assert set(again.spent) == {"inputs", "first calls", "checks", "measuring"}
    found = measure("a wrong result", PLAIN[0], "small", monkeypatch, cache="warm", folder=tmp_path)
    assert found.state is State.WRONG
    found = measure("a cached result", PLAIN[0], "small", monkeypatch, cache="warm", folder=tmp_path)
    assert found.state is State.WRONG
