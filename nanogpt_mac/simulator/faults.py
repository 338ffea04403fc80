"""Planted faults: make the device do one thing badly and see whether the rest of the product notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from nanogpt_mac.errors import InputError

Fault = Literal["fallback", "missing", "nowhere", "hidden", "announced", "dtype_limit", "shape_limit", "slow", "wrong"]

_COPYING = ("fallback", "missing", "nowhere", "hidden", "announced")  # to the host and back


@contextmanager
def planted(op: str, fault: Fault, value: float | None = None) -> Iterator[list[str]]:
    """Plants a fault in an operator, and in its in-place and out forms, while the context lasts.

    `op` is one that MPS has, with or without `aten::` and overload: `gelu`, `add.Tensor`, `mm`; the names in which the
    fault was planted are yielded. Faults: `fallback`, registered as an explicit CPU fallback, with the warning;
    `missing`, no kernel, so torch's NotImplementedError, or the fallback where that is enabled; `nowhere`, missing, and
    the CPU lacks it too; `hidden`, the native kernel copies to the host, computes there and copies back without a word;
    `announced`, the same, with the warning that some of these kernels give; `dtype_limit`, refuses its input with the
    TypeError for float64; `shape_limit`, with the RuntimeError of adaptive pooling; `slow`, takes `value` milliseconds
    more of the queue; `wrong`, its floating-point results are multiplied by `value`.

    InputError for an unknown fault, a value that is missing or superfluous, and an operator for which the device has no
    kernel of its own (composite ones decompose: plant the fault in what they become).
    """
    import torch

    from nanogpt_mac.simulator import table

    if fault not in get_args(Fault):
        raise InputError(f"fault={fault!r}: use one of {', '.join(get_args(Fault))}")
    if (value is None) == (fault in ("slow", "wrong")):
        raise InputError(f"fault={fault!r} value={value!r}: slow and wrong take a value, the others none")
    if op.removeprefix("aten::").split(".")[0] == "copy_" and fault in _COPYING:
        raise InputError(f"op={op!r} fault={fault!r}: this fault itself copies by copy_; copy_ takes the others")
    device = torch.ops.nanogpt_mps
    names = [n for n in table().variants(op) if device.status(n) == "native"]
    if not names:
        raise InputError(f"op={op!r}: MPS has no native kernel of that name in torch {torch.__version__}")
    registered = fault in ("fallback", "missing", "nowhere")
    undo = ("native", 0.0) if registered else (fault, 1.0 if fault == "wrong" else 0.0)
    try:
        for name in names:
            device.plant(name, fault, 1.0 if value is None else value)
        yield names
    finally:
        for name in names:
            device.plant(name, *undo)
