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
from typing import Any

from nanogpt_mac.simulator.samples import arguments, database, difference, full_name, line, run, tensors

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
        return Outcome(name, SKIPPED, f"the database makes no samples: {line(error)}")
    rounded = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
    limits = dict.fromkeys(rounded, TOLERANCE)
    compared = 0
    for sample in samples[:limit]:
        if any(t.layout is not torch.strided for t in tensors(arguments(sample))):
            continue
        forms: list[tuple[str, Callable[..., Any], bool]] = [("forward", op.op, True)]
        if op.inplace_variant is not None and not sample.broadcasts_input:
            forms.append(("in place", _in_place(op.inplace_variant), False))
        for form, function, backward in forms:
            try:
                expected = run(function, "cpu", sample, backward)
            except Exception:  # the CPU refuses the sample: nothing to compare with
                continue
            if any(r.layout is not torch.strided for r in expected[0]):
                return Outcome(name, SKIPPED, "its result is sparse, which is not simulated")
            try:
                got = run(function, "mps", sample, backward)
                found = difference(form, got[0], expected[0], limits) or difference(
                    "gradient", got[1], expected[1], limits
                )
            except NotImplementedError as error:
                if "for the MPS device" in str(error):
                    return Outcome(name, MISSING, str(error).split("'")[1])
                return Outcome(name, ERROR, line(error))
            except Exception as error:
                if isinstance(error, TypeError) and "float64" in str(error):
                    return Outcome(name, FLOAT64, line(error))
                if "expected tensor_indices_or_sections to be on cpu" in str(error):
                    return Outcome(name, SKIPPED, "torch wants its index tensor on the CPU, on every device")
                return Outcome(name, ERROR, line(error))
            if found:
                return Outcome(name, DIFFERENT, found)
            compared += 1
    if not compared:
        return Outcome(name, SKIPPED, "the CPU refuses every sample, or all of them are sparse")
    return Outcome(name, EQUAL)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        return function(first.detach(), *args, **kwargs).detach()

    return run


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
