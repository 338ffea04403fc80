"""Which kernels a step of the classifier launches, in which order and on what: the same wherever they are submitted.

Arrays go by name: x0 is a batch's rows and y their classes, x1 and on the layers' results, d1 and on their gradients,
w0, b0 and on the parameters, gw0 and gb0 their gradients. The kernels are those of the .metal files and of cuda.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise

from nanogpt_mac.errors import InputError

SIDE = 16  # of a threadgroup, as in the sources
LANES = 32
DEPTH = 64  # command buffers of a Metal queue that may be in flight, by default
SOURCES = {"v1": ("v1",), "v2": ("tiles", "v2"), "v3": ("tiles", "v3"), "tiles": ("tiles",)}


@dataclass(frozen=True)
class Version:
    """What is launched, and when the host waits. `order` says where a batch's rows come from: copied by the host, or
    gathered on the device by the order of a batch or of an epoch that the host has written."""

    name: str
    kernels: str  # naive, tiled
    wait: str  # launch, batch, epoch
    order: str  # host, batch, epoch
    batches: int = 1  # of a command buffer; 0: all of an epoch
    depth: int = DEPTH


VERSIONS = {
    "v1": Version("v1", "naive", "launch", "host"),
    "v2": Version("v2", "tiled", "batch", "batch"),
    "v3": Version("v3", "tiled", "epoch", "epoch"),
}


def version(words: str) -> Version:
    """v1, v2, v3, or v3 with its parameters: v3-5 (batches a command buffer), v3-all, v3-queue1024, v3-5-queue1024."""
    found = re.fullmatch(r"(v[123])(?:-([1-9]\d*|all))?(?:-queue([1-9]\d*))?", words)
    if not found or (found[1] != "v3" and words != found[1]):
        raise InputError(f"{words!r}: use v1, v2, v3, or v3-5, v3-all, v3-queue1024, v3-5-queue1024")
    batches = 0 if found[2] == "all" else int(found[2] or 1)
    return replace(VERSIONS[found[1]], batches=batches, depth=int(found[3] or DEPTH))


def source(name: str) -> str:
    """The Metal source of v1, v2 or v3, or of the tiles alone."""
    folder = files("nanogpt_mac.backends.by_hand")
    return "\n".join(folder.joinpath(f"{part}.metal").read_text(encoding="utf-8") for part in SOURCES[name])


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its arrays in the order of its parameters, then `size`, which is (m, n, k) of its result,
    and a `rate` where it takes one. `threads` (across, down) in groups of `group`."""

    kernel: str
    arrays: tuple[str, ...]
    size: tuple[int, int, int]
    threads: tuple[int, int]
    group: tuple[int, int] = (SIDE, SIDE)
    rate: float | None = None


def _naive(kernel: str, arrays: str, m: int, n: int, k: int = 0, rate: float | None = None) -> Launch:
    """A thread for each number of the result."""
    return Launch(kernel, tuple(arrays.split()), (m, n, k), (n, m), rate=rate)


def _tiled(kernel: str, arrays: str, m: int, n: int, k: int, rate: float | None = None) -> Launch:
    """Whole threadgroups: all threads of one bring numbers for the others."""
    return Launch(kernel, tuple(arrays.split()), (m, n, k), (-(-n // SIDE) * SIDE, -(-m // SIDE) * SIDE), rate=rate)


def forward(of: Version, widths: tuple[int, ...], rows: int) -> list[Launch]:
    """From x0 to the logits, the last x."""
    found, last = [], len(widths) - 2
    for i, (inner, outer) in enumerate(pairwise(widths)):
        if of.kernels == "tiled":
            kernel = "linear" if i == last else "linear_relu"
            found.append(_tiled(kernel, f"x{i} w{i} b{i} x{i + 1}", rows, outer, inner))
            continue
        found += [
            _naive("matmul_nt", f"x{i} w{i} x{i + 1}", rows, outer, inner),
            _naive("add_bias", f"x{i + 1} b{i}", rows, outer),
        ]
        found += [] if i == last else [_naive("relu", f"x{i + 1}", rows, outer)]
    return found


def _loss(of: Version, last: int, rows: int, classes: int) -> list[Launch]:
    x, d = f"x{last}", f"d{last}"
    if of.kernels == "tiled":
        arrays = f"{x} y {d} loss" + (" behind" if of.order == "epoch" else "")
        return [Launch("cross_entropy_grad", tuple(arrays.split()), (rows, classes, 0), (LANES, rows), (LANES, 1))]
    return [
        replace(_naive("softmax", f"{x} shares", rows, classes), threads=(1, rows)),
        replace(_naive("cross_entropy", "shares y loss", rows, classes), threads=(1, rows)),
        _naive("softmax_cross_entropy_backward", f"shares y {d}", rows, classes),
    ]


def backward(of: Version, widths: tuple[int, ...], rows: int, rate: float, update: bool = True) -> list[Launch]:
    """From the logits to new parameters; without `update` to their gradients, for which gw and gb hold zeros before."""
    last = len(widths) - 1
    found, steps = _loss(of, last, rows, widths[-1]), []
    for i in reversed(range(last)):
        inner, outer = widths[i], widths[i + 1]
        if of.kernels == "tiled":  # the input's gradient first: the other changes w
            found += [_tiled("linear_backward_input", f"d{i + 1} w{i} x{i} d{i}", rows, inner, outer)] if i else []
            into, by = (f"w{i} b{i}", rate) if update else (f"gw{i} gb{i}", -1.0)
            found.append(_tiled("linear_backward_weight", f"d{i + 1} x{i} {into}", outer, inner, rows, by))
            continue
        found += [
            _naive("matmul_tn", f"d{i + 1} x{i} gw{i}", outer, inner, rows),
            replace(_naive("column_sum", f"d{i + 1} gb{i}", rows, outer), threads=(outer, 1)),
        ]
        if i:
            found.append(_naive("matmul_nn", f"d{i + 1} w{i} d{i}", rows, inner, outer))
            found.append(_naive("relu_backward", f"d{i} x{i}", rows, inner))
        steps += [
            _naive("sgd", f"w{i} gw{i}", outer, inner, rate=rate),
            _naive("sgd", f"b{i} gb{i}", 1, outer, rate=rate),
        ]
    return found + (steps if update else [])


def training(of: Version, widths: tuple[int, ...], rows: int, rate: float) -> list[Launch]:
    """A whole step: 27 launches of v1 for three layers, 10 of v2 and v3."""
    behind = of.order == "epoch"
    arrays = "images classes order behind x0 y" if behind else "images classes order x0 y"
    gather = [] if of.order == "host" else [_naive("gather_batch", arrays, rows, widths[0])]
    step = [*gather, *forward(of, widths, rows), *backward(of, widths, rows, rate)]
    if behind and of.kernels == "naive":  # whose loss kernel moves nothing on
        step.append(Launch("advance", ("behind",), (rows, 1, 0), (1, 1), (1, 1)))
    return step
