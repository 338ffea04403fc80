"""The pages of all suites, looked at in a headless Chromium: with long names, and with what has no time."""

import pytest
from fakes.browser import Browser, look, programs

from nanogpt_mac.records.bench import (
    Bench,
    GemmBench,
    GemmReading,
    NetBench,
    NetReading,
    OpReading,
    OpsBench,
    Reading,
    State,
    Way,
)  # fmt: skip
from nanogpt_mac.records.parts import PartReading, PartsBench
from nanogpt_mac.records.run import Times
from nanogpt_mac.report import page, svg
from nanogpt_mac.suites import lm, mlp
from nanogpt_mac.suites.gemm.suite import Step, Work
from nanogpt_mac.suites.parts import ROWS
from nanogpt_mac.suites.run import suite_of

WAYS = tuple(
    Way(name=name, label=label, backend="cpu", device="cpu")
    for name, label in (("cpu", "CPU eager"), ("mlx", "MLX compiled <b>1</b>"), ("long", "A " + "long " * 9 + "name"))
)  # fmt: skip
OPS = (
    "ReLU 64x128x1024",
    "ReLU 64x128x1024 with gradient",
    "SDPA 64x16x16x1024 64x16x64x1024",
    "Sort 64x128x1024 axis=1",
)
SIZES = {f"{dtype} {n}": (dtype, n, n, n) for dtype in ("float32", "bfloat16") for n in (64, 1024)}


def times(ms):
    return Times(median=ms, min=0.9 * ms, ci95=(0.95 * ms, 1.2 * ms), count=9)


def of(suite, document, rows, figures, work=None):
    """A bench of two rounds in which the last row of the last way is wrong."""
    readings = []
    for i, row in enumerate(rows):
        for j, way in enumerate(WAYS):
            for number in range(2):
                known = {"row": row, "way": way.name, "round": number}
                last = (i, j) == (len(rows) - 1, len(WAYS) - 1)
                found = figures[1](0.01 * 7**i * (j + 1))
                readings.append(
                    figures[0](**known, state=State.WRONG, reason="wrong result: " + "it is all zeros, " * 9)
                    if last else figures[0](**known, state=State.OK, **found)
                )  # fmt: skip
    return document(
        suite=suite, created="2026-11-27T00:00:00", version="0.1", seconds=400, complete=False, seed=1, rounds=2,
        ways=WAYS, rows=rows, work=work or {}, readings=readings, spent={"measuring": 200, "checks": 150},
    )  # fmt: skip


def calls(ms):
    return {"throughput": times(ms), "latency": times(2 * ms), "error": 0.3, "cold": True}


def nets(ms):
    return {"batch": 256, "epochs_s": (ms, 1.1 * ms), "median_s": ms, "run_s": 2 * ms, "cpu": 1.5, "accuracy": 0.97,
            "accuracy_last": 0.98, "distance": 1e-6}  # fmt: skip


def settings(rows):
    steps = {way.name: Step() for way in WAYS}
    return Work(sizes=rows, seed=1, steps=steps, gpu={}, cpu={}).model_dump(mode="json")


PAGES: dict[str, Bench] = {
    "ops": of("ops", OpsBench, OPS, (OpReading, calls), {"scale": 1.0, "cache": "cold"}),
    "gemm": of("gemm", GemmBench, tuple(SIZES), (GemmReading, calls), settings(SIZES)),
    "mlp": of("mlp", NetBench, tuple(n for chunk in mlp.CHUNKS for n in chunk if "inference" not in n),
              (NetReading, nets), {"data": "stand-in"}),
    "lm": of("lm", NetBench, (f"small {lm.TRAINED}", f"full {lm.TRAINED}"), (NetReading, nets), {"data": "text"}),
    "parts": of("parts", PartsBench, ROWS, (PartReading, lambda ms: {"forward": times(ms), "both": times(3 * ms)})),
}  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs()
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser(browser, tmp_path, name, empty):
    bench, suite = PAGES[name], suite_of(name)
    if empty:
        lost = {"state": State.SKIPPED, "reason": "budget_minutes=1 was spent"}
        readings = [Reading(row=r.row, way=r.way, round=r.round, **lost).model_dump() for r in bench.readings]
        bench = type(bench).model_validate(bench.model_dump() | {"readings": readings})
    report = suite.report(bench)
    with svg.style():
        html = page.html(report, suite.charts(bench))
    for width in (390, 1280):
        found = look(browser, html, tmp_path / "report.html", width, name)
        assert found["sections"] == len(report.sections)
        assert bool(found["charts"]) is (name != "parts" and not empty)
    if not empty:
        assert "it is all zeros" in html
        assert "MLX compiled &lt;b&gt;1" in html
        assert name == "parts" or "measuring 3 min 20 s" in html
