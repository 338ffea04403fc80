"""What a back end is: its entry in the registry (Kind), its options, and the protocol (Backend).

Numpy in, numpy out, and no waiting inside `step`. docs/add-a-backend.md says how to write one.
"""

from __future__ import annotations

import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from nanogpt_mac.backends.world import Ranks, World
from nanogpt_mac.garbage import uncollected
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.records.capabilities import Capabilities

if TYPE_CHECKING:  # `--help` has no time for it
    import numpy as np

    from nanogpt_mac.backends.arrays import Arrays
    from nanogpt_mac.backends.nets import Net
    from nanogpt_mac.backends.parts import Parts

DTYPES = ("float32", "bfloat16", "float16")
MATMUL_PRECISIONS = ("highest", "high", "medium")

# How the loss scale of float16 moves: torch.amp.GradScaler's own defaults.
SCALE_GROWTH, SCALE_BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000
EVAL_CHUNK = 10

# What a back end marks with `phase`, in the order of an iteration, an evaluation and the sampling of a token.
PHASES = ("forward", "backward", "clip", "optimizer", "result", "evaluation", "sampling")

Mark = Callable[[str], AbstractContextManager[Any]]  # a phase's name to a context that lasts as long as the phase
_UNWATCHED = nullcontext()


def unwatched(_phase: str) -> AbstractContextManager[Any]:
    """`Backend.phase` while nobody looks: one shared context that does nothing."""
    return _UNWATCHED


@dataclass(frozen=True)
class Meant:
    """A copy or wait that a back end makes on purpose, declared beside its code; anything beyond these is a finding."""

    phase: str
    op: str  # torch's name, without aten::
    to_host: bool
    most: int  # times a phase: one iteration, one batch of an evaluation, a prompt and the token after it
    reason: str


@dataclass(frozen=True)
class BackendOptions:
    """Everything but the model that decides what a step computes and how. What Config has is given from there."""

    name: str  # of a Kind
    compile: bool
    dtype: str  # one of DTYPES, of the matrix products; weights, moments and the loss stay float32
    matmul_precision: str  # one of MATMUL_PRECISIONS
    seed: int
    weight_decay: float  # on tensors of two or more dimensions
    beta1: float
    beta2: float
    grad_clip: float  # global norm; 0 switches it off
    checkpointing: bool = False  # compute each block's activations anew in the backward pass
    resident_tokens: int = 1 << 27  # splits of up to this many stay on the device; larger ones on the host
    settings: Mapping[str, Any] = field(default_factory=dict)  # the kind's own, by name; absent: at their defaults


@dataclass(frozen=True)
class Lever:
    """One setting worth changing on its own, to see what it gains or costs."""

    key: str  # of train.py: "backend.fused_adamw"
    value: Any
    what: str  # what the value means, in a few words
    when: Callable[[Capabilities, Any], bool] = lambda capabilities, config: True  # config: the base variant's Config


@dataclass(frozen=True)
class Rung:
    """A further way in which a kind multiplies matrices: suite=gemm measures it beside the framework's own."""

    name: str  # of its way, after the kind's: "tiled"
    label: str
    devices: tuple[str, ...]  # where it can be had
    product: str = ""  # "module:function" of two matrices, in place of the framework's
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the kind's own
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here


@dataclass(frozen=True)
class Kind:
    """One back end's entry in the registry: what must be known of it before its framework is imported."""

    name: str  # backend=NAME
    cls: str  # "module:Class", imported when one is made
    label: str  # "MLX"; its variants are "MLX eager" and "MLX compiled"
    framework: str  # the package that must be importable, and the distribution whose version is recorded
    devices: tuple[Capabilities, ...]  # what it may run on; its class says which one it does here
    extra: str = ""  # of this package, which brings the framework; none: it is a dependency, or another's
    compiler: str = ""  # what compile=true calls: "torch.compile"; none: the back end has one variant, NAME
    compiled_by_default: bool = False  # what compile=auto means
    eager_by_name: bool = True  # NAME is the eager variant, NAME-compile the compiled; else NAME-eager and NAME
    rank: Mapping[str, int] = field(default_factory=dict)  # sys.platform -> place in backend=auto; absent: never taken
    settings: type | None = None  # a dataclass of its own keys, backend.KEY; see `setting`
    caches: Mapping[str, str] = field(default_factory=dict)  # variable that says where compiled code is kept -> folder
    compiles_side_by_side: bool = False  # whether two processes may: what is kept is written whole, or locked
    nvidia: bool = False  # it computes in the memory of an NVIDIA card, not in the machine's
    keeps_attention: bool = False  # with dropout its backward pass reads whole attention weights
    arrays: str = (
        ""  # "module:Class" of its single operations, backends/arrays.py, for bench.py; none: it takes no part
    )
    world: str = ""  # "module:Class" of its ranks, backends/world.py; none: a run is one process
    launcher: str = "torchrun"  # what starts them
    nets: str = ""  # "module:Class" of its small networks, backends/nets.py; none: not in suite=mlp and suite=lm
    also_on: tuple[str, ...] = ()  # further devices that its arrays may be put on, where it has another one by default
    rungs: tuple[Rung, ...] = ()
    falls_back: Mapping[str, str] = field(default_factory=dict)  # environment in which the CPU does what it lacks
    by_threads: bool = False  # its arrays can be held to fewer threads than there are cores
    out_of_memory: str = ""  # a pattern of the line in a log that says so
    missing_operator: str = ""

    def on(self, device: str) -> Capabilities:
        """What it says of itself on `device`; of one that it does not know, nothing but the name."""
        known = (capabilities for capabilities in self.devices if capabilities.device == device)
        return next(known, Capabilities(device, self.framework))

    def missing(self) -> str | None:
        """Why it cannot run here, or None when it can. May import the framework only where nothing is set before."""
        bring = f": pip install 'nanogpt-mac[{self.extra}]'" if self.extra else ""
        return None if find_spec(self.framework) else f"the package {self.framework} is not installed{bring}"

    def programs(self) -> tuple[str, ...]:
        """The distributions whose versions are recorded."""
        return (self.framework,)

    def prepare(self, options: BackendOptions) -> None:
        """Set what the framework reads once a process, before it is imported. InputError where that is too late."""

    def load(self) -> type[Backend]:
        """The class, its framework imported."""
        cls: type[Backend] = loaded(self.cls)
        return cls

    def load_arrays(self) -> type[Arrays]:
        """As `load`, of its single operations. Only where `arrays` says where they are."""
        cls: type[Arrays] = loaded(self.arrays)
        return cls

    def load_nets(self) -> type[Net]:
        """As `load`, of its small networks. Only where `nets` says where they are."""
        cls: type[Net] = loaded(self.nets)
        return cls

    def load_world(self) -> type[Ranks]:
        """As `load`, of what connects its ranks. Only where `world` says where that is."""
        cls: type[Ranks] = loaded(self.world)
        return cls

    def is_for(self, launcher: str) -> bool:
        """Whether `launcher` starts runs of several processes of it; of one process, every kind is."""
        return not launcher or (bool(self.world) and self.launcher == launcher)

    @property
    def variants(self) -> dict[bool, str]:
        """The names of its variants, by whether they are compiled, the bare name first."""
        bare = not self.eager_by_name  # what the bare name means
        other = self.name + ("-eager" if bare else "-compile")
        return {bare: self.name, not bare: other} if self.compiler else {False: self.name}


def loaded(place: str) -> Any:
    """What "module:name" stands for."""
    module, _, name = place.partition(":")
    with uncollected():
        return getattr(import_module(module), name)


def setting(default: Any, *allowed: Any) -> Any:
    """A field of a kind's settings: its default and, where they are few, the values that it may take."""
    return field(default=default, metadata={"allowed": allowed})


class Backend(ABC):
    """One framework on one device. Arrays that cross are numpy; tokens and targets are integers (B, T).

    One thread makes it and calls it: no method may be called from two threads at once. Any method may raise what the
    framework raises (out of memory, an operator that is missing); `Kind.out_of_memory` and `missing_operator` say how
    such an error reads. InputError is for options that cannot be had here, from `__init__` alone.
    """

    LEVERS: ClassVar[tuple[Lever, ...]] = ()

    options: BackendOptions
    capabilities: Capabilities
    details: dict[str, Any]  # what was chosen where the options left a choice: written to the records
    # `with self.phase("clip"):` marks what the back end does: one of PHASES. Whoever wants to look (the fallback
    # detector, a trace) puts a function of its own here; until then it is `unwatched`.
    phase: Mark = staticmethod(unwatched)
    # The other processes of a run, put here before the first step: `step` then takes this rank's share of the windows,
    # and gradients and loss are means over all ranks.
    world: World = World()
    eval_chunk = EVAL_CHUNK  # batches that `evaluate` is given between two looks for a signal: it must not take long

    @property
    def device_name(self) -> str:
        return self.capabilities.device

    @property
    def runs_ahead(self) -> bool:
        """Whether `step` returns while the device is still at work."""
        return self.capabilities.runs_ahead

    @abstractmethod
    def __init__(self, spec: GPTSpec, options: BackendOptions, tokens: Tokens) -> None: ...

    @classmethod
    def device_of(cls, kind: Kind) -> str:
        """Which of `kind.devices` it computes on here, by name."""
        return kind.devices[0].device

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take `weights` (float32, by canonical name) and start afresh: zero moments, iteration 0."""
        self.restore(TrainState.fresh(dict(weights)))

    @abstractmethod
    def step(self, starts: np.ndarray, lr: float) -> Any:
        """Enqueue one whole iteration on training windows `starts`, int64 (accumulation, batch); return a handle.

        Where the device works behind the host (`runs_ahead`) it returns without waiting; elsewhere it may be done. An
        error of the device may show here or in any later call.
        """

    @abstractmethod
    def wait(self, handle: Any) -> tuple[float, float]:
        """Wait until the iteration behind `handle` is complete, and for nothing enqueued after it.

        Its mean loss, and its gradient norm before clipping. Handles are waited for in order, each once.
        """

    @abstractmethod
    def evaluate(self, split: str, starts: np.ndarray) -> float:
        """Mean loss, without dropout, over windows `starts`, int64 (batches, batch), of `split`."""

    @abstractmethod
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Float32 (B, T, vocab_size), without dropout."""

    @abstractmethod
    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and its gradients by canonical name, before clipping, without dropout."""

    @abstractmethod
    def state(self) -> TrainState:
        """A copy, which later steps do not touch."""

    @abstractmethod
    def restore(self, state: TrainState) -> None:
        """Go on from `state`, of any back end; it is copied."""

    @abstractmethod
    def decode(self) -> Decoder:
        """A fresh sequence with an empty key-value cache."""

    def memory(self) -> dict[str, int]:
        """`current` and `peak` bytes: the device allocator's, or the process's resident set on a CPU."""
        return resident_memory()

    def reset_peak_memory(self) -> None:  # noqa: B027 (nothing to do on most devices)
        """Forget the peak so far, where the device keeps one of its own."""

    def synchronize(self) -> None:  # noqa: B027 (nothing to do on most devices)
        """Wait until the device has nothing left to do."""

    # -- how fast a matrix product is here, for mfu_measured ------------------------------------------------------

    @abstractmethod
    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[int], None]:
        """For normal random (M, K) and (K, N) of `dtype`: a function that multiplies them n times and waits.

        Random numbers of its own: the run's are left alone. The precision is the run's.
        """

    # -- where an iteration goes, for suite=parts ------------------------------------------------------------------

    def parts(self, starts: np.ndarray) -> Parts | None:
        """What an iteration on windows `starts`, int64 (accumulation, batch), consists of; None: it gives no parts.

        Each is computed by the very functions that `step` calls, compiled one by one where `step` is compiled as a
        whole, and outside of any graph that replays an iteration.
        """
        return None

    def free_memory(self) -> int:
        """Bytes that the device could still give."""
        import psutil

        return int(psutil.virtual_memory().available)

    def iteration_bytes(self) -> int | None:
        """What an iteration takes beside what stays, once the first is complete; None where a second, enqueued behind
        it, takes nothing more."""
        return None

    def close(self) -> None:  # noqa: B027 (nothing to do for most)
        """No further iteration: let go of what holds on to the other ranks."""

    def release_memory(self) -> None:  # noqa: B027 (nothing to do on most devices)
        """Give back what the allocator keeps."""


class Decoder(Protocol):
    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Feed new tokens (T,); float32 logits (vocab_size,) of the token that follows the last."""


@dataclass
class Tokens:
    """The corpus as a back end needs it: two 1-D uint16 arrays, and how long a window is."""

    splits: dict[str, np.ndarray] = field(default_factory=dict)
    block_size: int = 0

    def windows(self, split: str, starts: np.ndarray) -> np.ndarray:
        """Gather on the host: int32 (..., block_size + 1)."""
        import numpy as np

        offsets = starts[..., None] + np.arange(self.block_size + 1)
        return self.splits[split][offsets].astype(np.int32)


def step_seed(seed: int, iteration: int, rank: int = 0) -> int:
    """63 bits that one iteration's dropout is drawn from (splitmix64), so that a resumed run draws the same."""
    z = (seed * 0x9E3779B97F4A7C15 + iteration + 1 + (rank << 40)) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


@lru_cache(maxsize=1)
def _resident(_tick: int) -> int:
    import psutil  # here, because the fallback detector runs where only torch and numpy are installed

    return int(psutil.Process().memory_info().rss)


def resident_memory() -> dict[str, int]:
    """This process's resident set: what a back end on the CPU has in place of an allocator's figures."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS and KiB on Linux
    current = _resident(int(time.monotonic() * 4))  # read four times a second: it costs more than all other records
    return {"current": current, "peak": peak * unit}
