"""The benchmarks' own arithmetic on known numbers, and that each script starts. Nothing is timed here."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nanogpt_mac.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


@pytest.fixture
def load(monkeypatch):
    """A module of the folder, by name, imported as a script imports it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_does(load, capsys, script):
    with pytest.raises(SystemExit) as end:
        load(script).main(["--help"])
    assert end.value.code == 0
    assert f"benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--rounds", "0"], "argument --rounds: 0: use a number above 0"),
        (["--limit", "nan"], "argument --limit: nan: use a number above 0"),
        (["--out", "nowhere/found.json"], "argument --out: nowhere/found.json: there is no such folder; make it first"),
        (["--read", "nowhere.json"], "argument --read: nowhere.json: there is no such file"),
        (["--images", "-3"], "argument --images: -3: use a number above 0"),
        (["--batches", "8", "0"], "argument --batches: [8, 0]: use a number above 0"),
        (["--widths", "784", "4"], "submission.py: --widths 784 4: use at least two"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(load, capsys, tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    script = load("submission")
    monkeypatch.setattr(sys, "argv", ["submission.py", *given])
    with pytest.raises(SystemExit) as end:
        load("_side_by_side").run(script.main)
    assert end.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_known_numbers(load):
    found = load("_side_by_side").figures(range(1, 12))
    assert (found.count, found.min, found.p10, found.median, found.p90, found.max) == (11, 1, 2, 6, 10, 11)
    with pytest.raises(ValueError, match="no measurements"):
        load("_side_by_side").figures([])


def test_a_ratio_is_made_within_rounds(load):
    # A machine that is five times slower in the second round hits both sides, and no ratio.
    found = load("_side_by_side").ratio([[10, 11, 12], [50, 55, 60]], [[5, 5.5, 6], [20, 27.5, 30]])
    assert found.rounds == (2.0, 2.0)
    uneven = load("_side_by_side").ratio([[8.0], [2.0], [4.0]], [[1.0], [1.0], [1.0]])
    assert (uneven.value, uneven.min, uneven.median, uneven.max) == (pytest.approx(4.0), 2.0, 4.0, 8.0)


def test_sides_take_turns_and_the_order_moves_on(load):
    beside, ran = load("_side_by_side"), []

    def side(name):
        return beside.Side(name, lambda: ran.append(name) or [1.0, 3.0])

    sides = [side(name) for name in "abc"]
    beside.interleave(sides, 3, time.monotonic() + 60)
    assert "".join(ran) == "abcbcacab"
    found = beside.compared(sides)
    assert (found["base"], found["rounds"], list(found["faster"])) == ("a", 3, ["b", "c"])
    assert found["sides"][0]["round_medians"] == [2.0, 2.0, 2.0]


def test_no_round_starts_that_would_pass_the_limit(load):
    beside = load("_side_by_side")
    side = beside.Side("a", lambda: time.sleep(0.02) or [1.0])
    beside.interleave([side], 1000, time.monotonic() + 0.01)
    assert len(side.rounds) == 1


def test_a_path_of_this_machine_is_not_kept(load):
    beside = load("_side_by_side")
    assert [beside._without_folder(a) for a in ("/home/me/nanoGPT", "--peer=/a/b", "--dtype=high")] == [
        "nanoGPT",
        "--peer=b",
        "--dtype=high",
    ]


# -- sides ------------------------------------------------------------------------------------------------------------


def test_how_a_side_is_spelt(load):
    how = load("_sides").How.parse("ours+compile+bfloat16+fused_adamw=false+compile_mode=max-autotune")
    assert (how.ours, how.compile, how.dtype) == (True, True, "bfloat16")
    assert how.settings == {"fused_adamw": False, "compile_mode": "max-autotune"}
    assert load("_sides").How.parse("peer").dtype == "float32"


@pytest.mark.parametrize("side", ["theirs", "ours+fast", "peer+fused_adamw=true", "peer+compiled"])
def test_a_side_that_cannot_be_meant(load, side):
    with pytest.raises(InputError, match="use ours or peer, then any of"):
        load("_sides").How.parse(side)


class Known:
    """A program with these losses."""

    def __init__(self, losses, logits):
        self.losses, self.facts = losses, {"logits": logits}

    def loss(self, iteration):
        return self.losses[iteration]


@pytest.mark.parametrize(
    ("side", "off", "logits", "tf32", "same"),
    [
        ("peer+compile", 1e-5, "torch.float32", False, True),
        ("peer+compile", 1e-3, "torch.float32", False, False),
        ("peer+compile", 1e-3, "torch.float32", True, True),
        ("peer+compile", 1e-5, "torch.bfloat16", False, False),  # float32 by name alone
        ("peer+bfloat16", 1e-2, "torch.bfloat16", False, True),
        ("peer+bfloat16", 1e-1, "torch.bfloat16", False, False),
    ],
)
def test_the_check_finds_what_does_not_compute_the_same(load, tmp_path, side, off, logits, tf32, same):
    sides = load("_sides")
    work = sides.Work(sides.RECIPES["tiny"], None, 65, tmp_path)
    exact = [4.2, 4.1, 4.0]

    def build(work, how):
        return Known(exact, "torch.float32") if how.name == "peer" else Known([x + off for x in exact], logits)

    hows = [sides.How.parse(side)]
    found = sides.same_losses(build, work, hows, sides.How.parse("peer"), 3, tf32)
    assert found["same"] is same
    assert found["sides"][0]["largest_difference"] == pytest.approx(off, rel=1e-6)
    assert ("warning" in found["sides"][0]) == (logits != "torch.float32" and "bfloat16" not in side)


def test_a_moment_in_which_two_kernels_run_is_counted_once(load):
    union = load("torch_step").union
    assert union([(5, 7), (0, 2), (1, 3), (2.5, 2.75), (10, 11)]) == pytest.approx(3 + 2 + 1)
    assert union([]) == 0


# -- scripts ----------------------------------------------------------------------------------------------------------


def test_what_a_programs_lines_say(load):
    lines = [
        (1.0, "number of parameters: 0.80M"),
        (2.0, "step 0: train loss 4.2800, val loss 4.2900"),
        (2.5, "iter 0: loss 4.2841, time 500.00ms, mfu -100.00%"),
        (2.7, "iter 10: loss 4.0000, time 20.00ms, mfu 1.00%"),
        (3.0, "iter 20: loss 3.9000, time 30.00ms, mfu 1.00%"),
        (4.0, "step 20: train loss 3.1000, val loss 3.2000"),
        (4.5, "iter 30: loss 3.8000, time 30.00ms, mfu 1.00%"),
        (5.0, "step 30: train loss 3.1000, val loss 3.3000"),
    ]
    found = load("whole_run").read(lines)
    assert (found["first_iteration_s"], found["first_loss"], found["last_evaluation_s"]) == (2.5, 4.2841, 5.0)
    assert (found["first_val_loss"], found["best_val_loss"], found["last_val_loss"]) == (4.29, 3.2, 3.3)
    blocks = found["iteration_ms"]  # not the one with an evaluation in it
    assert (blocks["count"], blocks["min"], blocks["max"]) == (2, pytest.approx(20.0), pytest.approx(30.0))
    assert load("whole_run").read(lines[:1])["first_iteration_s"] is None


def test_the_loop_is_run_with_and_without_its_records(load, capsys):
    argv = ["--recipe", "tiny", "--rounds", "2", "--iterations", "4", "--warmup", "2", "--no-wandb"]
    assert load("overhead").main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(side["round_medians"]) for side in found["sides"]] == [2, 2]
    assert found["added_share"]["recorded"] == pytest.approx(1 / found["faster"]["recorded"]["value"] - 1, abs=1e-5)


def test_a_large_corpus_stays_on_the_host(load, capsys):
    argv = ["--recipe", "tiny", "--gigabytes", "0.6", "--rounds", "1", "--iterations", "10", "--warmup", "1"]
    assert load("memmap").main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [side["settings"]["resident_data"] for side in found["sides"]] == [["train"], []]
    assert (found["sparse"], found["sides"][1]["tokens"]) == (True, 300_000_000)


def test_mlx_primitives_grow_with_the_layers(load, capsys):
    counted = []
    for layers in ("1", "2"):
        argv = ["--device", "mlx", "--recipe", "tiny", "--layers", layers, "--side", "peer", "--side", "ours"]
        assert load("counts").main(argv) == 0
        counted.append([side["not_views"] for side in json.loads(capsys.readouterr().out)["an_iteration"]])
    assert all(one > 20 and one < two < 2 * one for one, two in zip(*counted, strict=True))


def test_points_change_one_size_at_a_time(load):
    size = load("size")
    few, every = size.points(size.FEW), size.points(size.RANGES)
    assert set(few) <= set(every)
    assert (len(few), few[0]) == (8, size.Point(256, 64, 384))
    base = vars(few[0])
    assert all(sum(base[key] != value for key, value in vars(point).items()) == 1 for point in every[1:])


def test_the_floor_of_the_full_recipe_on_an_h100(load):
    size = load("size")
    result = {"card": "NVIDIA H100 80GB HBM3", "point": vars(size.points({})[0]), "vocabulary": 65, "dtype": "bfloat16"}
    weights = 65 * 384 + 6 * (12 * 384**2 + 2 * 384) + 384  # without wpe, as nanoGPT counts them
    flops = 256 * 64 * (6 * weights + 12 * 6 * 384 * 256)
    assert size.floor_ms(result) == pytest.approx(flops / 989.4e12 * 1e3, rel=0.01)  # more than 2.3 GB at 3.35 TB/s
    assert size.floor_ms({**result, "card": "a card of tomorrow"}) is None


def test_the_plot_is_drawn_from_the_lines(load, tmp_path):
    size = load("size")
    path = tmp_path / "lines.jsonl"
    facts = {"card": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "dtype": "bfloat16", "vocabulary": 65}
    sides = {name: {"ms": {"median": ms}, "reserved": 2**30} for name, ms in (("ours", 5.0), ("peer", 13.0))}
    rows = [{**facts, "point": vars(point), "sides": sides} for point in size.points(size.FEW)]
    rows.append({"point": vars(size.Point(512, 64, 384)), "error": "ended with exit code 9", "sides": {}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert size.main(["--results", str(path), "--plot", str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").read_text().count("<path") > 10
    with pytest.raises(InputError, match="holds no measured point"):
        size.main(["--results", str(tmp_path / "none"), "--plot", str(tmp_path / "plot.svg")])


def test_two_that_share_turns_are_timed_one_by_one(load, tmp_path):
    beside, inside, most = load("_side_by_side"), [], []
    parser = beside.parser(None, rounds=1)
    beside.add_turns(parser)
    args = parser.parse_args(["--turns", str(tmp_path / "turns"), "--others", "1"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(beside.os, "getpid", threading.get_ident)

        def timed():
            with beside.turn(args, time.monotonic() + 20):
                inside.append(1)
                most.append(len(inside))
                assert len(list((tmp_path / "turns").glob("*.ready"))) == 2  # none before both have compiled
                time.sleep(0.05)
                inside.pop()

        threads = [threading.Thread(target=timed) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1, 1]


CHILD = """
import json, sys
point = json.loads(sys.argv[-1])
if point["batch_size"] == 256:
    sys.exit(3)  # before it is ready
print("READY", flush=True)
assert sys.stdin.readline() == "GO\\n"
side = {"ms": {"median": 1.5}, "reserved": 2**30}
print(json.dumps({"point": point, "sides": {"ours": side, "peer": {"error": "out of memory"}}}), flush=True)
"""


def test_a_point_that_fails_harms_no_other_and_is_tried_again(load, tmp_path, monkeypatch, capsys):
    size = load("size")
    script, lines = tmp_path / "child.py", tmp_path / "lines.jsonl"
    script.write_text(CHILD)
    monkeypatch.setattr(size, "__file__", str(script))
    monkeypatch.setattr(size.kinds, "resolve", lambda name: name)
    argv = ["--peer", str(tmp_path), "--points", "few", "--results", str(lines), "--together", "3"]
    assert size.main(argv) == 0
    found = size.read(lines)
    assert [bool(result["sides"]) for result in found].count(False) == 1
    assert len(found) == 8
    assert "peer out of memory" in capsys.readouterr().err
    script.write_text(CHILD.replace("== 256", "== 257"))
    assert size.main(argv) == 0
    assert [result["point"]["batch_size"] for result in size.read(lines)[8:]] == [256]  # only what had failed


def test_a_device_that_is_not_here_is_one_line(load, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")  # which the script changes
    with pytest.raises(InputError, match="backend=cuda: not available here: torch finds no CUDA device"):
        load("torch_step").main(["--peer", str(tmp_path), "--device", "cuda"])
    with pytest.raises(InputError, match=r"has no model\.py; use a checkout of"):
        load("torch_step").main(["--peer", str(tmp_path), "--recipe", "tiny"])


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_efficiency_is_against_one_process_of_the_same_program(load):
    results = [
        {"name": "ours-torch", "size": 1, "tokens_per_s": 100.0},
        {"name": "nanoGPT", "size": 1, "tokens_per_s": 50.0},
        {"name": "ours-torch", "size": 4, "tokens_per_s": 380.0},
        {"name": "nanoGPT", "size": 4, "error": "late"},
    ]
    load("ranks").compare(results)
    assert [result["efficiency"] for result in results] == [1.0, 1.0, 0.95, None]
    assert [result["times_nanogpt"] for result in results] == [2.0, None, None, None]


LATE = """import subprocess, sys, time
rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(f"rank {child.pid}", flush=True)
for i in range(8):
    print(f"iter {i}: loss {11 - i:.4f}, time 100.00ms", flush=True)
time.sleep(60)
"""


def test_a_step_that_is_late_is_ended_with_its_processes_and_keeps_its_figures(load, tmp_path):
    step = load("ranks").Step("nanoGPT", 1, [sys.executable, "-c", LATE], tmp_path)
    step.start()
    while "iter 7" not in step.log:
        assert step.process.poll() is None, step.log
        time.sleep(0.05)
    step.wait(time.monotonic())
    found = load("ranks").read(step, {"accumulation": 1, "batch_size": 2, "block_size": 5}, str(tmp_path))
    assert found["error"].startswith("exit code -15, 3 iterations")
    assert found["tokens_per_s"] == pytest.approx(100.0)
    rank = int(found["log"][0].removeprefix("rank "))  # in a session of its own, as torchrun's are
    until = time.monotonic() + 20  # killed, and not gone at once
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_nanogpts_lines_are_read_after_the_first(load, tmp_path):
    lines = [f"iter {i}: loss {11 - i:.4f}, time {100.0 + i:.2f}ms, mfu -100.00%" for i in range(8)]
    (tmp_path / "nanoGPT-2.log").write_text("\n".join([*lines, "peak of rank 1: 7", "peak of rank 0: 6"]))
    times, losses, extra = load("ranks")._peers(load("ranks").Step("nanoGPT", 2, [], tmp_path))
    assert times == [105.0, 106.0, 107.0]
    assert (losses[0], losses[-1], extra["peak_memory"]) == (11.0, 4.0, [6, 7])


def cells(**sides):
    """Of a document of submission.py: ms by side and batch."""
    return [
        {"side": name, "batch": batch, "off": 1e-7, "ms": {"median": ms}}
        for name, of in sides.items()
        for batch, ms in of.items()
    ]


LAUNCH, NAIVE = "tiled, a wait a launch", "naive, a graph a batch"


def test_up_to_which_batch_structure_is_worth_more_than_kernels(load, tmp_path):
    submission = load("submission")
    found = cells(v3={8: 10, 32: 10, 128: 10}, cuda={8: 40, 32: 20, 128: 5})
    for name, of in ((LAUNCH, {8: 80, 32: 40, 128: 20}), (NAIVE, {8: 20, 32: 20, 128: 40})):
        found += [{**cell, "side": name} for cell in cells(x=of)]
    gains = submission.gains(found)
    assert gains[submission.STRUCTURE] == {8: 8, 32: 4, 128: 2}
    assert gains[submission.KERNELS] == {8: 2, 32: 2, 128: 4}
    crossings = submission.crossings(found)
    assert crossings["structure beats kernels"] == pytest.approx(64)  # 4 to 2 and 2 to 4 over the same logarithms
    assert crossings["v3 beats cuda"] == pytest.approx(64)
    assert submission.crossings(cells(v3={8: 10}, cuda={8: 40}))["v3 beats cuda"] == "8 and beyond"
    assert submission.crossings(cells(v3={8: 10}, cuda={8: 4}))["v3 beats cuda"] is None
    document = {"cells": found, "gains": gains, "widths": [784, 10], "images": 60_000}
    (tmp_path / "found.json").write_text(json.dumps(document))
    argv = ["--read", str(tmp_path / "found.json"), "--plot", str(tmp_path / "plot.svg")]
    assert submission.main(argv) == 0
    assert "ms an epoch of 60,000 images" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(InputError, match="add --plot FILE"):
        submission.main(argv[:2])


def test_the_last_batch_is_checked_too(load):
    data = load("submission").Data.of((49, 10), 100)
    assert len(data.short(32, 2)) == 2 * 32 + 4
    assert len(data.short(50, 3)) == 100
    assert len(data.short(128, 3)) == 100


@pytest.mark.slow
def test_submissions_run_in_tritons_interpreter(tmp_path):
    """As on a GPU, but for graphs, and for times that say anything."""
    argv = ["--device", "cpu", "--batches", "4", "--images", "10", "--widths", "16", "8", "10", "--seconds", "0"]
    argv = [sys.executable, str(FOLDER / "submission.py"), *argv, "--plot", str(tmp_path / "plot.svg")]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1200, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"v1", "v2", "v3", "cpu"} <= {cell["side"] for cell in found["cells"]}
    assert all(cell["off"] < 1e-5 for cell in found["cells"])
