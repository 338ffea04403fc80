"""torch's own operator database, and one of its samples run on two devices. Nothing here needs the simulated device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


def database() -> list[Any]:
    """torch's `op_db`. Its test helpers import expecttest, of which nothing here needs more than the name."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        import unittest

        stand_in = ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def full_name(op: Any) -> str:
    """The operator's name in the database, with its variant."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _on(device: str, value: Any) -> Any:
    """A fresh copy of a sample's arguments on a device."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone().to(device).requires_grad_(leaf.requires_grad)
        return torch.device(device) if isinstance(leaf, torch.device) else leaf

    return tree_map(move, value)


def tensors(value: Any) -> list[Any]:
    """The tensors anywhere in a nested value."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def arguments(sample: Any) -> tuple[Any, Any, Any]:
    return sample.input, sample.args, sample.kwargs


def run(
    function: Callable[..., Any], device: str, sample: Any, backward: bool, seed: int = 0
) -> tuple[list[Any], list[Any]]:
    """Results and the gradients of the inputs, all on `device`; `seed` is that of random operators."""
    first, args, kwargs = _on(device, arguments(sample))
    if "device" in kwargs:
        kwargs["device"] = device
    torch.manual_seed(seed)
    results = tensors(function(first, *args, **kwargs))
    wanted = [r for r in results if r.requires_grad and not r.is_complex()]
    if not backward or not wanted:
        return results, []
    torch.autograd.backward([r.sum() for r in wanted])
    return results, [t.grad for t in tensors((first, args, kwargs)) if t.grad is not None]


def difference(
    kind: str, got: Sequence[Any], expected: Sequence[Any], tolerance: Mapping[Any, float], values: bool = True
) -> str:
    """How the device's tensors differ from the CPU's, or nothing.

    `tolerance` is absolute and relative, by dtype; a dtype that is not in it must be equal. Without `values` only
    shapes and dtypes are compared.
    """
    if len(got) != len(expected):
        return f"{kind}: {len(got)} tensors, the CPU has {len(expected)}"
    for g, e in zip(got, expected, strict=True):
        if g.shape != e.shape or g.dtype != e.dtype:
            return f"{kind}: {tuple(g.shape)} {g.dtype}, the CPU has {tuple(e.shape)} {e.dtype}"
        limit = tolerance.get(e.dtype, 0.0)
        try:
            if values:
                torch.testing.assert_close(
                    g.detach().cpu(), e.detach(), rtol=limit, atol=limit, equal_nan=True, check_stride=False
                )
        except AssertionError as error:
            return f"{kind}: " + " ".join(str(error).split())[:200]
    return ""


def line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:160]
