"""GPT-2 124M on 1, 2, 4 ... processes: our train.py beside nanoGPT's, both under torchrun, on one machine in one call.

    python benchmarks/ranks.py --peer nanoGPT --sizes 1 2 --limit 230
    python benchmarks/ranks.py --sizes 1 2 --engines mlx --limit 330 --timeout 150
    python benchmarks/ranks.py --peer nanoGPT --sizes 1 --device cpu --recipe tiny

nanoGPT's config/train_gpt2.py: block 1024, batch 12, accumulation 40 shared among the ranks, bfloat16, compiled, AdamW.
The corpus is RANDOM token numbers, made here, more than a back end keeps on its device: both programs read it through
the memory map of a train.bin. Losses say nothing; times, tokens a second and memory do.

Programs of one process run side by side, a GPU each, where there are as many GPUs; with several processes one program
runs at a time. Every step has its own --timeout, and one that fails or is late is an `error` in the document. A step's
figures are a line of JSON on standard error, and in --out, as soon as it is over; the document is printed at the end,
or when a signal asks for it. `efficiency`: tokens a second of n processes over n times those of one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _side_by_side as beside
import numpy as np
import psutil

from nanogpt_mac.corpus.encoders import GPT2Encoder
from nanogpt_mac.corpus.openwebtext import DATASET, SPLIT_SEED
from nanogpt_mac.corpus.prepared import key_of, write_meta, write_split
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import merged

PEER_LINE = re.compile(r"iter (\d+): loss ([\d.a-z]+), time ([\d.]+)ms")
PEER_PEAK = re.compile(r"peak of rank (\d+): (\d+)")
WORDY = ("command", "details", "log")  # what a result's line leaves out
SETTLED = 5  # iterations after which nothing compiles or is recorded any more, of both programs
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12, "accumulation": 40},
    "tiny": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 1, "accumulation": 4},
}
# nanoGPT's train.py as it is, then what its allocator has held at most, which it does not print.
PEER = """import runpy, sys, os
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
import torch
if torch.cuda.is_available():
    print(f"peak of rank {os.environ.get('RANK', 0)}: {torch.cuda.max_memory_allocated()}", flush=True)
"""


@dataclass
class Step:
    """One program with one number of processes."""

    name: str
    size: int
    argv: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: Any = None
    begun: float = 0.0
    ended: float = 0.0

    def start(self) -> None:
        self.begun = time.monotonic()
        with (self.folder / f"{self.name}-{self.size}.log").open("wb") as log:
            self.process = subprocess.Popen(
                self.argv,
                cwd=self.folder,
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, until: float) -> None:
        """Until a value of time.monotonic(); what is late, or not wanted any more, is killed with all its processes."""
        try:
            self.process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end(5.0)
        except BaseException:
            self.end(0.0)
            raise
        self.ended = time.monotonic()

    def end(self, grace: float) -> None:
        """SIGTERM, and what is left after so many seconds is killed: torchrun's ranks are in sessions of their own."""
        if self.process is None:
            return
        try:
            ranks = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        self.process.kill()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # what is in the driver's hands outlives even this

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}-{self.size}.log").read_text(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=1)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT; without it ours runs alone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--recipe", choices=RECIPES, default="gpt2")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=110.0, help="seconds of a step")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="another override of train.py")
    parser.add_argument("--engines", nargs="+", choices=("torch", "mlx"), default=["torch"], help="of ours")
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    import torch

    recipe, gpus = RECIPES[args.recipe], torch.cuda.device_count()
    tokens = 150_000_000 if args.recipe == "gpt2" else 1_000_000
    peers = beside.checksum(args.peer, "*.py") if args.peer else None
    results: list[dict[str, Any]] = []
    found = {"corpus": f"{tokens} random tokens", "recipe": recipe, "peer": peers, "gpus": gpus, "steps": results}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with tempfile.TemporaryDirectory() as name:
            corpus(Path(name), tokens)
            with closing(measured(args, recipe, Path(name), gpus, deadline)) as every:
                for result in every:
                    results.append(result)
                    compare(results)
                    beside.say(json.dumps({key: value for key, value in result.items() if key not in WORDY}))
                    beside.finish("ranks", args, found, done=False)
    finally:
        beside.finish("ranks", args, found)
    return 0 if all("error" not in result for result in results) else 1


def measured(args: Any, recipe: dict[str, Any], scratch: Path, gpus: int, deadline: float) -> Iterator[dict[str, Any]]:
    """What every program comes to with every number of processes, each as soon as it is known."""
    for size in args.sizes:
        steps = [ours(args, recipe, scratch, size, engine) for engine in args.engines]
        steps += [peer(args, recipe, scratch, size)] if args.peer and (args.device == "cuda" or size == 1) else []
        if args.device == "cuda" and size > gpus:
            yield from ({"name": s.name, "size": size, "error": f"this machine has {gpus} GPUs"} for s in steps)
            continue
        together = size == 1 and args.device == "cuda" and gpus >= len(steps)
        if together:
            named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            for step, gpu in zip(steps, named, strict=False):
                step.environment["CUDA_VISIBLE_DEVICES"] = gpu
        for turn in [steps] if together else [[step] for step in steps]:
            if time.monotonic() > deadline - 20:
                yield from ({"name": s.name, "size": size, "error": "no time was left"} for s in turn)
                continue
            until = min(time.monotonic() + args.timeout, deadline - 10)  # which is what killing may take
            try:
                for step in turn:
                    step.start()
                for step in turn:
                    step.wait(until)
                    yield read(step, recipe, str(scratch)) | {"side_by_side": len(turn) > 1}
            finally:
                for step in turn:
                    step.end(0.0)


def corpus(scratch: Path, tokens: int) -> None:
    """Random GPT-2 tokens where our data=openwebtext looks for the prepared Hub data set, and where nanoGPT does."""
    identity = {"source": DATASET, "tokenizer": "gpt2", "val_fraction": 0.0005, "seed": SPLIT_SEED}
    folder = scratch / "data" / key_of("openwebtext", identity)
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    sizes = {"train": tokens, "val": 200_000}
    splits = {
        split: write_split(folder / f"{split}.bin", [draw.integers(0, 50257, size, np.uint16)])
        for split, size in sizes.items()
    }
    write_meta(folder, name="openwebtext", sha256=splits["train"].sha256, encoder=GPT2Encoder(), splits=splits)
    (scratch / "nanoGPT" / "data").mkdir(parents=True)
    (scratch / "nanoGPT" / "data" / "random").symlink_to(folder)


def ours(args: Any, recipe: dict[str, Any], scratch: Path, size: int, engine: str) -> Step:
    folder = scratch / f"ours-{engine}"
    folder.mkdir(exist_ok=True)
    backend = "mlx" if engine == "mlx" else args.device
    given = ["experiment=gpt2", f"backend={backend}", f"data_dir={scratch / 'data'}", f"run_dir=run-{size}"]
    given += [f"model.{key}={recipe[key]}" for key in ("n_layer", "n_head", "n_embd", "block_size")]
    given += [f"batch_size={recipe['batch_size']}", f"gradient_accumulation_steps={recipe['accumulation']}"]
    given += [f"max_iters={args.iterations}", f"timing_warmup={SETTLED - 1}", "eval_interval=0", "eval_iters=1"]
    given += ["checkpoint=false", "gemm_seconds=0", "sample_tokens=0", "wandb.mode=disabled", "log_interval=1"]
    given += ["dtype=bfloat16", "matmul_precision=high"] if args.device == "cuda" else []
    script = [str(beside.ROOT / "train.py"), *merged(given, args.ours)]
    if size == 1:
        launch = [sys.executable]
    elif engine == "mlx":
        by = ["--backend", "nccl", "--repeat-hosts", str(size)] if args.device == "cuda" else ["-n", str(size)]
        launch = [str(Path(sys.executable).with_name("mlx.launch")), *by, "--python", sys.executable]
    else:
        launch = torchrun(size)
    return Step(f"ours-{engine}", size, [*launch, *script], folder)


def peer(args: Any, recipe: dict[str, Any], scratch: Path, size: int) -> Step:
    folder = scratch / "nanoGPT"
    if not (args.peer / "train.py").is_file():
        raise InputError(f"--peer {args.peer}: has no train.py; use a checkout of github.com/karpathy/nanoGPT")
    for file in ("train.py", "model.py", "configurator.py", "config"):
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to((args.peer / file).resolve())
    (folder / "peer.py").write_text(PEER)
    given = {key: recipe[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
    given |= {"gradient_accumulation_steps": recipe["accumulation"], "max_iters": args.iterations - 1}
    given |= {"eval_interval": 10**6, "eval_iters": 1, "log_interval": 1, "wandb_log": False, "dataset": "random"}
    given |= {"device": args.device, "dtype": "bfloat16"} if args.device == "cuda" else {"device": "cpu"}
    given |= {} if args.device == "cuda" else {"compile": False, "dtype": "float32"}
    script = ["peer.py", "train.py", "config/train_gpt2.py", *(f"--{key}={value}" for key, value in given.items())]
    return Step("nanoGPT", size, [*(torchrun(size) if size > 1 else [sys.executable]), *script], folder)


def torchrun(size: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]


def read(step: Step, recipe: dict[str, Any], scratch: str) -> dict[str, Any]:
    """What a step has come to; `error` where that is nothing."""
    command = shlex.join(step.argv[1:]).replace(scratch, "").replace(f"{beside.ROOT}/", "")
    command = command.replace(sys.executable, "python")  # which mlx.launch is told
    found: dict[str, Any] = {"name": step.name, "size": step.size, "command": command}
    found["seconds"] = step.ended - step.begun
    times, losses, extra = _peers(step) if step.name == "nanoGPT" else _ours(step)
    if step.process.returncode != 0 or len(times) < 2:  # None: it could not even be killed
        tail = [line for line in step.log.replace(scratch, "").splitlines() if line.strip()][-25:]
        found |= {"error": f"exit code {step.process.returncode}, {len(times)} iterations", "log": tail}
    if len(times) < 2:
        return found
    tokens = recipe["accumulation"] * recipe["batch_size"] * recipe["block_size"]
    middle = statistics.median(times)
    figures = {"iteration_ms": vars(beside.figures(times)), "tokens_per_s": tokens / middle * 1e3}
    return found | figures | {"first_loss": losses[0], "last_loss": losses[-1], **extra}


def _peers(step: Step) -> tuple[list[float], list[float], dict[str, Any]]:
    lines = [(int(m[1]), float(m[2]), float(m[3])) for m in PEER_LINE.finditer(step.log)]
    peaks = {int(m[1]): int(m[2]) for m in PEER_PEAK.finditer(step.log)}
    times = [ms for number, _, ms in lines if number >= SETTLED]
    return times, [loss for _, loss, _ in lines], {"peak_memory": [peaks[rank] for rank in sorted(peaks)]}


def _ours(step: Step) -> tuple[list[float], list[float], dict[str, Any]]:
    run = step.folder / f"run-{step.size}"
    if not (run / "metrics.jsonl").is_file():
        return [], [], {}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    rows = [row for row in rows if row["kind"] == "iteration"]
    times, losses = [row["iter_ms"] for row in rows if _counts(row)], [row["loss"] for row in rows]
    if not (run / "summary.json").is_file():
        return times, losses, {}
    summary = json.loads((run / "summary.json").read_text())
    world = summary.get("world") or {"ranks": [{"peak_memory": summary["peak_memory"]}]}
    extra = {key: world.get(key) for key in ("by", "bytes_per_iter", "alone_ms")}
    extra |= {key: world.get(key) for key in ("exposed_ms", "exposed_share", "exposed_missing")}
    extra |= {"peak_memory": [rank["peak_memory"] for rank in world["ranks"]], "details": summary["details"]}
    extra |= {key: summary[key] for key in ("first_iter_s", "dispatch_ms", "mfu", "warnings")}
    return times, losses, extra


def _counts(row: dict[str, Any]) -> bool:
    return row["iter"] >= SETTLED and row.get("left_out") != "drain"


def compare(results: list[dict[str, Any]]) -> None:
    """Each program's efficiency against its own single process, and ours against nanoGPT's of the same size."""
    rates = {(r["name"], r["size"]): r["tokens_per_s"] for r in results if "tokens_per_s" in r}
    for result in results:
        name, size = result["name"], result["size"]
        rate, one, theirs = rates.get((name, size)), rates.get((name, 1)), rates.get(("nanoGPT", size))
        result["efficiency"] = rate / size / one if rate and one else None
        result["times_nanogpt"] = rate / theirs if rate and theirs and name != "nanoGPT" else None


if __name__ == "__main__":
    beside.run(main)
