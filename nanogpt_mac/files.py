"""How the project touches a disk: files that are never half, things made once, locks, the cache folder."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from nanogpt_mac.errors import InputError

T = TypeVar("T")
NAME = "nanogpt-mac"
TELL = "NANOGPT_MAC_RUN_FOLDER_TO"  # in the environment: the file that the first run folder made is written into


# -- writing ----------------------------------------------------------------------------------------------------------


_unfinished: set[Path] = set()
_numbers = itertools.count()


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Within, `path`, a file or a folder, is being made; where that fails, or a signal ends it, it is removed."""
    _unfinished.add(path)
    try:
        yield
    except BaseException:
        remove(path)
        raise
    finally:
        _unfinished.discard(path)


def remove_unfinished() -> None:
    for path in tuple(_unfinished):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there, whatever else is still writing to it."""
    for _ in range(3):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            break


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError of writing names no file: it gets the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """`path` to write to; afterwards it is on the disk."""
    with named(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, data: str | bytes) -> None:
    """Write `path` and wait until it is on the disk."""
    with synced(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_aside(path: Path, data: str | bytes) -> None:
    """Write `path` so that a reader sees the old file or the new one, never half of one.

    OSError leaves the old file.
    """
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    with unfinished(aside), named(path):
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        aside.replace(path)


def write_json(path: Path, document: Any) -> None:
    """`document` as JSON, written aside; numbers that are not finite are written by name (`plain`)."""
    write_aside(path, json.dumps(plain(document), indent=1) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold; NaN and infinity become their names, never a silent null."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk: a new or renamed file is durable only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`; one that is there is replaced in one step."""
    aside = link.with_name(f".{link.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)


def run_folder(pattern: str, name: str) -> Path:
    """Make a run's folder from `pattern` ({date}, {time}, {name}); a taken name gets a number, a given one does not.

    InputError when a folder that was named outright already holds a run, or cannot be made.
    """
    now = datetime.now()
    text = pattern.replace("{date}", now.strftime("%Y-%m-%d")).replace("{time}", now.strftime("%H-%M-%S"))
    folder = Path(text.replace("{name}", name))
    is_pattern = any(part in pattern for part in ("{date}", "{time}", "{name}"))
    if not is_pattern and any((folder / file).exists() for file in ("metrics.jsonl", "bench.json")):
        raise InputError(f"run_dir={pattern}: already holds a run; use a new or an empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                candidate.mkdir()
            except FileExistsError:
                if is_pattern:
                    continue
            break
        if not os.access(candidate, os.W_OK | os.X_OK) or not candidate.is_dir():
            raise PermissionError(errno.EACCES, "not a folder that can be written", str(candidate))
    except OSError as error:
        raise InputError(f"run_dir={pattern}: cannot be made: {error.strerror}: {error.filename}") from error
    if told := os.environ.pop(TELL, None):  # once: runs of this run are told nothing
        write_aside(Path(told), str(candidate))
    return candidate


# -- one process at a time --------------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path, waiting: str = "", refuse: str = "") -> Iterator[None]:
    """Hold `path` (made where it is missing, and left behind); the system lets go of it when the process ends.

    Where another process holds it: InputError with the text `refuse`, or without one `waiting` on standard error and
    a wait. OSError where `path` cannot be made.
    """
    import filelock  # here, because the fallback detector runs where only torch and numpy are installed

    held = filelock.FileLock(path)
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        if refuse:
            raise InputError(refuse) from None
        if waiting:
            print(waiting, file=sys.stderr, flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder that is gone afterwards, also after a signal."""
    folder = (parent or Path(tempfile.gettempdir())) / f".{NAME}-{os.getpid()}-{next(_numbers)}"
    with unfinished(folder):
        remove(folder)  # of a process that had this number before
        folder.mkdir(mode=0o700)
        yield folder
        remove(folder)


def make_once(target: Path, make: Callable[[Path], Path]) -> Path:
    """`target`, a file or a folder, put in place of what `make(empty folder)` returns unless it is there already.

    Safe for processes that race: one makes it, the others wait. Nothing is kept of a `make` that raises.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            with temporary_folder(target.parent) as folder:
                make(folder).replace(target)
    return target


# -- the cache folder -------------------------------------------------------------------------------------------------


def cache_folder(*parts: str) -> Path:
    """A folder for what can be made again: `$XDG_CACHE_HOME/nanogpt-mac`, or where this system keeps such things.

    That is `~/.cache/nanogpt-mac` on Linux and `~/Library/Caches/nanogpt-mac` on a Mac. It need not exist yet.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        folder = Path(base) / NAME
    else:
        import platformdirs  # as above

        folder = platformdirs.user_cache_path(NAME, appauthor=False)
    return folder.joinpath(*parts)


def kept(path: Path, parse: Callable[[str], T], make: Callable[[], str]) -> T:
    """`parse` of the text in the cache file `path`, which `make` gives where there is none or it is damaged.

    `parse` raises ValueError, KeyError, TypeError or AttributeError for a text that is not what it should be.
    """
    if path.is_file():
        try:
            return parse(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{path}: damaged ({error}); it is made again", file=sys.stderr)
    text = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, text)
    return parse(text)
