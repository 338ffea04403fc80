"""The fallback detector's child: every phase of a model on MPS, run with all fallbacks made visible.

`python -m nanogpt_mac.fallbacks.watch` reads a task (detect.py makes it) as JSON and writes what it saw as
JSON. It needs torch and numpy and nothing else, so it runs under any interpreter with any torch.
PYTORCH_ENABLE_MPS_FALLBACK=1 must be in its environment, since torch reads it when it is loaded.

Two passes over the same work: torch's own warnings, each of them, and a profile. Neither is a timed run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

import numpy as np
import torch

from nanogpt_mac import simulator
from nanogpt_mac.backends import base, kinds
from nanogpt_mac.backends.base import PHASES, BackendOptions, Tokens
from nanogpt_mac.compile_report.describe import describe
from nanogpt_mac.compile_report.seen import watch as compiling
from nanogpt_mac.fallbacks import profiled, signs
from nanogpt_mac.fallbacks.observed import Observed, Profiled, Refused, Task, Warned, Warnings
from nanogpt_mac.fallbacks.phases import Phased
from nanogpt_mac.fallbacks.refusals import Lines, Locator, located_in_profile
from nanogpt_mac.fallbacks.signs import ADMITS, COMPILED_PHASES, CONTROL, FALLS_BACK, Frame, short
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.operators.dispatch import Dispatch, dispatch_of

_OVERFLOWS = 30  # float16 iterations until the loss scale fits, at most
_PROMPT = 4  # tokens


class Phases(Phased):
    """Knows which phase is under way, and marks it for the profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: set[str] = set()
        self.failed: str | None = None  # the innermost phase that an exception left
        self.around: dict[str, Callable[[], Any]] = {}  # phase to a context to run it in

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        self.reached.add(name)
        try:
            with torch.profiler.record_function(profiled.MARK + name), self.around.get(name, nullcontext)():
                yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self.current = before


class Listener:
    """The first pass: what torch warns of while the context lasts, each time it does, and where."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self.fallbacks: list[Warned] = []
        self.admitted: list[Warned] = []  # native kernels that say that they use the CPU

    @contextmanager
    def listening(self) -> Iterator[None]:
        always = torch.is_warn_always_enabled()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._show
            torch.set_warn_always(True)
            try:
                yield
            finally:
                torch.set_warn_always(always)

    def _show(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        # Those of the backward pass are all given at its end: its lines are not theirs.
        frames = [] if self.phases.current == "backward" else _stack(sys._getframe(1))
        generated = next((f for f in frames if signs.is_generated(f, _generated())), None)
        warned = Warned(self.phases.current, None if generated else signs.place(frames))
        if found := FALLS_BACK.search(text):
            self.fallbacks.append(replace(warned, op=short(found[1])))
        elif ADMITS.search(text):
            self.admitted.append(replace(warned, text=text.partition(" (Triggered")[0]))


def _stack(frame: FrameType | None) -> list[Frame]:
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames


def _generated() -> str:
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")


class Session:
    """The back end of a run, made once, and the units of work that hold its phases."""

    def __init__(self, task: Task) -> None:
        self.phases, self.options, spec = Phases(), task.options, task.spec
        text = (np.arange(20 * (spec.block_size + 1)) % spec.vocab_size).astype(np.uint16)
        tokens = Tokens({"train": text, "val": text}, spec.block_size)
        backend: Any = kinds.create(spec, task.options, tokens)
        backend.load(spec.init_weights(0))
        self.backend, self.compiled = backend, task.options.compile
        shape = (task.gradient_accumulation_steps, task.batch_size)
        self.starts = np.arange(math.prod(shape)).reshape(shape) % (10 * spec.block_size)
        self.prompt = text[: min(_PROMPT, spec.block_size)], text[:1]
        self.long_enough = spec.block_size > _PROMPT
        self.units = {"train": self._train, "evaluation": self._evaluation, "sampling": self._sampling}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The back end's own marks are read while the context lasts."""
        self.backend.phase = self.phases.within
        try:
            yield
        finally:
            self.backend.phase = base.unwatched

    def _train(self) -> None:
        with self.phases.phase("forward"):
            handle = self.backend.step(self.starts, 1e-4)
        with self.phases.phase("result"):
            self.norm = self.backend.wait(handle)[1]

    def _evaluation(self) -> None:
        with self.phases.phase("evaluation"):
            self.backend.evaluate("val", self.starts[:1])

    def _sampling(self) -> None:
        """A prompt, and one token after it."""
        prompt, token = self.prompt
        with self.phases.phase("sampling"):
            decode = self.backend.decode()
            decode(prompt)
            if self.long_enough:
                decode(token)

    def run(self, units: list[str] | None = None) -> dict[str, Exception]:
        """Runs every unit; those that raised, with what they raised. `phases.failed` has where the last did."""
        raised: dict[str, Exception] = {}
        for name in units or list(self.units):
            self.phases.failed = None
            try:
                self.units[name]()
            except Exception as error:  # whatever it is: it is reported
                raised[name] = error
                self.failed = self.phases.failed or name
                self.backend.recover()
        return raised

    def warm_up(self) -> None:
        """Compiles, and makes what later iterations find. Under float16 until the loss scale fits."""
        for _ in range(_OVERFLOWS if self.options.dtype == "float16" else 1):
            if "train" in self.run() or math.isfinite(self.norm):
                break


# -- trying the detector ----------------------------------------------------------------------------------------------


def _controls() -> dict[str, Callable[[], Any]]:
    """Operators that some torch's MPS has left to the CPU, each with a call."""
    x = torch.ones(3, 4, device=profiled.DEVICE)
    index = torch.zeros(1, dtype=torch.int64, device=profiled.DEVICE)
    return {
        "embedding_renorm_": lambda: torch.embedding_renorm_(x.clone(), index, 0.5, 2.0),
        "mode": lambda: torch.mode(x),
        "_pdist_forward": lambda: torch.pdist(x),
        "geqrf": lambda: torch.geqrf(x),
    }


def _control() -> tuple[str | None, Callable[[], Any]]:
    """An operator that is known to fall back, to see whether both passes see it; None where none does."""
    for name, call in _controls().items():
        if dispatch_of(name) in (Dispatch.MISSING, Dispatch.BY_HAND):
            return name, call
    return None, lambda: None


# -- the passes -------------------------------------------------------------------------------------------------------


def examine(session: Session) -> Observed:
    """Both passes over a session that is warm."""
    phases, (control, call) = session.phases, _control()
    phases.reached.clear()
    listener = Listener(phases)
    with session.hooked():
        with listener.listening():
            with phases.phase(CONTROL):
                call()
            session.run()
        profiler, overloads = profiled.profiler()
        failed: dict[str, str] = {}
        raised: dict[str, Exception] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with profiler:
                with phases.phase(CONTROL):
                    call()
                for unit in session.units:
                    if error := session.run([unit]):
                        raised |= error
                        failed[unit] = session.failed
            home = sys.modules[type(session.backend).__module__]
            seen = profiled.read(profiler, overloads, _generated(), home)
            located = [_locate(session, unit, failed[unit], error, seen) for unit, error in raised.items()]
            _exact_lines(session, seen)
    rows = [r.call() for r in seen.records if r.phase != CONTROL]
    warned = [w for w in listener.fallbacks if w.phase != CONTROL]
    heard, profiler_saw = len(warned) < len(listener.fallbacks), len(rows) < len(seen.records)
    return Observed(
        reached=[p for p in PHASES if p in phases.reached],
        warnings=Warnings(warned, listener.admitted, None if control is None else heard),
        profiler=Profiled(
            records=rows,
            meant=seen.meant,
            operators=seen.operators,
            overloads=seen.overloads,
            control=None if control is None else profiler_saw,
        ),
        control=control,
        refused=located,
        dispatch={op: dispatch_of(op) for op in sorted({r.op for r in rows} | {w.op for w in warned})},
    )


def _locate(session: Session, unit: str, phase: str, error: Exception, seen: profiled.Profile) -> Refused:
    """Which operator raised: asked again with every operator of the phase looked at, else read from the profile."""
    last = seen.last.get(phase)
    if session.compiled and phase in COMPILED_PHASES:
        return located_in_profile(phase, error, last)
    locator = Locator()
    _look_at(session, [unit], [phase], locator)
    found = locator.located(phase, error)
    if phase == "backward" and last is not None:  # on autograd's own thread: the profile knows the forward call
        found.where, found.evidence = last.where, list(last.evidence)
    return found


def _exact_lines(session: Session, seen: profiled.Profile) -> None:
    """Fills in lines that a profile cannot know, from a third run with every operator looked at."""
    vague = [r for r in seen.records if r.line_of is not None and r.phase != CONTROL]
    phases = {"forward" if r.phase == "backward" else r.phase for r in vague}
    if session.compiled:
        phases -= set(COMPILED_PHASES)
    if not phases:
        return
    lines = Lines()
    _look_at(session, list(session.units), sorted(phases), lines)
    for record in vague:
        _, file, first = record.line_of or ("", "", 0)
        known = [f"{file}:{line}" for line in (lines.lines.get(record.line_of, []) if record.line_of else [])]
        if known and record.where == f"{file}:{first}":
            record.where, *others = known
            record.evidence += [f"or at {other}" for other in others]
        elif known:
            rough = f"called in {file}:{first}"
            record.evidence = [f"called in {known[0]}" if text == rough else text for text in record.evidence]


def _look_at(session: Session, units: list[str], phases: list[str], mode: Locator | Lines) -> None:
    """Runs units with a dispatch mode in phases that are not compiled: it would switch the compiler off."""
    session.phases.around = {phase: lambda: mode for phase in phases}
    try:
        session.run(units)
    finally:
        session.phases.around = {}


def watch(task: Task) -> Observed:
    """Everything that the child sees of a task."""
    begin = time.perf_counter()
    session = Session(task)
    compiler = compiling() if session.compiled else nullcontext()
    with compiler as compiled:  # entered before the first compilation
        session.warm_up()
        if compiled is not None:
            with compiled.iteration():
                session.run(["train"])
            with compiled.iteration("evaluation"):
                session.run(["evaluation"])
    return replace(
        examine(session),
        torch=torch.__version__,
        python=sys.version.partition(" ")[0],
        device=session.backend.device_name,
        compile_report=describe(compiled) if compiled is not None else None,
        seconds=time.perf_counter() - begin,
    )


def _end_with_parent(scratch: str) -> None:
    """A parent that was killed has nobody to tell, and does not remove the `scratch` folder that it made."""
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """The child process: stdout holds the document and nothing else."""
    document = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever torch or its libraries print goes to stderr
    given = json.load(sys.stdin)
    _end_with_parent(given.pop("scratch"))
    given |= {"options": BackendOptions(**given["options"]), "spec": GPTSpec(**given["spec"])}
    simulator.install_if_asked()
    json.dump(asdict(watch(Task(**given))), document)
    document.flush()


if __name__ == "__main__":
    main()
