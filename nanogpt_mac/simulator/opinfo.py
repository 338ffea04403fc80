"""Self-test: torch's own operator database, run on the simulated device and on the CPU, values and gradients.

python -m nanogpt_mac.simulator.opinfo                    everything (minutes); exit code 1 on any difference
python -m nanogpt_mac.simulator.opinfo --sample 60        a seeded sample
python -m nanogpt_mac.simulator.opinfo gelu linalg.qr     these
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SAMPLES = 40  # of each operator, at most
# The kernels are the same on both sides; only what decomposes differently may differ, by rounding.
TOLERANCE = 2e-5

EQUAL, MISSING, FLOAT64, SKIPPED, DIFFERENT, ERROR = "equal", "missing", "float64", "skipped", "different", "error"


@dataclass(frozen=True)
class Outcome:
    """What became of one operator of the database. `reason` is empty for `equal` alone."""

    name: str
    status: str
    reason: str = ""


def database() -> list[Any]:
    """torch's `op_db`. Its test helpers import expecttest, a package that nothing here needs."""
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
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _on(device: str, value: Any) -> Any:
    """A fresh copy of a sample's arguments on a device."""
    import torch
    from torch.utils._pytree import tree_map

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone().to(device).requires_grad_(leaf.requires_grad)
        return torch.device(device) if isinstance(leaf, torch.device) else leaf

    return tree_map(move, value)


def _tensors(value: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _run(function: Callable[..., Any], device: str, sample: Any, backward: bool) -> tuple[list[Any], list[Any]]:
    """Results and the gradients of the inputs, all on `device`."""
    import torch

    first, args, kwargs = _on(device, (sample.input, sample.args, sample.kwargs))
    if "device" in kwargs:
        kwargs["device"] = device
    torch.manual_seed(0)
    results = _tensors(function(first, *args, **kwargs))
    wanted = [r for r in results if r.requires_grad and not r.is_complex()]
    if not backward or not wanted:
        return results, []
    torch.autograd.backward([r.sum() for r in wanted])
    return results, [t.grad for t in _tensors((first, args, kwargs)) if t.grad is not None]


def _difference(kind: str, got: Sequence[Any], expected: Sequence[Any]) -> str:
    """How the device's tensors differ from the CPU's, or nothing."""
    import torch

    if len(got) != len(expected):
        return f"{kind}: {len(got)} tensors, the CPU has {len(expected)}"
    for g, e in zip(got, expected, strict=True):
        if g.shape != e.shape or g.dtype != e.dtype:
            return f"{kind}: {tuple(g.shape)} {g.dtype}, the CPU has {tuple(e.shape)} {e.dtype}"
        try:
            torch.testing.assert_close(
                g.detach().cpu(), e.detach(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, check_stride=False
            )
        except AssertionError as error:
            return f"{kind}: " + " ".join(str(error).split())[:200]
    return ""


def check(op: Any, limit: int = SAMPLES) -> Outcome:
    """Runs the first `limit` samples of one operator, forward, in place and backward, on both devices.

    In float32, or int64 or complex64 where an operator has no float32.
    """
    import torch

    name = full_name(op)
    if "empty" in op.name:
        return Outcome(name, SKIPPED, "its values are whatever the memory held")
    dtype = next((d for d in (torch.float32, torch.int64, torch.complex64) if d in op.dtypes), None)
    if dtype is None:
        return Outcome(name, SKIPPED, "no kernel for float32, int64 or complex64 on the CPU")
    try:
        samples = list(op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd and dtype != torch.int64))
    except Exception as error:  # the database's own generators raise whatever they like
        return Outcome(name, SKIPPED, f"the database makes no samples: {_line(error)}")
    compared = 0
    for sample in samples[:limit]:
        if any(t.layout is not torch.strided for t in _tensors((sample.input, sample.args, sample.kwargs))):
            continue
        forms: list[tuple[str, Callable[..., Any], bool]] = [("forward", op.op, True)]
        if op.inplace_variant is not None and not sample.broadcasts_input:
            forms.append(("in place", _in_place(op.inplace_variant), False))
        for form, function, backward in forms:
            try:
                expected = _run(function, "cpu", sample, backward)
            except Exception:  # the CPU refuses the sample: nothing to compare with
                continue
            if any(r.layout is not torch.strided for r in expected[0]):
                return Outcome(name, SKIPPED, "its result is sparse, which is not simulated")
            try:
                got = _run(function, "mps", sample, backward)
                difference = _difference(form, got[0], expected[0]) or _difference("gradient", got[1], expected[1])
            except NotImplementedError as error:
                if "for the MPS device" in str(error):
                    return Outcome(name, MISSING, str(error).split("'")[1])
                return Outcome(name, ERROR, _line(error))
            except Exception as error:
                if isinstance(error, TypeError) and "float64" in str(error):
                    return Outcome(name, FLOAT64, _line(error))
                if "expected tensor_indices_or_sections to be on cpu" in str(error):
                    return Outcome(name, SKIPPED, "torch wants its index tensor on the CPU, on every device")
                return Outcome(name, ERROR, _line(error))
            if difference:
                return Outcome(name, DIFFERENT, difference)
            compared += 1
    if not compared:
        return Outcome(name, SKIPPED, "the CPU refuses every sample, or all of them are sparse")
    return Outcome(name, EQUAL)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        return function(first.detach(), *args, **kwargs).detach()

    return run


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:160]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every operator that is not equal with its reason, then the counts."""
    parser = argparse.ArgumentParser(prog="python -m nanogpt_mac.simulator.opinfo", description=__doc__)
    parser.add_argument("names", nargs="*", help="operators of the database, by default all")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    from nanogpt_mac import simulator

    simulator.install()
    import torch

    torch.set_num_threads(1)
    ops = [op for op in database() if not options.names or op.name in options.names]
    if options.sample:
        ops = random.Random(options.seed).sample(ops, min(options.sample, len(ops)))
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in ops:
            outcomes.append(check(op))
            if outcomes[-1].status != EQUAL:
                print(f"{outcomes[-1].status:9} {outcomes[-1].name}: {outcomes[-1].reason}", flush=True)
    counts = Counter(o.status for o in outcomes)
    print(f"{len(outcomes)} operators, torch {torch.__version__}: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    return int(bool(counts[DIFFERENT] or counts[ERROR] or not outcomes))


if __name__ == "__main__":
    sys.exit(main())
