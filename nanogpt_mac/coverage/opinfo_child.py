"""Run by opinfo.py in processes of their own: cases of torch's operator database, on MPS against the CPU.

    python -m nanogpt_mac.coverage.opinfo_child < TASK

TASK is JSON: `ops` (names, empty for all), `samples` (of each case at most), `start` and `stop` (of the cases in
order). Prints JSON lines: `{"cases": how many there are}`, then for each case its name before it runs and its outcome
after, so that a process that dies tells where.
"""

from __future__ import annotations

import json
import re
import sys
import unittest
import warnings
from typing import Any

from nanogpt_mac import simulator
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks.signs import ADMITS, FALLS_BACK
from nanogpt_mac.simulator.samples import arguments, database, difference, full_name, line, run, tensors

# What torch's own tests for MPS run, in their order; float64 and complex128 do not exist there.
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "bool", "complex64")
GRADIENTS = ("float16", "float32")
_TESTS = {"forward": "test_output_match", "gradient": "test_output_grad_match"}
# Wider than the tests of torch: what exceeds them is wrong and not only rounded.
_LIMITS = {"float16": 2e-2, "bfloat16": 5e-2, "float32": 2e-4, "complex64": 2e-4, "float64": 2e-4}
_DTYPE = re.compile(
    r"float64|complex128|double|dtype|scalar ?type|data type|not implemented for '\w+'|"
    r"\b(u?int(8|16|32|64)?|integer|long|short|char|byte|bool|half|float16|bfloat16|complex\w*|floating)\b",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"not (yet )?(supported|implemented)|n't (yet )?support|unsupported|only support|expect|must be")


def cases(names: list[str]) -> list[tuple[Any, str]]:
    """Operators of the database with their dtypes. InputError for a name that it does not have."""
    import difflib

    ops = database()
    chosen, known = [], {alias for op in ops for alias in _aliases(op)}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "allowed are names such as gelu and linalg.svd"
            raise InputError(f"op={name}: torch's operator database has no such operator; {hint}")
    for op in ops:
        if not names or _aliases(op) & set(names):
            dtypes = {str(dtype).removeprefix("torch.") for dtype in op.supported_dtypes("mps")}
            chosen += [(op, dtype) for dtype in DTYPES if dtype in dtypes]
    return chosen


def _aliases(op: Any) -> set[str]:
    """What an operator may be called: nn.functional.gelu, gelu; linalg.svd, linalg_svd."""
    return {full_name(op), op.name, op.name.replace(".", "_"), op.name.removeprefix("nn.functional.")}


def own_expectation(op: Any, dtype: str, leg: str) -> str:
    """What the operator's entry itself says of torch's test for MPS: expected to fail, not run, or nothing."""
    import torch

    found = op.get_decorators("TestConsistency", _TESTS[leg], "mps", getattr(torch, dtype), {})
    if unittest.expectedFailure in found:
        return "XFAIL of its own"
    return "SKIP of its own" if any(d.__qualname__.startswith("skip") for d in found if _is_function(d)) else ""


def _is_function(decorator: Any) -> bool:
    return hasattr(decorator, "__qualname__")


def check(op: Any, dtype_name: str, limit: int) -> dict[str, str]:
    """One case: its `status` (see opinfo.py), `leg` (forward or gradient), `reason`."""
    import torch

    dtype = getattr(torch, dtype_name)
    backward = op.supports_autograd and dtype_name in GRADIENTS
    if "empty" in op.name:
        return _outcome("skipped", "its values are whatever the memory held")
    worst, compared = None, 0
    for leg in ("forward", "gradient") if backward else ("forward",):
        try:
            torch.manual_seed(0)
            samples = [s for s in op.sample_inputs("cpu", dtype, requires_grad=leg == "gradient") if _can_be_asked(s)]
        except Exception as error:  # the database's own generators raise whatever they like
            return _outcome("skipped", f"the database makes no samples: {line(error)}")
        for sample in samples[:limit]:
            outcome = _compare(op, sample, leg)
            if outcome is None:
                continue
            compared += 1
            if outcome["status"] == "falls back":
                worst = worst or outcome
            elif outcome["status"] != "works":
                return outcome
    if not compared:
        return _outcome("skipped", "no sample is one that the CPU computes, dense and without float64")
    return worst or _outcome("works")


def _can_be_asked(sample: Any) -> bool:
    """Whether a sample is dense and asks for no dtype that MPS does not have."""
    import torch
    from torch.utils._pytree import tree_leaves

    absent = (torch.float64, torch.complex128)
    given = tensors(arguments(sample))
    return all(t.layout is torch.strided and t.dtype not in absent for t in given) and not any(
        leaf in absent for leaf in tree_leaves(arguments(sample)) if isinstance(leaf, torch.dtype)
    )


def _outcome(status: str, reason: str = "", leg: str = "forward") -> dict[str, str]:
    return {"status": status, "leg": leg, "reason": reason}


def _compare(op: Any, sample: Any, leg: str) -> dict[str, str] | None:
    """One sample. None where the CPU refuses it or its result is sparse, so that nothing can be compared."""
    import torch

    limits = {getattr(torch, name): value for name, value in _LIMITS.items()}
    backward = leg == "gradient"
    try:
        expected = run(op.op, "cpu", sample, backward)
    except Exception:  # it raises whatever it likes
        return None
    if any(r.layout is not torch.strided for r in expected[0]):
        return None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = run(op.op, "mps", sample, backward)
    except Exception as error:
        if "to be on cpu" in str(error):  # tensor_split's indices, on every device
            return None
        if isinstance(error, NotImplementedError) and "for the MPS device" in str(error):
            return _outcome("missing", str(error).split("'")[1], leg)
        return _outcome("dtype limit" if _is_limit(error) else "error", line(error), leg)
    mine, theirs = (got[1], expected[1]) if backward else (got[0], expected[0])
    if found := difference(leg, mine, theirs, limits):
        again = run(op.op, "cpu", sample, backward, seed=1)
        random = difference(leg, again[1] if backward else again[0], theirs, limits)
        if not random or (found := difference(leg, mine, theirs, limits, values=False)):
            return _outcome("wrong value", found, leg)
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if FALLS_BACK.search(text) or ADMITS.search(text):
            return _outcome("falls back", text[:160], leg)
    return _outcome("works")


def _is_limit(error: Exception) -> bool:
    text = str(error)
    return bool(_DTYPE.search(text) and (_LIMIT.search(text) or "float64" in text))


def main() -> None:
    task = json.load(sys.stdin)
    simulator.install_if_asked()
    import torch

    if not torch.backends.mps.is_available():
        raise InputError("scope=opinfo: torch finds no MPS device here")
    torch.set_num_threads(1)
    torch.set_warn_always(True)
    chosen = cases(task["ops"])
    device = simulator.DEVICE_NAME if simulator.active() else "mps"

    def say(**words: Any) -> None:
        print(json.dumps(words), flush=True)

    say(cases=len(chosen), device=device, torch=torch.__version__)
    for number in range(task["start"], min(task["stop"], len(chosen))):
        op, dtype = chosen[number]
        own = {leg: own_expectation(op, dtype, leg) for leg in _TESTS}
        say(number=number, op=full_name(op), key=op.name + op.variant_test_name, dtype=dtype, own=own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            say(number=number, **check(op, dtype, task["samples"]))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
