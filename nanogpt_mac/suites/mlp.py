"""suite=mlp: a small classifier on MNIST, trained and asked, as richiksc/mlx-benchmarks does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.nets import MLPSpec
from nanogpt_mac.corpus import mnist
from nanogpt_mac.records.bench import Task
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.nets import by_hand, suite
from nanogpt_mac.suites.nets.measured import Measuring, NetRow
from nanogpt_mac.suites.suite import Plan

DEEP, WIDE = (784, 32, 32, 10), (784, 128, 10)  # richiksc's; that of the hand-written Metal kernels
MAIN_BATCH = 256
SWEEP = tuple(2**power for power in range(3, 15))  # 8 to 16384
WIDE_BATCHES = (8, 32, 128)


class Work(suite.Work):
    folder: str
    given: bool
    stand_in: bool
    images: int


def _name(widths: tuple[int, ...], what: str) -> str:
    return f"{'-'.join(map(str, widths))} {what}"


ASKED = "inference"
MAIN = _name(DEEP, f"batch {MAIN_BATCH}")
# One process measures a line of these.
CHUNKS: tuple[tuple[str, ...], ...] = (
    (MAIN, _name(DEEP, ASKED)),
    tuple(_name(DEEP, f"batch {batch}") for batch in SWEEP if batch != MAIN_BATCH),
    (*(_name(WIDE, f"batch {batch}") for batch in WIDE_BATCHES), _name(WIDE, ASKED)),
)


class MLP(suite.Nets):
    def plan(self, config: BenchConfig) -> Plan:
        chunks = suite.asked(config, CHUNKS)
        found, missing = ways.here_for(config, "nets", lambda found: by_hand.asked(config, found))
        folder = Path(config.mnist or Path(config.data.dir) / "mnist")
        images = mnist.load(folder, given=config.mnist is not None)
        some = f", {config.images:,} images" if config.images < mnist.TRAIN else ""
        work = Work.of(
            config,
            folder=str(folder.resolve()),
            given=config.mnist is not None,
            stand_in=images.stand_in,
            data=images.label + some,  # an epoch of fewer is another thing
            images=config.images,
        )
        return suite.plan(config, found, missing, chunks, work)

    def measuring(self, task: Task) -> Measuring:
        work = Work.model_validate(task.work)
        ours = by_hand.of_way(task.way, work.config)
        arrays, make = ours or (ways.arrays(task.way, work.config), kinds.KINDS[task.way.backend].load_nets())
        images = mnist.stand_in() if work.stand_in else mnist.load(Path(work.folder), given=True)
        inputs, answers = _shares(images.train[: work.images]), images.train_classes[: work.images].astype(np.int32)
        tests, classes = _shares(images.test), images.test_classes.astype(np.int32)

        def row(name: str) -> NetRow:
            widths, _, what = name.partition(" ")
            spec = MLPSpec(tuple(map(int, widths.split("-"))))
            trained = what != ASKED
            batch = int(what.split()[1]) if trained else MAIN_BATCH
            return NetRow(spec, batch, inputs, answers, tests, classes, len(inputs), trained)

        return Measuring(task, arrays, make, row, work.settings)


def _shares(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


SUITE = MLP()
