"""Which operator raised an error, and whether the CPU would have taken the same arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nanogpt_mac.fallbacks.observed import Refused
from nanogpt_mac.fallbacks.profiled import DEVICE, Record, dtypes_of
from nanogpt_mac.fallbacks.signs import NOT_ON_CPU, Frame, place, relative, short

# Of torch, between the call of an operator and the mode that looks at it.
_BETWEEN = ("/torch/utils/_python_dispatch.py", "/torch/_dynamo/eval_frame.py", "/torch/_compile.py")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


class Locator(TorchDispatchMode):
    """Looks at every operator of a phase, and keeps the one that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Refused | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if self.found is None:  # an outer operator passes the error on
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                self.found = Refused(
                    phase="",
                    type=type(error).__name__,
                    text=_line(error),
                    op=short(str(func)).replace("aten.", "", 1),
                    dtypes=dtypes_of(tensors),
                    shapes=[list(t.shape) for t in tensors],
                    where=place(_frames()),
                    cpu=runs_on_cpu(func, args, kwargs),
                )
            raise

    def located(self, phase: str, error: Exception) -> Refused:
        """What was found, or the bare error where no operator raised it."""
        found = self.found or Refused(phase, type(error).__name__, _line(error))
        found.phase = phase
        return found


class Lines(TorchDispatchMode):
    """Looks at every operator of a phase, and keeps the exact line in Python that each was called from."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[tuple[str, str, int], list[int]] = {}  # operator, file, a function's first line: lines

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if frame := next(_python(), None):
            code = frame.f_code
            name, file = func.__name__.partition(".")[0], relative(code.co_filename) or ""
            known = self.lines.setdefault((name, file, code.co_firstlineno), [])
            if frame.f_lineno not in known:
                known.append(frame.f_lineno)
        return func(*args, **(kwargs or {}))


def _python() -> Iterator[FrameType]:
    """The frames that an operator was called from, innermost first; nothing of use on a thread of autograd's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.endswith((*_BETWEEN, __file__)):
            yield frame
        frame = frame.f_back


def _frames() -> list[Frame]:
    return [(f.f_code.co_filename, f.f_lineno, f.f_code.co_name) for f in _python()]


def runs_on_cpu(func: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether the CPU takes the same call; None where it has no such operator.

    False where arguments lie on both devices: that is the caller's mistake, which moving them would hide.
    """
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
    if len({t.device.type for t in given}) > 1:
        return False

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().cpu()
        return "cpu" if isinstance(value, str | torch.device) and str(value).partition(":")[0] == DEVICE else value

    try:
        # Without function modes: one of them is the default device.
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            func(*tree_map(moved, args), **tree_map(moved, kwargs))
    except Exception as error:  # whatever it is, MPS is not what limits
        return None if NOT_ON_CPU.search(str(error)) else False
    return True


def located_in_profile(phase: str, error: Exception, last: Record | None) -> Refused:
    """Of compiled code: the last operator that it called before the error came out of it."""
    found = Refused(phase, type(error).__name__, _line(error))
    if last is not None:
        found.op, found.dtypes, found.shapes, found.where = last.op, last.dtypes, last.shapes, last.where
        found.evidence = list(last.evidence)
    return found
