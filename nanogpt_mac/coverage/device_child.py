"""Run by verify.py and opinfo.py in processes of their own: the MPS device at hand, asked what it says and computes.

The task is JSON on standard input. `{"ask": "itself", "fallback": bool}` is answered with the dispatcher's class of
every overload and the texts of what MPS refuses; under PYTORCH_ENABLE_MPS_FALLBACK=1 (`fallback`) with the warnings
alone.
`{"ask": "cases", "names": operators, empty for all, "samples": of each case at most, "start", "stop"}` runs cases of
torch's operator database on MPS against the CPU: `{"cases": how many there are}`, then of each case its name before it
runs and its outcome after, so that a process that dies shows where.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from nanogpt_mac import simulator
from nanogpt_mac.coverage.op_samples import arguments, database, difference, full_name, line, run, tensors
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks.signs import ADMITS, FALLS_BACK
from nanogpt_mac.operators.dispatch import Dispatch, dispatch_of

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


# -- a case of the database ------------------------------------------------------------------------------------------


def cases(names: list[str]) -> list[tuple[Any, str]]:
    """Operators of the database with their dtypes. InputError for a name that it does not have."""
    ops = database()
    chosen, known = [], {alias for op in ops for alias in _aliases(op)}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "use a name such as gelu or linalg.svd"
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
    found = op.get_decorators("TestConsistency", _TESTS[leg], "mps", getattr(torch, dtype), {})
    if unittest.expectedFailure in found:
        return "XFAIL of its own"
    return "SKIP of its own" if any(d.__qualname__.startswith("skip") for d in found if _is_function(d)) else ""


def _is_function(decorator: Any) -> bool:
    return hasattr(decorator, "__qualname__")


def check(op: Any, dtype_name: str, limit: int, limits: Mapping[str, float] = _LIMITS) -> dict[str, str]:
    """One case of at most `limit` samples: its `status` (see opinfo.py), `leg` (forward or gradient), `reason`.

    `limits` are the relative and absolute differences allowed, by dtype; a dtype without one must be equal.
    """
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
            outcome = compare(op.op, sample, leg, limits)
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

    absent = (torch.float64, torch.complex128)
    given = tensors(arguments(sample))
    return all(t.layout is torch.strided and t.dtype not in absent for t in given) and not any(
        leaf in absent for leaf in tree_leaves(arguments(sample)) if isinstance(leaf, torch.dtype)
    )


def _outcome(status: str, reason: str = "", leg: str = "forward") -> dict[str, str]:
    return {"status": status, "leg": leg, "reason": reason}


def compare(function: Any, sample: Any, leg: str, limits: Mapping[str, float]) -> dict[str, str] | None:
    """One sample. None where the CPU refuses it or its result is sparse, so that nothing can be compared."""
    by_dtype = {getattr(torch, name): value for name, value in limits.items()}
    backward = leg == "gradient"
    try:
        expected = run(function, "cpu", sample, backward)
    except Exception:  # it raises whatever it likes
        return None
    if any(r.layout is not torch.strided for r in expected[0]):
        return None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = run(function, "mps", sample, backward)
    except Exception as error:
        if "to be on cpu" in str(error):  # tensor_split's indices, on every device
            return None
        if isinstance(error, NotImplementedError) and "for the MPS device" in str(error):
            return _outcome("missing", str(error).split("'")[1], leg)
        return _outcome("dtype limit" if _is_limit(error) else "error", line(error), leg)
    mine, theirs = (got[1], expected[1]) if backward else (got[0], expected[0])
    if found := difference(leg, mine, theirs, by_dtype):
        again = run(function, "cpu", sample, backward, seed=1)
        random = difference(leg, again[1] if backward else again[0], theirs, by_dtype)
        if not random or (found := difference(leg, mine, theirs, by_dtype, values=False)):
            return _outcome("wrong value", found, leg)
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if FALLS_BACK.search(text) or ADMITS.search(text):
            return _outcome("falls back", text[:160], leg)
    return _outcome("works")


def _is_limit(error: Exception) -> bool:
    text = str(error)
    return bool(_DTYPE.search(text) and (_LIMIT.search(text) or "float64" in text))


# -- what the device says ---------------------------------------------------------------------------------------------


def _calls() -> dict[str, Callable[[], Any]]:
    """Operators that at least one torch of every age has left without a kernel, each with a call that reaches it."""
    x = torch.ones(3, 3, device="mps")
    return {
        "_pdist_forward": lambda: torch.pdist(x),
        "geqrf": lambda: torch.geqrf(x),
        "segment_reduce": lambda: torch.segment_reduce(x, "sum", lengths=torch.tensor([3], device="mps")),
        "heaviside.out": lambda: torch.heaviside(x, x),
        "linalg_ldl_factor_ex.out": lambda: torch.linalg.ldl_factor_ex(x),
    }


def texts(fallback: bool) -> dict[str, str | None]:
    """What is said where an operator is missing, where one falls back, and of float64; None where nothing is."""
    heard: dict[str, str | None] = {}
    for op, call in _calls().items():
        if dispatch_of(op) not in (Dispatch.MISSING, Dispatch.BY_HAND):
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call()
                words = str(caught[0].message) if caught else None
            except NotImplementedError as error:
                words = str(error)
        heard[op] = words and _tidy(words)
    if not fallback:
        try:
            torch.ones(1, dtype=torch.float64, device="mps")
            heard["float64"] = None
        except TypeError as error:
            heard["float64"] = _tidy(str(error))
    return heard


def _tidy(text: str) -> str:
    """One line, without the place in torch's sources, which changes with every version."""
    return " ".join(text.split(" (Triggered")[0].split())


# -- the two questions ------------------------------------------------------------------------------------------------


def _itself(fallback: bool) -> dict[str, object]:
    made: dict[str, object] = {"torch": torch.__version__, "texts": texts(fallback)}
    if not fallback:
        names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
        made["classes"] = {op: dispatch_of(op) for op in sorted(name.removeprefix("aten::") for name in names)}
    return made


def _cases(names: list[str], samples: int, start: int, stop: int) -> Iterator[dict[str, object]]:
    torch.set_num_threads(1)
    chosen = cases(names)
    device = simulator.DEVICE_NAME if simulator.active() else "mps"
    yield {"cases": len(chosen), "device": device, "torch": torch.__version__}
    for number in range(start, min(stop, len(chosen))):
        op, dtype = chosen[number]
        own = {leg: own_expectation(op, dtype, leg) for leg in _TESTS}
        key = op.name + op.variant_test_name
        yield {"number": number, "op": full_name(op), "key": key, "dtype": dtype, "own": own}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = check(op, dtype, samples)
        yield {"number": number, **outcome}


def main() -> None:
    task = json.load(sys.stdin)
    simulator.install_if_asked()
    if not torch.backends.mps.is_available():
        raise InputError("torch finds no MPS device here")
    torch.set_warn_always(True)
    for words in [_itself(**task)] if task.pop("ask") == "itself" else _cases(**task):
        print(json.dumps(words), flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
