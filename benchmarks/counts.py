"""What an iteration launches, counted on a machine that has no Mac's GPU.

    python benchmarks/counts.py --device mps --peer nanoGPT --side peer --side ours
    python benchmarks/counts.py --device mps --side ours+compile --recipe quick --layers 1
    python benchmarks/counts.py --device mlx --side peer+compile --side ours+compile

mps: kernels, operators and waits of the host on the simulated device (nanogpt_mac/simulator). It counts a linear
layer's backward and a concatenation of any number as one kernel; `kernels_wide` counts the former as two and the latter
as one an input. Compiled, `metal_launches` are those of the compiler's own kernels among them. mlx: primitives of the
graph that is evaluated, those that are not views apart. No time is measured: the simulated device says nothing of one.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _side_by_side as beside
from _sides import RECIPES, How, NanoGPT, Ours, Program, Work

from nanogpt_mac import simulator
from nanogpt_mac.errors import InputError

# MLX primitives that launch nothing on Metal: they only change shape and strides.
VIEWS = {"Reshape", "Transpose", "Broadcast", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Split", "Slice"}
VIEWS |= {"AsStrided", "StopGradient", "BroadcastAxes", "View", "Copy", "CustomTransforms"}
WARM = 3  # iterations before those that are counted: the first ones make state and compile


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=1)
    parser.add_argument("--device", choices=("mps", "mlx"), required=True)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, for --device mps --side peer")
    parser.add_argument("--recipe", choices=RECIPES, default="quick")
    parser.add_argument("--side", action="append", dest="sides", metavar="SIDE", help="peer or ours, +compile, +DTYPE")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--layers", type=int, help="(default: the recipe's)")
    parser.add_argument("--iterations", type=int, default=5, help="that are counted, after the first three")
    args = parser.parse_args(argv)
    hows = [How.parse(side) for side in args.sides or ("ours",)]
    if args.device == "mps" and args.peer is None and not all(how.ours for how in hows):
        raise InputError("--side peer: on mps it is nanoGPT's; add --peer CHECKOUT")
    recipe = replace(RECIPES[args.recipe], dropout=args.dropout)
    recipe = replace(recipe, n_layer=args.layers or recipe.n_layer)
    with tempfile.TemporaryDirectory() as folder:
        work = Work.of(recipe, None, Path(folder))
        count = on_mps if args.device == "mps" else in_mlx
        found = [{"name": how.name, **count(args, work, how)} for how in hows]
    facts = {"recipe": args.recipe, "layers": recipe.n_layer, "dropout": args.dropout}
    beside.finish("counts", args, {**facts, "an_iteration": found})
    return 0


def on_mps(args: Any, work: Work, how: How) -> dict[str, Any]:
    simulator.install()
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Inputs(TorchDispatchMode):
        """Inputs of concatenations beyond the first, and backwards of linear layers."""

        extra = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("cat", "stack"):
                Inputs.extra += len(args[0]) - 1
            elif name == "linear_backward":
                Inputs.extra += 1
            return func(*args, **(kwargs or {}))

    program: Program = (
        Ours(work, "mps", how, "highest") if how.ours else NanoGPT(work, args.peer, "mps", how, "highest")
    )
    losses = [program.loss(i) for i in range(WARM)]
    simulator.reset_counts()
    simulator.clear_launches()
    program.run(WARM, args.iterations, 1)  # a loss is read each time, as nanoGPT's README asks for
    counts, operators, launches = simulator.counts(), simulator.operators(), simulator.launch_counts()
    n = args.iterations
    wide = None
    if not how.compile:  # a dispatch mode would be traced
        with Inputs(), torch.autograd.set_multithreading_enabled(False):
            program.run(WARM + n, n, 1)
        wide = (counts.kernels + Inputs.extra) / n
    per_operator = {name: calls / n for name, calls in sorted(operators.items(), key=lambda item: -item[1])}
    return {
        **program.facts,
        "kernels": counts.kernels / n,
        "kernels_wide": wide,
        "metal_launches": sum(launches.values()) / n,
        "waits": counts.waits / n,
        "operators": sum(operators.values()) / n,
        "by_operator": dict(list(per_operator.items())[:25]),
        "first_losses": losses,
    }


def in_mlx(args: Any, work: Work, how: How) -> dict[str, Any]:
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    import mlx.core as mx
    from _mlx_peer import MLXPeer

    program: Program = Ours(work, "mlx", how, "highest") if how.ours else MLXPeer(work, how, "highest")
    losses = [program.loss(i) for i in range(WARM)]
    asked: list[Counter[str]] = []
    with Watched(mx, asked):
        program.run(WARM, 1, 1)
    primitives = sum(asked, Counter())
    return {
        **program.facts,
        "primitives": sum(primitives.values()),
        "not_views": sum(calls for name, calls in primitives.items() if name not in VIEWS),
        "by_primitive": dict(primitives.most_common(25)),
        "first_losses": losses,
    }


class Watched:
    """Within, the graph of whatever is evaluated is counted just before: one Counter an evaluation that has work."""

    def __init__(self, mx: Any, asked: list[Counter[str]]) -> None:
        self.mx, self.asked = mx, asked
        self.kept = {name: getattr(mx, name) for name in ("eval", "async_eval")}

    def __enter__(self) -> None:
        for name, original in self.kept.items():
            setattr(self.mx, name, self._counting(original))

    def __exit__(self, *_: object) -> None:
        for name, original in self.kept.items():
            setattr(self.mx, name, original)

    def _counting(self, evaluate: Callable[..., None]) -> Callable[..., None]:
        from mlx.utils import tree_flatten

        def counting(*trees: Any) -> None:
            leaves: Any = tree_flatten(list(trees))
            arrays = [leaf for _, leaf in leaves if isinstance(leaf, self.mx.array)]
            with tempfile.NamedTemporaryFile("r", suffix=".dot") as file:
                self.mx.export_to_dot(file.name, *arrays)
                labels = re.findall(r'label ?= ?"([^"]+)", shape ?= ?rectangle', Path(file.name).read_text())
            self.asked.append(Counter(label.split()[0] for label in labels))
            evaluate(*trees)

        return counting


if __name__ == "__main__":
    beside.run(main)
