"""Several processes as one run, under the launchers that users have, beside one process."""

import json
import os
import signal
import subprocess
import threading
import time

import psutil
import pytest
from fakes.support import ROOT

from nanogpt_mac import cli, ranks
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import TrainState
from nanogpt_mac.overrides import merged
from nanogpt_mac.ranks import Launched
from nanogpt_mac.train import checkpoint, session, together
from nanogpt_mac.train.together import Together

ITERATIONS, SAME = 50, 1e-3
TEXT = "".join(f"{a} and {b} went up the hill.\n\n" for a in ["Jack", "Jill", "Tom", "Ann"] for b in "abcdefghij" * 20)
RECIPE = ["experiment=smoke", "data=text", "path=text.txt", "gemm_seconds=0", "wandb.mode=disabled", "sample_tokens=0"]
RECIPE += ["model.n_layer=1", "gradient_accumulation_steps=4", f"max_iters={ITERATIONS}", "eval_interval=25"]
LAUNCHERS = {"cpu": ranks.TORCHRUN, "mlx": ranks.MLX}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder, backend, size, *overrides, restarts=0, script=ROOT / "train.py"):
    argv = ranks.command(LAUNCHERS[backend], size) if size > 1 else ranks.command(ranks.MLX, 1)[-1:]
    argv += ["--max-restarts=1"] if restarts else []
    recipe = [] if "init_from=resume" in overrides else RECIPE
    argv += [str(script), *merged(recipe, [f"backend={backend}", "compile=false", *overrides])]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:  # stdin is a pipe, because mlx.launch spins at its end
        return subprocess.Popen(argv, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)


def train(folder, backend, size, *overrides):
    with start(folder, backend, size, *overrides) as process:
        assert process.wait(300) == 0, (folder / "log").read_text()


def losses(run, kind="iteration", key="loss"):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["iter"]: row[key] for row in rows if row["kind"] == kind}


def furthest(one, other):
    assert one.keys() & other.keys()
    return max(abs(one[i] - other[i]) for i in one.keys() & other.keys())


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_two_processes_learn_what_one_does(folder, backend):
    train(folder, "cpu", 1, "run_dir=one")
    train(folder, backend, 2, "run_dir=two")
    one, two = folder / "one", folder / "two"
    assert list(losses(two)) == list(range(ITERATIONS))
    assert furthest(losses(one), losses(two)) < SAME
    validation = (losses(run, "evaluation", "val_loss") for run in (one, two))
    assert furthest(*validation) < SAME
    summary = json.loads((two / "summary.json").read_text())
    assert (summary["world_size"], summary["exit_state"]) == (2, "finished")
    world = summary["world"]
    assert [rank["rank"] for rank in world["ranks"]] == [0, 1]
    assert all(rank["times"]["count"] > 10 for rank in world["ranks"])
    _, (spec, _, _) = checkpoint.open_run(str(one))
    assert world["bytes_per_iter"] == 4 * (spec.n_params() + spec.block_size * spec.n_embd)
    assert world["exposed_ms"] > 0
    assert 0 < world["exposed_share"] < 1
    states = [checkpoint.open_run(str(run))[1][1] for run in (one, two)]
    for name, weight in states[0].weights.items():
        assert abs(weight - states[1].weights[name]).max() < SAME


def carried(folder, way):
    """A checkpoint goes from world to world; its last iterations beside those of a run that never stopped."""
    train(folder, "cpu", 1, "run_dir=whole")
    before = None
    for number, (backend, size) in enumerate(way, 1):
        until = [f"max_iters={ITERATIONS * number // len(way)}", f"run_dir=leg-{number}"]
        train(folder, backend, size, *until, *(f"init_from=resume run={before}".split() if before else []))
        before = f"leg-{number}"
        assert furthest(losses(folder / "whole"), losses(folder / before)) < 2e-3
    assert max(losses(folder / before)) == ITERATIONS - 1


@pytest.mark.slow
def test_a_checkpoint_goes_from_one_world_to_another(folder):
    carried(folder, [("cpu", 2), ("mlx", 1)])


@pytest.mark.slow
def test_a_checkpoint_goes_from_1_to_4_to_2_to_1_process(folder):
    carried(folder, [("mlx", 1), ("cpu", 4), ("mlx", 2), ("cpu", 1)])


def pids(process):
    """The ranks' processes, by rank, once there is a checkpoint."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK", child.environ().get("MLX_RANK"))
        if rank is not None and "train.py" in " ".join(child.cmdline()):
            found[int(rank)] = child.pid
    return found


def until(path, process, log):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    pytest.fail(log.read_text())


ENDLESS = ["max_iters=100000", "lr_decay_iters=100000", "eval_interval=5", "eval_iters=1", "run_dir=run"]


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_when_a_rank_is_killed(folder):
    log = folder / "log"
    with start(folder, "cpu", 2, *ENDLESS, restarts=1) as process:
        until(folder / "run" / "ckpt" / "last", process, log)
        os.kill(pids(process)[1], signal.SIGKILL)
        until(folder / "run-2" / "ckpt" / "last", process, log)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    words = log.read_text()
    assert "rank 1 (process " in words
    assert "is gone: it was killed, or has crashed; go on with init_from=resume run=run" in words
    _, (_, state, _) = checkpoint.open_run("run")
    first = min(losses(folder / "run-2"))
    assert first == state.iteration > 0  # rank 0 has saved what it knew
    assert json.loads((folder / "run-2" / "summary.json").read_text())["exit_state"] == "stopped"


# train.py whose rank 1 is killed in iteration 35, with the first of its sums under way.
DYING = f"""import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from nanogpt_mac.backends.torch_adamw import AdamW
from nanogpt_mac.backends.torch_world import TorchWorld

parts, begin = AdamW.parts, TorchWorld.begin
AdamW.parts = lambda self, most: parts(self, 5_000)


def dies(world, flat):
    if (world.rank, world.begun, len(world.under_way)) == (1, 36, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    begin(world, flat)


TorchWorld.begin = dies
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_that_dies_between_the_sums_of_an_iteration_ends_the_run(folder):
    (folder / "train.py").write_text(DYING)
    begun = time.monotonic()
    with start(folder, "cpu", 2, *ENDLESS, script=folder / "train.py") as process:
        assert process.wait(120) != 0
    words = (folder / "log").read_text()
    assert words.count("is gone: it was killed, or has crashed; go on with init_from=resume run=run") == 1
    assert time.monotonic() - begun < 60
    assert losses(folder / "run")
    _, (_, state, _) = checkpoint.open_run("run")
    assert state.iteration == 35


def test_mlx_ends_on_both_ranks(folder):
    with start(folder, "mlx", 2, *ENDLESS) as process:
        until(folder / "run" / "ckpt" / "last", process, folder / "log")
        both = pids(process)
        os.kill(both[0], signal.SIGKILL)
        process.wait(60)
    assert not any(psutil.pid_exists(pid) for pid in both.values())
    assert "rank 0 (process " in (folder / "log").read_text()
    checkpoint.open_run("run")


# -- what is said before anything is trained ---------------------------------------------------------------------------

TWO = Launched(ranks.TORCHRUN, 0, 2, 0, 2)


def refused(config, launched, name):
    options = session.backend_options(config, name)
    with pytest.raises(InputError) as error, together.joined(launched, config, options):
        pass
    return str(error.value)


def test_an_accumulation_that_does_not_divide_is_one_line():
    config = cli.compose(["gradient_accumulation_steps=5", "batch_size=12"])
    words = refused(config, TWO, "cpu")
    assert words.startswith("gradient_accumulation_steps=5: 2 ranks cannot share them; use a multiple of 2")
    assert words.endswith("such as gradient_accumulation_steps=2 and batch_size=30, the same work")
    words = refused(cli.compose(["gradient_accumulation_steps=1", "batch_size=5"]), TWO, "cpu")
    assert words.endswith("use a multiple of 2, such as gradient_accumulation_steps=2")


def test_each_engine_has_its_launcher():
    config = cli.compose(["gradient_accumulation_steps=2"])
    assert "backend=mlx: is not for torchrun; use mlx.launch -n 2" in refused(config, TWO, "mlx")
    words = refused(config, Launched(ranks.MLX, 0, 2), "cpu")
    assert "backend=cpu: is not for mlx.launch; use torchrun --nproc_per_node=2" in words


class Others(together.World):
    """A world whose other ranks say what a test has them say."""

    def __init__(self, change, devices=("", "")):
        super().__init__(0, 2)
        self.change, self.devices = change, devices

    def device(self):
        return self.devices[0]

    def gather(self, text):
        facts = json.loads(text)
        return [text, json.dumps({**facts, "device ": self.devices[1] or None, **self.change})]


@pytest.fixture
def state(spec):
    return TrainState.fresh(spec.init_weights(1337))


OPTIONS = session.backend_options(cli.compose([]), "cpu", compiled=True)
FACTS = {"versions": {"torch": "2.13.0"}, "git": {"commit": "abc"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_iters=": 7}, "rank 1 has max_iters=7, rank 0 has max_iters=5000"),
        ({"compile=": False}, "rank 1 has compile=False, rank 0 has compile=True"),  # of compile=auto
        ({"backend=": "mps"}, "rank 1 has backend=mps, rank 0 has backend=cpu"),
        ({"model.n_layer=": 2}, "rank 1 has model.n_layer=2, rank 0 has model.n_layer=6"),
        ({"torch ": "2.12.0"}, "rank 1 has torch 2.12.0, rank 0 has torch 2.13.0"),
        (
            {"nanogpt-mac at commit ": "def"},
            "rank 1 has nanogpt-mac at commit def, rank 0 has nanogpt-mac at commit abc",
        ),
        ({"weights with checksum ": 1}, "rank 1 has weights with checksum 1, rank 0 has weights with checksum "),
        ({"a corpus with sha256 ": "0"}, "rank 1 has a corpus with sha256 0, rank 0 has a corpus with sha256 1234"),
    ],
)
def test_ranks_that_differ_are_one_line(change, said, state):
    with pytest.raises(InputError) as error:
        Together(TWO, Others(change)).same(cli.compose([]), OPTIONS, FACTS, "1234", state)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_may_differ_from_machine_to_machine(state):
    others = Others({})
    Together(TWO, others).same(cli.compose(["run_dir=here", "data_dir=mine"]), OPTIONS, FACTS, "1234", state)


def test_two_ranks_on_one_gpu_are_one_line(state, monkeypatch):
    monkeypatch.setattr(together.socket, "gethostname", lambda: "a")
    others = Others({}, devices=("GPU-1", "a GPU-1"))
    with pytest.raises(InputError, match=r"ranks 0 and 1 share one GPU; start as many processes as there are GPUs$"):
        Together(TWO, others).same(cli.compose([]), OPTIONS, FACTS, "1234", state)
    Together(TWO, Others({}, devices=("GPU-1", "a GPU-2"))).same(cli.compose([]), OPTIONS, FACTS, "1234", state)


def test_a_mistake_of_one_rank_is_every_ranks():
    class World(together.World):
        def gather(self, text):
            return [text, "path=x: no such file"]

    with pytest.raises(InputError, match=r"^rank 1: path=x: no such file$"), Together(TWO, World(0, 2)).agreed():
        pass


def test_ranks_stop_together_or_not_at_all():
    one = Together(TWO, together.World(0, 2))
    assert one.stop([signal.SIGINT]) is None  # the others do not know yet
    assert one.world.asked
    one.world.heard(0.5)
    assert one.stop([signal.SIGINT]) == signal.SIGINT
    assert one.stop([]) == signal.SIGTERM  # on a rank that got no signal itself


def test_a_library_that_never_hangs_up_ends_in_a_line(monkeypatch):
    hung, ended = threading.Event(), []

    class World(together.World):
        def close(self):
            assert hung.wait(10)

    def end_now(code, line):
        ended.append((code, line))
        hung.set()

    monkeypatch.setattr(together, "CLOSE_S", 0.05)
    monkeypatch.setattr(together.signals, "end_now", end_now)
    Together(TWO, World(1, 2), code=1).close()
    assert ended == [(1, "train.py: rank 1 ends without hanging up, after 0 s; the run is complete")]
    Together(TWO, together.World(1, 2)).close()
    time.sleep(0.1)
    assert len(ended) == 1


def test_a_run_that_is_started_anew_goes_on(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    train(folder, "cpu", 1, "run_dir=first", "max_iters=2", "lr_decay_iters=20", "eval_interval=0")
    config = cli.compose([*RECIPE, "run_dir=first"])
    assert together.again(config, Launched(ranks.TORCHRUN)) is config
    together.note(Launched(ranks.TORCHRUN), folder / "first")
    found = together.again(config, Launched(ranks.TORCHRUN, restarts=1))
    assert (found.init_from, found.run, found.run_dir) == ("resume", str(folder / "first"), "first-2")
    together.note(Launched(ranks.TORCHRUN), folder / "without-a-checkpoint")
    found = together.again(config, Launched(ranks.TORCHRUN, restarts=1))
    assert (found.init_from, found.run_dir) == ("scratch", "first-2")
