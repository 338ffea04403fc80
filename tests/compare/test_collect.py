"""A comparison's folder as a document."""

import json
import shutil

import numpy as np
import pytest
from fakes.comparisons import LINUX, MAC, VARIANTS, write_comparison

from nanogpt_mac.compare import contents, figures, leaderboard
from nanogpt_mac.compare.collect import collect
from nanogpt_mac.measure import stats
from nanogpt_mac.records.plan import Recipe

pytestmark = pytest.mark.xdist_group("collect")  # what its fixtures make is expensive: one worker makes it

CPU = {"name": "cpu", "label": "CPU eager", "ms": 100.0}
MLX = {"name": "mlx", "label": "MLX compiled", "compile": True, "ms": 80.0}
MPS = {"name": "mps", "label": "MPS eager", "ms": 90.0}


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    """The interval itself is tests/measure/test_stats.py's business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_comparison(tmp_path_factory.mktemp("whole") / "compare", VARIANTS, 6, 30, 0.004, 1)
    return folder, collect(folder).document()


# -- a whole comparison -----------------------------------------------------------------------------------------------


def test_times_are_recomputed_from_the_rows(whole):
    """Read again here, line by line: kept iterations of the rounds, and no others."""
    folder, found = whole
    for variant in found["variants"]:
        rounds = {}
        for path in sorted((folder / "rounds").glob(f"[0-9]-{variant['name']}")):
            rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            rows = [row for row in rows if row["kind"] == "iteration" and "left_out" not in row]
            rounds[int(path.name.split("-")[0])] = [row["iter_ms"] for row in rows]
        pooled = np.concatenate(list(rounds.values()))
        assert variant["times"]["count"] == len(pooled) == 6 * 24
        assert variant["times"]["median"] == pytest.approx(np.median(pooled))
        low, high = variant["times"]["ci95"]
        assert low < variant["times"]["median"] < high
        assert {r["round"]: r["median"] for r in variant["rounds"]} == {r: np.median(t) for r, t in rounds.items()}
        assert variant["left_out"] == {"first": 6, "warmup": 30}
        tokens = 16384
        assert variant["tokens_per_s"] == pytest.approx(tokens / variant["times"]["median"] * 1e3)


def test_verdict_and_ratios(whole):
    _, found = whole
    variants = {variant["name"]: variant for variant in found["variants"]}
    assert found["complete"] is True
    assert found["verdict"]["fastest"] == "mlx"
    assert found["verdict"]["ties"] == []
    ratio = variants["mps"]["ratio"]
    pairs = [
        slow["median"] / fast["median"]
        for slow, fast in zip(variants["mps"]["rounds"], variants["mlx"]["rounds"], strict=True)
    ]
    assert ratio["pairs"] == pytest.approx(pairs)
    assert (ratio["to"], ratio["tie"], ratio["confidence"]) == ("mlx", False, 0.99)
    assert ratio["ci"][0] < 260 / 190 < ratio["ci"][1]
    assert variants["mlx"]["ratio"] is None
    low, high = ratio["ci"]
    assert found["verdict"]["sentence"] == (
        f"MLX compiled is fastest: {ratio['value']:.3g} x as fast as MPS eager "
        f"(99 % interval {low:.3g} to {high:.3g}, 6 rounds)."
    )


def test_utilisation_has_the_pilots_peak(whole):
    folder, found = whole
    for variant in found["variants"]:
        measured = json.loads((folder / "rounds" / f"pilot-{variant['name']}" / "summary.json").read_text())
        rate = found["work"]["flops_per_iter"] / (variant["times"]["median"] / 1e3)
        assert variant["mfu_measured"] == pytest.approx(rate / measured["mfu_denominators"]["mfu_measured"])
        assert variant["mfu_a100"] == pytest.approx(rate / 312e12)
        assert variant["mfu"] == (None if variant["device"] == "cpu" else pytest.approx(rate / 8.08e12))
        assert variant["mfu_denominators"].keys() == {"mfu", "mfu_measured", "mfu_a100", "measured_here"}
        roof = variant["roofline"]
        assert roof["share"] == pytest.approx(roof["floor_ms"] / variant["times"]["median"])
        assert roof["peak_source"] == (
            "best matmul measured here" if variant["device"] == "cpu" else "Apple M4 Pro's peak, disputed"
        )


def test_phases_and_recipe(whole):
    _, found = whole
    variant = next(variant for variant in found["variants"] if variant["name"] == "mlx")
    median_s = variant["times"]["median"] / 1e3
    assert (variant["first_iter_s"], variant["first_iter_warm_s"]) == (4.0, 1.5)  # the pilot's is cold
    assert variant["compile_s"] == pytest.approx(4.0 - median_s)
    assert variant["compile_warm_s"] == pytest.approx(1.5 - median_s)
    assert variant["eval_s"] == 0.8  # not the first of each process, which compiles
    assert variant["first_eval_s"] == pytest.approx(1.4 * 0.8)
    assert variant["recipe"]["evaluations"] == 21
    assert variant["recipe"]["seconds"] == pytest.approx(5000 * median_s + 21 * 0.8)
    assert variant["peak_memory"] == 1_500_000_000


@pytest.mark.parametrize(
    ("recipe", "eval_iters", "seconds", "evaluations"),
    [
        ({"max_iters": 5000, "eval_interval": 250, "eval_iters": 200}, 200, 5000 * 0.1 + 21 * 2, 21),
        ({"max_iters": 5000, "eval_interval": 250, "eval_iters": 200}, 5, 5000 * 0.1 + 21 * 2 * 40, 21),
        (
            {"max_iters": 2000, "eval_interval": 300, "eval_iters": 20},
            20,
            2000 * 0.1 + 8 * 2,
            8,
        ),  # 0, 300 .. 1800, 2000
        ({"max_iters": 20, "eval_interval": 0, "eval_iters": 20}, None, 2.0, 0),
    ],
)
def test_recipe_by_hand(recipe, eval_iters, seconds, evaluations):
    found = figures.projected(Recipe(**recipe), 100.0, 2.0 if eval_iters else None, eval_iters)
    assert found.seconds == pytest.approx(seconds)
    assert found.evaluations == evaluations


def test_recipe_without_its_parts():
    recipe = Recipe(max_iters=5000, eval_interval=250, eval_iters=200)
    assert figures.projected(recipe, None, 2.0, 200) is None
    assert figures.projected(recipe, 100.0, None, None) is None
    assert figures.projected(None, 100.0, 2.0, 200) is None


def test_recipe_of_an_older_plan_is_its_experiments(compared):
    _, variants = compared([CPU], rounds=1, recipe=None, experiment="quick", config={"eval_iters": 20})
    assert (variants["cpu"]["recipe"]["iters"], variants["cpu"]["recipe"]["evaluations"]) == (2000, 9)
    _, variants = compared([CPU], rounds=1, recipe=None, experiment="of_the_future")
    assert variants["cpu"]["recipe"] is None


def test_machine_environment_and_published(whole):
    _, found = whole
    assert found["machine"]["name"] == "Apple M4 Pro"
    assert found["machine"]["os"] == "macOS 15.6"
    assert found["machine"]["simulated"] is False
    assert found["environment"]["versions"] == MAC["versions"]
    assert found["work"]["tokens_per_iter"] == 16384
    assert found["work"]["flops_per_iter"] == pytest.approx(1162.6e9, rel=1e-4)
    assert {row["ms_per_iter"] for row in found["published"]} == {221, 306, 1986, 500, 8500}
    assert found["warnings"] == []
    assert found["levers"] is None
    assert found["variants"][0]["fallbacks"] == {"schema": 1, "fallbacks": [], "exit_state": "ok"}


def test_series(whole):
    _, found = whole
    for variant in found["variants"]:
        assert [part["round"] for part in variant["series"]] == list(range(6))
        for part in variant["series"]:
            assert part["iter"] == list(range(6, 30))
            assert all(b > a for a, b in zip(part["seconds"], part["seconds"][1:], strict=False))


def test_long_series_keep_their_outliers_and_count_evaluations(compared):
    _, variants = compared([CPU | {"outliers": 0.01, "eval_s": 7.0}], rounds=1, iters=2000, evaluations=5)
    part = variants["cpu"]["series"][0]
    assert 200 <= len(part["iter"]) <= 400
    assert max(part["ms"]) == pytest.approx(variants["cpu"]["outliers"]["worst_ms"], rel=1e-5)
    assert part["iter"] == sorted(part["iter"])
    ends = dict(zip(part["iter"], part["seconds"], strict=True))
    before, after = max(i for i in ends if i < 500), min(i for i in ends if i >= 500)
    assert ends[after] - ends[before] == pytest.approx(7.0, abs=2.5)  # the evaluation at 500
    rows = variants["cpu"]["evaluations"]
    assert [row["iter"] for row in rows] == [0, 500, 1000, 1500, 2000]
    assert variants["cpu"]["outliers"]["count"] >= 5


# -- the verdict in other cases ---------------------------------------------------------------------------------------


def test_the_same_variant_twice_ties(compared):
    found, variants = compared([CPU, CPU | {"name": "cpu-2", "label": "CPU eager (2)"}], machine=LINUX)
    assert {found["verdict"]["fastest"], *found["verdict"]["ties"]} == {"cpu", "cpu-2"}
    assert "tie as the fastest (99 % interval" in found["verdict"]["sentence"]
    assert [variant["ratio"]["tie"] for variant in variants.values() if variant["ratio"]] == [True]
    assert found["machine"]["name"] == "AMD EPYC"


def test_an_interval_that_tells_little_is_no_likeness(compared):
    found, _ = compared([CPU, CPU | {"name": "cpu-2", "label": "CPU eager (2)"}], rounds=3, noise=0.1)
    assert "cannot be told apart (99 % interval" in found["verdict"]["sentence"]


def test_a_pilot_stopped_in_time_is_done(compared):
    def stop(folder):
        path = folder / "rounds/pilot-cpu/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"exit_state": "stopped", "signal": "SIGTERM"}))

    _, variants = compared([CPU], damage=stop)
    assert (variants["cpu"]["state"], variants["cpu"]["failed_runs"]) == ("ok", [])


def test_ties_behind_the_fastest(compared):
    found, _ = compared([CPU, CPU | {"name": "cpu-compile", "label": "CPU compiled"}, MLX])
    sentence = found["verdict"]["sentence"]
    assert sentence.startswith("MLX compiled is fastest: 1.2")
    assert "CPU compiled tie." in sentence or "CPU eager tie." in sentence


def test_a_wrong_variant_never_wins(compared):
    found, variants = compared([CPU, MLX | {"parity": "fail"}, MPS])
    assert found["verdict"]["fastest"] == "mps"
    assert (variants["mlx"]["state"], variants["mlx"]["parity"]) == ("wrong", "fail")
    assert "MLX compiled is WRONG: failed parity: gradients: 0.03, allowed 0.001." in found["verdict"]["sentence"]
    assert variants["mlx"]["ratio"]["value"] < 1  # shown all the same
    found, variants = compared([CPU | {"parity": "fail"}], rounds=2)
    assert found["verdict"]["fastest"] is None
    assert found["verdict"]["sentence"].startswith("No configuration can be called fastest")


def test_a_variant_that_could_not_be_checked_never_wins(compared):
    found, variants = compared([CPU, MLX | {"parity": "error"}], rounds=5)
    assert found["verdict"]["fastest"] == "cpu"
    assert "MLX compiled is not ranked" in found["verdict"]["sentence"]
    assert "could not be checked" in variants["mlx"]["reason"]
    found, _ = compared([CPU, MLX], rounds=5, gate=False, damage=lambda folder: (folder / "parity.json").unlink(True))
    assert found["verdict"]["fastest"] == "mlx"
    assert "was not checked" in found["verdict"]["sentence"]


def test_failures_are_rows(compared):
    variants = [CPU, MLX | {"fail": "oom"}, MPS | {"fail": {1: "timeout"}}]
    found, variants = compared(variants, damage=lambda folder: shutil.rmtree(folder / "rounds/pilot-mlx"))
    assert (variants["mlx"]["state"], variants["mlx"]["reason"]) == ("failed", "oom: out of memory")
    assert variants["mlx"]["times"] is None
    assert (variants["mps"]["state"], variants["mps"]["runs"]) == ("partial", 5)
    assert variants["mps"]["failed_runs"] == [{"round": 1, "state": "timeout", "reason": "no end within 60 s"}]
    assert len(variants["cpu"]["ratio"]["pairs"]) == 5  # paired where both have a round
    sentence = found["verdict"]["sentence"]
    assert "MLX compiled failed: oom: out of memory." in sentence
    assert "MPS eager failed in 1 of 6 runs." in sentence
    assert found["complete"] is True


def test_nothing_ran(compared):
    found, variants = compared([CPU | {"fail": "failed"}], rounds=2, pilot=False)
    assert (found["verdict"]["fastest"], found["verdict"]["sentence"][:18]) == (None, "Nothing was timed.")
    assert variants["cpu"]["mfu"] is None
    assert found["published"] == []


def test_simulated_device_means_nothing(compared):
    simulated = MPS | {"device": "simulated-mps", "ms": 5.0}
    found, variants = compared([simulated, CPU], machine=LINUX, stand_in=True)
    assert found["verdict"]["fastest"] == "cpu"
    assert "simulated device: times mean nothing" in found["verdict"]["sentence"]
    assert "The corpus is the stand-in" in found["verdict"]["sentence"]
    assert any("simulated device" in line for line in found["warnings"])
    assert found["machine"]["simulated"] is True
    assert variants["mps"]["ratio"] is None
    assert variants["mps"]["roofline"] is None
    found, _ = compared([simulated], machine=LINUX)
    assert found["verdict"]["fastest"] is None


def test_too_few_rounds_for_an_interval(compared):
    found, variants = compared([CPU, MLX], rounds=1)
    assert "too few rounds to be sure" in found["verdict"]["sentence"]
    assert variants["cpu"]["ratio"]["ci"] is None
    assert variants["cpu"]["ratio"]["tie"] is None
    assert variants["cpu"]["times"]["ci95"] is None


def test_other_work_is_not_ranked(compared):
    found, variants = compared([CPU, MPS, MLX | {"dtype": "bfloat16", "ms": 20.0}])
    assert found["verdict"]["fastest"] == "mps"
    assert variants["mlx"]["ratio"] is None
    assert "not ranked: it does other work (dtype=bfloat16, not float32)" in variants["mlx"]["warnings"]
    assert found["work"]["dtype"] == "float32"


def test_many_variants_widen_the_interval(compared):
    variants = [CPU | {"name": f"cpu-{i}", "label": f"CPU {i}", "ms": 100 + 5 * i} for i in range(7)]
    found, variants = compared(variants, rounds=5, iters=16)
    assert variants["cpu-6"]["ratio"]["confidence"] == stats.confidence_for(7) > 0.99
    assert f"{100 * stats.confidence_for(7):.3g} % interval" in found["verdict"]["sentence"]


def test_levers_are_ranked_by_what_they_are_worth(compared):
    def lever(name, ms, key, value, **more):
        told = {"base": "mps", "key": key, "value": value, "what": f"{key} {value}"}
        return MPS | {"name": name, "label": name, "ms": ms, "lever": told} | more

    found, variants = compared(
        [
            MPS,
            lever("same", 90.0, "backend.fused_adamw", True),
            lever("compiled", 108.0, "compile", True),
            lever("sync", 85.0, "sync", "iteration"),
            lever("half", 45.0, "dtype", "bfloat16", dtype="bfloat16"),
            lever("dry", 60.0, "model.dropout", 0.0, model={"dropout": 0.0}),
            lever("lost", 60.0, "sync", "interval", fail="failed"),
        ],
        rounds=8,
        damage=lambda folder: shutil.rmtree(folder / "rounds/pilot-lost"),
    )
    rows = found["levers"]
    assert [row["name"] for row in rows] == ["half", "dry", "compiled", "sync", "same", "lost"]
    assert rows[0]["ratio"]["value"] == pytest.approx(0.5, rel=0.02)
    assert rows[0]["worth_percent"] == pytest.approx(50, abs=1)
    assert rows[2]["worth_percent"] == pytest.approx(-20, abs=1)
    assert (rows[4]["ratio"]["tie"], rows[5]["ratio"]) == (True, None)
    assert found["verdict"]["fastest"] == "mps"  # levers win nothing
    assert variants["half"]["ratio"] is None
    assert "One setting is faster still: sync needs 94" in found["verdict"]["sentence"]


def test_warnings_of_the_machine(compared):
    machine = MAC | {"power_source": "battery", "low_power_mode": True}

    def damage(folder):
        path = folder / "rounds/2-cpu/env.json"
        env = json.loads(path.read_text())
        path.write_text(json.dumps(env | {"versions": {"torch": "2.14.0"}}))
        path = folder / "rounds/3-cpu/outcome.json"
        heat = {"before": "heavy", "waited_s": 60.0, "at_start": "heavy", "after": "moderate"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"heat": heat}))

    found, variants = compared([CPU | {"creep": 0.2}], rounds=8, machine=machine, damage=damage)
    text = " ".join(found["warnings"])
    for words in ("battery", "Low Power Mode", "thermal pressure was moderate and heavy", "throttled", "versions"):
        assert words in text
    assert variants["cpu"]["drift"]["throttled"] is True


def test_impossible_utilisation_is_refused(compared):
    _, variants = compared([CPU], rounds=1, measured_peak=1e12)
    assert variants["cpu"]["mfu_measured"] is None
    assert any("above 100 %, which is impossible" in line for line in variants["cpu"]["warnings"])


def test_energy_is_that_of_training(compared):
    _, variants = compared([CPU | {"energy": 30.0}])
    median_s = variants["cpu"]["times"]["median"] / 1e3
    energy = variants["cpu"]["energy"]
    assert energy["watts"] == pytest.approx(30)
    assert energy["joules_per_1000_tokens"] == pytest.approx(30 * median_s / 16384 * 1000)
    assert energy["source"] == "zeus-apple-silicon"
    assert 0.5 < energy["share"] < 1


def test_slept_iterations_enter_no_statistic(compared):
    def sleep(folder):
        path = folder / "rounds/0-cpu/metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if row["kind"] == "iteration" and row["iter"] == 12:
                row |= {"iter_ms": 9e6, "left_out": "slept"}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    _, variants = compared([CPU], rounds=5, damage=sleep)
    assert variants["cpu"]["times"]["max"] < 200
    assert variants["cpu"]["left_out"]["slept"] == 1
    assert any(line.startswith("slept") for line in variants["cpu"]["warnings"])


def test_several_processes_are_never_ranked_with_one(tmp_path):
    several = {
        "name": "cpu-x2",
        "label": "CPU eager, 2 processes",
        "ms": 60.0,
        "ranks": 2,
        "alone": "cpu",
        "parity": None,
    }
    found = collect(write_comparison(tmp_path / "compare", [CPU, MLX, several], 6, 30, 0.004, 1))
    together = found.named("cpu-x2")
    assert (together.ranks, together.ranked, together.parity, together.state) == (2, False, "pass", "ok")
    assert found.verdict.fastest == "mlx"  # though two processes took less
    shown = {section.id: section for section in contents.report(found).sections}
    assert [row.cells[0] for row in shown["variants"].tables[0].rows] == ["MLX compiled", "CPU eager"]
    (table,) = shown["together"].tables
    one, two = (dict(zip(table.columns, row.cells, strict=True)) for row in table.rows)
    assert (one["processes"], two["processes"]) == ("1", "2")
    share = together.tokens_per_s / found.named("cpu").tokens_per_s / 2
    assert two["efficiency"] == f"{100 * share:.1f} %"
    entries = leaderboard.entries(tmp_path / "compare")
    reasons = {entry.variant.name: entry.unranked() for entry in entries}
    assert reasons == {"mlx": None, "cpu": None, "cpu-x2": "2 processes together: not ranked with single ones"}
