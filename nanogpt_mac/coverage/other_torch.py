"""This model's fallback detector under a torch that is not installed, against the same under the one that is.

The other torch gets a Python environment in the cache folder; the user's own is never touched. uv makes it where it is
on PATH, venv and pip elsewhere. It is made aside, asked whether its torch can be imported, and only then put in place,
so that a broken download or a full disk leaves nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from packaging.version import InvalidVersion, Version

from nanogpt_mac import child, files, simulator
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.corpus import TINY_SHAKESPEARE_SYMBOLS
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.coverage.page import CANNOT_TELL, LOST, OK, Page, section, some
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import detect
from nanogpt_mac.fallbacks.observed import Task
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.operators import wheel
from nanogpt_mac.records.fallbacks import Fallbacks, Finding
from nanogpt_mac.report.table import Section

SCHEMA = 1
OTHERS = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")  # variables of another environment

# What torch needs beside the CUDA libraries that its Linux wheels ask for; nothing here computes on CUDA.
_OF_TORCH = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools")
_OF_CHILD = (
    "numpy",
    "psutil",
    "packaging",
    "platformdirs",
    "pyyaml",
)  # what this project's code needs in there, as it is here
_ALLOWED = "use nightly, a release such as 2.15.0, or the path of a wheel for this machine"
_NO_LIBRARY = re.compile(r"lib[\w.+-]+\.so[\w.]*: cannot open shared object")


def task(model: ModelConfig, dtype: str, batch_size: int) -> Task:
    """What the detector runs: one eager iteration, evaluation and sampling of this model, resident data.

    Narrow and short on the simulated device, which has no limits of size that could show.
    """
    sizes = asdict(model) | {"vocab_size": model.vocab_size or TINY_SHAKESPEARE_SYMBOLS}
    if sys.platform != "darwin":
        sizes |= {"n_embd": model.n_head * 8, "block_size": min(model.block_size, 16)}
        batch_size = min(batch_size, 2)
    return Task(backend_options(Config(dtype=dtype), "mps"), GPTSpec(**sizes), batch_size)


def check(config: CoverageConfig) -> Page:
    """Makes the environment, runs both, and returns the report.

    InputError where there is no such torch for this machine, or no MPS device here.
    """
    made = task(config.model, config.dtype, config.batch_size)
    env = simulator.environment(True, *OTHERS)
    python = make(config.torch, config.nightly_index)
    print("running this model under the installed torch, and under the other", file=sys.stderr)
    before = detect.check_task(made, sys.executable, env)
    after = detect.check_task(made, python, env)
    meant = version(python)
    if after.torch not in (None, meant):  # what lies on its path must not be taken for it
        raise InputError(f"torch={config.torch}: torch {after.torch} ran there instead of {meant}")
    return page(config.torch, before, after)


def findings(seen: Fallbacks) -> dict[tuple[str, str, str], Finding]:
    """By operator, kind and phase: what two torches are compared by."""
    return {(f.op, f.kind.value, f.phase): f for f in seen.findings}


def page(asked: str, before: Fallbacks, after: Fallbacks) -> Page:
    """The report; `asked` is the torch that `after` ran under, as the user named it.

    Exit code 0 there is no new fallback, 1 there is one, 2 cannot tell.
    """
    old, new = findings(before), findings(after)
    gained = [new[key] for key in new if key not in old]
    gone = [old[key] for key in old if key not in new]
    name = after.torch or asked
    incomplete = [
        f"torch {seen.torch or which}: {why}"
        for which, seen in (("installed", before), (asked, after))
        for why in seen.why_incomplete
    ]
    if not before.complete and not before.torch:
        gained = []  # nothing is known of the other side
    if gained:
        ops = some([f"{f.op} ({f.phase})" for f in gained])
        code, verdict = LOST, f"{len(gained)} findings are new since {before.torch}: {ops}"
    elif incomplete:
        code, verdict = CANNOT_TELL, f"cannot tell: {incomplete[0]}"
    else:
        both = f"; {len(new)} are in both" if new else ""
        code, verdict = OK, f"no new fallback since {before.torch}{both}"
    data = {
        "schema": SCHEMA,
        "scope": "run",
        "torch": after.torch,
        "against": before.torch,
        "asked": asked,
        "device": after.device or before.device,
        "gained": [f.model_dump() for f in gained],
        "gone": [f.model_dump() for f in gone],
        "incomplete": incomplete,
        "runs": {"against": before.document(), "torch": after.document()},
    }
    groups = (
        ("New: leaves the GPU", gained),
        ("Gone", gone),
        ("In both", [new[key] for key in new if key in old]),
    )
    sections = [_section(title, found) for title, found in groups if found]
    return Page(f"This model on MPS, torch {name}", _lines(before, after), sections, code, verdict, data)


def _lines(before: Fallbacks, after: Fallbacks) -> list[str]:
    made = []
    for which, seen in (("against (installed)", before), ("torch", after)):
        state = "complete" if seen.complete else "incomplete: " + "; ".join(seen.why_incomplete)
        made.append(f"{which}: {seen.torch or 'unknown'} on {seen.device or 'no device'}, {state}")
    return made


def _section(title: str, found: Iterable[Finding]) -> Section:
    rows = [[f.op, f.kind.value, f.phase, str(f.calls_per_iteration), f.where or "", f.advice] for f in found]
    return section(title, ["op", "kind", "phase", "calls", "where", "what to do"], rows)


# -- environments -----------------------------------------------------------------------------------------------------


def folder() -> Path:
    return wheel.cache_folder() / "environments"


def make(asked: str, nightly_index: str) -> str:
    """The Python of an environment with the torch that `asked` names: nightly, a release or the path of a wheel.

    Made once; older nightlies are removed when a newer one is in place. InputError where there is no such torch for
    this machine, or it cannot be fetched or imported.
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
        try:
            _import(asked, python, what)
        except child.ChildError as error:
            raise InputError(f"torch={asked}: {name} cannot be imported here: {error}; nothing was kept") from error
        return made

    files.make_once(target, build)
    if index:
        for other in folder().glob("nightly-*"):
            if other.is_dir() and other != target:
                shutil.rmtree(other, ignore_errors=True)
    return str(target / "bin" / "python")


def _import(asked: str, python: Path, what: str) -> None:
    """Try the torch in an environment, once more with its CUDA libraries where it cannot do without them."""
    try:
        version(python)
    except child.ChildError as error:
        if not _NO_LIBRARY.search(str(error)):
            raise
        print(f"torch={asked}: this build needs its CUDA libraries, several GB", file=sys.stderr)
        _install(asked, python, [what])
        version(python)


def _requirement(asked: str, nightly_index: str) -> tuple[str, str | None]:
    """What to install, and the index to take it from where it is not the user's own."""
    if asked == "nightly":
        return f"torch=={wheel.find('nightly', _python(), nightly_index).version}", nightly_index
    if asked.endswith(".whl") or os.sep in asked:
        path = Path(asked).expanduser()
        if not path.is_file():
            raise InputError(f"torch={asked}: no such file; {_ALLOWED}")
        return str(path.resolve()), None
    try:
        return f"torch=={Version(asked)}", nightly_index if Version(asked).is_devrelease else None
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
    environment = {k: v for k, v in os.environ.items() if k not in OTHERS}
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
    of_pip = [line for line in lines if line.startswith("ERROR: ") and "ResolutionImpossible" not in line]
    return " ".join(of_pip[-1:] or lines)[:300].rstrip(".") or "no message"


def version(python: str | Path) -> str:
    """The torch in an environment. `ChildError` where it cannot be imported."""
    program = "import json, torch; print(json.dumps([torch.__version__]))"
    (made,) = child.ask([python, "-I", "-c", program])
    return str(made)
