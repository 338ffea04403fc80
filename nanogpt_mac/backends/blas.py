"""Whose matrix product MLX's Linux CPU build calls: its wheel brings only the reference BLAS, fifty times slower.

The dynamic linker takes a symbol from the first library that was loaded globally, so another library is loaded first:
a few lines of C that hand each product on, built once where there is a C compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from nanogpt_mac.errors import InputError
from nanogpt_mac.files import cache_folder, make_once

# A library's place beside a package, its product, and what sets the threads of one caller (and returns those before).
LIBRARIES = {
    "torch": ("torch/lib/libtorch_cpu.so", "sgemm_", "MKL_Set_Num_Threads_Local"),
    "scipy": ("scipy.libs/libscipy_openblas-*.so", "scipy_sgemm_", "openblas_set_num_threads_local"),
}

# Products below LIMIT multiplications take one thread: attention has hundreds of them in a row, and threads that meet
# for each waited up to 20 times as long as the product took where another process had a core.
SHIM = """
#include <dlfcn.h>
#define LIMIT 8e6
typedef void product(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                     const int *, const float *, const int *, const float *, float *, const int *);
static product *library;
static int (*threads)(int);
__attribute__((constructor)) static void find(void) {
  void *handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (handle) {
    library = (product *)dlsym(handle, PRODUCT);
    threads = (int (*)(int))dlsym(handle, THREADS);
  }
}
int blas_found(void) { return library != 0; }
void sgemm_(const char *ta, const char *tb, const int *m, const int *n, const int *k, const float *alpha,
            const float *a, const int *lda, const float *b, const int *ldb, const float *beta, float *c,
            const int *ldc) {
  int alone = threads && (double)*m * *n * *k < LIMIT, before = 0;
  if (alone) before = threads(1);
  library(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  if (alone) threads(before);
}
"""

_lent: dict[str, ctypes.CDLL] = {}  # what this process has loaded before MLX, by its name in LIBRARIES


def taken() -> str:
    """Whose it is in this process: "own" is MLX's."""
    return next(iter(_lent), "own")


def lend(asked: str) -> None:
    """Load what `backend.blas=asked` means before MLX is loaded. InputError where it cannot be had.

    "auto" takes torch's, else scipy's, else MLX's own; its own too in any but its Linux CPU build, or if loaded before.
    """
    if asked in ("own", taken()):
        return
    late = bool(_lent) or "mlx.core" in sys.modules
    if asked == "auto":
        if late or not wanted():
            return
        for name in LIBRARIES:
            try:
                return _load(name)
            except InputError:
                continue
        return
    if late:
        raise InputError(f"backend.blas={asked}: must be set before MLX is loaded; start a new process")
    _load(asked)


def wanted() -> bool:
    """Whether this MLX is its CPU build for Linux, which has only the reference BLAS."""
    try:
        return sys.platform == "linux" and bool(distribution("mlx-cpu"))
    except PackageNotFoundError:
        return False


def _load(name: str) -> None:
    package, _, pattern = LIBRARIES[name][0].partition("/")
    spec = find_spec(name)
    folders = [Path(place).with_name(package) for place in (spec.submodule_search_locations or [])] if spec else []
    library = next((found for folder in folders for found in folder.glob(pattern)), None)
    if library is None:
        raise InputError(f"backend.blas={name}: there is no {pattern} of {name} here; use backend.blas=own")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None and name == "torch":  # whose product has the name that MLX asks for
        path = library
    elif compiler is None:
        raise InputError(f"backend.blas={name}: it needs a C compiler; install gcc, or use backend.blas=own")
    else:
        path = _shim(name, library, compiler)
    try:
        loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise InputError(f"backend.blas={name}: {error}; use backend.blas=own") from error
    if path != library and not loaded.blas_found():
        raise InputError(f"backend.blas={name}: {library.name} has no {LIBRARIES[name][1]}; use backend.blas=own")
    _lent[name] = loaded


def _shim(name: str, library: Path, compiler: str) -> Path:
    """The C above for one library, built once and kept in the cache folder."""
    values = {"LIBRARY": str(library), "PRODUCT": LIBRARIES[name][1], "THREADS": LIBRARIES[name][2]}
    text = "".join(f'#define {key} "{value}"\n' for key, value in values.items()) + SHIM

    def build(folder: Path) -> Path:
        source, target = folder / "blas.c", folder / "blas.so"
        source.write_text(text)
        command = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(target), "-ldl"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            last = (made.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"backend.blas={name}: {compiler} cannot build it: {last}; use backend.blas=own")
        return target

    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return make_once(cache_folder("blas") / f"{name}-{digest}.so", build)
