"""What one submission buys: an epoch of suite=mlp's classifier against its batch size, by structure and by kernels.

    python benchmarks/submission.py --limit 220 --out submission_h100_2026-11-27.json --plot docs/submission.svg
    python benchmarks/submission.py --read submission_h100_2026-11-27.json --plot docs/submission.svg
    python benchmarks/submission.py --device cpu --batches 8 16 --images 40 --widths 49 8 10 --seconds 0

On an NVIDIA GPU: v1, v2 and v3 of docs/metal.md as kernels in Triton, beside torch, MLX and what else has the network;
with --device cpu Triton's interpreter computes them, which shows that they run. To tell structure and kernels apart,
both kinds of kernels are submitted in all three ways: a wait a launch, a wait a batch, and a CUDA graph a batch with
one wait an epoch. Frameworks wait once an epoch. Every side is first held against float64 after a few batches.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import _side_by_side as beside
import numpy as np

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import BackendOptions
from nanogpt_mac.backends.by_hand import launches
from nanogpt_mac.backends.by_hand.launches import Version
from nanogpt_mac.backends.nets import Feed, MLPSpec, Net, drawn
from nanogpt_mac.corpus import mnist
from nanogpt_mac.errors import InputError
from nanogpt_mac.suites.nets.measured import distance
from nanogpt_mac.suites.nets.twin import Twin

BATCHES = (256, 8, 4096, 64, 1024, 16, 32, 128, 512, 2048)  # so ordered that a run cut short has the ends
CELLS = {  # name -> what it is; of the rest, how the same kernels do in another structure
    "v1": launches.VERSIONS["v1"],
    "v2": launches.VERSIONS["v2"],
    "v3": launches.VERSIONS["v3"],
    "naive, a wait a batch": Version("v2", "naive", "batch", "batch"),
    "naive, a graph a batch": Version("v3", "naive", "epoch", "epoch"),
    "tiled, a wait a launch": Version("v2", "tiled", "launch", "batch"),
}
TOLERANCE = 1e-4  # of the weights after the checked batches, relative
MOST_EPOCHS = 20
SLOW_MS = 2e4  # of an epoch: a side that takes longer is left out at the batch sizes that follow
STRUCTURE, KERNELS = "structure: v3 beside a wait a launch", "kernels: v3 beside naive ones in a graph"


@dataclass
class Data:
    """Rows, classes, the order of an epoch, and the network that learns them."""

    spec: MLPSpec
    rows: np.ndarray
    classes: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, widths: Sequence[int], count: int) -> Data:
        images = mnist.stand_in()
        picked = np.linspace(0, images.train.shape[1] - 1, widths[0]).astype(int)  # narrower networks see fewer pixels
        rows = np.ascontiguousarray(images.train[:count][:, picked], np.float32) / np.float32(255)
        order = np.random.default_rng(1).permutation(len(rows))
        return cls(MLPSpec(tuple(widths)), rows, images.train_classes[: len(rows)].astype(np.int32), order)

    def short(self, batch: int, full: int) -> np.ndarray:
        """So many full batches, as far as there are, then one as the last of an epoch is."""
        whole = len(self.order) // batch
        return np.concatenate([self.order[: min(full, whole) * batch], self.order[whole * batch :]])


Make = Callable[[Data, int], tuple[Any, Net]]  # arrays, network


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.parser(__doc__, rounds=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--widths", type=int, nargs="+", default=(784, 32, 32, 10))
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=0.7, help="of a side at a batch size; one epoch at least")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: it compiles for minutes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the chart goes (.svg or .png)")
    parser.add_argument("--read", type=Path, metavar="FILE", help="draw an earlier document and measure nothing")
    args = parser.parse_args(argv)
    if args.read:
        if args.plot is None:
            raise InputError("--read: draws an earlier document; add --plot FILE")
        plot(json.loads(args.read.read_text()), args.plot)
        return 0
    if len(args.widths) < 2 or args.widths[0] > 784 or args.widths[-1] < 10:
        widths = " ".join(map(str, args.widths))
        raise InputError(f"--widths {widths}: use at least two, from 784 pixels or fewer to ten classes or more")
    deadline = beside.deadline(args)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are made
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the GPU's memory for itself
    kinds.resolve(args.device)
    sides, left_out = every_side(args)
    cells: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for cell in measure(args, Data.of(args.widths, args.images), sides, deadline):
            cells.append(cell)
    except KeyboardInterrupt:  # what was measured is written all the same
        beside.say("stopped")
    document = {
        "widths": list(args.widths),
        "images": args.images,
        "unit": "ms an epoch",
        "cells": cells,
        "gains": gains(cells),
        "crossings": crossings(cells),
        "left_out": left_out,
    }
    beside.finish("submission", args, document)
    if args.plot:
        plot({**document, "machine": beside.machine()}, args.plot)
    wrong = [f"{c['side']} at {c['batch']}" for c in cells if not c.get("off", math.inf) <= TOLERANCE]
    if wrong:
        beside.say(f"wrong, or failed: {', '.join(wrong)}")
    return 1 if wrong or not cells else 0


# -- sides ------------------------------------------------------------------------------------------------------------


def every_side(args: Any) -> tuple[dict[str, Make], dict[str, str]]:
    """By name, ours first; and why others are left out."""
    sides: dict[str, Make] = {name: _ours(args.device, version) for name, version in CELLS.items()}
    left_out: dict[str, str] = {}
    for kind in kinds.KINDS.values():
        if kind.name == "mps" or kind.name == {"cuda": "cpu", "cpu": "cuda"}[args.device]:
            continue
        reason = kinds.missing(kind.name) or (None if kind.nets else "it has no small networks")
        if reason:
            left_out[kind.name] = reason
            continue
        for compiled, name in kind.variants.items():
            if compiled and kind.framework == "torch" and not args.compiled:
                left_out[name] = "it compiles for minutes: --compiled"
            else:
                sides[name] = _framework(kind, compiled)
    return sides, left_out


def _ours(device: str, version: Version) -> Make:
    def make(data: Data, batch: int) -> tuple[Any, Net]:
        from nanogpt_mac.backends.by_hand.net import HandNet
        from nanogpt_mac.backends.by_hand.torch_devices import TritonArrays

        arrays = TritonArrays(version, kinds.KINDS[device], device)
        return arrays, HandNet(arrays, data.spec, Feed(batch), data.rows, data.classes)

    return make


def _framework(kind: Any, compiled: bool) -> Make:
    def make(data: Data, batch: int) -> tuple[Any, Net]:
        kind.prepare(BackendOptions(kind.name, compiled, "float32", "highest", 0, 0.0, 0.0, 0.0, 0.0))
        arrays = kind.load_arrays()(kind, kind.load().device_of(kind), compiled)
        return arrays, kind.load_nets()(arrays, data.spec, Feed(batch, "resident", "epoch"), data.rows, data.classes)

    return make


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(args: Any, data: Data, sides: dict[str, Make], deadline: float) -> Iterator[dict[str, Any]]:
    """A cell for each batch size and side.

    Ours and torch's come first, side by side at every batch size; then one framework after the other. tinygrad, which
    makes a CUDA context of its own that others would find in place of theirs, is the last of the registry.
    """
    first = drawn(data.spec, 1)
    beside_ours = [name for name in sides if name in CELLS or name.startswith(args.device)]
    slow: dict[str, str] = {}
    wanted: dict[int, Any] = {}
    for names in (beside_ours, *([name] for name in sides if name not in beside_ours)):
        for number, batch in enumerate(args.batches):
            checked, at = data.short(batch, 3), number % len(names)
            if batch not in wanted:
                twin = Twin(data.spec, first)
                twin.epoch(data.rows, data.classes, checked, batch)
                wanted[batch] = twin.weights
            for name in names[at:] + names[:at]:  # another one is first each time
                why = "the time is spent" if time.monotonic() > deadline else slow.get(name)
                if why:
                    beside.say(f"{name} at {batch}: left out, {why}")
                    continue
                try:
                    cell = _cell(args, data, sides[name], batch, first, wanted[batch], checked)
                except Exception as error:  # one side that fails loses its own figures
                    cell = {"error": f"{type(error).__name__}: {error}"[:300]}
                yield {"batch": batch, "side": name, **cell}
                words = cell["error"] if "error" in cell else f"{cell['ms']['median']:.4g} ms, off by {cell['off']:.1e}"
                beside.say(f"{name} at {batch}: {words}")
                if "ms" in cell and cell["ms"]["median"] > SLOW_MS:
                    slow[name] = f"an epoch at {batch} took {cell['ms']['median'] / 1e3:.0f} s"


def _cell(
    args: Any, data: Data, make: Make, batch: int, first: Any, wanted: Any, checked: np.ndarray
) -> dict[str, Any]:
    arrays, net = make(data, batch)
    net.load(first)
    arrays.wait(net.epoch(checked))
    off = distance(net.weights(), wanted)
    arrays.wait(net.epoch(checked))  # what is recorded as a graph is recorded by now
    took: list[float] = []
    began = time.perf_counter()
    while not took or (len(took) < MOST_EPOCHS and time.perf_counter() - began < args.seconds):
        start = time.perf_counter()
        arrays.wait(net.epoch(data.order))
        took.append(1e3 * (time.perf_counter() - start))
    del net
    arrays.release()
    return {"off": off, "ms": asdict(beside.figures(took))}


def _times(cells: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Side -> batch -> ms an epoch."""
    found: dict[str, dict[int, float]] = {}
    for cell in cells:
        if "ms" in cell:
            found.setdefault(cell["side"], {})[cell["batch"]] = cell["ms"]["median"]
    return found


def gains(cells: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """How many times as long an epoch takes with the worse structure and v3's kernels, and the other way round."""
    t = _times(cells)
    compared = {STRUCTURE: "tiled, a wait a launch", KERNELS: "naive, a graph a batch"}
    best = t.get("v3", {})
    return {
        what: {batch: t[other][batch] / best[batch] for batch in sorted(best) if batch in t.get(other, {})}
        for what, other in compared.items()
    }


def crossings(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Up to which batch size structure is worth more than kernels, and v3 faster than each framework.

    Between two measured sizes the ratio is taken to be a straight line over logarithms; None: at no measured size;
    a word where it holds at the largest one too.
    """
    t, gained = _times(cells), gains(cells)
    found = {"structure beats kernels": _until(gained[STRUCTURE], gained[KERNELS])}
    for name, times in t.items():
        if name not in CELLS:
            found[f"v3 beats {name}"] = _until(times, t.get("v3", {}))
    return found


def _until(left: dict[int, float], right: dict[int, float]) -> Any:
    """The batch size up to which left is larger than right."""
    ratios = [(batch, math.log(left[batch] / right[batch])) for batch in sorted(left) if batch in right]
    if not ratios or ratios[0][1] <= 0:
        return None
    for (before, over), (batch, under) in pairwise(ratios):
        if under <= 0:
            share = over / (over - under)
            return math.exp(math.log(before) + share * (math.log(batch) - math.log(before)))
    return f"{ratios[-1][0]} and beyond"


# -- the plot ---------------------------------------------------------------------------------------------------------


def plot(document: dict[str, Any], path: Path) -> None:
    """An epoch's time over the batch size, and what structure and kernels are worth; all axes logarithmic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    times = _times(document["cells"])
    if not times:
        raise InputError("--read: holds no measured side")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "submission"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        for name, of in times.items():
            style = {"v1": "o-", "v2": "s-", "v3": "D-"}.get(name, ":" if name in CELLS else "--")
            left.plot(sorted(of), [of[batch] for batch in sorted(of)], style, label=name, markersize=4)
        for what, of in document["gains"].items():
            of = {int(batch): value for batch, value in of.items()}
            right.plot(sorted(of), [of[batch] for batch in sorted(of)], "o-", label=what, markersize=4)
        left.set_ylabel(f"ms an epoch of {document['images']:,} images")
        right.set_ylabel("times as long as v3")
        ticks = sorted({batch for of in times.values() for batch in of})
        for axes in (left, right):
            axes.set(xscale="log", yscale="log", xlabel="batch")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        where = document.get("machine", {})
        network = "-".join(map(str, document["widths"]))
        figure.suptitle(f"{network} on {where.get('card') or where.get('cpu')}, {where.get('date', '')}")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


if __name__ == "__main__":
    beside.run(main)
