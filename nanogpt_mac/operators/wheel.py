"""Finds a torch by the name that the user gave it, and lays out the few of its files that are looked at.

`installed` is the torch of this environment. A release, and `nightly`, are found by the user's own pip, with its own
settings (index, certificates, proxies, credentials). Of a wheel on a server only the members that are needed are read,
in HTTP ranges; where the server has none, pip downloads the whole wheel into the cache folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from urllib.request import url2pathname

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from nanogpt_mac import files
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import native_yaml
from nanogpt_mac.report.progress import progress

NIGHTLY_INDEX = "https://download.pytorch.org/whl/nightly/cpu"  # PyTorch's own
YAML = f"{native_yaml.FOLDER}/native_functions.yaml"
DYLIB = "torch/lib/libtorch_cpu.dylib"
# The files in which PyTorch has registered MPS kernels from Python, in the versions named in table.py.
PYTHON_SOURCES = ("torch/backends/mps/__init__.py", "torch/_refs/linalg/__init__.py")
_TIMEOUT_S = (5, 30)  # to connect, and between two pieces of the answer
# What pip says where nobody answers at an address; an index that answers "404" has been reached.
_UNREACHABLE = re.compile(
    r"Could not fetch URL \S+: (connection error|timed out|There was a problem confirming the ssl)"
)
_ALLOWED = "use installed, nightly, a release such as 2.15.0, or the path of a macOS arm64 wheel"


@dataclass(frozen=True)
class Torch:
    """One torch that can be looked at."""

    asked: str  # what the user wrote: `installed`, `nightly`, a release or a path
    version: str  # in full
    identity: str  # of its content: two torches with the same identity have the same operators
    wheel: str | None = None  # file name of the wheel, None for an installed torch
    path: Path | None = None  # the folder (installed) or the wheel on this machine
    url: str | None = None  # where the wheel is, where it is not on this machine
    sha256: str | None = None  # the wheel's, where the index gives it


class Traffic:
    """What this process has read of wheels on servers."""

    bytes = 0


def cache_folder() -> Path:
    return files.cache_folder("coverage")


@contextmanager
def asked_by(key: str) -> Iterator[None]:
    """Errors name the key that asked, where that is not torch=."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub("^torch=", f"{key}=", str(error))) from error


def release_identity(asked: str, python: str) -> str | None:
    """The identity of a release, known without asking the index, because no index ever replaces a file; else None."""
    try:
        return f"{Version(asked)}-py{python}"
    except InvalidVersion:
        return None


def find(asked: str, python: str = "3.12", nightly_index: str = NIGHTLY_INDEX) -> Torch:
    """The torch that `asked` names: installed, nightly, a release, or the path of a wheel.

    `python` is the Python whose wheel is taken from an index, which does not change the operators; `nightly_index` the
    package index that `nightly` is taken from. InputError where there is no such torch, or no macOS arm64 wheel of it,
    or the index cannot be reached.
    """
    if asked == "installed":
        return _installed()
    if asked == "nightly":
        return _on_index(asked, python, nightly_index)
    if asked.endswith(".whl") or os.sep in asked:
        return _local(asked, Path(asked).expanduser())
    if release_identity(asked, python) is None:
        raise InputError(f"torch={asked}: {_ALLOWED}")
    return _on_index(asked, python, None)


def _installed() -> Torch:
    spec = find_spec("torchgen")
    if spec is None or spec.origin is None:
        raise InputError("torch=installed: torch is not installed here; run `make setup`")
    root = Path(spec.origin).parents[1]
    try:
        version = installed_version("torch")
    except PackageNotFoundError:
        raise InputError("torch=installed: torch is not installed here; run `make setup`") from None
    if not (root / YAML).is_file():
        raise InputError(f"torch=installed: torch {version} here has no {YAML}")
    built = [(root / name).stat().st_mtime_ns for name in (YAML, DYLIB, *PYTHON_SOURCES) if (root / name).is_file()]
    return Torch("installed", version, f"{version}-{_sha256(root / YAML)}-{built}", path=root)


def _local(asked: str, path: Path) -> Torch:
    if not path.is_file():
        raise InputError(f"torch={asked}: no such file; {_ALLOWED}")
    version = _check_name(asked, path.name)
    if not zipfile.is_zipfile(path):
        raise InputError(f"torch={asked}: not a wheel, or cut short (it is not a zip archive)")
    digest = _sha256(path)
    return Torch(asked, version, digest, wheel=path.name, path=path, sha256=digest)


def _check_name(asked: str, name: str) -> str:
    """The version in the wheel's file name, which must be torch for macOS on arm64."""
    try:
        package, version, _, tags = parse_wheel_filename(name)
    except InvalidWheelFilename:
        raise InputError(f"torch={asked}: {name} is not the file name of a wheel; {_ALLOWED}") from None
    if package != "torch":
        raise InputError(f"torch={asked}: {name} is a wheel of {package}, not of torch")
    platforms = sorted({tag.platform for tag in tags})
    if not any(re.fullmatch(r"macosx_\d+_\d+_(arm64|universal2)", platform) for platform in platforms):
        raise InputError(f"torch={asked}: {name} is for {', '.join(platforms)}; only macOS arm64 wheels have MPS")
    return str(version)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the user's pip ---------------------------------------------------------------------------------------------------


def _pip(asked: str, command: list[str], python: str, index: str | None) -> str:
    """Runs pip for macOS arm64 wheels and returns what it printed; InputError with pip's own reason where it fails."""
    # One far macOS version stands for all of them: pip expands it to every earlier one.
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", "--pre"]
    target += ["--platform=macosx_99_0_arm64", "--disable-pip-version-check", "--no-input"]
    argv = [sys.executable, "-m", "pip", *command, *target, *(["--index-url", index] if index else [])]
    verbose = "-vv" in command
    pip = subprocess.Popen(argv, stdout=subprocess.PIPE if verbose else sys.stderr, stderr=subprocess.PIPE, text=True)
    printed, errors = pip.communicate()
    if pip.returncode == 0:
        return printed or ""
    if _UNREACHABLE.search(printed or "") or "Retrying (" in errors:
        raise _unreachable(asked, index)
    if "No matching distribution found" in errors:
        raise InputError(f"torch={asked}: {_where(index)} has no macOS arm64 wheel of torch for Python {python}")
    reason = next((line for line in errors.splitlines() if line.startswith("ERROR: ")), errors.strip()[-300:])
    raise InputError(f"torch={asked}: pip failed: {reason or 'no message'}")


def _where(index: str | None) -> str:
    return f"the index {index}" if index else "the package index that pip is set to"


def _unreachable(asked: str, index: str | None) -> InputError:
    hint = "give another address in nightly_index=" if index else "a release that was read before needs no network"
    return InputError(f"torch={asked}: {_where(index)} cannot be reached; {hint}")


def _listed(asked: str, python: str, index: str | None) -> tuple[dict[Version, str], bool]:
    """The address of every torch that fits, and whether an index (one of several) did not answer.

    `pip index versions -vv` names them, and downloads none.
    """
    printed = _pip(asked, ["index", "versions", "torch", "-vv"], python, index)
    found = {Version(match[2]): match[1] for match in re.finditer(r"Found link (\S+) .*version: (\S+)$", printed, re.M)}
    return found, bool(_UNREACHABLE.search(printed))


def _on_index(asked: str, python: str, index: str | None) -> Torch:
    """The release `asked`, or the newest nightly."""
    found, unreachable = _listed(asked, python, index)
    nightlies = [version for version in found if version.is_devrelease]
    version = max(nightlies, default=None) if asked == "nightly" else Version(asked)
    if version not in found:
        if unreachable:
            raise _unreachable(asked, index)
        known = ", ".join(str(v) for v in sorted(found)[-6:])
        raise InputError(
            f"torch={asked}: {_where(index)} has no macOS arm64 wheel of it for Python {python}; newest: {known}"
        )
    assert version is not None
    return _at(asked, version, found[version], python)


def _at(asked: str, version: Version, link: str, python: str) -> Torch:
    address = urlsplit(link)
    path = Path(url2pathname(address.path))
    _check_name(asked, path.name)
    sha256 = dict(parse_qsl(address.fragment)).get("sha256")
    local, url = (path, None) if address.scheme == "file" else (None, address._replace(fragment="").geturl())
    return Torch(asked, str(version), f"{version}-py{python}", wheel=path.name, path=local, url=url, sha256=sha256)


def available(asked: str, python: str = "3.12", index: str | None = None) -> dict[Version, Torch | InputError]:
    """Every torch with a wheel on the user's index, or on `index`, oldest first; with the reason where it is no torch
    for a Mac. `asked` is what errors name. InputError where the index has none or cannot be reached."""
    found, unreachable = _listed(asked, python, index)
    if unreachable:
        raise _unreachable(asked, index)
    made: dict[Version, Torch | InputError] = {}
    for version, link in sorted(found.items()):
        try:
            made[version] = _at(str(version), version, link, python)
        except InputError as error:
            made[version] = error
    return made


def _downloaded(torch: Torch, python: str, nightly_index: str) -> Path:
    """The whole wheel in the cache folder: downloaded by pip, checked, and only then put in place."""
    assert torch.wheel is not None
    target = cache_folder() / "wheels" / torch.wheel
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    index = nightly_index if Version(torch.version).is_devrelease else None
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _pip(torch.asked, ["download", f"torch=={torch.version}", "--no-deps", "--dest", folder], python, index)
        wheel = Path(folder) / torch.wheel
        if not wheel.is_file() or not zipfile.is_zipfile(wheel):
            raise InputError(
                f"torch={torch.asked}: the server sent something that is not a wheel, or cut it short; nothing was kept"
            )
        if torch.sha256 not in (None, _sha256(wheel)):
            raise InputError(f"torch={torch.asked}: the wheel's sha256 is not {torch.sha256}; nothing was kept")
        wheel.replace(target)
    return target


# -- its files --------------------------------------------------------------------------------------------------------


@contextmanager
def unpacked(
    torch: Torch, binary: bool = False, python: str = "3.12", nightly_index: str = NIGHTLY_INDEX
) -> Iterator[Path]:
    """A folder that holds `torchgen/`, `torch/version.py`, the Python sources and, if `binary`, the dylib.

    For an installed torch it is the one that it lies in, otherwise a temporary one. InputError where the wheel is
    damaged, its download broke off, or it lacks what is looked for; nothing is kept.
    """
    if torch.wheel is None:
        assert torch.path is not None
        _require(torch, torch.path, binary)
        yield torch.path
        return

    def wanted(name: str) -> bool:
        in_torchgen = name.startswith("torchgen/") and name.endswith((".py", ".yaml"))
        return in_torchgen or name in ("torch/version.py", *PYTHON_SOURCES) or (binary and name == DYLIB)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with _reading(torch), _archive(torch, python, nightly_index) as archive:
            _extract(archive, wanted, root)
        _require(torch, root, binary)
        yield root


@contextmanager
def _reading(torch: Torch) -> Iterator[None]:
    """Every way in which an archive can break, in one line."""
    from remotezip import RemoteZipError
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (zipfile.BadZipFile, EOFError, zlib.error, RemoteZipError, RequestException, HTTPError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"torch={torch.asked}: {torch.wheel} is damaged or broke off ({what}); nothing was kept"
        ) from error


def _archive(torch: Torch, python: str, nightly_index: str) -> zipfile.ZipFile:
    if torch.path is not None:
        return zipfile.ZipFile(torch.path)
    assert torch.url is not None
    assert torch.wheel is not None
    whole = cache_folder() / "wheels" / torch.wheel
    if whole.exists() and not (zipfile.is_zipfile(whole) and torch.sha256 in (None, _sha256(whole))):
        whole.unlink()  # damaged since it was put there
    if not whole.exists():
        from remotezip import RemoteZip, RemoteZipError
        from requests import Session

        try:
            session = Session()
            session.hooks["response"].append(_counted)
            return RemoteZip(torch.url, session=session, timeout=_TIMEOUT_S)
        except RemoteZipError as error:  # no ranges, or an address that only pip's settings can reach
            print(f"reading parts of {torch.wheel}: {error}; downloading all of it", file=sys.stderr)
    return zipfile.ZipFile(_downloaded(torch, python, nightly_index))


def _counted(response: Any, *_: Any, **__: Any) -> None:
    Traffic.bytes += int(response.headers.get("Content-Length", 0))


def _extract(archive: zipfile.ZipFile, wanted: Callable[[str], bool], root: Path) -> None:
    for info in archive.infolist():
        if not wanted(info.filename):
            continue
        target = root / info.filename
        if not target.resolve().is_relative_to(root.resolve()):
            raise zipfile.BadZipFile(f"{info.filename} points out of the archive")
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            archive.open(info) as member,
            target.open("wb") as file,
            progress(Path(info.filename).name, info.file_size, 1 << 26, "bytes") as advance,
        ):
            while piece := member.read(1 << 20):
                file.write(piece)
                advance(len(piece))


def _require(torch: Torch, root: Path, binary: bool) -> None:
    for name in [YAML, *([DYLIB] if binary else [])]:
        if not (root / name).is_file():
            raise InputError(f"torch={torch.asked}: torch {torch.version} has no {name}")
