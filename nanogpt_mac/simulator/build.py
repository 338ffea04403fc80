"""Builds C++ for the simulator, once per source and compiler, in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from nanogpt_mac import files
from nanogpt_mac.errors import InputError
from nanogpt_mac.machine.cores import usable

NATIVE = Path(__file__).with_name("native")
SOURCES = ("MPSFallback.cpp", "kernels.cpp", "redirect.cpp", "device.cpp", "timeline.cpp")


@cache
def compiler() -> tuple[str, str]:
    """The C++ compiler and its version line. InputError when there is none."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"the simulated MPS device needs a C++ compiler, and {name!r} is not there: install g++ or set CXX to one"
        )
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path, version.partition("\n")[0]


def kept(name: str, build: Callable[[Path], Path]) -> Path:
    """`name` in the simulator's part of the cache folder, made by `build` (files.make_once) where it is not there."""
    folder = files.cache_folder("simulator")
    try:
        return files.make_once(folder / name, build)
    except OSError as error:
        why = f"{folder}: the simulated MPS device cannot be built there ({error.strerror})"
        raise InputError(f"{why}; set XDG_CACHE_HOME to a folder that can be written") from error


def run_compiler(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs the compiler; the caller looks at the return code."""
    return subprocess.run([compiler()[0], *map(str, arguments)], capture_output=True, text=True, check=False)


def first_error(stderr: str) -> str:
    """The first error line of a compiler's output, else its last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
    return re.sub(r"^\S*/", "", line.strip())


def build_device() -> Path:
    """The device as a shared library for the installed torch: about 20 s on two cores, then from the cache.

    InputError when there is no compiler or it does not build against this torch.
    """
    import torch

    root = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root}/include",
        f"-I{root}/include/torch/csrc/api/include",
    ]
    digest = hashlib.sha256(repr((torch.__version__, torch.version.git_version, flags, compiler())).encode())
    for name in ("sim.h", *SOURCES):
        digest.update((NATIVE / name).read_bytes())

    def build(folder: Path) -> Path:
        def compile_one(name: str) -> subprocess.CompletedProcess[str]:
            return run_compiler([*flags, "-c", NATIVE / name, "-o", folder / f"{name}.o"])

        with ThreadPoolExecutor(usable()) as pool:
            results = list(pool.map(compile_one, SOURCES))
        if all(r.returncode == 0 for r in results):
            objects = [folder / f"{name}.o" for name in SOURCES]
            libraries = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
            results.append(run_compiler(["-shared", *objects, *libraries, "-o", folder / "mps.so"]))
        for result in results:
            if result.returncode != 0:
                raise InputError(
                    f"the simulated MPS device does not build against torch {torch.__version__}: "
                    + first_error(result.stderr)
                )
        return folder / "mps.so"

    return kept(f"mps-{torch.__version__}-{digest.hexdigest()[:16]}.so", build)
