"""Run by test_check.py in a process with the simulated MPS device: small functions compiled under watch.

Prints one JSON object. With a patch (Python) and a task as arguments: the report of that task after the patch.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

warnings.simplefilter("ignore")

from nanogpt_mac import simulator  # noqa: E402

simulator.install()

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from nanogpt_mac.compile_report import check as compiled  # noqa: E402
from nanogpt_mac.compile_report import dynamo, recorders  # noqa: E402
from nanogpt_mac.compile_report.describe import describe  # noqa: E402
from nanogpt_mac.compile_report.seen import watch  # noqa: E402


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to("mps").requires_grad_()


def clean(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(F.gelu(x @ w), (w.shape[1],)).sum()


def compiled_clean(execute: bool) -> dict[str, Any]:
    """Forward and backward of `clean` in a marked iteration, with what the simulated device itself recorded of it."""
    torch._dynamo.reset()
    function = torch.compile(clean, dynamic=False)
    x, w = tensor(8, 48), tensor(48, 40)
    with watch(execute) as seen:
        function(x, w).backward()
        x.grad = w.grad = None
        simulator.clear_launches()
        with seen.iteration():
            function(x, w).backward()
        launches = [(r.name, r.threads, r.group, r.bytes) for r in simulator.launches()]
        grad = x.grad.clone()
        if execute:
            with simulator.plan(us_per_kernel=700), seen.timing():
                function(x, w).backward()
    made = {"report": asdict(describe(seen)), "launches": launches}
    if execute:
        x.grad = None
        value = function(x, w)  # after the watch: as before
        plain = clean(x, w)
        made["same_value"] = torch.allclose(value, plain, atol=1e-4)
        value.backward()
        made["same_grad"] = torch.equal(grad, x.grad)
    else:
        try:
            function(x, w)
        except RuntimeError as error:
            made["after"] = str(error)
    return made


def one(function: Any, *calls: tuple[Any, ...], marked: int = -1, **options: Any) -> dict[str, Any]:
    """The report of a function compiled without gradients; the call number `marked` is the steady iteration."""
    torch._dynamo.reset()
    f = torch.compile(function, dynamic=False, **options)
    with watch() as seen, torch.no_grad():
        for i, args in enumerate(calls):
            if i == marked % len(calls):
                with seen.iteration():
                    f(*args)
            else:
                f(*args)
    return asdict(describe(seen))


def broken(x: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


def without(holder: Any, name: str, function: Any = None) -> dict[str, Any]:
    """The report where one reading of torch's internals fails, as under a version that has them elsewhere."""

    def gone(*_args: Any) -> Any:
        raise AttributeError(f"no {name} in this torch")

    value = getattr(holder, name)
    setattr(holder, name, gone)
    try:
        x = tensor(5)
        return one(function or (lambda x: x * 3 + 1), (x,), (x,))
    finally:
        setattr(holder, name, value)


def cases() -> dict[str, Any]:
    x = tensor(6)
    made: dict[str, Any] = {"executed": compiled_clean(True), "dry": compiled_clean(False)}
    made["fallbacks"] = one(lambda x: x.cumsum(0) + x.sort().values * 2, (x,), (x,))
    made["broken"] = one(broken, (x,), (x,))
    made["break_line"] = broken.__code__.co_firstlineno + 2
    made["recompiled"] = one(lambda x: x.exp() - 1, (tensor(5),), (tensor(7),), (tensor(9),), (tensor(9),))
    made["unsteady"] = one(lambda x: x.exp() - 2, (tensor(5),), (tensor(6),))
    made["no_records"] = without(dynamo, "compilations")
    made["no_counters"] = without(dynamo, "counters")
    made["no_log"] = without(dynamo, "break_loggers", broken)
    made["no_modules"] = without(recorders, "_replace")
    hook, recorders._modules = recorders._modules, lambda recorder: nullcontext()
    made["hook_missed"] = one(lambda x: x * 5 + 1, (x,), (x,))
    recorders._modules = hook
    made["restored"] = recorders._current is None and not isinstance(torch.mps.compile_shader, partial)
    with watch():
        try:
            with watch():
                pass
        except RuntimeError as error:
            made["nested"] = str(error)
    return made


def patched(patch: str, task: str) -> dict[str, Any]:
    exec(patch, {"torch": torch})
    return compiled._child(json.loads(task))


if __name__ == "__main__":
    print(json.dumps(patched(*sys.argv[1:]) if sys.argv[1:] else cases()))
