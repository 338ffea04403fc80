"""Suspects in launches that are made up: what each rule sees, and what it leaves alone."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from nanogpt_mac.compile_report import suspects
from nanogpt_mac.compile_report.recorders import Call, What

SUM = "kernel void k(device float* out_ptr0, constant float* in_ptr0) { c10::metal::threadgroup_sum(a, b, c, 96); }"


def metal(threads, group=None, code=SUM, size=1 << 20, name="k", shapes=((4, 4),)):
    return Call(What.METAL, name, "0_forward", size, shapes, ("float32",), code, threads, group)


def judged(calls, live=False, ms_each=None, ms=10.0):
    times = suspects.Times(ms, ms_each or {}, live)
    return {row.name: asdict(row) for row in suspects.judge(calls, times, lambda *_: True)}


def test_what_this_torch_does_not_show_is_unknown():
    rows = suspects.judge([metal((64, 65), (1, 65))], suspects.Times(), lambda *needs: "launches" not in needs)
    status = {row.name: row.status for row in rows}
    assert status["odd reduction groups"] == "unknown"
    assert status["buffers from Python"] == "absent"


@pytest.mark.parametrize(("size", "found"), [(32, 0), (16, 0), (96, 0), (65, 1), (1000, 1)])
def test_groups_of_no_multiple_of_32(size, found):
    assert judged([metal((64, size), (1, size))])["odd reduction groups"]["count"] == found


@pytest.mark.parametrize(
    ("threads", "size", "found"), [((1, 1024), 1 << 20, 1), ((3, 64), 1 << 20, 0), ((1, 64), 9, 0)]
)
def test_large_reductions_in_few_groups(threads, size, found):
    assert judged([metal(threads, (1, threads[1]), size=size)])["reduction in few threadgroups"]["count"] == found


def test_a_copy_is_told_from_work():
    body = "auto tmp0 = in_ptr0[4*x0];\n{}out_ptr0[x0] = static_cast<float>(tmp1);"
    scaled = body.format("auto tmp2 = 0.5;\nauto tmp1 = tmp0 * tmp2;\n")
    gelu = body.format("auto tmp1 = c10::metal::erf(tmp0);\n")
    two = "auto tmp1 = in_ptr0[x0];\nauto tmp2 = in_ptr1[x0];\n" + scaled
    assert [suspects.is_copy(metal((64,), code=code)) for code in (scaled, gelu, two)] == [True, False, False]


def test_confirmed_takes_a_tenth_of_a_macs_iteration():
    call = metal((64, 65), (1, 65))
    for live, each, status in ((True, 1.2, "confirmed"), (True, 0.1, "suspect"), (False, 1.2, "suspect")):
        row = judged([call], live, {call.alike: each})["odd reduction groups"]
        assert (row["status"], row["ms"]) == (status, each if live else None)
    assert judged([call], True)["odd reduction groups"]["evidence"].endswith("; not timed")
    assert judged([metal((64,), code="error")], True)["odd reduction groups"]["status"] == "absent"


def test_an_error_buffer_that_nothing_uses():
    idle = metal((64,), code="device c10::metal::ErrorMessages* error_buf,")
    used = metal((64,), code="device c10::metal::ErrorMessages* error_buf, TORCH_REPORT_ERROR(error_buf, 1)")
    assert judged([used])["error buffers"]["status"] == "absent"
    row = judged([idle, used], True, {idle.alike: 9.0})["error buffers"]
    assert (row["status"], row["count"]) == ("suspect", 1)
    assert "1 of 2 launches" in row["evidence"]


def test_the_header_decides_whether_welford_is_serial(tmp_path, monkeypatch):
    import torch

    folder = tmp_path / "include" / "c10" / "metal"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert suspects.welford_is_serial("threadgroup_welford_reduce") is None
    body = "float3 threadgroup_welford_reduce(threadgroup T* data, unsigned size) {{\n  {}\n}}\n"
    serial, tree = (
        "for (unsigned idx = 1; idx < size; ++idx) {\n  }",
        "for (stride >>= 1; stride > 0; stride >>= 1) {\n  }",
    )
    for loop, answer in ((serial, True), (tree, False)):
        (folder / "reduction_utils.h").write_text(body.format(loop))
        assert suspects.welford_is_serial("threadgroup_welford_reduce") is answer
        assert suspects.welford_is_serial("threadgroup_welford_combine") is None
    call = metal((64, 32), (1, 32), code="c10::metal::threadgroup_welford_reduce(tmp_acc_0, 32)")
    assert judged([call])["serial Welford"]["status"] == "absent"  # the header now holds a tree
