"""The protocol that every back end follows: numpy in, numpy out, and no waiting inside `step`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, TrainState

NAMES = ("cpu", "mps", "mlx", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
MATMUL_PRECISIONS = ("highest", "high", "medium")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# How the loss scale of float16 moves: torch.amp.GradScaler's own defaults.
SCALE_GROWTH, SCALE_BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000

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
    """Everything but the model that decides what a step computes and how."""

    name: str  # one of NAMES
    compile: bool = False
    compile_mode: str = "default"  # torch.compile's
    dtype: str = "float32"  # of the matrix products; weights, moments and the loss stay float32
    matmul_precision: str = "highest"
    seed: int = 1337
    weight_decay: float = 0.1  # on tensors of two or more dimensions
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0  # global norm; 0 switches it off
    fused_adamw: bool | None = None  # torch: None is "wherever torch has it"
    blas: str = "own"  # MLX on Linux CPUs: "torch" borrows libtorch's faster matrix product
    resident_tokens: int = 1 << 28  # splits of up to this many stay on the device as int32; larger ones on the host


class Backend(Protocol):
    """One framework on one device. Arrays that cross are numpy; tokens and targets are integers (B, T)."""

    options: BackendOptions
    runs_ahead: bool  # whether `step` returns while the device is still at work
    device_name: str  # "cpu", "mps", "cuda", "simulated-mps", or MLX's "metal", "cuda", "cpu"
    details: dict[str, Any]  # what was chosen where the options left a choice: written to the records
    # `with self.phase("clip"):` marks what the back end does: one of PHASES. Whoever wants to look (the fallback
    # detector, a trace) puts a function of its own here; until then it is `unwatched`.
    phase: Mark

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take `weights` and start afresh: zero moments, iteration 0."""

    def step(self, starts: np.ndarray, lr: float) -> Any:
        """Enqueue one whole iteration on training windows `starts` (accumulation, batch); return without waiting."""

    def wait(self, handle: Any) -> tuple[float, float]:
        """Wait until the iteration behind `handle` is complete; its mean loss and its gradient norm before clipping."""

    def evaluate(self, split: str, starts: np.ndarray) -> float:
        """Mean loss, without dropout, over windows `starts` (batches, batch) of `split`."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Float32 (B, T, vocab_size), without dropout."""

    def gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Loss and its gradients by canonical name, before clipping, without dropout."""

    def state(self) -> TrainState: ...

    def restore(self, state: TrainState) -> None: ...

    def memory(self) -> dict[str, int]:
        """`current` and `peak` bytes: the device allocator's, or the process's resident set on a CPU."""

    def reset_peak_memory(self) -> None:
        """Forget the peak so far, where the device keeps one of its own."""

    def decode(self) -> Decoder:
        """A fresh sequence with an empty key-value cache."""

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""


class Decoder(Protocol):
    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Feed new tokens (T,); float32 logits (vocab_size,) of the token that follows the last."""


@dataclass
class Tokens:
    """The corpus as a back end needs it: two 1-D uint16 arrays, and how long a window is."""

    splits: dict[str, np.ndarray] = field(default_factory=dict)
    block_size: int = 0

    def windows(self, split: str, starts: np.ndarray) -> np.ndarray:
        """Gather on the host: int32 (len(starts), block_size + 1)."""
        offsets = starts[:, None] + np.arange(self.block_size + 1)
        return self.splits[split][offsets].astype(np.int32)


def step_seed(seed: int, iteration: int) -> int:
    """63 bits that dropout of one iteration is drawn from (splitmix64), so that a resumed run draws the same."""
    z = (seed * 0x9E3779B97F4A7C15 + iteration + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


def generate(
    backend: Backend,
    spec: GPTSpec,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 1337,
    symbols: int | None = None,
) -> Iterator[int]:
    """Yield tokens that continue `prompt`, drawn as nanoGPT draws them.

    The draw is made here from the logits with a generator of its own, so that the same seed gives the same text on
    every back end up to rounding. `temperature` 0 takes the likeliest token; only the first `symbols` ids are drawn
    (a vocabulary may be padded). Beyond `block_size` the window slides and, positions being learnt and absolute, is
    computed anew for each token.
    """
    if not prompt:
        raise InputError("prompt='': must hold at least one token")
    rng = np.random.Generator(np.random.Philox(key=seed))
    tokens, decoder, fed = list(prompt), backend.decode(), 0
    for _ in range(max_new_tokens):
        if len(tokens) > spec.block_size:
            decoder, fed = backend.decode(), len(tokens) - spec.block_size
        scores = decoder(np.array(tokens[fed:], np.int32))[:symbols].astype(np.float64)
        fed = len(tokens)
        token = draw(scores, temperature, top_k, rng.random())
        tokens.append(token)
        yield token


def draw(scores: np.ndarray, temperature: float, top_k: int | None, uniform: float) -> int:
    """One token from float64 logits (V,) by inverting the cumulative softmax at `uniform` in [0, 1)."""
    if temperature == 0.0:
        return int(scores.argmax())
    scores = (scores - scores.max()) / temperature
    if top_k is not None and top_k < len(scores):
        scores = np.where(scores < np.partition(scores, -top_k)[-top_k], -np.inf, scores)
    cumulative = np.cumsum(np.exp(scores))
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(scores) - 1)


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
