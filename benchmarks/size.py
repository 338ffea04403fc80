"""Cost against size on an NVIDIA GPU: ms and memory of an iteration, ours and nanoGPT's, over block, batch and width.

    python benchmarks/size.py --peer nanoGPT --points few --limit 150 --results size_h100_2026-11-26.jsonl
    python benchmarks/size.py --plot docs/cost-against-size.svg --results size_h100_2026-11-26.jsonl

The full recipe in bfloat16, compiled, with one of its sizes changed at a time; heads stay 64 wide. Each point is a
process of its own, so that one without memory harms no other. Several compile side by side, then each is timed alone. A
result is one line of --results; a point that is there already is left out, so a run can be ended and started again.

Memory is what a side adds: `allocated`, the most that its tensors took at once, and `reserved`, what the allocator held
for them, CUDA graphs' pools included, which between replays count as allocated no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _side_by_side as beside
from _sides import DTYPES, RECIPES, How, NanoGPT, Ours, Program, Recipe, Work

from nanogpt_mac.backends import kinds
from nanogpt_mac.errors import InputError

HEAD = 64
VOCABULARY = 65
RANGES: dict[str, tuple[int, ...]] = {
    "block_size": (128, 256, 512, 1024, 2048, 4096),
    "batch_size": (1, 4, 16, 64, 128, 256),
    "n_embd": (128, 256, 384, 768, 1024, 1600),
}
FEW: dict[str, tuple[int, ...]] = {
    "block_size": (128, 256, 1024, 4096),
    "batch_size": (1, 64, 256),
    "n_embd": (128, 384, 1600),
}
LABELS = {"block_size": "block, tokens", "batch_size": "batch, windows", "n_embd": "width, channels"}
BLOCK_S = 0.25  # that many seconds of iterations are timed together


@dataclass(frozen=True)
class Point:
    """One size of the recipe."""

    block_size: int
    batch_size: int
    n_embd: int

    @property
    def name(self) -> str:
        return f"block {self.block_size}, batch {self.batch_size}, width {self.n_embd}"

    def recipe(self, base: Recipe) -> Recipe:
        return replace(base, **asdict(self), n_head=max(self.n_embd // HEAD, 1))


def points(ranges: dict[str, tuple[int, ...]]) -> list[Point]:
    """The base recipe first, then what differs from it in one size."""
    base = Point(RECIPES["full"].block_size, RECIPES["full"].batch_size, RECIPES["full"].n_embd)
    others = [replace(base, **{key: value}) for key, values in ranges.items() for value in values]
    return list(dict.fromkeys([base, *others]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=3)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--points", choices=("few", "all"), default="all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--together", type=int, default=8, help="points that compile side by side")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, read first and added to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results (.svg or .png) and measure nothing")
    parser.add_argument("--child", type=json.loads, help="be the process of one point")
    args = parser.parse_args(argv)
    if args.plot:
        plot(read(args.results), args.plot)
        return 0
    if args.peer is None:
        raise InputError("--peer: is missing; add the folder of a checkout of nanoGPT")
    if args.child:
        return child(args, Point(**args.child))
    given = list(argv if argv is not None else sys.argv[1:])
    return measure(args, beside.deadline(args), given)


# -- measuring --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(args: Any, deadline: float, argv: list[str]) -> int:
    kinds.resolve("cuda")
    done = [Point(**result["point"]) for result in read(args.results) if result["sides"]]
    wanted = [point for point in points(FEW if args.points == "few" else RANGES) if point not in done]
    for begin in range(0, len(wanted), args.together):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for result in _group(args, argv, wanted[begin : begin + args.together], deadline):
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            beside.say(f"{Point(**result['point']).name}: {_short(result)}")
    return 0


def _group(args: Any, argv: list[str], group: list[Point], deadline: float) -> Iterator[dict[str, Any]]:
    """Start every point's process, and let one after the other be timed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    argvs = [[sys.executable, __file__, *argv, "--child", json.dumps(asdict(point))] for point in group]
    children: list[Any] = [subprocess.Popen(each, **pipes) for each in argvs]  # type: ignore[call-overload]
    try:
        ready = [child.stdout.readline() for child in children]  # all have compiled: nothing else runs from here on
        for point, child, line in zip(group, children, ready, strict=True):
            if time.monotonic() > deadline:
                beside.say(f"{point.name}: left out, there is no time")
                continue
            if line.strip() == "READY":
                child.stdin.write("GO\n")
                child.stdin.flush()
            answer = child.stdout.readline()
            if answer:
                yield json.loads(answer)
            else:
                yield {"point": asdict(point), "error": f"ended with exit code {child.wait()}", "sides": {}}
    finally:
        for child in children:
            child.kill()
            child.communicate()


def child(args: Any, point: Point) -> int:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        # Random tokens would do, but nanoGPT reads a file of them.
        base = Work.of(RECIPES["full"], None, Path(folder))
        work = replace(base, recipe=point.recipe(base.recipe))
        hows = {"peer": How.parse(f"peer+compile+{args.dtype}"), "ours": How.parse(f"ours+compile+{args.dtype}")}
        programs: dict[str, Program] = {}
        sides: dict[str, dict[str, Any]] = {}
        for name, how in hows.items():
            try:
                programs[name], sides[name] = _built(args, work, how)
            except torch.OutOfMemoryError:
                sides[name] = {"error": "out of memory"}
            torch.cuda.empty_cache()
        print("READY", flush=True)
        sys.stdin.readline()
        _time(args, programs, sides)
        facts = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": args.dtype}
        result = {"point": asdict(point), **facts, "commit": beside.commit(), "vocabulary": work.vocab_size}
        print(json.dumps({**result, "n_layer": work.recipe.n_layer, "sides": sides}), flush=True)
    return 0


def _built(args: Any, work: Work, how: How) -> tuple[Program, dict[str, Any]]:
    """A program that has compiled and settled, and the memory that it took beyond what was there."""
    import torch

    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    program: Program = Ours(work, "cuda", how, "high") if how.ours else NanoGPT(work, args.peer, "cuda", how, "high")
    losses = [program.loss(i) for i in range(5)]
    facts = {"loss_4": losses[-1], "settings": program.facts["settings"]}
    facts["allocated"] = torch.cuda.max_memory_allocated() - allocated
    facts["reserved"] = torch.cuda.max_memory_reserved() - reserved
    return program, facts


def _time(args: Any, programs: dict[str, Program], sides: dict[str, dict[str, Any]]) -> None:
    """Fill in ms and the ratio of rounds that take turns."""
    import torch

    made = []
    for name, program in programs.items():
        try:
            about = program.run(5, 6, 2)[-1]
            every = max(1, round(BLOCK_S * 1e3 / about))
            made.append(beside.Side(name, _runs(program, every)))
        except torch.OutOfMemoryError:
            sides[name] = {"error": "out of memory"}
    if made:
        beside.interleave(made, args.rounds, float("inf"))
        for side in made:
            sides[side.name] |= {"ms": asdict(beside.figures(v for r in side.rounds for v in r))}
    if len(made) == 2:
        sides["ours"]["faster"] = asdict(beside.ratio(made[0].rounds, made[1].rounds))


def _runs(program: Program, every: int) -> Callable[[], list[float]]:
    return lambda: program.run(11, 2 * every, every)


def _short(result: dict[str, Any]) -> str:
    def side(facts: dict[str, Any]) -> str:
        if "ms" not in facts:
            return str(facts.get("error"))
        return f"{facts['ms']['median']:.2f} ms, {facts['reserved'] / 2**30:.2f} GiB"

    return str(result.get("error") or "; ".join(f"{name} {side(facts)}" for name, facts in result["sides"].items()))


# -- the plot ---------------------------------------------------------------------------------------------------------


def floor_ms(result: dict[str, Any]) -> float | None:
    """The roofline of a point (compare/roofline.py) on its card, by its data sheet; None for a card that has none."""
    from nanogpt_mac.compare import roofline
    from nanogpt_mac.machine import chips

    chip = chips.find(result["card"], None)
    recipe = Point(**result["point"]).recipe(RECIPES["full"])
    spec = recipe.spec(result["vocabulary"])
    flops = spec.flops_per_token() * recipe.batch_size * recipe.block_size
    traffic = roofline.bytes_per_iter(spec, recipe.batch_size, 1, result["dtype"])["total"]
    peak = chips.peak(chip, result["dtype"], "high")
    found = roofline.floor(flops, traffic, peak, "data sheet", chip.bandwidth if chip else None, "data sheet")
    return found.floor_ms if found else None


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Two rows, time and memory, of three panels, one a size that changes; both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    results = [result for result in results if result["sides"]]
    if not results:
        raise InputError("--results: holds no measured point; run without --plot first")
    base = points({})[0]
    figure, axes = plt.subplots(2, len(RANGES), figsize=(11, 6), sharey="row", layout="constrained")
    for column, key in enumerate(RANGES):
        along = [r for r in results if replace(Point(**r["point"]), **{key: getattr(base, key)}) == base]
        along.sort(key=lambda result: int(result["point"][key]))
        upper, lower = axes[0][column], axes[1][column]
        for name, label in (("ours", "nanogpt-mac"), ("peer", "nanoGPT")):
            timed = [r for r in along if "ms" in r["sides"].get(name, {})]
            sizes = [r["point"][key] for r in timed]
            upper.plot(sizes, [r["sides"][name]["ms"]["median"] for r in timed], "o-", label=label)
            lower.plot(sizes, [r["sides"][name]["reserved"] / 2**30 for r in timed], "o-", label=label)
        floors = [(r["point"][key], floor) for r in along if (floor := floor_ms(r)) is not None]
        if floors:
            upper.plot(*zip(*floors, strict=True), "k:", label="roofline")
        lower.set_xlabel(LABELS[key])
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.set_xticks(ticks := [r["point"][key] for r in along], [str(tick) for tick in ticks])
            axis.minorticks_off()
    axes[0][0].set_ylabel("ms an iteration")
    axes[1][0].set_ylabel("memory, GiB")
    axes[0][0].legend()
    first = results[0]
    figure.suptitle(f"An iteration on {first['card']}, {first['dtype']}, compiled, torch {first['torch']}")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    beside.run(main)
