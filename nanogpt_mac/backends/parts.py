"""The parts of the model as a back end computes them, each alone, for suite=parts. `Backend.parts` makes them.

A forward pass is a chain of stages, each a function of named values. Stages that compute the same are one part, of
which the first is called, on the values that the chain has there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from nanogpt_mac.gpt.spec import GPTSpec

# In the order of an iteration.
NAMES = (
    "batch",
    "dropout masks",
    "casts",
    "embedding",
    "layer norms",
    "attention",
    "MLP",
    "residual sums",
    "head and loss",
    "gradients",
    "clip",
    "optimizer",
)

Call = Callable[[int], Sequence[Any]]  # of measure.calls: enqueues one call and returns its outputs


@dataclass(frozen=True)
class Part:
    """`both` is forward and backward in one call: its gradients by what comes in, by its weights, of a cotangent.

    What backward takes is `both` less `forward`: MLX keeps no graph that could be run backward twice, and torch.compile
    gives away what it has saved, so this alone can be had everywhere. None: it has no gradient.
    """

    name: str  # one of NAMES
    times: int  # in one iteration
    forward: Call
    both: Call | None = None
    parameters: tuple[str, ...] = ()  # canonical names, of all its places in the model; a tied weight is its first's
    note: str = ""  # what is in it, where its name does not say so


@dataclass(frozen=True)
class Inside:
    """What a profiler has seen of each part within whole iterations: ms an iteration, forward and backward."""

    parts: Mapping[str, tuple[float, float]]
    iteration_ms: float  # under the profiler
    why_not: str = ""  # no profiler tells: the reason


@dataclass(frozen=True)
class Stage:
    """`function(*inputs)` gives `outputs`, one value or a tuple of them. Of `x` and `y` gradients are taken."""

    part: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()  # parameters of an earlier stage that it reads too
    note: str = ""

    def made(self, outputs: Any) -> tuple[Any, ...]:
        return tuple(outputs) if len(self.outputs) > 1 else (outputs,)

    def anew(self, wrapped: Callable[[Callable[..., Any]], Any]) -> Stage:
        """With checkpointing: its function `wrapped`, so that a backward pass computes it anew."""
        return replace(self, function=wrapped(self.function))

    @property
    def moving(self) -> list[int]:
        """Which of the inputs have gradients."""
        return [i for i, name in enumerate(self.inputs) if name in ("x", "y")]


class Parts(ABC):
    """The parts in the order of an iteration, and how their device is started, waited for and read (measure.calls).

    Calling them leaves the back end's weights as they are, but not its moments, gradients and random numbers.
    """

    starts: np.ndarray  # int64 (accumulation, batch), of the windows of an iteration
    stages: Sequence[Stage]  # of a forward pass
    values: Mapping[str, Any]  # what its first stages read
    parts: Mapping[str, Part]
    smallest: Call | None = None  # the launch of one element's work, where launches are the host's to pay

    def loss(self) -> Any:
        """The loss of the chain of all stages, (): the model's own, with dropout as these stages draw it."""
        *_, (_, _, (loss,)) = self._chain()
        return loss

    def _chain(self) -> Iterator[tuple[Stage, tuple[Any, ...], tuple[Any, ...]]]:
        """Each stage with what went in and what came out."""
        values = dict(self.values)
        for stage in self.stages:
            given = tuple(values[name] for name in stage.inputs)
            made = self._run(stage, given)
            values.update(zip(stage.outputs, made, strict=True))
            yield stage, given, made

    def _of_model(self) -> Iterator[Part]:
        """The parts of forward and backward passes."""
        times, own, seen = Counter(stage.part for stage in self.stages), dict[str, tuple[str, ...]](), set()
        for stage in self.stages:
            own[stage.part] = own.get(stage.part, ()) + stage.parameters
        for stage, given, made in self._chain():
            if stage.part not in seen:
                seen.add(stage.part)
                forward, both = self._calls(stage, given, made)
                often = times[stage.part] * len(self.starts)
                yield Part(stage.part, often, forward, both, own[stage.part], stage.note)

    @abstractmethod
    def _run(self, stage: Stage, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a stage makes, once, as it is."""

    @abstractmethod
    def _calls(self, stage: Stage, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Call, Call | None]:
        """`Part.forward` and `both` of a stage that made `made`."""

    @abstractmethod
    def start(self, outputs: Sequence[Any]) -> None: ...

    @abstractmethod
    def wait(self, outputs: Sequence[Any]) -> None: ...

    @abstractmethod
    def peek(self, array: Any) -> float: ...

    def counted(self, call: Call) -> dict[str, int]:
        """What one call has the device do: `kernels`, and on a simulated device `waits`. Empty where nothing tells."""
        return {}

    def inside(self, step: Callable[[], Any]) -> Inside:
        """What a profiler says of the parts within `step`, which enqueues an iteration and waits for it."""
        return Inside({}, 0.0, "its framework has no profiler that says so")


class TwinParts(Parts):
    """Of a twin that draws all masks of a pass at once. A stage takes its weights, by canonical name, then inputs."""

    spec: GPTSpec
    weights: Mapping[str, Any]  # of now
    causal: Any  # the mask of attention
    ready: Callable[..., Any]  # compiles a function, where the step is compiled as a whole
    again: Callable[[Callable[..., Any]], Any] | None = None  # with checkpointing, as in Stage.anew

    @abstractmethod
    def _part(self, name: str, weights: Mapping[str, Any]) -> Callable[..., Any]:
        """What the twin has by that name ("transformer.h.0.attn", or "embed", "head"), computing with `weights`."""

    @abstractmethod
    def _masks(self, key: Any) -> Any: ...

    @abstractmethod
    def _mean_nats(self, logits: Any, targets: Any) -> Any: ...

    def _stages(self) -> list[Stage]:
        """Of a training forward pass. Its value `keep` is 1 + 3 n_layer masks, or as often None."""
        names = list(self.spec.shapes())

        def stage(part: str, function: Any, inputs: tuple[str, ...], output: str, *owners: str, **more: Any) -> Stage:
            own = tuple(name for name in names if name.startswith(tuple(f"{owner}." for owner in owners)))
            return Stage(part, function, inputs, (output,), own, **more)

        def norm(name: str) -> Stage:
            return stage("layer norms", lambda weights, x: self._part(name, weights)(x), ("x",), "y", name)

        def attention(name: str, place: int) -> Stage:
            def attended(weights: Any, y: Any, keep: Any) -> Any:
                return self._part(name, weights)(y, self.causal, None, keep[place : place + 3])

            return stage("attention", attended, ("y", "keep"), "y", name, note="has both projections and dropout")

        def mlp(name: str, place: int) -> Stage:
            def fed(weights: Any, y: Any, keep: Any) -> Any:
                return self._part(name, weights)(y, keep[place + 2])

            return stage("MLP", fed, ("y", "keep"), "y", name, note="has dropout")

        def embedded(weights: Any, tokens: Any, keep: Any) -> Any:
            positions = weights["transformer.wpe.weight"][: tokens.shape[1]]
            return self._part("embed", weights)(tokens, positions, keep[0])

        def nats(weights: Any, y: Any, targets: Any) -> Any:
            return self._mean_nats(self._part("head", weights)(y), targets)

        add = stage("residual sums", lambda _, x, y: x + y, ("x", "y"), "x")
        chain = [stage("dropout masks", lambda _, key: self._masks(key), ("key",), "keep")] if self.spec.dropout else []
        chain.append(stage("embedding", embedded, ("tokens", "keep"), "x", "transformer.wte", "transformer.wpe"))
        for i in range(self.spec.n_layer):
            name, place = f"transformer.h.{i}", 3 * i + 1
            inside = [norm(f"{name}.ln_1"), attention(f"{name}.attn", place), add]
            inside += [norm(f"{name}.ln_2"), mlp(f"{name}.mlp", place), add]
            chain += [each.anew(self.again) for each in inside] if self.again else inside
        last = stage("head and loss", nats, ("y", "targets"), "loss", tied=("transformer.wte.weight",))
        return [*chain, norm("transformer.ln_f"), last]

    def _named(self, stage: Stage) -> dict[str, Any]:
        return {name: self.weights[name] for name in stage.parameters + stage.tied}

    def _run(self, stage: Stage, given: tuple[Any, ...]) -> tuple[Any, ...]:
        made = stage.made(stage.function(self._named(stage), *given))
        self.start(made)
        return made


class DerivedParts(TwinParts):
    """Of a framework that derives functions: the gradients of a part are its `vjp`."""

    @abstractmethod
    def _vjp(self, function: Callable[..., list[Any]], of: list[Any], cotangents: list[Any]) -> list[Any]:
        """The outputs of `function` and behind them its gradients by each of `of`."""

    @abstractmethod
    def _cotangent(self, output: Any) -> Any:
        """Normal random, of its shape and dtype."""

    def _calls(self, stage: Stage, given: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Call, Call | None]:
        names, moving, count = stage.parameters + stage.tied, stage.moving, len(stage.moving)

        def forward(weights: dict[str, Any], given: Sequence[Any]) -> list[Any]:
            return list(stage.made(stage.function(weights, *given)))

        def both(weights: dict[str, Any], given: Sequence[Any], cotangents: list[Any]) -> list[Any]:
            def flat(*arrays: Any) -> list[Any]:
                inputs = list(given)
                for i, array in zip(moving, arrays, strict=False):
                    inputs[i] = array
                return forward(dict(zip(names, arrays[count:], strict=True)), inputs)

            return self._vjp(flat, [*(given[i] for i in moving), *weights.values()], cotangents)

        run, run_both = self.ready(forward), self.ready(both)
        if not names and not moving:
            return lambda number: run({}, given), None
        of = [self._cotangent(output) for output in made]
        return lambda number: run(self._named(stage), given), lambda number: run_both(self._named(stage), given, of)
