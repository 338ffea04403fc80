"""A training iteration of the torch back ends beside nanoGPT's, in one process, rounds taking turns.

    P="python benchmarks/torch_step.py --peer nanoGPT"
    $P --device cuda --side peer+compile+bfloat16 --side ours+compile+bfloat16
    $P --device cpu --recipe quick --side peer --side ours --side ours+compile

The first side is the base of the ratios. Before anything is timed, losses from the same weights on the same windows are
compared (_sides.same_losses): on the timed recipe where it has no dropout, else without it and on --check-layers.

Inductor's cache of whole graphs is off: torch before 2.13 took a graph compiled under one autocast dtype for another
(pytorch PR 181564), and nanoGPT's float32 then computes in bfloat16. --graph-cache leaves it on, to see that happen.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _side_by_side as beside
import numpy as np
from _sides import CLOCKS, RECIPES, How, NanoGPT, Ours, Program, Work, rounds, same_losses

from nanogpt_mac.backends import kinds


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=8)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--side", action="append", dest="sides", metavar="SIDE", help="peer or ours, +compile, +DTYPE")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest", help="of float32")
    parser.add_argument("--text", type=Path, help="train on it (default: the built-in stand-in)")
    parser.add_argument("--iterations", type=int, default=50, help="of a side in a round")
    parser.add_argument("--log", type=int, default=10, help="iterations between losses that the peer reads")
    parser.add_argument("--warmup", type=int, default=100, help="iterations before the first round")
    parser.add_argument("--check", type=int, default=20, help="iterations of the check; 0 leaves it out")
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, on a busy machine"
    )
    parser.add_argument("--graph-cache", action="store_true")
    beside.add_turns(parser)
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    kinds.resolve(args.device)
    if not args.graph_cache:
        os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
    hows = [How.parse(side) for side in args.sides or ("peer+compile", "ours+compile")]
    with tempfile.TemporaryDirectory() as folder:
        work = replace(Work.of(RECIPES[args.recipe], args.text, Path(folder)), now=CLOCKS[args.clock])
        found = measure(args, hows, work, deadline)
    beside.finish("torch_step", args, found)
    return 0 if found["check"] is None or found["check"]["same"] else 1


def measure(args: Any, hows: Sequence[How], work: Work, deadline: float) -> dict[str, Any]:
    reference = How.parse("peer")

    def build(work: Work, how: How) -> Program:
        precision = "highest" if how is reference else args.precision
        if how.ours:
            return Ours(work, args.device, how, precision)
        return NanoGPT(work, args.peer, args.device, how, precision)

    checked = None
    if args.check:
        plain = work if not work.recipe.dropout else work.without_dropout(args.check_layers)
        checked = same_losses(build, plain, hows, reference, args.check, args.precision != "highest")
        if any(how.compile for how in hows):  # else what differed from the check's model might be compiled as variable
            import torch._dynamo

            torch._dynamo.reset()
    sides, programs = [], []
    for how in hows:
        begin = time.perf_counter()
        program = build(work, how)
        program.loss(0)
        first = time.perf_counter() - begin
        losses = [program.loss(i) for i in range(1, args.warmup)]
        programs.append(program)
        sides.append(beside.Side(how.name, rounds(program, args.warmup, args.iterations, args.log), program.facts))
        program.facts |= {"first_iteration_s": first, "warmup_loss": float(np.mean(losses[-10:])) if losses else None}
        beside.say(f"ready {how.name}: first iteration after {first:.1f} s, loss {program.facts['warmup_loss']}")
    with beside.turn(args, deadline):
        beside.interleave(sides, args.rounds, deadline)
        for program in programs if args.device == "cuda" else ():
            program.facts["gpu"] = busy(program)
    peer = beside.checksum(args.peer, "*.py")
    recipe = {
        "recipe": args.recipe,
        "iterations_a_round": args.iterations,
        "losses_read_every": args.log,
        "clock": args.clock,
    }
    return {"peer": peer, **recipe, "check": checked, **beside.compared(sides), **_memory(args.device)}


def busy(program: Program, iterations: int = 10) -> dict[str, float]:
    """How long the GPU computes in an iteration, ms, and in how many kernels: the union of what the profiler saw."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        program.run(0, iterations, iterations)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    spans = [(e.time_range.start, e.time_range.end) for e in profiled.events() or () if e.device_type == cuda]
    return {"busy_ms": union(spans) / iterations / 1e3, "kernels": len(spans) / iterations}


def union(spans: Sequence[tuple[float, float]]) -> float:
    """The length that intervals cover together."""
    covered, end = 0.0, float("-inf")
    for begin, stop in sorted(spans):
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered


def _memory(device: str) -> dict[str, Any]:
    import torch

    if device != "cuda":
        return {}
    return {"peak_memory_of_all_sides": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    beside.run(main)
