"""Run by coverage/program.py: a PyTorch program that is not ours, unmodified, with everything watched that leaves MPS.

`python -m nanogpt_mac.fallbacks.program TASK`, in the program's own folder; TASK is a file of JSON: `argv` (the
program's; `-m NAME` for a module), `steps` (to stop after so many optimizer steps, or null), `map_cuda`, `answer` (the
file that gets what was seen, as JSON). SIGXCPU is the parent's time limit. It needs torch and nothing else, and
PYTORCH_ENABLE_MPS_FALLBACK=1 in its environment.

Two things watch. A torch function mode sees every call of torch's interface from Python and annotates it with its place
in the program; it changes nothing of what the call does. A profile of the CPU, read and begun anew every few thousand
calls, has every operator below, with the devices of its arguments.
"""

from __future__ import annotations

import json
import linecache
import os
import runpy
import signal
import site
import sys
import sysconfig
import threading
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig, _RecordFunctionFast
from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from nanogpt_mac import simulator
from nanogpt_mac.fallbacks.cuda_map import CudaMap
from nanogpt_mac.fallbacks.profiled import DEVICE, MARK
from nanogpt_mac.fallbacks.program_profile import BACKWARD, MASK, NOWHERE, STEP, WAIT, Ledger
from nanogpt_mac.fallbacks.refusals import runs_on_cpu
from nanogpt_mac.fallbacks.signs import ADMITS, FALLS_BACK, NOT_ON_CPU, NOT_ON_MPS, OUT_OF_MEMORY, short
from nanogpt_mac.operators.dispatch import dispatch_of

_WINDOW = 4000  # calls of torch's interface between two looks at the profile
_INDEXING = ("__getitem__", "__setitem__", "index_put", "index_put_")
_KEEP_S = 5.0  # between two versions of the answer, in case the process dies
_BLIND = {  # what Python tells of a program's doings that cannot be watched; unless such a library does it
    "subprocess.Popen": ("subprocesses", ("/multiprocessing/",)),
    "os.system": ("subprocesses", ()),
    "os.posix_spawn": ("subprocesses", ("/multiprocessing/", "/subprocess.py")),
}
_LIBRARIES = (
    *(f"{Path(path)}/" for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))),
    *(f"{Path(path)}/" for path in (*site.getsitepackages(), site.getusersitepackages())),
    f"{Path(torch.__file__).parent}/",
    f"{Path(__file__).parents[1]}/",
    "<frozen",
)


class Stop(BaseException):
    """The program has run long enough; the text says why."""


class Watch(TorchFunctionMode):
    """Everything that looks on while the program runs."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self.task, self.map = task, CudaMap() if task["map_cuda"] else None
        self.ledger = Ledger()
        self.home = str(Path(task["argv"][0]).resolve().parent)
        self.of_program: dict[str, bool] = {}
        self.places: list[tuple[str, int, str]] = []  # file, line, what it called
        self.marks: dict[tuple[str, int, str], str] = {}
        self.open = self.busy = False
        self.calls = self.steps = self.backwards = 0
        self.optimizers: dict[int, Any] = {}
        self.made_optimizer = False
        self.warned: Counter[str] = Counter()
        self.refused: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.unseen: Counter[str] = Counter()
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
            begin, self.open = time.perf_counter(), False
            with torch._C.DisableTorchFunction():
                self.ledger.read(_disable_profiler().experimental_event_tree())
            self.watched_s += time.perf_counter() - begin

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
        frame = self._frame(sys._getframe(1))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        masked = name in _INDEXING and _has_mask(args[1:])
        with self.annotation(frame, name), _RecordFunctionFast(MASK) if masked else nullcontext():
            try:
                return func(*args, **kwargs)
            except Exception as error:
                self._refusal(frame, name, func, args, kwargs, error)
                raise

    def _frame(self, frame: types.FrameType | None) -> tuple[str, int]:
        """The innermost line of the program; ("", 0) where it has none."""
        while frame is not None:
            file = frame.f_code.co_filename
            mine = self.of_program.get(file)
            if mine is None:
                mine = self.of_program[file] = self._is_program(file)
            if mine:
                return file, frame.f_lineno
            frame = frame.f_back
        return "", 0

    def _is_program(self, file: str) -> bool:
        if file.startswith("<"):
            return False
        path = os.path.abspath(file)  # noqa: PTH100 - links stay: a program's folder may be one
        if path.startswith(f"{self.home}/") or path.startswith(_LIBRARIES):
            return path.startswith(f"{self.home}/")
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
        with self.annotation(self._frame(sys._getframe(2)), name), _RecordFunctionFast(mark):
            yield

    def _refusal(self, frame: tuple[str, int], name: str, func: Any, args: Any, kwargs: Any, error: Exception) -> None:
        """Keeps an error that is MPS's own: the operator is missing, or the CPU takes the same call."""
        text = " ".join(str(error).split())[:400]
        if getattr(error, "_nanogpt_mac_seen", False) or OUT_OF_MEMORY.search(text):
            return
        if named := NOT_ON_CPU.search(text) or NOT_ON_MPS.search(text):
            kind, name = "missing", short(named[1])
        elif not isinstance(error, TypeError | RuntimeError):
            return
        elif self.busy or name == "backward":  # not to be asked again
            kind = "limit" if "MPS" in text else ""
        else:
            kind = "limit" if _on_device(args, kwargs) and self._on_cpu(func, args, kwargs) else ""
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

    # -- the rest of torch ----------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The whole of it, while the context lasts."""
        self._listen()
        self._hook_torch()
        self._hook_processes()
        if self.map is not None:
            self.map.install()
        self.begin()
        try:
            with self:
                yield
        finally:
            self.end()

    def _listen(self) -> None:
        """torch's own warnings, each of them; the program's terminal gets the first."""
        torch.set_warn_always(True)
        warnings.filterwarnings("always", message="The operator '.*' is not currently supported on the MPS backend")
        shown = warnings.showwarning

        def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            found = FALLS_BACK.search(str(message))
            if found or ADMITS.search(str(message)):
                op = short(found[1]) if found else ""
                self.warned[op] += 1
                if self.warned[op] > 1:
                    return
            shown(message, *args, **kwargs)

        warnings.showwarning = show

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
        storage: Any = torch.UntypedStorage  # what torch.save copies; no call of the interface
        for owner, name in (
            (torch, "save"),
            (torch, "load"),
            (storage, "copy_"),
            (torch.jit.ScriptFunction, "__call__"),
        ):
            setattr(owner, name, self._placed(getattr(owner, name), name))
        profiler: Any = profile
        prepare, leave = profiler._prepare_trace, profiler.__exit__

        def prepared(other: Any) -> Any:
            self.end()
            self.unseen["what ran under the program's own profiler"] += 1
            return prepare(other)

        def left(other: Any, *args: Any) -> Any:
            try:
                return leave(other, *args)
            finally:
                self.begin()

        profiler._prepare_trace, profiler.__exit__ = prepared, left

    def _placed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.annotation(self._frame(sys._getframe(1)), name):
                return function(*args, **kwargs)

        return call

    def _waiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any) -> Any:
            with self.marked(WAIT, "synchronize"):
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
        if self.task["steps"] is not None and done >= self.task["steps"] and self.task["answer"]:
            raise Stop(f"stopped after {done} {what}")

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
            if self.task["answer"] and not self._called_by("/site-packages/", "/multiprocessing/"):
                self._blind("threads of the program")
            begin(other)

        thread.start = begun
        os.register_at_fork(before=self.end, after_in_parent=self.begin, after_in_child=self.leave)
        system: Any = os
        leave = system._exit

        def exit_at_once(code: int) -> Any:
            if self.task["answer"]:
                self.end()
                self.keep(f"left by os._exit({code})")
            leave(code)

        system._exit = exit_at_once

        def audit(event: str, args: tuple[Any, ...]) -> None:
            what, libraries = _BLIND.get(event, ("", ()))
            if what and self.task["answer"] and not self._called_by(*libraries):
                self._blind(what)

        sys.addaudithook(audit)

    def _called_by(self, *parts: str) -> bool:
        """Whether code of a library stands between the program and the caller."""
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None and not self.of_program.get(frame.f_code.co_filename):
            if any(part in frame.f_code.co_filename for part in parts):
                return True
            frame = frame.f_back
        return False

    def _blind(self, what: str) -> None:
        file, line = self._frame(sys._getframe(1))
        if file:
            self.unseen[f"{what}, started in {os.path.relpath(file, self.home)}:{line}"] += 1

    # -- the answer -----------------------------------------------------------------------------------------------

    def keep(self, ended: str, code: int = 0) -> None:
        """Writes what was seen so far."""
        self.kept = time.monotonic()
        with torch._C.DisableTorchFunction():
            document = self._document(ended, code)
        answer = Path(self.task["answer"])
        aside = answer.with_name(f"{answer.name}.aside")
        aside.write_text(json.dumps(document))
        aside.replace(answer)

    def _document(self, ended: str, code: int) -> dict[str, Any]:
        ledger = self.ledger
        found = []
        for (sign, op, place, to_host), seen in ledger.found.items():
            file, line, api = self.places[place] if place >= 0 else ("", 0, "")
            row = {"sign": sign, "op": op, "to_host": to_host, "file": self._named(file), "line": line, "api": api}
            more = {"source": _source(file, line), "dispatch": dispatch_of(op).value}
            found.append(row | more | vars(seen))
        places = self.places
        rhythms = {
            name.removeprefix(MARK): {
                "intervals": rhythm.intervals,
                "places": [[self._named(places[p][0]), places[p][1], n] for p, n in rhythm.places.items() if p >= 0],
            }
            for name, rhythm in ledger.rhythms.items()
        }
        unseen = dict(self.unseen)
        if ledger.foreign:
            names = ", ".join(sorted(ledger.foreign)[:8])
            unseen[f"inside operators that are not torch's: {names}"] = len(ledger.foreign)
        return {
            "torch": torch.__version__,
            "python": sys.version.partition(" ")[0],
            "device": simulator.DEVICE_NAME if simulator.active() else DEVICE,
            "ended": ended,
            "code": code,
            "seconds": time.monotonic() - self.began,
            "watched_s": self.watched_s,
            "found": found,
            "refused": [
                row | {"file": self._named(row["file"]), "source": _source(row["file"], row["line"])}
                for row in self.refused.values()
            ],
            "warned": dict(self.warned),
            "reached": dict(ledger.reached),
            "kernels": ledger.kernels,
            "waits": ledger.waits,
            "steps": self.steps,
            "rhythms": rhythms,
            "unseen": unseen,
            "mapped": self.map.used() if self.map is not None else [],
        }

    def _named(self, file: str) -> str:
        """A file of the program as a person knows it: from the program's folder where it lies there."""
        path = os.path.abspath(file)  # noqa: PTH100 - as above
        return os.path.relpath(path, self.home) if file and path.startswith(f"{self.home}/") else file


class _Engine:
    """Autograd's engine, with a mark around each backward pass."""

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine, self._watch = engine, watch

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        watch = self._watch
        before, watch.busy = watch.busy, True
        try:
            # What the pass calls in Python (hooks, functions of the program's own) is looked at as well.
            off = watch not in _get_current_function_mode_stack()
            with watch.marked(BACKWARD, "backward"), watch if off else nullcontext():
                result = self._engine.run_backward(*args, **kwargs)
        finally:
            watch.busy = before
        if not before:
            watch.passed_backward()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@cache
def _is_installed(folder: str) -> bool:
    """Whether a folder of sys.path is one that packages were installed into, wherever it lies."""
    return any(Path(folder).glob("*.dist-info"))


def _has_mask(indices: Any) -> bool:
    """Whether an index is a mask, whose true elements the host must count."""
    first = indices[0] if indices else None
    given = first if isinstance(first, tuple | list) else [first]
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in given)


def _source(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()[:200] if file else ""


def _on_device(args: Any, kwargs: Any) -> bool:
    """Whether a call has to do with the device: a tensor of it, or its name."""
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == DEVICE:
            return True
        if isinstance(leaf, str | torch.device) and str(leaf).startswith(DEVICE):
            return True
    return False


# -- running it -------------------------------------------------------------------------------------------------------


def _execute(argv: list[str]) -> None:
    """Run a program as Python would, in a real `__main__`."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(argv)
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=argv[0], __builtins__=__builtins__, __spec__=None, __annotations__={})
    sys.modules["__main__"] = main  # for good: spawned workers and pickles look for it
    exec(compile(Path(argv[0]).read_bytes(), argv[0], "exec"), main.__dict__)


def run(task: dict[str, Any]) -> int:
    """Run the program of a task and write the answer; its exit code."""
    watch = Watch(task)

    def too_long(*_: Any) -> None:
        raise Stop("stopped by the time limit")

    signal.signal(signal.SIGXCPU, too_long)
    ended, code = "ended by itself", 0
    try:
        with watch.watching():
            _execute(task["argv"])
    except Stop as stop:
        ended = str(stop)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        ended = f"ended by sys.exit({left.code!r})"
    except BaseException as error:  # whatever it is, it is the program's, and is shown as Python shows it
        trace = error.__traceback__
        while trace is not None and not watch.of_program.get(trace.tb_frame.f_code.co_filename) and trace.tb_next:
            if trace.tb_frame.f_code.co_filename == task["argv"][0]:
                break
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        ended = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if task["answer"]:
        watch.keep(ended, code)
    return code


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    root = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [path for path in sys.path if path != root or path in task["path"]]
    os.environ["PYTHONPATH"] = task["path"]
    simulator.install_if_asked()
    sys.exit(run(task))


if __name__ == "__main__":
    main()
