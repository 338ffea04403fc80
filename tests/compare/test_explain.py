"""explain=true: a verdict's reason, from the parts of each variant."""

import json

import pytest
from fakes.comparisons import write_comparison
from fakes.support import FRAMEWORKS

from nanogpt_mac.compare import contents, explain
from nanogpt_mac.compare.collect import collect, read
from nanogpt_mac.files import write_json
from nanogpt_mac.records.bench import State, Way
from nanogpt_mac.records.comparison import Comparison
from nanogpt_mac.records.parts import ITERATION, PartReading, PartsBench
from nanogpt_mac.records.plan import Plan
from nanogpt_mac.records.run import Times
from nanogpt_mac.report import show

TAKES = {
    "fast": {ITERATION: (20.0, None), "attention": (5.0, 12.0), "MLP": (3.0, 7.0)},
    "slow": {ITERATION: (30.0, None), "attention": (5.1, 20.1), "MLP": (3.0, 8.5)},
}


def times(ms):
    return Times(median=ms, ci95=(0.99 * ms, 1.01 * ms), count=9)


def parts(folder, takes, complete=True, **lost):
    """What suite=parts would leave in a comparison's folder."""
    readings = [
        PartReading(row=row, way=name, round=0, state=State.OK, forward=times(forward), both=both and times(both))
        for name, rows in takes.items()
        for row, (forward, both) in rows.items()
    ]
    readings += [PartReading(row="clip", way=n, round=0, state=State.FAILED, reason=why) for n, why in lost.items()]
    ways = tuple(Way(name=name, label=name.upper(), backend="cpu") for name in takes)
    bench = PartsBench(suite="parts", created="", version="", seconds=9.0, complete=complete, seed=1, rounds=1,
                       ways=ways, rows=(), readings=readings)  # fmt: skip
    (folder / "parts").mkdir()
    write_json(folder / "parts" / "bench.json", bench.document())


@pytest.fixture
def folder(tmp_path):
    write_comparison(tmp_path / "out", [{"name": "fast", "ms": 20.0}, {"name": "slow", "ms": 30.0}], 6, 30, 0.004, 1)
    return tmp_path / "out"


def test_the_verdict_gets_its_reason(folder):
    before = collect(folder)
    assert before.explanation is None
    parts(folder, TAKES)
    found = collect(folder)
    assert found.verdict.sentence.startswith(before.verdict.sentence)
    (reason,) = found.explanation.reasons
    assert f"Why: {reason.sentence}" in found.verdict.sentence
    said = "of 10.00 ms difference 8.000 lie in attention backward, 1.500 in MLP backward."
    assert reason.sentence.endswith(said)
    assert (reason.faster, reason.slower, reason.difference) == ("fast", "slow", pytest.approx(10.0))
    text = show.markdown(contents.report(found))
    assert "Why: where each iteration goes" in text
    assert said in text


def test_it_is_kept_in_comparison_json_and_older_ones_still_open(folder):
    parts(folder, TAKES)
    found = collect(folder)
    again = Comparison.parse(json.loads(json.dumps(found.document())), "comparison.json")
    assert again.explanation == found.explanation
    older = found.document()
    del older["explanation"]
    assert Comparison.parse(older, "comparison.json").explanation is None
    plan = json.loads((folder / "plan.json").read_text())
    plan.pop("explain", None)
    assert Plan.parse(plan, "plan.json").explain is False


def test_what_was_not_measured_is_said(folder):
    parts(folder, TAKES, complete=False, slow="out of memory")
    found = read(folder)
    assert "the parts of SLOW were not measured (clip: out of memory)" in found.verdict.sentence
    text = show.markdown(contents.report(found))
    assert "SLOW: not measured: clip: out of memory." in text
    assert "The budget was spent" in text


def test_a_damaged_document_is_a_warning(folder):
    parts(folder, TAKES)
    (folder / "parts" / "bench.json").write_text("{")
    found = collect(folder)
    assert found.explanation is None
    assert any("bench.json" in line for line in found.warnings)


def test_the_budget_is_shared(folder):
    plan = Plan.load(folder / "plan.json")
    assert explain.seconds(plan) == 0
    asked = plan.model_copy(update={"explain": True, "budget_minutes": 10.0})
    assert explain.seconds(asked) == pytest.approx(0.3 * 600)


@pytest.mark.slow
@pytest.mark.skipif("jax" not in FRAMEWORKS, reason="needs JAX")
def test_a_comparison_is_explained(command, tmp_path):
    given = ("variants=[cpu,mlx-eager,jax]", "experiment=smoke", "data=stand_in", "rounds=3", "iters=12")
    done = command("compare.py", *given, "parity=false", "explain=true", "budget_minutes=1", "run_dir=out", timeout=300)
    assert done.returncode == 0, done.stderr
    document = Comparison.load(tmp_path / "out" / "comparison.json")
    assert {each.name for each in document.explanation.accounts} == {"cpu", "mlx-eager", "jax"}
    assert "Why: where each iteration goes" in (tmp_path / "out" / "report.html").read_text()
    bench = tmp_path / "out" / "parts" / "bench.json"
    before = bench.read_text()
    again = command("compare.py", "run=out", timeout=300)  # measured once
    assert (again.returncode, bench.read_text()) == (0, before)
    bench.write_text("{")  # and again where it is damaged
    assert command("compare.py", "run=out", timeout=300).returncode == 0
    assert json.loads(bench.read_text())["suite"] == "parts"
