"""The rows of suite=ops: shape, kind of numbers, axis and result of each, stated once for every framework. No numpy.

The published rows come from published.csv; those of this model have the run's sizes. A row with gradients has a second
one, "... with gradient", which is forward and backward.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from nanogpt_mac.gpt.spec import GPTSpec

PUBLISHED = Path(__file__).with_name("published.csv")
WITH_GRADIENT = " with gradient"
LEAST = 16  # scale= makes no dimension smaller: an axis of one element could be ignored unseen
SLOPE = 0.01  # of LeakyReLU
F32 = 4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """One input. `kind` says which numbers: inputs.py draws them. `below`: of indices and classes."""

    shape: Shape
    kind: str = "normal"
    below: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Row:
    """`op` is the operation's name in every NAME_arrays. `of`: the inputs that have a gradient, by number.

    Layout: images and signals are (batch, length..., channels), kernels (outputs, length..., channels), weights
    (outputs, inputs). Everything is float32; indices are whatever the framework uses.
    """

    name: str
    family: str
    op: str
    inputs: tuple[Input, ...]
    output: Shape
    settings: Mapping[str, Any] = field(default_factory=dict)
    of: tuple[int, ...] = ()
    flops: float = 0
    further_outputs: int = 0  # of the same shape: sort's indices, AdamW's moments
    read: int | None = None  # elements that must be read, where that is not every input in full
    backward: bool = False
    note: str = ""

    @property
    def input_bytes(self) -> int:
        return F32 * sum(i.size for i in self.inputs)

    @property
    def output_bytes(self) -> int:
        return F32 * math.prod(self.output) * (1 + self.further_outputs)

    @property
    def least_bytes(self) -> int:
        """What must cross the memory bus at least: every input and output once (of a gradient's row, going forward:
        a framework may hand back a view of the cotangent)."""
        return (self.input_bytes if self.read is None else F32 * self.read) + self.output_bytes

    @property
    def gradient_bytes(self) -> int:
        return self.output_bytes + F32 * sum(self.inputs[i].size for i in self.of) if self.backward else 0


def all_rows(spec: GPTSpec, batch: int, scale: float) -> dict[str, Row]:
    """Every row by name, the published ones first."""
    found = (
        [_published(name, scale) for name in published()] + _sorts_with_indices(scale) + _of_model(spec, batch, scale)
    )
    rows: dict[str, Row] = {}
    for row in found:
        rows[row.name] = row
        if row.of:
            name = row.name + WITH_GRADIENT
            rows[name] = replace(row, name=name, backward=True, flops=3 * row.flops)
    return rows


# -- the published ones -----------------------------------------------------------------------------------------------

PUBLISHED_WAYS = ("mlx_gpu", "mlx_gpu_compile", "mlx_cpu", "mps", "cpu")


@dataclass(frozen=True)
class PublishedRow:
    """Milliseconds by column, where the table has them, and why the columns are of different work."""

    times: Mapping[str, float]
    wrong: str


@cache
def published() -> Mapping[str, PublishedRow]:
    """The table, by the row's name in full size."""
    lines = [line for line in PUBLISHED.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {
        line["row"]: PublishedRow({way: float(line[way]) for way in PUBLISHED_WAYS if line[way]}, line["wrong"])
        for line in csv.DictReader(lines)
    }


def source() -> str:
    return next(iter(PUBLISHED.read_text(encoding="utf-8").splitlines())).lstrip("# ")


def _published(name: str, scale: float) -> Row:
    family, *words = name.split()
    axis = next((int(word[5:]) for word in words if word.startswith("axis=")), None)
    dims = [tuple(map(int, word.split("x"))) for word in words if not word.startswith("axis=")]
    return replace(_BUILD[family](_scaled(dims, scale), axis), name=name, family=family)


def _scaled(dims: list[Shape], scale: float) -> list[Shape]:
    """Halve the largest size, wherever it stands, until no more than `scale` of the elements are left."""
    now = {size: size for shape in dims for size in shape}

    def elements() -> int:
        return sum(math.prod(now[size] for size in shape) for shape in dims)

    wanted = scale * elements()
    while elements() > wanted and max(now.values()) > LEAST:
        largest = max(now, key=now.__getitem__)
        now[largest] = max(now[largest] // 2, LEAST)
    return [tuple(now[size] for size in shape) for shape in dims]


def _row(op: str, inputs: Sequence[Input], output: Shape, **more: Any) -> Row:
    return Row("", "", op, tuple(inputs), output, **more)


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]


def _elementwise(op: str, flops: int, *further: Input) -> Any:
    def build(dims: list[Shape], axis: int | None) -> Row:
        x = Input(dims[0])
        settings = {} if axis is None else {"axis": axis}
        of = tuple(range(1 + len(further)))
        return _row(op, [x, *further], x.shape, settings=settings, of=of, flops=flops * x.size)

    return build


def _argmax(dims: list[Shape], axis: int | None) -> Row:
    assert axis is not None
    return _row("argmax", [Input(dims[0], f"distinct {axis}")], _without(dims[0], axis), settings={"axis": axis})


def _sum(dims: list[Shape], axis: int | None) -> Row:
    x = Input(dims[0], "positive")  # sums of numbers around 0 would hide a wrong one behind rounding
    output = () if axis is None else _without(x.shape, axis)
    return _row("sum", [x], output, settings={"axis": axis}, of=(0,), flops=x.size)


def _sort(dims: list[Shape], axis: int | None, op: str = "sort") -> Row:
    assert axis is not None
    x = Input(dims[0], f"distinct {axis}")
    indices = op == "sort_with_indices"
    note = "values and indices" if indices else "values alone"
    return _row(op, [x], x.shape, settings={"axis": axis}, of=() if indices else (0,), further_outputs=indices,
                flops=x.size * math.log2(x.shape[axis]), note=note)  # fmt: skip


def _sorts_with_indices(scale: float) -> list[Row]:
    rows = []
    for name in published():
        if name.startswith("Sort "):
            words = name.split()
            built = _sort(
                _scaled([tuple(map(int, words[1].split("x")))], scale), int(words[2][5:]), "sort_with_indices"
            )
            rows.append(replace(built, name=name.replace("Sort", "SortIndices"), family="SortIndices"))
    return rows


def _bce(dims: list[Shape], _: int | None) -> Row:
    p, t = Input(dims[0], "probability"), Input(dims[0], "binary")
    return _row("bce", [p, t], (), of=(0,), flops=8 * p.size, note="probabilities, mean")


def _concat(dims: list[Shape], axis: int | None) -> Row:
    assert axis is not None
    a, b = dims
    joined = (*a[:axis], a[axis] + b[axis], *a[axis + 1 :])
    return _row("concat", [Input(a), Input(b)], joined, settings={"axis": axis}, of=(0, 1))


def _conv(dims: list[Shape], _: int | None) -> Row:
    x, w = dims
    lengths = tuple(n - k + 1 for n, k in zip(x[1:-1], w[1:-1], strict=True))
    output = (x[0], *lengths, w[0])
    flops = 2 * math.prod(output) * math.prod(w[1:])
    return _row(f"conv{len(lengths)}d", [Input(x), Input(w)], output, of=(0, 1), flops=flops, note="channels last")


def _gather(dims: list[Shape], _: int | None) -> Row:
    (rows, columns), (count,) = dims
    read = min(rows, count) * columns + count
    inputs = [Input((rows, columns)), Input((count,), "index", rows)]
    return _row("gather", inputs, (count, columns), of=(0,), read=read)


def _scatter(op: str) -> Any:
    def build(dims: list[Shape], _: int | None) -> Row:
        (rows, columns), (count,) = dims
        distinct = op == "scatter" and count <= rows
        index = Input((count,), "distinct index" if distinct else "index", rows)
        # Where rows are written more than once, each time with the same numbers, so that whoever wins is right; whose
        # the gradient then is remains undefined.
        kind = "by index" if op == "scatter" and not distinct else "normal"
        inputs = [Input((rows, columns)), index, Input((count, columns), kind)]
        of = (0,) if kind == "by index" else (0, 2)
        note = "equal rows for equal indices" if kind == "by index" else ""
        return _row(op, inputs, (rows, columns), of=of, flops=count * columns * (op != "scatter"), note=note)

    return build


def _linear(dims: list[Shape], _: int | None) -> Row:
    x, (_, outputs), *bias = dims
    inputs = [Input(x), Input((outputs, x[-1])), *map(Input, bias)]
    output = (*x[:-1], outputs)
    return _row("linear", inputs, output, of=tuple(range(len(inputs))), flops=2 * math.prod(output) * x[-1])


def _matmul(dims: list[Shape], _: int | None) -> Row:
    a, b = dims
    output = (*a[:-1], b[-1])
    return _row("matmul", [Input(a), Input(b)], output, of=(0, 1), flops=2 * math.prod(output) * a[-1])


def _layer_norm(dims: list[Shape], _: int | None, bias: bool = True) -> Row:
    x = dims[0]
    inputs = [Input(x), Input(x[-1:]), *([Input(x[-1:])] if bias else [])]
    return _row("layer_norm", inputs, x, of=tuple(range(len(inputs))), flops=7 * math.prod(x))


def _sdpa(dims: list[Shape], _: int | None, causal: bool = False) -> Row:
    q, k = dims
    flops = 4 * math.prod(q) * k[2] / (2 if causal else 1)
    note = "causal" if causal else "no mask"
    return _row("sdpa", [Input(q), Input(k), Input(k)], q, settings={"causal": causal}, of=(0, 1, 2), flops=flops,
                note=note)  # fmt: skip


_BUILD: dict[str, Any] = {
    "Argmax": _argmax,
    "BCE": _bce,
    "Concat": _concat,
    "Conv1d": _conv,
    "Conv2d": _conv,
    "Gather": _gather,
    "LeakyReLU": _elementwise("leaky_relu", 2),
    "Linear": _linear,
    "MatMul": _matmul,
    "PReLU": _elementwise("prelu", 2, Input((1,))),
    "ReLU": _elementwise("relu", 1),
    "Scatter": _scatter("scatter"),
    "ScatterSum": _scatter("scatter_sum"),
    "ScatterMax": _scatter("scatter_max"),
    "SeLU": _elementwise("selu", 4),
    "Sigmoid": _elementwise("sigmoid", 4),
    "Softmax": _elementwise("softmax", 5),
    "Softplus": _elementwise("softplus", 4),
    "Sort": _sort,
    "Sum": _sum,
    "SumAll": _sum,
    "LayerNorm": _layer_norm,
    "SDPA": _sdpa,
}

# -- this model's -----------------------------------------------------------------------------------------------------


def _of_model(spec: GPTSpec, batch: int, scale: float) -> list[Row]:
    """What an iteration of the run spends its time in, at its sizes."""
    batch = max(round(scale * batch), 1)
    tokens, width, heads, vocab = batch * spec.block_size, spec.n_embd, spec.n_head, spec.vocab_size
    head = (batch, heads, spec.block_size, width // heads)
    wide = Input((tokens, 4 * width))
    weights = math.ceil(scale * sum(math.prod(shape) for shape in spec.shapes().values()))
    flat = Input((weights,))
    layers = {
        "linear qkv": (width, 3 * width),
        "linear attention out": (width, width),
        "linear MLP in": (width, 4 * width),
        "linear MLP out": (4 * width, width),
        "linear head": (width, vocab),
    }
    found = {
        "attention": _sdpa([head, head], None, causal=True),
        "layer norm": _layer_norm([(tokens, width)], None, spec.bias),
        "GELU": _row("gelu", [wide], wide.shape, settings={"tanh": spec.gelu == "tanh"}, of=(0,), flops=8 * wide.size,
                     note=spec.gelu),
        "cross entropy": _row(
            "cross_entropy", [Input((tokens, vocab)), Input((tokens,), "index", vocab)], (), of=(0,),
            flops=5 * tokens * vocab, note="mean",
        ),
        "embedding": _gather([(vocab, width), (tokens,)], None),
        "AdamW": _row(
            "adamw", [flat, flat, flat, Input((weights,), "positive")], (weights,), further_outputs=2,
            flops=12 * weights, note="one step of all weights, written out",
        ),
        **{
            name: _linear([(tokens, k), (k, n), *([(n,)] if spec.bias and name != "linear head" else [])], None)
            for name, (k, n) in layers.items()
        },
    }  # fmt: skip
    return [replace(row, name=f"Model {name}", family=f"Model {name}") for name, row in found.items()]
