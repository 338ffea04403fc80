"""The programs that are compared: the product's own step, and nanoGPT's, on the same recipe, weights and windows.

nanoGPT's train.py has no step that could be imported: `NanoGPT` is the body of its loop over its own model.py,
configure_optimizers and settings, iteration for iteration. MLX's peer is in _mlx_peer.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from _side_by_side import say

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import BackendOptions, Tokens
from nanogpt_mac.corpus import stand_in
from nanogpt_mac.corpus.batches import starts
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.train.clock import Clock

SEED = 1337
DTYPES = ("float32", "bfloat16", "float16")
# cpu: the process's own time, of all its threads. With one thread it holds on a machine that others use.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# -- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """nanoGPT's config/train_shakespeare_char.py (full), or what its README gives for a MacBook (quick)."""

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    batch_size: int = 64
    dropout: float = 0.2
    lr_decay_iters: int = 5000
    learning_rate: float = 1e-3
    min_lr: float = 1e-4
    warmup_iters: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0

    def spec(self, vocab_size: int) -> GPTSpec:
        return GPTSpec(self.n_layer, self.n_head, self.n_embd, self.block_size, vocab_size, self.dropout)

    def lr(self, iteration: int) -> float:
        """get_lr of nanoGPT's train.py."""
        if iteration < self.warmup_iters:
            return self.learning_rate * (iteration + 1) / (self.warmup_iters + 1)
        if iteration > self.lr_decay_iters:
            return self.min_lr
        done = (iteration - self.warmup_iters) / (self.lr_decay_iters - self.warmup_iters)
        return self.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (self.learning_rate - self.min_lr)


RECIPES = {
    "full": Recipe(),
    "quick": Recipe(4, 4, 128, 64, 12, dropout=0.0, lr_decay_iters=2000),
    "tiny": Recipe(2, 2, 32, 16, 4, dropout=0.0, lr_decay_iters=200),  # for the tests
}


@dataclass(frozen=True)
class Work:
    """A recipe on a text, from given weights. `folder` gets nanoGPT's train.bin."""

    recipe: Recipe
    tokens: np.ndarray  # uint16, of the training split
    vocab_size: int
    folder: Path
    now: Callable[[], float] = time.perf_counter  # seconds; what iterations are timed by

    @classmethod
    def of(cls, recipe: Recipe, text: Path | None, folder: Path) -> Work:
        """One token a character, of `text` or of the stand-in for tiny Shakespeare, split as nanoGPT splits it."""
        content = text.read_text(encoding="utf-8") if text else stand_in.generate()
        symbols = {char: index for index, char in enumerate(sorted(set(content)))}
        ids = np.array([symbols[char] for char in content], np.uint16)
        work = cls(recipe, ids[: int(len(ids) * 0.9)], len(symbols), folder)
        work.tokens.tofile(folder / "train.bin")
        ids[len(work.tokens) :].tofile(folder / "val.bin")
        return work

    @property
    def spec(self) -> GPTSpec:
        return self.recipe.spec(self.vocab_size)

    def weights(self) -> dict[str, np.ndarray]:
        return self.spec.init_weights(SEED)

    def starts(self, iteration: int) -> np.ndarray:
        """Where an iteration's windows begin, int64 (batch,)."""
        recipe = self.recipe
        return starts(SEED, iteration, "train", recipe.batch_size, len(self.tokens), recipe.block_size)

    def without_dropout(self, layers: int) -> Work:
        """The same work with masks left out, which no two programs draw alike, and of few layers, to compile fast."""
        return replace(self, recipe=replace(self.recipe, dropout=0.0, n_layer=min(layers, self.recipe.n_layer)))


# -- how a side is asked for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """`ours+compile+bfloat16+fused_adamw=false`: which program, whether compiled, its dtype, settings of a back end."""

    name: str
    ours: bool
    compile: bool
    dtype: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> How:
        who, *parts = text.split("+")
        compiled, dtype, settings = False, "float32", {}
        for part in parts:
            key, equals, value = part.partition("=")
            if part == "compile":
                compiled = True
            elif part in DTYPES:
                dtype = part
            elif equals and who == "ours":
                try:
                    settings[key] = json.loads(value)
                except ValueError:
                    settings[key] = value
            else:
                who = ""
        if who not in ("ours", "peer"):
            raise InputError(
                f"--side {text}: use ours or peer, then any of +compile, +{', +'.join(DTYPES)} and, with ours, "
                "+KEY=VALUE"
            )
        return cls(text, who == "ours", compiled, dtype, settings)


class Program(Protocol):
    """One of the programs, ready to train."""

    facts: dict[str, Any]

    def loss(self, iteration: int) -> float:
        """Run one iteration on the windows that Work draws for it; its loss."""

    def run(self, first: int, count: int, every: int) -> list[float]:
        """Run `count` iterations as the program itself does, reading a loss every so many: ms an iteration of each
        such block."""


# -- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """The product's step under the product's own clock: it waits for an iteration when the next is enqueued."""

    def __init__(self, work: Work, kind: str, how: How, precision: str) -> None:
        recipe = work.recipe
        options = BackendOptions(
            kind,
            compile=how.compile,
            dtype=how.dtype,
            matmul_precision=precision,
            seed=SEED,
            weight_decay=recipe.weight_decay,
            beta1=recipe.beta1,
            beta2=recipe.beta2,
            grad_clip=recipe.grad_clip,
            settings=how.settings,
        )
        self.work = work
        self.backend = kinds.create(work.spec, options, Tokens({"train": work.tokens}, recipe.block_size))
        self.backend.load(work.weights())
        self.dispatched: list[float] = []  # ms of the host, to enqueue an iteration
        self.clock = Clock(self.backend.wait, ahead=self.backend.runs_ahead)
        self.facts = {
            "program": "nanogpt-mac",
            "device": self.backend.device_name,
            "compile": how.compile,
            "dtype": how.dtype,
            "matmul_precision": precision,
            "settings": {**how.settings, **self.backend.details},
        }

    def step(self, iteration: int) -> Any:
        return self.backend.step(self.work.starts(iteration)[None], self.work.recipe.lr(iteration))

    def loss(self, iteration: int) -> float:
        return self.backend.wait(self.step(iteration))[0]

    def run(self, first: int, count: int, every: int) -> list[float]:
        now = self.work.now
        marks, completed = [now()], 0
        for number in range(first, first + count):
            done = self.clock.submit(number, partial(self.step, number))
            if number == first + count - 1:
                done += self.clock.drain()
            self.dispatched += [completion.dispatch_ms for completion in done]
            for _ in done:
                completed += 1
                if completed % every == 0:
                    marks.append(now())
        self.facts["dispatch_ms"] = float(np.median(self.dispatched))
        return _blocks(marks, every)


def rounds(program: Program, first: int, count: int, every: int) -> Callable[[], list[float]]:
    """A side's round: each call runs the next `count` iterations, from `first` on."""
    numbers = itertools.count(first, count)
    return lambda: program.run(next(numbers), count, every)


def _blocks(marks: Sequence[float], every: int) -> list[float]:
    return [(end - begin) / every * 1e3 for begin, end in itertools.pairwise(marks)]


# -- nanoGPT ----------------------------------------------------------------------------------------------------------


def nanogpt(folder: Path) -> Any:
    """model.py of a checkout. InputError where there is none."""
    path = folder / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"--peer {folder}: has no model.py; use a checkout of github.com/karpathy/nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # inspect and pickle look there
    spec.loader.exec_module(module)
    return module


class NanoGPT:
    """train.py at commit 3adf61e: its settings, then `step`, the body of its loop with one process and no accumulation.

    Two things differ from the file: weights and, for `loss`, windows are given; with `precision` highest TF32 is
    switched off, which the file always allows. What it computes on each device is its own choice: on a CPU and on MPS
    float32 whatever the dtype, and AdamW that is not fused.
    """

    def __init__(self, work: Work, folder: Path, device: str, how: How, precision: str) -> None:
        import torch

        recipe = work.recipe
        self.torch, self.work, self.device = torch, work, device
        torch.backends.cuda.matmul.allow_tf32 = precision != "highest"
        torch.backends.cudnn.allow_tf32 = precision != "highest"
        self.device_type = "cuda" if "cuda" in device else "cpu"
        ptdtype = getattr(torch, how.dtype)
        self.ctx: Callable[[], Any] = contextlib.nullcontext
        if self.device_type == "cuda":
            self.ctx = lambda: torch.amp.autocast(device_type="cuda", dtype=ptdtype)
        module = nanogpt(folder)
        with contextlib.redirect_stdout(sys.stderr):
            sizes = {key: getattr(recipe, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
            model = module.GPT(module.GPTConfig(vocab_size=work.vocab_size, bias=False, **sizes))
            model.load_state_dict({n: torch.from_numpy(w) for n, w in work.weights().items()}, strict=False)
            model.to(device)
            self.scaler = torch.amp.GradScaler("cuda", enabled=how.dtype == "float16")
            betas = recipe.beta1, recipe.beta2
            self.optimizer = model.configure_optimizers(
                recipe.weight_decay, recipe.learning_rate, betas, self.device_type
            )
        self.model: Any = torch.compile(model) if how.compile else model
        self.batch: tuple[Any, Any] | None = None
        self.logits_dtype = ""
        self.facts = {
            "program": "nanoGPT",
            "device": device,
            "compile": how.compile,
            "dtype": how.dtype if self.device_type == "cuda" else "float32 (train.py has no autocast here)",
            "matmul_precision": precision,
            "settings": {
                "allow_tf32": precision != "highest",
                "fused_adamw": self.device_type == "cuda",
                "autocast": self.device_type == "cuda",
                "compile_mode": "default" if how.compile else None,
            },
        }

    def get_batch(self, ix: Any) -> tuple[Any, Any]:
        torch, block_size = self.torch, self.work.recipe.block_size
        data = np.memmap(self.work.folder / "train.bin", dtype=np.uint16, mode="r")
        if ix is None:
            ix = torch.randint(len(data) - block_size, (self.work.recipe.batch_size,))
        x = torch.stack([torch.from_numpy((data[i : i + block_size]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + block_size]).astype(np.int64)) for i in ix])
        if self.device_type == "cuda":
            x, y = (t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))
            return x, y
        return x.to(self.device), y.to(self.device)

    def step(self, iteration: int, windows: Callable[[int], Any] = lambda iteration: None) -> Any:
        recipe, scaler, optimizer = self.work.recipe, self.scaler, self.optimizer
        X, Y = self.batch or self.get_batch(windows(iteration))
        for param_group in optimizer.param_groups:
            param_group["lr"] = recipe.lr(iteration)
        with self.ctx():
            logits, loss = self.model(X, Y)
            loss = loss / 1
        self.logits_dtype = str(logits.dtype)
        self.batch = self.get_batch(windows(iteration + 1))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def loss(self, iteration: int) -> float:
        loss = self.step(iteration, lambda i: self.torch.from_numpy(self.work.starts(i))).item()
        self.facts["logits"] = self.logits_dtype
        return float(loss)

    def run(self, first: int, count: int, every: int) -> list[float]:
        now = self.work.now
        marks = [now()]
        for number in range(count):
            loss = self.step(first + number)
            if (number + 1) % every == 0:  # as train.py with log_interval
                loss.item()
                marks.append(now())
        return _blocks(marks, every)


# -- do they compute the same? ----------------------------------------------------------------------------------------

# Largest difference of a loss (about 4) from float32's over the check's iterations that a dtype explains.
TOLERANCES = {"float32": 2e-4, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 1e-2}


def same_losses(
    build: Callable[[Work, How], Program], work: Work, hows: Sequence[How], reference: How, iterations: int, tf32: bool
) -> dict[str, Any]:
    """Losses of every side over some iterations from the same weights on the same windows, without dropout, against
    the eager float32 step of the peer: what each differs by, and whether its dtype explains that.

    A side that says float32 and has logits of 16 bits computes in 16 bits, whatever its losses say.
    """
    expected = _losses(build(work, reference), iterations)
    found = []
    for how in hows:
        program = build(work, how)
        losses = _losses(program, iterations)
        worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        kind = "tf32" if how.dtype == "float32" and tf32 else how.dtype
        halved = how.dtype == "float32" and program.facts.get("logits", "torch.float32") != "torch.float32"
        found.append(
            {
                "side": how.name,
                "losses": losses,
                "largest_difference": worst,
                "tolerance": TOLERANCES[kind],
                "logits": program.facts.get("logits"),
                "same": bool(worst <= TOLERANCES[kind]) and not halved,
                **({"warning": "float32 was asked for and 16 bits are computed"} if halved else {}),
            }
        )
        what = f"same={found[-1]['same']}, losses differ by {worst:.2g} at most (limit {TOLERANCES[kind]:g})"
        say(f"check {how.name}: {what} {found[-1].get('warning', '')}")
    return {
        "reference": reference.name,
        "iterations": iterations,
        "recipe": asdict(work.recipe),
        "same": all(side["same"] for side in found),
        "sides": found,
    }


def _losses(program: Program, iterations: int) -> list[float]:
    return [program.loss(i) for i in range(iterations)]
