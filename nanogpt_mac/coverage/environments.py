"""Python environments with a torch that is not installed here, in the cache folder; the user's own is never touched.

uv makes them where it is on PATH, venv and pip elsewhere. Each is made aside, asked whether its torch can be imported,
and only then put in place, so that a broken download or a full disk leaves nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from packaging.version import InvalidVersion, Version

from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import wheel
from nanogpt_mac.simulator.build import build_once

# What torch needs beside the CUDA libraries that its Linux wheels ask for; nothing here computes on CUDA.
_OF_TORCH = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools")
_OF_CHILD = ("numpy", "psutil", "packaging", "pyyaml")  # what this project's code needs in there, as it is here
_ALLOWED = "allowed are nightly, a release such as 2.15.0, and the path of a wheel for this machine"
_NO_LIBRARY = re.compile(r"lib[\w.+-]+\.so[\w.]*: cannot open shared object")


def folder() -> Path:
    return wheel.cache_folder() / "environments"


def make(asked: str, nightly_index: str) -> str:
    """The Python of an environment with the torch that `asked` names: nightly, a release or the path of a wheel.

    Made once; older nightlies are removed when a newer one is in place.

    Raises:
        InputError: there is no such torch for this machine, it cannot be fetched, or it cannot be imported.
    """
    what, index = _requirement(asked, nightly_index)
    digest = hashlib.sha256(repr((what, index, sys.version, _own())).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.+-]", "_", Path(what).name)
    target = folder() / f"{'nightly-' if index else ''}{name}-{digest}"

    def build(work: Path) -> Path:
        made = work / "env"
        python = made / "bin" / "python"
        print(f"torch={asked}: making an environment with {name}", file=sys.stderr)
        _run(asked, _create(made))
        _install(asked, python, [what, "--no-deps", *(["--index-url", index] if index else [])])
        _install(asked, python, [*_OF_TORCH, *_own()])
        problem = _problem(python)
        if problem and _NO_LIBRARY.search(problem):
            print(f"torch={asked}: this build needs its CUDA libraries, several GB", file=sys.stderr)
            _install(asked, python, [what])
            problem = _problem(python)
        if problem:
            raise InputError(f"torch={asked}: {name} cannot be imported here: {problem}; nothing was kept")
        return made

    build_once(target, build)
    if index:
        for other in folder().glob("nightly-*"):
            if other.is_dir() and other != target:
                shutil.rmtree(other, ignore_errors=True)
    return str(target / "bin" / "python")


def _requirement(asked: str, nightly_index: str) -> tuple[str, str | None]:
    """What to install, and the index to take it from where it is not the user's own."""
    if asked == "nightly":
        return f"torch=={wheel.find('nightly', _python(), nightly_index).version}", nightly_index
    if asked.endswith(".whl") or os.sep in asked:
        path = Path(asked).expanduser()
        if not path.is_file():
            raise InputError(f"torch={asked}: there is no such file; {_ALLOWED}")
        return str(path.resolve()), None
    try:
        return f"torch=={Version(asked)}", None
    except InvalidVersion:
        raise InputError(f"torch={asked}: {_ALLOWED}") from None


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _own() -> list[str]:
    """What the child imports, in the versions of this environment."""
    pinned = []
    for name in _OF_CHILD:
        try:
            pinned.append(f"{name}=={installed_version(name)}")
        except PackageNotFoundError:
            pinned.append(name)
    return pinned


def _uv() -> str | None:
    return shutil.which("uv")


def _create(path: Path) -> list[str]:
    uv = _uv()
    if uv:
        return [uv, "venv", "--quiet", "--python", sys.executable, str(path)]
    return [sys.executable, "-m", "venv", str(path)]


def _install(asked: str, python: Path, what: list[str]) -> None:
    uv = _uv()
    if uv:
        _run(asked, [uv, "pip", "install", "--quiet", "--python", str(python), *what])
    else:
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]
        _run(asked, [str(python), "-m", "pip", "install", *quiet, *what])


def _run(asked: str, argv: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    for name, pip_name in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("UV_DEFAULT_INDEX", "PIP_INDEX_URL")):
        if pip_name in environment:  # the user's pip is what the other commands ask
            environment.setdefault(name, environment[pip_name])
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, errors="replace")
    except OSError as error:
        raise InputError(f"torch={asked}: {argv[0]} cannot be run: {error.strerror}; nothing was kept") from error
    if done.returncode:
        raise InputError(f"torch={asked}: {_reason(done.stderr or done.stdout)}; nothing was kept")


def _reason(text: str) -> str:
    """What uv or pip said went wrong, in one line."""
    lines = [line for line in text.splitlines() if not line.startswith("WARNING")]
    lines = [line for line in (re.sub(r"^[^\w(/]+", "", line).strip() for line in lines) if line]  # uv draws trees
    of_pip = [line for line in lines if line.startswith("ERROR: ")]
    return " ".join(of_pip[-1:] or lines)[:300] or "no message"


def _problem(python: Path) -> str | None:
    """Why torch cannot be imported in there; None where it can."""
    done = subprocess.run(
        [str(python), "-I", "-c", "import torch"], capture_output=True, text=True, check=False, errors="replace"
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def version(python: str) -> str:
    """The torch in an environment that `make` made."""
    argv = [python, "-I", "-c", "import torch; print(torch.__version__)"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
