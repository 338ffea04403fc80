"""Every child process of the project: asked a question, or attended in this terminal; supervise.py runs trainings.

None outlives the wait for it: each has a session of its own, and whatever it has started there is killed with it.
Programs of others (a compiler, pip) are run where they are needed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_mac.errors import ESCAPES, InputError

ROOT = Path(__file__).resolve().parents[1]
ANSWER_POLL_S = 0.05
ATTEND_POLL_S = 0.2
ROOM = 64 * 1024  # bytes; less is a full disk

RAISED = re.compile(r"^(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Fault)\w*\b")


# -- a question and its answer ----------------------------------------------------------------------------------------


class ChildError(Exception):
    """A child process that gave no answer; the text is one line that says why.

    `code` is its exit code, None where it was ended for taking too long or could not be started.
    """

    def __init__(self, reason: str, code: int | None = None) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Question:
    """One child process that reads `task` as JSON on its standard input and prints its answer as a line of JSON.

    `what` is a module, run by `python -m` with this package on its path, or a whole command. What it says on standard
    error, and prints beside the answer, stays in the file `log` where it fails. `timeout_s` ends it after so many
    seconds without an answer.
    """

    what: str | Sequence[str | Path]
    task: Any = None
    python: str | None = None  # by default this process's, as is the environment
    environment: Mapping[str, str] | None = None
    timeout_s: float | None = None
    log: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a question: `value`, or `error` where there is none."""

    value: Any
    error: ChildError | None
    seconds: float


def ask(
    what: str | Sequence[str | Path],
    task: Any = None,
    *,
    python: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """The answer to one `Question`. `ChildError` where there is none."""
    with _Asked(Question(what, task, python, environment, timeout_s)) as asked:
        while not asked.over():
            asked.wait(ANSWER_POLL_S)
        return asked.value()


def ask_lines(question: Question) -> Iterator[Any]:
    """Every line of JSON that a child prints, as it comes; `timeout_s` is then the longest silence.

    `ChildError` at the end, where the child has failed, crashed or fallen silent.
    """
    with _Asked(question) as asked:
        while True:
            over = asked.over()
            yield from asked.fresh()
            if over:
                break
            asked.wait(ANSWER_POLL_S)
        asked.check()


def ask_side_by_side(queues: Iterable[Sequence[Question]]) -> list[list[Answer]]:
    """Answers in the shape of `queues`: these side by side, what is in one of them in its order."""
    waiting = [list(queue) for queue in queues]
    answers: list[list[Answer]] = [[] for _ in waiting]
    running: dict[int, _Asked] = {}
    with ExitStack() as stack:
        while any(waiting) or running:
            for number, queue in enumerate(waiting):
                if queue and number not in running:
                    running[number] = stack.enter_context(_Asked(queue.pop(0)))
            time.sleep(ANSWER_POLL_S)
            for number, asked in list(running.items()):
                if asked.over():
                    answers[number].append(asked.answer())
                    del running[number]
    return answers


def answer(function: Callable[[Any], Any]) -> None:
    """The child's side of a question: print what `function` makes of the task. An InputError becomes the one line."""
    try:
        print(json.dumps(function(json.load(sys.stdin))), flush=True)
    except InputError as error:
        sys.exit(str(error))


class _Asked:
    """One question under way. Files stand in for pipes, which a helper of the child could keep open behind it."""

    def __init__(self, question: Question) -> None:
        self.question, self.began, self.heard = question, time.monotonic(), time.monotonic()
        self.failure: ChildError | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.read = 0

    def __enter__(self) -> _Asked:
        q = self.question
        given = dict(os.environ if q.environment is None else q.environment)
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH", "")]))
        argv = [q.python or sys.executable, "-m", q.what] if isinstance(q.what, str) else [str(part) for part in q.what]
        self.output = tempfile.TemporaryFile()
        self.errors = tempfile.TemporaryFile() if q.log is None else q.log.open("w+b")
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(json.dumps(q.task).encode())
                stdin.seek(0)
                self.process = subprocess.Popen(
                    argv, stdin=stdin, stdout=self.output, stderr=self.errors, env=given, start_new_session=True
                )
        except OSError as error:
            self.failure = ChildError(f"{argv[0]}: cannot be run: {error.strerror}")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.output.close()
        self.errors.close()

    def wait(self, seconds: float) -> None:
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)

    def over(self) -> bool:
        """Whether it has ended, if need be by us."""
        if self.process is None:
            return True
        if self.process.poll() is None:
            timeout = self.question.timeout_s
            if timeout is None or time.monotonic() - self.heard <= timeout:
                return False
            self.failure = ChildError(f"no answer within {timeout:g} s")
        self._end()
        return True

    def _end(self) -> None:
        if self.process is not None:
            end(self.process.pid)
            self.process.wait()

    def fresh(self) -> list[Any]:
        """The lines of JSON since the last call; what else a kernel or a library prints is passed over."""
        text = self._text(self.output, self.read)
        whole, newline, _ = text.rpartition("\n")
        self.read += len((whole + newline).encode(errors="surrogateescape"))
        found = [value for line in whole.splitlines() if (value := _json(line)) is not None]
        if found:
            self.heard = time.monotonic()
        return found

    def value(self) -> Any:
        self.check()
        text = self._text(self.output)
        found = next((v for line in reversed(text.splitlines()) if (v := _json(line)) is not None), None)
        if found is None:
            raise ChildError(f"its answer cannot be read: {shortened(text, 100)!r}", 0)
        return found

    def check(self) -> None:
        """`ChildError` unless it ended well by itself."""
        if self.failure is not None:
            raise self.failure
        assert self.process is not None
        code = self.process.returncode
        if code < 0:
            name = signal_name(-code)
            raise ChildError(f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else ""), code)
        if code:
            raise ChildError(_last_words(self._text(self.errors)) or f"exit code {code}", code)

    def answer(self) -> Answer:
        """`value` or the error; the log goes where all went well."""
        value, error = None, None
        try:
            value = self.value()
        except ChildError as failure:
            error = failure
        if (log := self.question.log) is not None:
            if error is None:
                log.unlink()
            else:
                self.errors.seek(0, os.SEEK_END)
                self.errors.write(self._text(self.output).encode(errors="surrogateescape"))
                self.errors.flush()
        return Answer(value, error, time.monotonic() - self.began)

    def _text(self, file: Any, start: int = 0) -> str:
        handle = file.fileno()
        return os.pread(handle, os.fstat(handle).st_size - start, start).decode(errors="surrogateescape")


def _json(line: str) -> Any:
    """The object or the list that a line holds; None for anything else that is printed."""
    if not line.startswith(("{", "[")):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _last_words(text: str) -> str:
    """Why a process says it failed, in one line: the exception of its last traceback, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    traces = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    raised = [line for line in lines[traces[-1] :] if RAISED.match(line)] if traces else []
    return shortened((raised or lines[-1:] or [""])[0], 300)


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


def end(pid: int) -> None:
    """End the process, all of its session, and what a launcher started in others: a compiler's workers, ranks."""
    import psutil  # here, because the fallback detector runs where only torch and numpy are installed

    with suppress(psutil.Error):
        for started in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                started.kill()
    with suppress(ProcessLookupError, PermissionError):  # a Mac answers EPERM for a group of zombies
        os.killpg(pid, signal.SIGKILL)


def shortened(line: str, most: int = 240) -> str:
    line = re.sub(r"^(train\.py): ", "", " ".join(ESCAPES.sub("", line).split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def require_room(folder: Path) -> None:
    """After a failure: OSError where the disk is full, which is nobody's fault and would fail everything to come."""
    if shutil.disk_usage(folder).free < ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


# -- in this terminal -------------------------------------------------------------------------------------------------


def attend(
    argv: Sequence[str],
    environment: Mapping[str, str],
    cwd: str,
    asked: Callable[[], Sequence[int]],
    begun: Callable[[int], object],
    stdout: int | None = None,
) -> int:
    """Run `argv` in this terminal; its exit code. `begun` gets its process, which is sent every signal that `asked`
    has, in order and once each. `stdout` is where it prints, by default where we do. Where waiting itself is ended,
    SIGTERM ends it first."""
    process = subprocess.Popen(argv, process_group=0, env=environment, cwd=cwd, stdout=stdout)
    sent = 0
    try:
        begun(process.pid)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(ATTEND_POLL_S)
            for signum in asked()[sent:]:
                process.send_signal(signum)
                sent += 1
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
