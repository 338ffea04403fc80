"""The rows are the published ones, and every framework gives for each what numpy gives in float64."""

import math

import numpy as np
import pytest
from fakes.support import FRAMEWORKS, ROOT, options

from nanogpt_mac.backends import kinds
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.bench import Way
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.ops import checked
from nanogpt_mac.suites.ops.inputs import Drawn
from nanogpt_mac.suites.ops.measured import _One
from nanogpt_mac.suites.ops.rows import WITH_GRADIENT, all_rows, published

SPEC = GPTSpec(2, 2, 32, 16, 65, bias=True)
FULL = all_rows(SPEC, 4, 1)
SMALL = all_rows(SPEC, 200, 0.002)


def test_the_published_rows_are_91_of_which_33_compare_different_work():
    table = published()
    assert len(table) == 91
    assert sum(bool(row.times) for row in table.values()) == 85
    assert sum(bool(row.wrong) for row in table.values() if row.times) == 33
    assert table["Sort 64x128x1024 axis=0"].times == {
        "mlx_gpu": 0.74, "mlx_gpu_compile": 0.73, "mlx_cpu": 228.52, "mps": 8.83, "cpu": 62.04
    }  # fmt: skip
    assert "mps" not in table["ScatterSum 64x16 10"].times
    assert set(table) <= set(FULL)


@pytest.mark.parametrize(
    ("name", "into", "out", "mflop"),
    [  # MiB and MFLOP, worked out by hand from the shapes
        ("Argmax 64x1024x128 axis=1", 32, 0.03, 0),
        ("Concat 1000000x64 1000000x32 axis=1", 366.21, 366.21, 0),
        ("Conv1d 16x1000x80 128x11x80", 5.31, 7.73, 3568.4),
        ("Conv2d 100x256x256x3 8x3x3x3", 75.00, 196.89, 2787.1),
        ("Linear 100x1024x512 512x1024 1024", 202.00, 400.00, 107374.2),
        ("MatMul 1000000x64 64x1024", 244.39, 3906.25, 131072.0),
        ("SDPA 64x16x16x1024 64x16x64x1024", 576.00, 64.00, 4295.0),
        ("Sum 64x128x128x128 axis=0", 512.00, 8.00, 134.2),
    ],
)
def test_bytes_and_flops(name, into, out, mflop):
    row = FULL[name]
    assert row.input_bytes / 2**20 == pytest.approx(into, abs=0.006)
    assert row.output_bytes / 2**20 == pytest.approx(out, abs=0.006)
    assert row.flops / 1e6 == pytest.approx(mflop, abs=0.06)


def test_gather_reads_a_row_once():
    assert FULL["Gather 64x256 1000000"].least_bytes == 4 * (64 * 256 + 10**6 + 10**6 * 256)


def test_scale_makes_rows_smaller_and_leaves_no_axis_of_one_element():
    small = all_rows(SPEC, 64, 0.01)
    assert small.keys() == FULL.keys()
    for name, row in small.items():
        if "axis" in row.settings and row.settings["axis"] is not None:
            assert row.inputs[0].shape[row.settings["axis"]] > 1, name
    total = sum(row.input_bytes for name, row in small.items() if not name.startswith("Model"))
    assert total < 0.02 * sum(row.input_bytes for name, row in FULL.items() if not name.startswith("Model"))


def test_rows_with_a_gradient_are_all_but_those_that_have_none():
    without = {row.family for row in FULL.values() if not row.backward and row.name + WITH_GRADIENT not in FULL}
    assert without == {"Argmax", "SortIndices", "Model AdamW"}


def one(framework, row):
    kind = kinds.KINDS[framework]
    kind.prepare(options(framework))
    device = kind.load().device_of(kind)
    if (op := kind.load_arrays()(kind, device, False).op(row.op)) is None:
        return None
    return _One(ways.arrays(Way(name="", label="", backend=framework, device=device), BenchConfig()), row,
                op, Drawn(row, 3))  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("family", dict.fromkeys(row.family for row in SMALL.values()))
def test_every_framework_gives_what_float64_gives(family, framework):
    for name, row in SMALL.items():
        if row.family != family:
            continue
        found = one(framework, row)
        if found is None:
            pytest.skip(f"{row.op} is not written for {framework}")
        for k in (0, 1):
            got, expected = found.got(found.outputs(k)), found.expected(k)
            assert len(got) == len(expected)
            offs = [e.off(g) for e, g in zip(expected, got, strict=True)]
            assert max(offs).share < 0.5, f"{name}, copy {k}: {offs}"
        other = found.expected(0)  # another copy's result is never taken for it
        assert max(e.off(g).share for e, g in zip(other, got, strict=True)) > 1, name
        zeros = [e.off(np.zeros_like(g)).share for e, g in zip(expected, got, strict=True)]
        assert zeros[0] > 1, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if kinds.KINDS[name].framework != "torch"])
def test_whether_outputs_last_is_what_a_framework_says(framework, compiled):
    """Where they do not, as in tinygrad's captured functions, a timed call's output is read before the next call."""
    kind = kinds.KINDS[framework]
    kind.prepare(options(framework))
    arrays = kind.load_arrays()(kind, kind.load().device_of(kind), compiled)
    relu = arrays.ready(arrays.op("relu").function)
    one, two = (arrays.put(np.full((2, 3), number, np.float32)) for number in (1, 2))
    made = [relu(x) for x in (one, one, two)]
    arrays.start(made)
    arrays.wait(made)
    assert arrays.outputs_last == (arrays.get(made[1])[0, 0] == 1)
    assert arrays.peek(made[2]) == arrays.get(made[2])[0, 0] == 2


def test_inputs_are_the_same_for_all_and_follow_from_the_seed():
    row = SMALL["SDPA 64x8x16x1024 64x8x16x1024"]
    with_gradient = SMALL[row.name + WITH_GRADIENT]
    for a, b in zip(Drawn(row, 1).copy(2), Drawn(with_gradient, 1).copy(2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(Drawn(row, 1).first[0], Drawn(row, 2).first[0])


def test_values_along_an_axis_are_distinct_and_indices_where_they_must_be():
    for name in ("Sort 64x128x1024 axis=1", "Argmax 64x1024x128 axis=0"):
        row = SMALL[name]
        for k in (0, 1, 5):
            x = np.sort(Drawn(row, 1).copy(k)[0], row.settings["axis"])
            assert (np.diff(x, axis=row.settings["axis"]) > 0).all()
    index = Drawn(FULL["Scatter 1024x32 10"], 1).copy(3)[1]
    assert len(set(index)) == 10
    _, index, values = Drawn(FULL["Scatter 64x16 1000"], 1).copy(3)
    for i in range(64):  # whoever wins is right
        assert len(np.unique(values[index == i], axis=0)) == 1


# -- large products are held against random signs and some rows -------------------------------------------------------


@pytest.fixture
def product(monkeypatch):
    monkeypatch.setattr(checked, "FULL", 0)  # as if it were too large to be computed whole
    monkeypatch.setattr(checked, "ROWS", 4)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 200, 64), np.float32), rng.standard_normal((3, 64, 100), np.float32)
    return checked.Product(a, b), a @ b


def test_a_product_is_right(product):
    expected, right = product
    assert expected.off(right).share < 0.1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.__setitem__((1, 150), 0),
        lambda c: c.__setitem__((slice(None), slice(None), 3), 1),
        lambda c: c.__setitem__((2, 17, 5), c[2, 17, 5] + 1),
        lambda c: c.__setitem__((0, 0, 0), math.nan),
        lambda c: c.__imul__(1 + 1e-3),
        lambda c: c.__setitem__(slice(None), c[::-1].copy()),
    ],
)
def test_a_product_that_is_wrong_in_a_few_places_is_found(product, spoil):
    expected, right = product
    spoil(right)
    assert expected.off(right).share > 1


def test_a_sum_one_after_the_other_is_right_but_careless():
    value = np.asarray(0.8)
    expected = checked.total(value, 10_000_000)
    assert not expected.off(np.asarray(0.8 * (1 + 1e-4), np.float32)).careless
    assert expected.off(np.asarray(0.8 * 1.016, np.float32)).careless
    assert expected.off(np.asarray(0.8 * 1.06, np.float32)).share > 1
    assert checked.total(value, 100).off(np.asarray(0.8 * (1 + 1e-4), np.float32)).share > 1


def test_another_shape_is_named(product):
    assert product[0].off(np.zeros((3, 100, 200))).words == "its shape is (3, 100, 200), not (3, 200, 100)"


def test_the_published_table_names_its_source():
    head = (ROOT / "nanogpt_mac/suites/ops/published.csv").read_text().splitlines()[0]
    assert "TristanBilot/mlx-benchmark" in head
