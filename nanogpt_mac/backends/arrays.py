"""Single operations of a framework on one device: what the suites of `bench.py` measure. `Kind.arrays` names the class.

Numpy in, numpy out; in between arrays are the framework's own, and nothing is waited for but in `wait`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanogpt_mac.backends.base import Kind

if TYPE_CHECKING:
    import numpy as np


class AbsentError(Exception):
    """This way does not have what is asked of it. The text is the reason, as a blank of a suite shows it."""


Function = Callable[..., Any]  # native arrays to one native array, or a tuple of them


def unchanged(array: Any) -> Any:
    return array


@dataclass(frozen=True)
class Op:
    """One operation as a framework has it: `function(*inputs, **settings)`.

    `inward` brings an array that lies as the row states it (channels last, say) into the layout that the framework
    works in, `outward` brings results back. Neither is timed.
    """

    function: Function
    inward: Callable[[Any], Any] = unchanged
    outward: Callable[[Any], Any] = unchanged


class Arrays(ABC):
    """One framework on `device`, one of `kind.devices`, compiled or not.

    Whoever makes one has called `kind.prepare`. Any method may raise what the framework raises. Float32 products have
    float32's full precision.
    """

    outputs_last = True  # False: the next call of what `ready` returns writes its outputs over those of the one before

    @abstractmethod
    def __init__(self, kind: Kind, device: str, compiled: bool) -> None: ...

    @abstractmethod
    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        """A copy on the device, complete; `dtype` by numpy's name or "bfloat16", by default the array's own."""

    @abstractmethod
    def get(self, array: Any) -> np.ndarray:
        """A copy on the host, once it is complete; bfloat16 comes as float32."""

    @abstractmethod
    def dtype(self, array: Any) -> str:
        """By numpy's name, or "bfloat16"."""

    @abstractmethod
    def start(self, outputs: Sequence[Any]) -> None:
        """See to it that `outputs` will be computed, without waiting."""

    @abstractmethod
    def wait(self, outputs: Sequence[Any]) -> None:
        """Until `outputs`, and all that was started before them, are complete on the device."""

    @abstractmethod
    def peek(self, array: Any) -> float:
        """One element, on the host: what can only be read once `array` is complete."""

    @abstractmethod
    def op(self, name: str) -> Op | None:
        """The framework's own way of the operation `name` (suites/ops/operations.py has them); None: not written."""

    @abstractmethod
    def ready(self, function: Function) -> Function:
        """`function` of native arrays as it is timed: compiled, where this is the compiled variant."""

    @abstractmethod
    def ready_with_gradient(self, function: Function, of: Sequence[int]) -> Function:
        """(cotangent, *inputs) -> (output, gradients of <output, cotangent> by the inputs numbered `of`).

        AbsentError where no operation has a gradient.
        """

    def library(self, dtype: str) -> str:
        """Whose matrix products of `dtype` these are, as far as it is known: "mkl", "Accelerate"."""
        return ""

    def limit_threads(self, threads: int) -> None:
        """Compute with so many from now on. AbsentError, unless the kind has `by_threads`."""
        raise AbsentError(f"{type(self).__name__} cannot be held to {threads} threads")

    def watched(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """What `call` returns, complete, and how many of its operations the CPU did in the device's place."""
        made = call()
        self.wait(made if isinstance(made, tuple | list) else (made,))
        return made, 0

    def gpu_seconds(self) -> float | None:
        """That the GPU was at work for this program since the last call; None where only the system can tell."""
        return None

    def free_memory(self) -> int:
        """Bytes that the device could still give."""
        import psutil

        return int(psutil.virtual_memory().available)

    def release(self) -> None:  # noqa: B027 (nothing to do on most devices)
        """Give back what the allocator and the compiler keep."""

    def counted(self) -> Mapping[str, int] | None:
        """What a simulated device has done since the last call (kernels, fallbacks, waits); None on a real one."""
        return None
