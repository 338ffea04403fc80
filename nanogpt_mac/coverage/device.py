"""The environment of a child process that has an MPS device: a Mac's own, or the simulated one on Linux."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nanogpt_mac import simulator
from nanogpt_mac.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]


def environment(fallback: bool, **more: str) -> dict[str, str]:
    """This process's environment, with MPS set as asked and this package importable.

    Args:
        fallback: whether a missing operator runs on the CPU (torch reads the variable when it is loaded).

    InputError on a machine that can have neither device.
    """
    if sys.platform not in ("darwin", "linux"):
        raise InputError(f"there is no MPS device, and none can be simulated, on {sys.platform}")
    dropped = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")  # another environment's
    made = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_") and k not in dropped}
    if fallback:
        made["PYTORCH_ENABLE_MPS_FALLBACK"] = "1"
    if sys.platform == "linux":
        made[simulator.VARIABLE] = "1"
    made["PYTHONPATH"] = str(PACKAGE.parent)
    return made | more
