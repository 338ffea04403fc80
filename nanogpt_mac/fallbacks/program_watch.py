"""What looks on while a program runs: a function mode for places, a profile in windows for operators."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig, _RecordFunctionFast
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode

from nanogpt_mac.fallbacks.cuda_map import CudaMap
from nanogpt_mac.fallbacks.profiled import DEVICE, MARK
from nanogpt_mac.fallbacks.program_profile import MASK, NOWHERE, Ledger
from nanogpt_mac.fallbacks.refusals import runs_on_cpu
from nanogpt_mac.fallbacks.signs import ANY_DEVICE, NOT_ON_CPU, NOT_ON_MPS, OUT_OF_MEMORY, PACKAGE, WATCHERS, short

_WINDOW = 4000  # calls of torch's interface between two looks at the profile
_INDEXING = ("__getitem__", "__setitem__", "index_put", "index_put_")
_KEEP_S = 5.0  # between two versions of the answer, in case the process dies
_LIBRARIES = (
    *(f"{Path(path)}/" for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))),
    *(f"{Path(path)}/" for path in (*site.getsitepackages(), site.getusersitepackages())),
    f"{Path(torch.__file__).parent}/",
    *(f"{PACKAGE / room}/" for room in WATCHERS),
    "<frozen",
)


class Stop(BaseException):
    """The program has run long enough; the text says why."""


class Watch(TorchFunctionMode):
    """Everything that looks on while the program runs."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self.task, self.map = task, CudaMap() if task["map_cuda"] else None
        self.keep: Callable[[str], object] = lambda ended: None  # writes the answer
        self.ledger = Ledger()
        self.home = str(Path(task["argv"][0]).resolve().parent)
        self.of_program: dict[str, bool] = {}
        self.places: list[tuple[str, int, str]] = []  # file, line, what it called
        self.marks: dict[tuple[str, int, str], str] = {}
        self.open = self.busy = self.reading = self.late = False
        self.calls = 0
        self.refused: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.began = self.kept = time.monotonic()
        self.watched_s = 0.0  # spent on reading profiles
        config = _ExperimentalConfig(capture_overload_names=True)
        self.profiler = profile(use_cpu=True, use_kineto=True, record_shapes=True, experimental_config=config)

    # -- windows --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        if not self.open and self.task["answer"]:
            _prepare_profiler(self.profiler.config(), self.profiler.kineto_activities)
            _enable_profiler(self.profiler.config(), self.profiler.kineto_activities)
            self.open, self.calls = True, 0

    def end(self) -> None:
        """Closes a window and reads it."""
        if self.open:
            begin, self.open, self.reading = time.perf_counter(), False, True
            with torch._C.DisableTorchFunction():
                self.ledger.read(_disable_profiler().experimental_event_tree())
            self.watched_s += time.perf_counter() - begin
            self.reading = False
            if self.late:
                self.too_long()

    def too_long(self) -> None:
        """The time limit; a window that is being read is read to its end."""
        self.late = self.reading
        if not self.late:
            raise Stop("stopped by the time limit")

    def leave(self) -> None:
        """In a process that was forked off: nothing is watched there."""
        self.open, self.task["answer"] = False, ""

    # -- calls of torch's interface -------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.map is not None:
            func, args, kwargs = self.map.mapped(func, args, kwargs)
        if not self.task["answer"]:
            return func(*args, **kwargs)
        self.calls += 1
        if self.calls > _WINDOW and not self.busy:
            self.end()
            self.begin()
            if time.monotonic() - self.kept > _KEEP_S:
                self.keep("killed")
        frame = self.frame(sys._getframe(1))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        masked = name in _INDEXING and _has_mask(args[1:])
        try:
            with self.annotation(frame, name), _RecordFunctionFast(MASK) if masked else nullcontext():
                return func(*args, **kwargs)
        except Exception as error:  # outside: a range that is open when a profile ends is written to after it is freed
            self._refusal(frame, name, func, args, kwargs, error)
            raise

    def frame(self, frame: types.FrameType | None) -> tuple[str, int]:
        """The innermost line of the program; ("", 0) where it has none."""
        while frame is not None:
            if self.is_program(frame.f_code.co_filename):
                return frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back
        return "", 0

    def is_program(self, file: str) -> bool:
        """Whether a file is of the program: not of Python, torch, or a package."""
        mine = self.of_program.get(file)
        if mine is None:
            mine = self.of_program[file] = self._is_program(file)
        return mine

    def _is_program(self, file: str) -> bool:
        if file.startswith("<"):
            return False
        path = os.path.abspath(file)  # noqa: PTH100 - links stay: a program's folder may be one
        at_home = path.startswith(f"{self.home}/")
        if path.startswith(_LIBRARIES):  # an environment may lie in the program's folder, a program in an environment
            return at_home and f"{self.home}/".startswith(_LIBRARIES)
        if at_home:
            return True
        return not any(path.startswith(f"{folder}/") and _is_installed(folder) for folder in sys.path)

    def annotation(self, frame: tuple[str, int], name: str) -> _RecordFunctionFast:
        key = (*frame, name)
        mark = self.marks.get(key)
        if mark is None:
            mark = self.marks[key] = f"{MARK}{len(self.places) if frame[0] else NOWHERE}"
            if frame[0]:
                self.places.append(key)
        return _RecordFunctionFast(mark)

    @contextmanager
    def marked(self, mark: str, name: str) -> Iterator[None]:
        """An annotation of its own, at the program's line."""
        if not self.open:
            yield
            return
        with self.annotation(self.frame(sys._getframe(2)), name), _RecordFunctionFast(mark):
            yield

    def _refusal(self, frame: tuple[str, int], name: str, func: Any, args: Any, kwargs: Any, error: Exception) -> None:
        """Keeps an error that is MPS's own: the operator is missing, or the CPU takes the same call."""
        text = " ".join(str(error).split())[:400]
        if getattr(error, "_nanogpt_mac_seen", False) or OUT_OF_MEMORY.search(text) or ANY_DEVICE.search(text):
            return
        if named := NOT_ON_CPU.search(text) or NOT_ON_MPS.search(text):
            kind, name = "missing", short(named[1])
        elif not isinstance(error, TypeError | RuntimeError):
            return
        elif self.busy or name == "backward":  # not to be asked again
            kind = "limit" if "MPS" in text else ""
        else:
            here = "MPS" in text or _on_device(args, kwargs)  # in neither where MPS is the default device
            kind = "limit" if here and self._on_cpu(func, args, kwargs) else ""
        if kind:
            error.__dict__["_nanogpt_mac_seen"] = True
            row = {"kind": kind, "op": name, "file": frame[0], "line": frame[1], "text": text, "calls": 0}
            self.refused.setdefault((name, *frame), row)["calls"] += 1

    def _on_cpu(self, func: Any, args: Any, kwargs: Any) -> bool | None:
        """Whether the CPU takes a call; the program is not to see that it was asked, nor is the profile."""
        self.end()
        try:
            with torch.random.fork_rng(devices=[]):
                return runs_on_cpu(func, args, kwargs)
        finally:
            self.begin()


@cache
def _is_installed(folder: str) -> bool:
    """Whether a folder of sys.path is one that packages were installed into, wherever it lies."""
    return any(Path(folder).glob("*.dist-info"))


def _has_mask(indices: Any) -> bool:
    """Whether an index is a mask, whose true elements the host must count."""
    first = indices[0] if indices else None
    given = first if isinstance(first, tuple | list) else [first]
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in given)


def _on_device(args: Any, kwargs: Any) -> bool:
    """Whether a call has to do with the device: a tensor of it, or its name."""
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == DEVICE:
            return True
        if isinstance(leaf, str | torch.device) and str(leaf).startswith(DEVICE):
            return True
    return False
