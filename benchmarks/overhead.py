"""What the clock, the records, the console and wandb add to an iteration: the loop with and without them, taking turns.

    python benchmarks/overhead.py --device cpu --recipe quick
    python benchmarks/overhead.py --device cuda --recipe full --compile --dtype bfloat16

bare: the step alone, under a clock that keeps nothing. recorded: with the run's folder and a line every ten iterations,
as without wandb. wandb: with it as well, offline; its rows wait for the next pause, whose cost is given apart.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _side_by_side as beside
from _sides import CLOCKS, DTYPES, RECIPES, How, Ours, Work

from nanogpt_mac.backends import kinds
from nanogpt_mac.records.run import Denominators
from nanogpt_mac.train.clock import Clock
from nanogpt_mac.train.display import Lines
from nanogpt_mac.train.recorder import Recorder
from nanogpt_mac.train.recorder import Work as Flops
from nanogpt_mac.train.sinks import Folder, Sink, Wandb


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=30)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps", "mlx"), default="cpu")
    parser.add_argument("--recipe", choices=RECIPES, default="quick")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--iterations", type=int, default=20, help="of a side in a round")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-wandb", action="store_true")
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    kinds.resolve(args.device)
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as nowhere:
        work = replace(Work.of(RECIPES[args.recipe], None, Path(name)), now=CLOCKS[args.clock])
        ours = Ours(work, args.device, How("ours", True, args.compile, args.dtype, {}), "highest")
        for iteration in range(args.warmup):
            ours.loss(iteration)
        numbers = itertools.count(args.warmup, args.iterations)
        every = args.iterations
        sides = [beside.Side("bare", lambda: ours.run(next(numbers), every, every))]
        wandb = None if args.no_wandb else _wandb(Path(name))
        recorders = {"recorded": _recorder(work, Path(name) / "recorded", Sink())}
        if wandb is not None:
            recorders["wandb"] = _recorder(work, Path(name) / "wandb_too", wandb)
        for label, recorder in recorders.items():
            sides.append(beside.Side(label, _recorded(ours, recorder, numbers, every, nowhere)))
        beside.interleave(sides, args.rounds, deadline)
        begin = time.perf_counter()
        if wandb is not None:
            wandb.flush()
        flushed = (time.perf_counter() - begin) / (every * len(sides[0].rounds)) * 1e3
        for recorder in recorders.values():
            recorder.close()
    found = beside.compared(sides)
    share = {name: 1 / ratio["value"] - 1 for name, ratio in found["faster"].items()}
    more = {
        "recipe": args.recipe,
        "clock": args.clock,
        "added_share": share,
        "wandb_flush_ms_a_row": None if args.no_wandb else flushed,
    }
    beside.finish("overhead", args, {**more, **ours.facts, **found})
    return 0


def _recorder(work: Work, folder: Path, wandb: Sink) -> Recorder:
    folder.mkdir()
    flops, tokens = work.spec.flops_per_token(), work.recipe.batch_size * work.recipe.block_size
    peaks = Denominators(mfu_measured=1e18, mfu_a100=312e12)
    return Recorder(Flops(float(flops * tokens), tokens, peaks), [Folder(folder), wandb, Lines(10)])


def _recorded(
    ours: Ours, recorder: Recorder, numbers: itertools.count[int], count: int, console: Any
) -> Callable[[], list[float]]:
    """As train/loop.py runs an iteration and keeps it; the block ends, as bare's, with an empty queue."""
    backend, recipe, now = ours.backend, ours.work.recipe, ours.work.now

    def keep(done: list[Any]) -> None:
        for completion in done:
            recorder.iteration(completion, recipe.lr(completion.iteration), backend.memory())
        recorder.tick()

    def run() -> list[float]:
        first = next(numbers)
        clock = Clock(backend.wait, "completion", 10, 5, backend.runs_ahead)
        clock.submit(first, partial(ours.step, first))  # a clock waits for its first iteration alone
        with contextlib.redirect_stdout(console):
            begin = now()
            for iteration in range(first + 1, first + 1 + count):
                keep(clock.submit(iteration, partial(ours.step, iteration)))
            keep(clock.drain())
            return [(now() - begin) / count * 1e3]

    return run


def _wandb(folder: Path) -> Wandb:
    import wandb

    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    return Wandb(wandb.init(project="benchmarks", mode="offline", dir=folder, settings=settings))


if __name__ == "__main__":
    beside.run(main)
