"""What torch.compile's front end, Dynamo, tells of itself: counters, records of compilations, and graph breaks.

None of it is public API. What a version does not have raises AttributeError, ImportError, KeyError or TypeError, which
`Recorder.ask` in recorders.py turns into a line under `unknown`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
_BREAK = re.compile(
    r"in user code at (?P<line>.+?:\d+)\nGraph Break Reason: (?:Encountered graph break[^\n]*:\n\n)?(?P<reason>.*?)"
    r"(?:\n\s*\n|\n\s*Hint:|\Z)",
    re.DOTALL,
)
_SKIP = re.compile(r"following user code:\n.*File \"(?P<file>[^\"]+)\", line (?P<number>\d+)", re.DOTALL)

Break = tuple[str, str | None]  # reason, and line as file:number


def counters() -> dict[str, Counter[str]]:
    """torch's own counters of this process so far: group to name to number."""
    from torch._dynamo.utils import counters

    return {group: Counter(values) for group, values in counters.items()}


def compilations() -> list[Any]:
    """torch's records of the last compilations of this process (64 at most), one for a forward or a backward."""
    from torch._dynamo.utils import get_compilation_metrics

    return list(get_compilation_metrics())


def break_loggers() -> list[logging.Logger]:
    """The loggers that name the reason and the line of every graph break."""
    import torch

    modules = ("symbolic_convert", "convert_frame", "exc")
    return [torch._logging.getArtifactLogger(f"torch._dynamo.{name}", "graph_breaks") for name in modules]


@contextmanager
def listening(loggers: list[logging.Logger], breaks: list[Break]) -> Iterator[None]:
    """Adds every graph break to `breaks`, and keeps what is logged of it off the console."""
    handler = _Handler(breaks)
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


class _Handler(logging.Handler):
    def __init__(self, breaks: list[Break]) -> None:
        super().__init__(logging.DEBUG)
        self._breaks = breaks

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if match := _BREAK.search(text):
            file, _, number = match["line"].rpartition(":")
            self._breaks.append((one_line(match["reason"]), f"{short(file)}:{number}"))
        elif match := _SKIP.search(text):
            reason = str(record.exc_info[1]) if record.exc_info else text.partition("\n")[0]
            self._breaks.append((one_line(reason), f"{short(match['file'])}:{match['number']}"))
        else:
            self._breaks.append((one_line(text), None))


def one_line(text: str) -> str:
    """What torch says over many lines, on one of 300 characters at most."""
    return " ".join(text.split())[:300]


def short(path: str | Path) -> str:
    """A file's path inside this package, or else its name."""
    path = Path(path)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name
