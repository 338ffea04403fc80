"""What is changed in torch and Python so that a watched program shows its steps, its waits and what cannot be seen."""

from __future__ import annotations

import os
import sys
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd.profiler import profile
from torch.overrides import _get_current_function_mode_stack

from nanogpt_mac.fallbacks.program_profile import BACKWARD, STEP, WAIT
from nanogpt_mac.fallbacks.program_watch import Stop, Watch
from nanogpt_mac.fallbacks.signs import ADMITS, FALLS_BACK, PACKAGE, short

_BLIND = {  # what Python tells of a program's doings that cannot be watched; unless such a library does it
    "subprocess.Popen": ("subprocesses", ("/multiprocessing/",)),
    "os.system": ("subprocesses", ()),
    "os.posix_spawn": ("subprocesses", ("/multiprocessing/", "/subprocess.py")),
}


class Hooks:
    """Installed once, for good. Counts steps, passes and warnings, and keeps what cannot be seen."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.steps = self.backwards = 0
        self.optimizers: dict[int, Any] = {}
        self.made_optimizer = self.stopped = False
        self.warned: Counter[str] = Counter()
        self.unseen: Counter[str] = Counter()
        self._listen()
        self._hook_torch()
        self._hook_processes()
        if watch.map is not None:
            watch.map.install()

    def _listen(self) -> None:
        """torch's own warnings, each of them; the program's terminal gets the first."""
        torch.set_warn_always(True)
        warnings.filterwarnings("always", message="The operator '.*' is not currently supported on the MPS backend")
        module: Any = warnings
        shown = module.showwarning

        def show(message: Warning | str, category: Any, file: str, line: int, *args: Any, **kwargs: Any) -> None:
            found = FALLS_BACK.search(str(message))
            if found or ADMITS.search(str(message)):
                op = short(found[1]) if found else ""
                self.warned[op] += 1
                if self.warned[op] > 1:
                    return
            if file.startswith(f"{PACKAGE}/"):  # what stands between the program and torch
                place = self.watch.frame(sys._getframe(1))
                file, line = place if place[0] else (file, line)
            shown(message, category, file, line, *args, **kwargs)

        module.showwarning = show

    def _hook_torch(self) -> None:
        from torch.optim import optimizer as optimizers

        parent: Any = optimizers.Optimizer
        made = parent.__init__

        def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.made_optimizer = True
            made(optimizer, *args, **kwargs)

        parent.__init__ = init
        optimizers.register_optimizer_step_post_hook(self._stepped)
        variable: Any = torch.autograd.Variable
        variable._execution_engine = _Engine(variable._execution_engine, self)
        bindings: Any = torch._C
        for name in ("_mps_deviceSynchronize", "_mps_synchronizeEvent", "_accelerator_synchronizeDevice"):
            if hasattr(bindings, name):
                setattr(bindings, name, self._waiting(getattr(bindings, name)))
        # No calls of the interface: what torch.save copies, and compiled functions and methods.
        for owner, name in (
            (torch, "save"),
            (torch, "load"),
            (torch.UntypedStorage, "copy_"),
            (torch.jit.ScriptFunction, "__call__"),
            (bindings.ScriptMethod, "__call__"),
        ):
            setattr(owner, name, self._placed(getattr(owner, name), name))
        profiler: Any = profile
        prepare, leave = profiler._prepare_trace, profiler.__exit__

        def prepared(other: Any) -> Any:
            self.watch.end()
            self.unseen["what ran under the program's own profiler"] += 1
            return prepare(other)

        def left(other: Any, *args: Any) -> Any:
            try:
                return leave(other, *args)
            finally:
                self.watch.begin()

        profiler._prepare_trace, profiler.__exit__ = prepared, left

    def _placed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.watch.annotation(self.watch.frame(sys._getframe(1)), name):
                return function(*args, **kwargs)

        return call

    def _waiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any) -> Any:
            with self.watch.marked(WAIT, "synchronize"):
                return function(*args)

        return wait

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        number = list(self.optimizers).index(id(optimizer)) if id(optimizer) in self.optimizers else None
        if number is None:
            number = len(self.optimizers)
            self.optimizers[id(optimizer)] = optimizer
        with _RecordFunctionFast(f"{STEP}{number} {type(optimizer).__name__}"):
            pass
        self.steps += 1
        self._enough(self.steps, "optimizer steps")

    def passed_backward(self) -> None:
        self.backwards += 1
        if not self.made_optimizer:
            self._enough(self.backwards, "backward passes (it has no optimizer of torch's)")

    def _enough(self, done: int, what: str) -> None:
        if self.watch.task["steps"] is None or done < self.watch.task["steps"] or not self.watch.task["answer"]:
            return
        ended = f"stopped after {done} {what}"
        if self.stopped:  # the program has caught it, and goes on
            self.watch.end()
            self.watch.keep(ended)
            self.watch.leave()
            sys.stdout.flush()
            os._exit(0)
        self.stopped = True
        raise Stop(ended)

    def _hook_processes(self) -> None:
        from multiprocessing import process as processes

        parent: Any = processes.BaseProcess
        start = parent.start

        def started(process: Any) -> None:
            loader = self._called_by("/torch/utils/data/")
            what = "DataLoader worker processes" if loader else "processes of multiprocessing"
            self._blind(what)
            start(process)

        parent.start = started
        thread: Any = threading.Thread
        begin = thread.start

        def begun(other: Any) -> None:
            if self.watch.task["answer"] and not self._called_by("/site-packages/", "/multiprocessing/"):
                self._blind("threads of the program")
            begin(other)

        thread.start = begun
        os.register_at_fork(before=self.watch.end, after_in_parent=self.watch.begin, after_in_child=self.watch.leave)
        system: Any = os
        leave = system._exit

        def exit_at_once(code: int) -> Any:
            if self.watch.task["answer"]:
                self.watch.end()
                self.watch.keep(f"left by os._exit({code})")
            leave(code)

        system._exit = exit_at_once

        def audit(event: str, args: tuple[Any, ...]) -> None:
            what, libraries = _BLIND.get(event, ("", ()))
            if what and self.watch.task["answer"] and not self._called_by(*libraries):
                self._blind(what)

        sys.addaudithook(audit)

    def _called_by(self, *parts: str) -> bool:
        """Whether code of a library stands between the program and the caller."""
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None and not self.watch.is_program(frame.f_code.co_filename):
            if any(part in frame.f_code.co_filename for part in parts):
                return True
            frame = frame.f_back
        return False

    def _blind(self, what: str) -> None:
        file, line = self.watch.frame(sys._getframe(1))
        if file:
            self.unseen[f"{what}, started in {os.path.relpath(file, self.watch.home)}:{line}"] += 1


class _Engine:
    """Autograd's engine, with a mark around each backward pass."""

    def __init__(self, engine: Any, hooks: Hooks) -> None:
        self._engine, self._hooks = engine, hooks

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        watch = self._hooks.watch
        before, watch.busy = watch.busy, True
        try:
            # What the pass calls in Python (hooks, functions of the program's own) is looked at as well.
            off = watch not in _get_current_function_mode_stack()
            with watch.marked(BACKWARD, "backward"), watch if off else nullcontext():
                result = self._engine.run_backward(*args, **kwargs)
        finally:
            watch.busy = before
        if not before:
            self._hooks.passed_backward()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
