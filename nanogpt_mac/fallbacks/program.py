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
import sys
import time
import traceback
import types
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from nanogpt_mac import simulator
from nanogpt_mac.fallbacks.profiled import DEVICE, MARK
from nanogpt_mac.fallbacks.program_hooks import Hooks
from nanogpt_mac.fallbacks.program_watch import Stop, Watch
from nanogpt_mac.fallbacks.signs import PACKAGE
from nanogpt_mac.operators.dispatch import dispatch_of

# -- the answer -------------------------------------------------------------------------------------------------------


def keep(watch: Watch, hooks: Hooks, ended: str, code: int = 0) -> None:
    """Writes what was seen so far."""
    watch.kept = time.monotonic()
    with torch._C.DisableTorchFunction():
        document = _document(watch, hooks, ended, code)
    answer = Path(watch.task["answer"])
    aside = answer.with_name(f"{answer.name}.aside")
    aside.write_text(json.dumps(document))
    aside.replace(answer)


def _document(watch: Watch, hooks: Hooks, ended: str, code: int) -> dict[str, Any]:
    ledger = watch.ledger
    found = []
    for (sign, op, place, to_host), seen in ledger.found.items():
        file, line, api = watch.places[place] if place >= 0 else ("", 0, "")
        row = {"sign": sign, "op": op, "to_host": to_host, "file": _named(watch, file), "line": line, "api": api}
        more = {"source": _source(file, line), "dispatch": dispatch_of(op).value}
        found.append(row | more | vars(seen))
    places = watch.places
    rhythms = {
        name.removeprefix(MARK): {
            "intervals": rhythm.intervals,
            "places": [[_named(watch, places[p][0]), places[p][1], n] for p, n in rhythm.places.items() if p >= 0],
        }
        for name, rhythm in ledger.rhythms.items()
    }
    unseen = dict(hooks.unseen)
    if ledger.foreign:
        names = ", ".join(sorted(ledger.foreign)[:8])
        unseen[f"inside operators that are not torch's: {names}"] = len(ledger.foreign)
    return {
        "torch": torch.__version__,
        "python": sys.version.partition(" ")[0],
        "device": simulator.DEVICE_NAME if simulator.active() else DEVICE,
        "ended": ended,
        "code": code,
        "seconds": time.monotonic() - watch.began,
        "watched_s": watch.watched_s,
        "found": found,
        "refused": [
            row | {"file": _named(watch, row["file"]), "source": _source(row["file"], row["line"])}
            for row in watch.refused.values()
        ],
        "warned": dict(hooks.warned),
        "reached": dict(ledger.reached),
        "kernels": ledger.kernels,
        "waits": ledger.waits,
        "steps": hooks.steps,
        "rhythms": rhythms,
        "unseen": unseen,
        "mapped": watch.map.used() if watch.map is not None else [],
    }


def _named(watch: Watch, file: str) -> str:
    """A file of the program as a person knows it: from the program's folder where it lies there."""
    path = os.path.abspath(file)  # noqa: PTH100 - as above
    return os.path.relpath(path, watch.home) if file and path.startswith(f"{watch.home}/") else file


def _source(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()[:200] if file else ""


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
    file = os.path.abspath(argv[0])  # noqa: PTH100 - as Python has it: links stay
    main.__dict__.update(__file__=file, __builtins__=__builtins__, __spec__=None, __annotations__={})
    sys.modules["__main__"] = main  # for good: spawned workers and pickles look for it
    exec(compile(Path(file).read_bytes(), file, "exec"), main.__dict__)


def _as_without(error: BaseException, watch: Watch) -> BaseException:
    """An error, its traceback as it were without what watches: from the program's first line on, no line of ours."""
    kept: list[types.TracebackType] = []
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if watch.is_program(file) or (kept and not file.startswith(f"{PACKAGE}/")):
            kept.append(trace)
        trace = trace.tb_next
    for earlier, later in zip_longest(kept, kept[1:]):
        earlier.tb_next = later
    return error.with_traceback(kept[0] if kept else None)


def run(task: dict[str, Any]) -> int:
    """Run the program of a task and write the answer; its exit code."""
    watch = Watch(task)
    hooks = Hooks(watch)
    watch.keep = lambda ended: keep(watch, hooks, ended)
    signal.signal(signal.SIGXCPU, lambda *_: watch.too_long())
    ended, code = "ended by itself", 0
    try:
        watch.begin()
        try:
            with watch:
                _execute(task["argv"])
        finally:
            watch.end()
    except Stop as stop:
        ended = str(stop)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        ended = f"ended by sys.exit({left.code!r})"
    except BaseException as error:  # whatever it is, it is the program's, and is shown as Python shows it
        traceback.print_exception(_as_without(error, watch))
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        ended = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if task["answer"]:
        keep(watch, hooks, ended, code)
        watch.leave()  # what runs at exit is not watched
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
