"""An iteration on a memory-mapped corpus of many gigabytes beside one that lives on the device, taking turns.

    python benchmarks/memmap.py --device cpu --recipe quick --gigabytes 10
    python benchmarks/memmap.py --device cuda --recipe full --compile --dtype bfloat16 --gigabytes 10 --written

A corpus above the back end's limit stays on the host, and each window is gathered there. Without --written the file is
sparse: its pages come from the file system but not from a disk. With it random tokens are written, and before each
round the system is asked to drop the file's pages, so that windows are read from the disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _side_by_side as beside
import numpy as np
from _sides import CLOCKS, DTYPES, RECIPES, How, Ours, Work, rounds

from nanogpt_mac.backends import kinds
from nanogpt_mac.corpus import prepared


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=10)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps", "mlx"), default="cpu")
    parser.add_argument("--recipe", choices=RECIPES, default="quick")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant (default: the temporary one)")
    parser.add_argument("--written", action="store_true", help="write the file and read it from the disk")
    parser.add_argument("--iterations", type=int, default=50, help="of a side in a round")
    parser.add_argument("--warmup", type=int, default=20)
    args = parser.parse_args(argv)
    deadline = beside.deadline(args)
    kinds.resolve(args.device)
    how = How("ours", True, args.compile, args.dtype, {})
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        resident = replace(Work.of(RECIPES[args.recipe], None, Path(name)), now=CLOCKS[args.clock])
        path = Path(name) / "large.bin"
        make(path, int(args.gigabytes * 1e9) // 2 * 2, resident.vocab_size, args.written)
        mapped = replace(resident, tokens=prepared.mapped(path))
        sides = []
        for label, work in (("resident", resident), ("memory-mapped", mapped)):
            program = Ours(work, args.device, how, "highest")
            for iteration in range(args.warmup):
                program.loss(iteration)
            run = rounds(program, args.warmup, args.iterations, 10)
            facts = {**program.facts, "tokens": len(work.tokens)}
            sides.append(beside.Side(label, _dropping(path, run) if args.written else run, facts))
        beside.interleave(sides, args.rounds, deadline)
    found = beside.compared(sides)
    share = 1 / found["faster"]["memory-mapped"]["value"] - 1
    facts = {"recipe": args.recipe, "clock": args.clock, "bytes": int(args.gigabytes * 1e9), "sparse": not args.written}
    beside.finish("memmap", args, {**facts, "added_share": share, **found})
    return 0


def make(path: Path, size: int, vocab_size: int, written: bool) -> None:
    """A file of `size` bytes of uint16 tokens: random and on the disk, or all zero and sparse."""
    with path.open("wb") as file:
        if not written:
            file.truncate(size)
            return
        part = np.random.default_rng(0).integers(0, vocab_size, 1 << 25).astype(np.uint16).tobytes()
        for begin in range(0, size, len(part)):
            file.write(part[: size - begin])
        file.flush()
        os.fsync(file.fileno())


def _dropping(path: Path, run: Callable[[], list[float]]) -> Callable[[], Any]:
    """`run` after the system was asked to forget the file's pages; a Mac has no such call, and keeps them."""

    def dropped() -> list[float]:
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return run()

    return dropped


if __name__ == "__main__":
    beside.run(main)
