"""The signs of work that leaves the GPU, as torch gives them: texts, places, and the transfers that are meant.

Imports no torch: the parent of the detector's child reads it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
WATCHERS = ("fallbacks", "compile_report", "coverage", "simulator")  # rooms that look on: never the place of a finding

PHASES = ("forward", "backward", "clip", "optimizer", "result", "evaluation", "sampling")
COMPILED_PHASES = ("forward", "backward", "evaluation")  # those that compile=true compiles
CONTROL = "control"  # where the detector tries itself

# What MPSFallback.mm, the dispatcher and native kernels say. Overload names follow a dot: aten::gelu.out
FALLS_BACK = re.compile(r"The operator '([^']+)' is not currently supported on the MPS backend")
NOT_ON_MPS = re.compile(r"The operator '([^']+)' is not currently implemented for the MPS device")
NOT_ON_CPU = re.compile(r"Could not run '([^']+)' with arguments from the 'CPU' backend")
ADMITS = re.compile(r"falling back (?:to|on)(?: the)? CPU", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"out of memory", re.IGNORECASE)

Frame = tuple[str, int, str]  # file, line, function


@dataclass(frozen=True)
class Meant:
    """A transfer or wait that this project makes on purpose. Anything beyond `most` of them in a phase is a finding."""

    phase: str
    op: str
    function: str  # of backends/torch_backend.py, in which it is made
    to_host: bool
    most: int  # times a phase, as the detector runs it
    reason: str


# Everything that the project itself sends between host and device, or waits for, while a phase runs. Non-blocking
# copies to the device wait for nothing and are not looked for.
MEANT = (
    Meant("result", "copy_", "_handle", True, 1, "loss and gradient norm go to the host behind the iteration"),
    Meant("evaluation", "_local_scalar_dense", "evaluate", True, 1, "the mean loss of an evaluation is read once"),
    Meant("sampling", "copy_", "decoder", True, 2, "the logits of each token go to the host, where it is drawn"),
    Meant("sampling", "copy_", "_tokens", False, 2, "each token goes to the device"),
)


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
