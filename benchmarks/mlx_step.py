"""A training iteration of the MLX back end beside a step as mlx-lm and MLX's examples write it, rounds taking turns.

    python benchmarks/mlx_step.py --recipe quick --blas torch --side peer+compile --side ours+compile

On MLX's default device: Metal on a Mac, CUDA or the CPU elsewhere. Memory is what a side alone holds at its highest,
one after the other, before the rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _side_by_side as beside
import numpy as np
from _sides import RECIPES, How, Ours, Program, Work, rounds, same_losses

from nanogpt_mac.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=8)
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--side", action="append", dest="sides", metavar="SIDE", help="peer or ours, +compile, +DTYPE")
    parser.add_argument("--precision", choices=("highest", "high"), default="highest", help="of float32")
    parser.add_argument("--blas", help="backend.blas of every side: one process has one BLAS")
    parser.add_argument("--text", type=Path, help="train on it (default: the built-in stand-in)")
    parser.add_argument("--iterations", type=int, default=50, help="of a side in a round")
    parser.add_argument("--log", type=int, default=10, help="iterations that are timed together")
    parser.add_argument("--warmup", type=int, default=100, help="iterations before the first round")
    parser.add_argument("--check", type=int, default=20, help="iterations of the check; 0 leaves it out")
    beside.add_turns(parser)
    args = parser.parse_args(argv)
    if args.iterations < args.log:
        raise InputError(f"--iterations {args.iterations}: use at least --log {args.log}, which are timed together")
    deadline = beside.deadline(args)
    hows = [How.parse(side) for side in args.sides or ("peer+compile", "ours+compile")]
    if args.blas:
        hows = [replace(how, settings={**how.settings, "blas": args.blas}) for how in hows]
    with tempfile.TemporaryDirectory() as folder:
        work = Work.of(RECIPES[args.recipe], args.text, Path(folder))
        found = measure(args, hows, work, deadline)
    beside.finish("mlx_step", args, found)
    return 0 if found["check"] is None or found["check"]["same"] else 1


def measure(args: Any, hows: Sequence[How], work: Work, deadline: float) -> dict[str, Any]:
    tiny = replace(work, recipe=RECIPES["tiny"])
    Ours(tiny, "mlx", replace(hows[0], compile=False), args.precision)  # sets what MLX reads once a process
    import mlx.core as mx
    from _mlx_peer import MLXPeer

    def build(work: Work, how: How) -> Program:
        return Ours(work, "mlx", how, args.precision) if how.ours else MLXPeer(work, how, args.precision)

    checked = None
    if args.check:
        plain = work if not work.recipe.dropout else work.without_dropout(2)
        checked = same_losses(build, plain, hows, How.parse("peer"), args.check, args.precision != "highest")
    sides = []
    for how in hows:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        begin = time.perf_counter()
        program = build(work, how)
        program.loss(0)
        first = time.perf_counter() - begin
        losses = [program.loss(i) for i in range(1, args.warmup)]
        program.run(args.warmup, 10, 10)
        program.facts |= {
            "first_iteration_s": first,
            "warmup_loss": float(np.mean(losses[-10:])) if losses else None,
            "peak_memory": mx.get_peak_memory() - before,
        }
        sides.append(beside.Side(how.name, rounds(program, args.warmup + 10, args.iterations, args.log), program.facts))
        beside.say(f"ready {how.name}: first iteration after {first:.1f} s, loss {program.facts['warmup_loss']}")
    with beside.turn(args, deadline):
        beside.interleave(sides, args.rounds, deadline)
    recipe = {"recipe": args.recipe, "iterations_a_round": args.iterations}
    return {**recipe, "check": checked, **beside.compared(sides)}


if __name__ == "__main__":
    beside.run(main)
