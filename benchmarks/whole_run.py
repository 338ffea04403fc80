"""Our train.py and nanoGPT's as processes, from their start: to the first logged iteration, or to their exit.

    python benchmarks/whole_run.py --peer nanoGPT --device cpu --recipe quick --until first
    python benchmarks/whole_run.py --peer nanoGPT --device cuda --compile --dtype bfloat16 --until exit --rounds 1

Both print nanoGPT's lines, which are read and stamped here. Each runs as it comes but for what the options name, with a
folder of its own for compiled code; the first round fills that folder and is given apart, as `cold`. nanoGPT's files
are linked into a scratch folder, so that nothing is written into the checkout.
"""

from __future__ import annotations

import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _side_by_side as beside
from _sides import DTYPES, RECIPES, Work

from nanogpt_mac.backends import kinds
from nanogpt_mac.errors import InputError

ITERATION = re.compile(r"iter (\d+): loss ([\d.]+), time")
EVALUATION = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
STOP_S = 60.0


@dataclass
class Program:
    """A command line, and what its lines said, one entry a run."""

    name: str
    argv: list[str]
    folder: Path
    until: str
    environment: dict[str, str]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def command(self, scratch: str) -> str:
        """What was run, without this machine's folders."""
        return shlex.join(self.argv[1:]).replace(scratch, "").replace(f"{beside.ROOT}/", "")

    def __call__(self) -> list[float]:
        begin = time.perf_counter()
        child = subprocess.Popen(
            self.argv,
            cwd=self.folder,
            env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert child.stdout is not None
        lines: list[tuple[float, str]] = []
        for line in child.stdout:
            lines.append((time.perf_counter() - begin, line.rstrip()))
            if self.until == "first" and ITERATION.match(line):
                child.send_signal(signal.SIGTERM)
                break
        child.stdout.read()
        try:
            code = child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        ended = time.perf_counter() - begin
        found = read(lines)
        if found["first_iteration_s"] is None or (self.until == "exit" and code):
            tail = "\n".join(line for _, line in lines[-8:])
            raise InputError(f"{self.name} ended with exit code {code}: {shlex.join(self.argv)}\n{tail}")
        self.runs.append(found | {"exit_s": ended if self.until == "exit" else None})
        return [found["first_iteration_s"] if self.until == "first" else ended]


def read(lines: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """What a program's stamped lines say: seconds since its start, losses, and ms an iteration between the stamps of
    two logged iterations without an evaluation between them."""
    first, previous, blocks, evaluations = None, None, [], []
    for at, line in lines:
        if match := ITERATION.match(line):
            number = int(match[1])
            if first is None:
                first = at, float(match[2])
            if previous is not None and number > previous[1]:
                blocks.append((at - previous[0]) / (number - previous[1]) * 1e3)
            previous = at, number
        elif match := EVALUATION.match(line):
            evaluations.append((at, float(match[3])))
            previous = None
    losses = [loss for _, loss in evaluations]
    return {
        "first_iteration_s": first[0] if first else None,
        "first_loss": first[1] if first else None,
        "last_evaluation_s": evaluations[-1][0] if evaluations else None,
        "first_val_loss": losses[0] if losses else None,
        "best_val_loss": min(losses, default=None),
        "last_val_loss": losses[-1] if losses else None,
        "iteration_ms": vars(beside.figures(blocks)) if blocks else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=5)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT; without it ours runs alone")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--recipe", choices=("quick", "full"), default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true", help="both; without it neither")
    parser.add_argument("--until", choices=("first", "exit"), default="first")
    parser.add_argument("--no-cold", action="store_true", help="leave the cold round out: then the first round is cold")
    parser.add_argument("--text", type=Path, help="train on it (default: the built-in stand-in)")
    parser.add_argument("--iterations", type=int, help="of a whole run (default: the recipe's)")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="another override of train.py")
    beside.add_turns(parser)
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    kinds.resolve(args.device)
    with tempfile.TemporaryDirectory() as name:
        programs = [make(args, Path(name)) for make in ((nanogpt, ours) if args.peer else (ours,))]
        for program in [] if args.no_cold else programs:
            program()
        sides = [beside.Side(p.name, p, {"command": p.command(name)}, "s") for p in programs]
        with beside.turn(args, deadline):
            beside.interleave(sides, args.rounds, deadline)
    for program, side in zip(programs, sides, strict=True):
        cold = None if args.no_cold else program.runs.pop(0)
        side.facts |= {"cold": cold, "runs": program.runs}
    peer = beside.checksum(args.peer, "*.py") if args.peer else None
    beside.finish("whole_run", args, {"peer": peer, **beside.compared(sides)})
    return 0


def nanogpt(args: Any, scratch: Path) -> Program:
    """Its README's command for the recipe."""
    folder = scratch / "nanoGPT"
    corpus = folder / "data" / "shakespeare_char"
    corpus.mkdir(parents=True)
    if not (args.peer / "train.py").is_file():
        raise InputError(f"--peer {args.peer}: has no train.py; use a checkout of github.com/karpathy/nanoGPT")
    for file in ("train.py", "model.py", "configurator.py", "config"):
        (folder / file).symlink_to((args.peer / file).resolve())
    work = Work.of(RECIPES[args.recipe], args.text, corpus)
    (corpus / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": work.vocab_size}))
    given: dict[str, Any] = {"device": args.device, "dtype": args.dtype, "compile": args.compile}
    if args.recipe == "quick":
        recipe = work.recipe
        given |= {key: getattr(recipe, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}
        given |= {"dropout": 0.0, "eval_iters": 20, "max_iters": 2000, "lr_decay_iters": 2000}
    if args.iterations:
        given["max_iters"] = args.iterations
    argv = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
    argv += [f"--{key}={value}" for key, value in given.items()]
    return Program("peer", argv, folder, args.until, _caches(folder))


def ours(args: Any, scratch: Path) -> Program:
    folder = scratch / "ours"
    folder.mkdir()
    corpus = [f"data=text path={args.text.resolve()}"] if args.text else ["data=stand_in"]
    given = [f"experiment={args.recipe}", f"backend={args.device}", f"dtype={args.dtype}", *corpus[0].split()]
    given += [f"compile={str(args.compile).lower()}", "run_dir=runs/{date}/{time}-{name}", *args.ours]
    if args.iterations:
        given.append(f"max_iters={args.iterations}")
    argv = [sys.executable, str(beside.ROOT / "train.py"), *given]
    return Program("ours", argv, folder, args.until, _caches(folder))


def _caches(folder: Path) -> dict[str, str]:
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {variable: str(folder / name) for variable, name in names.items()}


if __name__ == "__main__":
    beside.run(main)
