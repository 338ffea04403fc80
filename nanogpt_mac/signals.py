"""SIGINT, SIGTERM and SIGHUP end a command in time, whatever is at work: the one place that handles them.

In the main thread a signal raises `Stop`, or is noted where work wants to end well (`asked`). Python's handlers only
run between two bytecodes, so a second thread, which the system's own handler wakes through a socket, gives the main
thread a grace and then ends the process itself: it removes what is half made, ends all children and exits with 128 +
the signal's number. It needs the GIL: code that holds it holds this up.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from nanogpt_mac import files

GRACE_S = 1.5  # for the main thread to end by itself; with what ending takes, two seconds
ITERATION_S = 9.5  # the same, while an iteration or an evaluation is under way
CHECKPOINT_S = 60.0  # the same, while a checkpoint is written: it is what an ending run is for
POLL_S = 0.05
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminal closed"}

Handler = Callable[[int, FrameType | None], None]


class Stop(BaseException):
    """A signal asks for the end, and nobody further in has taken it for a request to end well."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.code = 128 + signum


class _State:
    """Of this process. `until` is a time of time.monotonic: nothing is forced before it."""

    watching = False
    came: int | None = None  # the first signal
    patience = GRACE_S
    until = 0.0
    mask: Any = ()  # of the thread that forks


def words(signum: int) -> str:
    return WORDS[signal.Signals(signum)]


def _raise(signum: int, _frame: FrameType | None) -> None:
    if _State.came is None:  # a second one must not interrupt the tidying up
        _State.came = signum
        raise Stop(signum)


@contextmanager
def watched(program: str) -> Iterator[None]:
    """Within, the signals raise `Stop`, and end the process if that does not. Only the outermost of several counts.

    Signals that are ignored stay ignored (nohup), but for the two that ask for an end.
    """
    if _State.watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _State.watching, _State.came, _State.until = True, None, 0.0
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        with _handled(_raise):
            threading.Thread(target=_watch, args=(reader, program), daemon=True).start()
            yield
    finally:
        signal.set_wakeup_fd(before)
        _State.watching = False
        writer.close()
        if _State.came is not None:
            files.remove_unfinished()


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within, a signal leaves the main thread so many seconds; and some more, after it, to end."""
    outer, _State.patience = _State.patience, max(seconds, _State.patience)
    try:
        yield
    finally:
        _State.patience, _State.until = outer, time.monotonic() + GRACE_S


@contextmanager
def asked() -> Iterator[list[int]]:
    """Within, the first signal is only noted in the list, for who ends the iteration and saves; a second raises."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if received:
            _raise(signum, frame)
        else:
            received.append(signum)
            _say(f"\n{signal.Signals(signum).name}: finishing this iteration, then a checkpoint\n", 1)

    with _handled(note), patience(ITERATION_S):
        yield received


def leave(code: int) -> NoReturn:
    """End the process; after a signal at once, whatever threads and exit handlers a library has left behind."""
    if _State.came is None:
        for signum in WORDS:  # from here on nothing is left to tidy up
            signal.signal(signum, lambda signum, _frame: os._exit(128 + signum))
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    _end_children()
    os._exit(code)


def end_now(code: int, text: str) -> NoReturn:
    """From any thread: end the process, its children and what is half made, whatever the main thread waits for."""
    _end_children()
    files.remove_unfinished()
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # which a progress bar hides
    _say(f"{show_cursor}{text}\n" if text else show_cursor, 2)
    os._exit(code)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [s for s in WORDS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, handler) for s in ours}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


def _watch(reader: socket.socket, program: str) -> None:
    """The second thread: wait for a signal's number, then for the main thread, then end the process."""
    first, begun, twice = 0, 0.0, False
    with reader:
        while True:
            ready = select.select([reader], [], [], POLL_S if first else None)[0]
            if ready:
                number = reader.recv(1)
                if not number:
                    return  # closed: the command has ended by itself
                if number[0] in WORDS:
                    first, begun, twice = first or number[0], time.monotonic(), bool(first)
            if not first:
                continue
            grace = GRACE_S if twice else _State.patience
            if time.monotonic() > max(begun + grace, 0.0 if twice else _State.until):
                end_now(128 + first, f"{os.path.basename(program)}: {words(first)}")  # noqa: PTH119 - no import now


def _end_children() -> None:
    """All of this process's children and theirs: workers of a compiler, of a data set, of wandb."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def _say(text: str, descriptor: int) -> None:
    """Past Python's buffers, which the main thread may be in the middle of."""
    with suppress(OSError):
        os.write(descriptor, text.encode())


# A forked worker must not wake this process's thread through the socket that both have: so none of these signals is
# delivered to it before it has forgotten the socket. (What is started with subprocess has none.)


def _hold() -> None:
    if _State.watching:
        _State.mask = signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)


def _let_go() -> None:
    if _State.watching:
        signal.pthread_sigmask(signal.SIG_SETMASK, _State.mask)


def _forget() -> None:
    if _State.watching:
        signal.set_wakeup_fd(-1)
        for signum in WORDS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        _let_go()
        _State.watching = False


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
