"""Run by verify.py in a process of its own: what the MPS device at hand says of itself.

    python -m nanogpt_mac.coverage.verify_child [texts]

Prints JSON. Without an argument: the dispatcher's class of every overload, and the texts of what MPS refuses; with
`texts`, under PYTORCH_ENABLE_MPS_FALLBACK=1, the warnings of what falls back.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from nanogpt_mac import simulator

# Operators that at least one torch of every age has left without a kernel, each with a call that reaches it.
_MISSING = ("_pdist_forward", "geqrf", "segment_reduce", "heaviside.out", "linalg_ldl_factor_ex.out")


def _calls() -> dict[str, Callable[[], Any]]:
    import torch

    x = torch.ones(3, 3, device="mps")
    return {
        "_pdist_forward": lambda: torch.pdist(x),
        "geqrf": lambda: torch.geqrf(x),
        "segment_reduce": lambda: torch.segment_reduce(x, "sum", lengths=torch.tensor([3], device="mps")),
        "heaviside.out": lambda: torch.heaviside(x, x),
        "linalg_ldl_factor_ex.out": lambda: torch.linalg.ldl_factor_ex(x),
    }


def dispatch_class(op: str) -> str:
    """Where the dispatcher has an overload for MPS: kernel, explicit fallback, missing, composite, or unknown."""
    import torch

    try:
        table = torch._C._dispatch_dump_table(f"aten::{op}")
    except RuntimeError:
        return "unknown"
    row = next((line for line in table.splitlines() if line.startswith("MPS: ")), "")
    if "[backend fallback]" in row:
        return "missing"
    if "MPSFallback" in row:  # the registrations by hand: to fall back, or to raise
        return "explicit fallback"
    if "[math kernel]" in row or "[default backend kernel]" in row:
        return "composite"
    return "kernel" if "[kernel]" in row else "missing" if "fallthrough" not in row else "unknown"


def classes() -> dict[str, str]:
    import torch

    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    return {name: dispatch_class(name) for name in sorted(n.removeprefix("aten::") for n in names)}


def texts(fallback: bool) -> dict[str, str | None]:
    """What is said where an operator is missing, where one falls back, and of float64; None where nothing is."""
    import torch

    said: dict[str, str | None] = {}
    for op, call in _calls().items():
        if dispatch_class(op) not in ("missing", "explicit fallback"):
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call()
                words = str(caught[0].message) if caught else None
            except NotImplementedError as error:
                words = str(error)
        said[op] = words and _tidy(words)
    if not fallback:
        try:
            torch.ones(1, dtype=torch.float64, device="mps")
            said["float64"] = None
        except TypeError as error:
            said["float64"] = _tidy(str(error))
    return said


def _tidy(text: str) -> str:
    """One line, without the place in torch's sources, which changes with every version."""
    return " ".join(text.split(" (Triggered")[0].split())


def main() -> None:
    fallback = sys.argv[1:] == ["texts"]
    simulator.install_if_asked()
    import torch

    if not torch.backends.mps.is_available():
        sys.exit("torch finds no MPS device here")
    torch.set_warn_always(True)
    device = simulator.DEVICE_NAME if simulator.active() else "mps"
    made: dict[str, Any] = {"torch": torch.__version__, "device": device, "texts": texts(fallback)}
    if not fallback:
        made["classes"] = classes()
    print(json.dumps(made))


if __name__ == "__main__":
    main()
