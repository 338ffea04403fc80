"""A simulated MPS device for a stock torch on Linux, so that every line meant for a Mac's GPU runs in CI.

`install()`, or NANOGPT_MAC_SIMULATE_MPS=1 and `install_if_asked()`, make `device="mps"` work for the whole process:
tensors in host memory, operators on the CPU kernels, the operator set, errors, warnings and rules of a Mac. It proves
dispatch, interfaces and error paths. It says nothing about a Mac's numbers or speed, so whatever is recorded under it
carries `device: simulated-mps`.

Not simulated: sparse tensors, `load_metallib`, captures and the Metal profiler (it does nothing), what Mac kernels
check beyond the CPU's (an integer `linear` is refused there and computed here), the MPS operators of LSTM and
convolution (they decompose), memory figures beyond the tensors' own sizes, and Metal's address spaces.

    from nanogpt_mac import simulator

    simulator.install()
    with simulator.planted("gelu", "missing"): ...       # faults.py
    simulator.plan(us_per_kernel=20)                      # timeline.py: a queue that runs behind the host
    simulator.launches()                                  # metal.py: the Metal kernels that ran
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from nanogpt_mac.errors import InputError
from nanogpt_mac.simulator.torch_layer import DEVICE_NAME

if TYPE_CHECKING:
    from nanogpt_mac.simulator.faults import planted
    from nanogpt_mac.simulator.metal import Launch, clear_launches, launch_counts, launches
    from nanogpt_mac.simulator.optable import OpTable
    from nanogpt_mac.simulator.timeline import Counts, counts, operators, plan, reset_counts, set_max_memory

__all__ = [
    "DEVICE_NAME",
    "VARIABLE",
    "Counts",
    "Launch",
    "active",
    "clear_launches",
    "counts",
    "install",
    "install_if_asked",
    "launch_counts",
    "launches",
    "operators",
    "plan",
    "planted",
    "reset_counts",
    "set_max_memory",
    "table",
]

VARIABLE = "NANOGPT_MAC_SIMULATE_MPS"
_OLDEST, _TOO_NEW = (2, 11), (2, 17)
_table: OpTable | None = None


def __getattr__(name: str) -> Any:
    """What looks at an installed device, imported when it is asked for: every command comes through here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanogpt_mac.simulator import faults, metal, timeline

    return next(getattr(module, name) for module in (faults, metal, timeline) if hasattr(module, name))


def active() -> bool:
    """Whether this process has the simulated device. Imports nothing."""
    return _table is not None


def environment(fallback: bool, *dropped: str, **more: str) -> dict[str, str]:
    """The environment of a child process that has an MPS device: a Mac's own, or this one on Linux.

    `fallback` is whether a missing operator runs on the CPU there; torch reads that when it is loaded. Variables that
    begin with `PYTORCH_` or one of `dropped` are left out. InputError on a machine that can have neither device.
    """
    if sys.platform not in ("darwin", "linux"):
        raise InputError(f"MPS needs a Mac, or Linux to simulate it; this is {sys.platform}")
    made = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH_", *dropped))}
    if fallback:
        made["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"
    if sys.platform == "linux":
        made[VARIABLE] = "1"
    return made | more


def asked() -> bool:
    """Whether NANOGPT_MAC_SIMULATE_MPS is 1."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise InputError(f"{VARIABLE}={value!r}: use 1 or 0")
    return value == "1"


def install_if_asked() -> bool:
    """Installs the device when NANOGPT_MAC_SIMULATE_MPS is 1; returns whether it is active."""
    if asked():
        install()
    return active()


def install(operators: OpTable | None = None) -> None:
    """Makes `device="mps"` work in this process and its children, for good; does nothing when it does already.

    `operators` is the operator set to simulate, by default that of the installed torch. InputError off Linux, for a
    torch that is not supported, and without a compiler.
    """
    global _table
    if active():
        return
    if sys.platform != "linux":
        raise InputError(f"the simulated MPS device needs Linux; this is {sys.platform}")
    import torch

    from nanogpt_mac.simulator.build import build_device
    from nanogpt_mac.simulator.optable import installed_table
    from nanogpt_mac.simulator.torch_layer import patch_torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not _OLDEST <= version < _TOO_NEW:
        raise InputError(
            f"torch {torch.__version__} is not supported by the simulated MPS device: use "
            f">={_OLDEST[0]}.{_OLDEST[1]},<{_TOO_NEW[0]}.{_TOO_NEW[1]}"
        )
    operators = operators or installed_table()
    torch.ops.load_library(build_device())
    # A Mac's build reads the variable once, when torch is loaded; a number other than zero enables the fallback.
    fallback = os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0")
    if not fallback.strip().isdecimal():
        raise InputError(f"PYTORCH_ENABLE_MPS_FALLBACK={fallback!r}: torch reads a number, 0 or 1")
    torch.ops.nanogpt_mps.install(operators.native, operators.fallback, int(fallback) != 0)
    patch_torch()
    os.environ[VARIABLE] = "1"  # for child processes
    _table = operators


def table() -> OpTable:
    """The operator set in force. InputError when the device is not installed."""
    if _table is None:
        raise InputError(f"the simulated MPS device is not installed: set {VARIABLE}=1")
    return _table
