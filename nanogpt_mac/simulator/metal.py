"""`torch.mps.compile_shader` for the simulated device: Metal kernels, compiled with g++, run and recorded.

Inductor's Metal backend comes through here as well. Kernels that the shim cannot compile are a SyntaxError that names
the kernel, as a Mac gives for source that Apple's compiler refuses.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nanogpt_mac.simulator.build import compiler, first_error, kept, run_compiler
from nanogpt_mac.simulator.metal_source import Kernel, UnsupportedKernelError, translate

_SHIM = Path(__file__).with_name("shim")
# No contraction and no fast math: a kernel's result is what its source says, in float32.
_FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-fsingle-precision-constant", "-ffp-contract=off"),
    *("-D__METAL__=1", "-D__METAL_VERSION__=310", "-include", "metal_stdlib"),  # as Apple's compiler has them built in
)
_CASTS = {
    "int32": ctypes.c_int32,
    "int16": ctypes.c_int16,
    "int8": ctypes.c_int8,
    "uint8": ctypes.c_uint8,
}
_ERROR_BUFFER_BYTES = 1 << 15  # c10/metal/error.h: a count, then 30 messages of 512 bytes
_KEPT_LAUNCHES = 100_000

_lock = threading.Lock()  # a library's lanes and threadgroup memory are static
_launches: deque[Launch] = deque(maxlen=_KEPT_LAUNCHES)
_compiled: dict[tuple[str, str], None] = {}  # in order


@dataclass(frozen=True)
class Launch:
    """One run of a Metal kernel.

    `library` tells kernels of one name apart: Inductor numbers them from 0 in each graph. `threads` and `group` have
    three entries; `bytes` sums its tensors' sizes.
    """

    name: str
    library: str
    threads: tuple[int, ...]
    group: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    bytes: int


def launches() -> list[Launch]:
    """The launches since `clear_launches`, the last 100,000 at most, in order."""
    return list(_launches)


def clear_launches() -> None:
    """Forgets launches and compiled kernels."""
    _launches.clear()
    _compiled.clear()


def launch_counts() -> dict[tuple[str, str], int]:
    """How often each kernel ran since `clear_launches`, by library and name; 0 for one compiled since and never run."""
    return dict.fromkeys(_compiled, 0) | Counter((launch.library, launch.name) for launch in _launches)


class MetalLibrary:
    """What `torch.mps.compile_shader` returns: its kernels are attributes."""

    def __init__(self, source: str) -> None:
        try:
            self._kernels, self._library = compiled(source)
        except UnsupportedKernelError as error:
            raise SyntaxError(f"the simulated MPS device cannot compile this Metal source: {error}") from None
        self._name = Path(self._library._name).stem[:8]
        _compiled.update(dict.fromkeys((self._name, k) for k in self._kernels))

    def __getattr__(self, name: str) -> MetalKernel:
        kernels = self.__dict__.get("_kernels", {})
        if name not in kernels:
            raise AttributeError(f"Failed to create function state object for: {name}")
        return MetalKernel(kernels[name], self._library, self._name)

    def __dir__(self) -> list[str]:
        return list(self._kernels)


def compiled(
    source: str, constants: Mapping[int, bool | int | float] | None = None
) -> tuple[dict[str, Kernel], ctypes.CDLL]:
    """The kernels of Metal source by name, and the library that has them; `constants` as `translate` takes them.

    UnsupportedKernelError, or SyntaxError where g++ refuses it.
    """
    code, kernels = translate(source, constants)
    return {k.name: k for k in kernels}, ctypes.CDLL(str(_compile(code, tuple(kernels))))


def run(kernel: Kernel, function: Any, addresses: Sequence[int], grid: Sequence[int], group: Sequence[int]) -> None:
    """One launch of `function`, the kernel's symbol in its library. RuntimeError where its lanes go wrong."""
    message, sizes = ctypes.create_string_buffer(200), ctypes.c_uint * 3
    with _lock:
        failed = function((ctypes.c_void_p * len(addresses))(*addresses), sizes(*grid), sizes(*group), message)
    if failed:
        raise RuntimeError(f"Metal kernel {kernel.name}: {message.value.decode()}")


@cache
def _shim_digest() -> bytes:
    digest = hashlib.sha256(repr((_FLAGS, compiler())).encode())
    for file in sorted(_SHIM.iterdir()):
        digest.update(file.read_bytes())
    return digest.digest()


def _compile(code: str, kernels: tuple[Kernel, ...]) -> Path:
    digest = hashlib.sha256(_shim_digest() + code.encode()).hexdigest()

    def build(folder: Path) -> Path:
        file = folder / "kernels.cpp"
        file.write_text(code)
        result = run_compiler([*_FLAGS, f"-I{_SHIM}", file, "-o", folder / "kernels.so"])
        if result.returncode != 0:
            raise SyntaxError(_explain(result.stderr, kernels))
        return folder / "kernels.so"

    return kept(f"metal/{digest[:32]}.so", build)


def _explain(stderr: str, kernels: Sequence[Kernel]) -> str:
    """Names the kernel whose lines the compiler complains about, or all when it is none of theirs."""
    lines = [int(n) for n in re.findall(r"kernels\.cpp:(\d+):", stderr)]
    named = [k.name for k in kernels if any(k.first_line <= n <= k.last_line for n in lines)]
    what = ", ".join(named or [k.name for k in kernels]) or "a library without kernels"
    return f"the simulated MPS device cannot compile the Metal kernel {what}: {first_error(stderr)}"


class MetalKernel:
    """A kernel with torch's calling convention: `kernel(*args, threads=, group_size=, arg_casts=, error_buf_idx=)`."""

    thread_execution_width = 32

    def __init__(self, kernel: Kernel, library: ctypes.CDLL, library_name: str) -> None:
        self._kernel = kernel
        self._library_name = library_name
        self._function = getattr(library, kernel.symbol)
        self.max_threads_per_threadgroup = kernel.max_threads

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
        error_buf_idx: int | None = None,
    ) -> None:
        import torch

        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        grid, group = self._sizes(threads, group_size, tensors)
        casts = arg_casts if isinstance(arg_casts, dict) else dict.fromkeys(range(len(args)), arg_casts or "")
        slots = max(self._kernel.buffers, len(args))
        buffers = [0] * slots
        held = []  # what must live until the kernel has run
        for i, value in enumerate(args):
            address, keep = _argument(value, casts.get(i, ""))
            buffers[i] = address
            held.append(keep)
        errors = ctypes.create_string_buffer(_ERROR_BUFFER_BYTES)
        if error_buf_idx is not None:
            buffers[error_buf_idx] = ctypes.addressof(errors)
        if self._kernel.shared:
            raise ValueError(f"kernel {self._kernel.name}: torch cannot say how large its threadgroup arguments are")
        absent = [i for i in range(self._kernel.buffers) if not buffers[i] and i >= len(args)]
        if absent:
            raise ValueError(f"kernel {self._kernel.name}: no argument for buffer {absent[0]}")
        size = sum(t.nbytes for t in tensors)
        _launches.append(
            Launch(
                self._kernel.name,
                self._library_name,
                grid,
                group,
                tuple(tuple(t.shape) for t in tensors),
                tuple(str(t.dtype).removeprefix("torch.") for t in tensors),
                size,
            )
        )
        if 0 in grid:
            return
        torch.ops.nanogpt_mps.enqueue(size, 0)
        run(self._kernel, self._function, buffers, grid, group)
        _raise_reported(errors.raw)

    def _sizes(
        self, threads: int | Sequence[int] | None, group_size: int | Sequence[int] | None, tensors: Sequence[Any]
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        if threads is None and not tensors:
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        grid = _dimensions(tensors[0].numel() if threads is None else threads)
        limit = self.max_threads_per_threadgroup
        group = (min(grid[0], limit), 1, 1) if group_size is None else _dimensions(group_size)
        if group[0] * group[1] * group[2] > limit:
            raise ValueError(f"Threadgroup size exceeds {limit} limit")
        return grid, (max(group[0], 1), group[1], group[2])


def _dimensions(size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = [int(size)] if isinstance(size, int) else [int(s) for s in size]
    if not 1 <= len(sizes) <= 3:
        raise RuntimeError("Number of threads is undefined or has wrong dimension")
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def _argument(value: Any, cast: str) -> tuple[int, Any]:
    """An argument's address, and the object that owns the memory. Python floats are float32, ints int64."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.device.type != "mps" and value.dim() != 0:
            raise RuntimeError(f"Placeholder storage has not been allocated on MPS device: a {value.device} tensor")
        return value.data_ptr(), value
    if isinstance(value, (list, tuple)):
        if not value:
            raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
        if isinstance(value[0], torch.Tensor):  # their addresses
            addresses = (ctypes.c_void_p * len(value))(*(t.data_ptr() for t in value))
            return ctypes.addressof(addresses), (addresses, value)
        values, count = list(value), len(value)
    elif isinstance(value, (bool, int, float)):
        values, count = [value], 1
    else:
        raise RuntimeError("Unsupported argument type")
    number: Any
    if cast in ("fp16", "bf16"):
        packed = torch.tensor(values, dtype=torch.float16 if cast == "fp16" else torch.bfloat16)
        return packed.data_ptr(), packed
    if cast and cast not in _CASTS:
        raise RuntimeError(f"Unsupported cast instruction {cast}")
    number = _CASTS[cast] if cast else (ctypes.c_float if isinstance(values[0], float) else ctypes.c_int64)
    convert = float if number is ctypes.c_float else int
    array = (number * count)(*(convert(v) for v in values))
    return ctypes.addressof(array), array


def _raise_reported(raw: bytes) -> None:
    """The first error that a kernel wrote with TORCH_REPORT_ERROR, as a Mac raises at the next synchronisation."""
    import torch

    if int.from_bytes(raw[:4], "little") == 0:
        return
    text = [raw[4 + a : 4 + b].split(b"\0")[0].decode() for a, b in ((0, 128), (128, 256), (256, 506))]
    line = int.from_bytes(raw[4 + 508 : 4 + 512], "little")
    raise getattr(torch, "AcceleratorError", RuntimeError)(f"{text[0]}:{line} in {text[1]}: {text[2]}")
