"""What becomes of a run of two ranks when one is killed or hangs, the disk is full, or ranks disagree: many times each.

    python benchmarks/faults.py --tries 20
    python benchmarks/faults.py --tries 20 --engine mlx --fault killed --fault stopped

Each try starts a small run under torchrun or mlx.launch, does the harm once the first checkpoint is there, and takes
the time until every process is gone. A try is right where the exit code, the one line and the checkpoint, which is read
whole, are as they should be. `hung`: the main thread sleeps, the process lives.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _side_by_side as beside
import psutil

from nanogpt_mac.corpus import DataConfig, prepare
from nanogpt_mac.errors import InputError
from nanogpt_mac.train import checkpoint

LATE_S = 120.0
RECIPE = "experiment=smoke data=stand_in gemm_seconds=0 wandb.mode=disabled sample_tokens=0 log_interval=1000 "
RECIPE += (
    "gradient_accumulation_steps=4 max_iters=100000 lr_decay_iters=100000 eval_interval=5 eval_iters=1 run_dir=run"
)
# Both ranks run this. By their variables: SIGUSR1 makes the main thread sleep, and rank 1 has another seed or torch.
WRAPPER = """import importlib.metadata as metadata, os, runpy, signal, sys, time
sys.argv = sys.argv[1:]
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(10**6))
if os.environ.get("RANK", os.environ.get("MLX_RANK")) == "1":
    sys.argv += os.environ.get("SECOND_RANK", "").split()
    if other := os.environ.get("SECOND_VERSION"):
        known = metadata.version
        metadata.version = lambda name: other if name == "torch" else known(name)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Fault:
    """`says` is a pattern of the one line; `rank` gets `signum`; `code`: of torchrun, which gives 1 for any failure."""

    says: str
    signum: int = 0
    rank: int = 1
    variables: tuple[tuple[str, str], ...] = ()
    largest_file: int = 0
    restarts: int = 0
    trained: bool = True  # a checkpoint must be there, and be whole


FAULTS = {
    "killed": Fault(r"rank 1 .* is gone: .*go on with init_from=resume run=run", signal.SIGKILL),
    "first killed": Fault(r"rank 0 .* is gone: .*go on with init_from=resume run=run", signal.SIGKILL, rank=0),
    "stopped": Fault(r"rank 1 .* has not answered for 1\d s: .*init_from=resume run=run", signal.SIGSTOP),
    "first stopped": Fault(r"rank 0 .* has not answered for 1\d s: .*init_from=resume run=run", signal.SIGSTOP, rank=0),
    "hung": Fault(r"no iteration for 3\d s: .*go on with init_from=resume run=run", signal.SIGUSR1),
    "full disk": Fault(r"File too large; make room there", largest_file=20_000, trained=False),
    "other config": Fault(
        r"rank 1 has seed=7, rank 0 has seed=1337", variables=(("SECOND_RANK", "seed=7"),), trained=False
    ),
    "other version": Fault(
        r"rank 1 has torch 1.0, rank 0 has torch", variables=(("SECOND_VERSION", "1.0"),), trained=False
    ),
    "restarted": Fault(r"from run=.*run at iteration [1-9]", signal.SIGKILL, restarts=1),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=1)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--engine", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only these")
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    faults = args.fault or [name for name in FAULTS if args.engine == "torch" or name != "restarted"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "wrapper.py").write_text(WRAPPER)
        prepare(DataConfig("stand_in", dir=f"{name}/data"))  # once, and before a disk is full
        for fault in faults:
            tries = []
            for number in range(args.tries):
                if time.monotonic() > deadline:
                    break
                folder = Path(name) / f"{fault.replace(' ', '-')}-{number}"
                folder.mkdir()
                tries.append(tried(FAULTS[fault], args.engine, folder))
            if not tries:
                continue
            seconds = [one["seconds"] for one in tries]
            wrong = [one for one in tries if one["wrong"]]
            found[fault] = {"tries": len(tries), "right": len(tries) - len(wrong), "wrong": wrong[:3]}
            found[fault] |= {"seconds": asdict(beside.figures(seconds)), "line": tries[0]["line"]}
            beside.say(
                f"{fault}: {found[fault]['right']} of {len(tries)} right, {max(seconds):.1f} s at most {wrong[:1]}"
            )
    beside.finish("faults", args, {"faults": found})
    return 0 if all(one["right"] == one["tries"] for one in found.values()) else 1


def tried(fault: Fault, engine: str, folder: Path) -> dict[str, Any]:
    script = [str(folder.parent / "wrapper.py"), str(beside.ROOT / "train.py"), *RECIPE.split(), "data_dir=../data"]
    python = Path(sys.executable)
    if engine == "mlx":
        script += ["backend=mlx", "compile=false"]
        argv = [str(python.with_name("mlx.launch")), "-n", "2", "--python", str(python), *script]
    else:
        torchrun = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        argv = [*torchrun, f"--max-restarts={fault.restarts}", *script, "backend=cpu"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env={**os.environ, **dict(fault.variables), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_limited(fault.largest_file),
        )
    begun = time.monotonic()
    try:
        ranks: list[psutil.Process] = []
        if fault.signum:
            while not (folder / "run" / "ckpt" / "last").exists():
                if process.poll() is not None or time.monotonic() - begun > LATE_S:
                    return _result(folder, fault, process, begun, "no checkpoint came")
                time.sleep(0.05)
            ranks = _ranks(process.pid)
            begun = time.monotonic()
            ranks[fault.rank].send_signal(fault.signum)
        if fault.restarts:
            while not (folder / "run-2" / "ckpt" / "last").exists():
                if process.poll() is not None or time.monotonic() - begun > LATE_S:
                    return _result(folder, fault, process, begun, "it was not started again")
                time.sleep(0.05)
            return _result(folder, fault, process, begun)
        try:
            process.wait(LATE_S)
        except subprocess.TimeoutExpired:
            return _result(folder, fault, process, begun, "it did not end")
        left = [rank.pid for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
        return _result(folder, fault, process, begun, f"processes are left: {left}" if left else "")
    finally:
        for child in _children(process.pid):
            child.kill()
        process.kill()
        process.wait()


def _result(folder: Path, fault: Fault, process: Any, begun: float, wrong: str = "") -> dict[str, Any]:
    seconds = time.monotonic() - begun
    log = (folder / "log").read_text(errors="replace")
    lines = [line for line in log.splitlines() if re.search(fault.says, line)]
    if not wrong and len(lines) != 1:
        wrong = f"{len(lines)} lines say {fault.says}"
    if not wrong and process.poll() == 0 and "mlx.launch" not in " ".join(process.args):  # which always gives 0
        wrong = "exit code 0"
    if not wrong and fault.trained:
        try:
            checkpoint.open_run(str(folder / "run"))
        except InputError as error:
            wrong = str(error)
    kept = [line for line in log.splitlines() if not line.startswith(("iter", "step"))]
    tail = "\n".join(kept[:30]).replace(str(folder.parent), "") if wrong else ""
    return {"seconds": seconds, "wrong": wrong, "line": lines[0].strip() if lines else None, "log": tail}


def _limited(largest_file: int) -> Callable[[], None] | None:
    """For a child: no file larger than that, which is how a full disk looks to who writes."""
    if not largest_file:
        return None
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _ranks(pid: int) -> list[psutil.Process]:
    """The two processes that train, by rank."""
    found = {}
    for child in _children(pid):
        variables = child.environ()
        rank = variables.get("RANK", variables.get("MLX_RANK"))
        if rank is not None and "python" in child.name() and "wrapper.py" in " ".join(child.cmdline()):
            found.setdefault(int(rank), child)
    return [found[rank] for rank in sorted(found)]


if __name__ == "__main__":
    beside.run(main)
