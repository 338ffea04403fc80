"""The signs of work that leaves the GPU, as torch gives them: texts and places.

Imports no torch: the parent of the detector's child reads it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
WATCHERS = ("fallbacks", "compile_report", "coverage", "simulator")  # rooms that look on: never the place of a finding

COMPILED_PHASES = ("forward", "backward", "evaluation")  # those that compile=true compiles
CONTROL = "control"  # where the detector tries itself

# What MPSFallback.mm, the dispatcher and native kernels say. Overload names follow a dot: aten::gelu.out
FALLS_BACK = re.compile(r"The operator '([^']+)' is not currently supported on the MPS backend")
NOT_ON_MPS = re.compile(r"The operator '([^']+)' is not currently implemented for the MPS device")
NOT_ON_CPU = re.compile(r"Could not run '([^']+)' with arguments from the 'CPU' backend")
ADMITS = re.compile(r"falling back (?:to|on)(?: the)? CPU", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
ANY_DEVICE = re.compile(r"Use Tensor\.cpu\(\)|only dense CPU tensors")  # what no device but the CPU can

Frame = tuple[str, int, str]  # file, line, function


def short(op: str) -> str:
    """An operator without aten::, and without the overload name `default`."""
    return op.removeprefix("aten::").removesuffix(".default")


def relative(file: str) -> str | None:
    """A source file's path from the repository or from site-packages; None for what is neither this project nor torch.

    A profiler leaves out the entries of sys.path, a frame has them.
    """
    if file.startswith(f"{PACKAGE}/"):
        return file[len(str(PACKAGE.parent)) + 1 :]
    tail = file.rpartition("-packages/")[2]
    return tail if tail.startswith(("nanogpt_mac/", "torch/")) else None


def is_generated(frame: Frame, folder: str) -> bool:
    """Whether a frame belongs to code that Inductor wrote into its cache `folder`."""
    return bool(folder) and frame[0].startswith(folder)


def project_frame(frames: Iterable[Frame]) -> Frame | None:
    """The innermost frame of this project (the detector itself apart), of frames that begin with the innermost."""
    for frame in frames:
        path = relative(frame[0])
        if path and path.startswith("nanogpt_mac/") and path.split("/")[1] not in WATCHERS:
            return frame
    return None


def place(frames: Iterable[Frame]) -> str | None:
    """`file.py:line`: where this project's code is, else torch's."""
    frames = list(frames)
    frame = project_frame(frames) or next((f for f in frames if (relative(f[0]) or "").startswith("torch/")), None)
    return f"{relative(frame[0])}:{frame[1]}" if frame else None
