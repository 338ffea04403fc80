"""suite=lm: mlx-examples' Transformer language model and its twin in torch, on this project's corpora."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from nanogpt_mac import corpus
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.nets import LMSpec
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import NetReading, Reading, State, Task
from nanogpt_mac.suites import ways
from nanogpt_mac.suites.config import BenchConfig
from nanogpt_mac.suites.nets import suite
from nanogpt_mac.suites.nets.measured import Measuring, NetRow
from nanogpt_mac.suites.suite import Measure, Plan

ITERATIONS = 20  # what is called an epoch here: a corpus takes hours
LEVELS = {"char": "characters", "gpt2": "GPT-2's BPE", "bpe": "a BPE trained on it"}
# blocks, width, heads, context, batch, steps that float64 follows. full is mlx-examples' own.
SIZES = {"small": (2, 128, 4, 128, 8, 3), "full": (12, 1024, 16, 1024, 2, 1)}
TRAINED, ASKED = "training", "inference"


class Work(suite.Work):
    """`data` names the corpus and its tokens."""

    corpus: dict[str, str | int | float | None]
    vocab: int
    everywhere: bool  # whether CPUs measure the full size too
    iterations: int = ITERATIONS


class LM(suite.Nets):
    def plan(self, config: BenchConfig) -> Plan:
        found, missing = ways.here_for(config, "nets")
        sizes = ["small", "full"] if config.lm_size == "auto" else [config.lm_size]
        if config.lm_size == "auto" and not any(way.accelerator for way in found):
            sizes = ["small"]
        chunks = suite.asked(config, tuple((f"{size} {TRAINED}", f"{size} {ASKED}") for size in sizes))
        tokens = corpus.prepare(config.data)
        for size in sizes:
            *_, context, batch, _ = SIZES[size]
            if len(tokens.train) < batch * (context + 1):
                raise InputError(
                    f"data={config.data.name}: its {len(tokens.train)} tokens are too few for lm_size={size}; use a "
                    "longer text, or lm_size=small"
                )
        work = Work.of(
            config,
            corpus=asdict(config.data),
            data=f"{tokens.label}, {LEVELS[config.data.tokenizer]} ({tokens.encoder.vocab_size:,} tokens)",
            vocab=tokens.encoder.vocab_size,
            everywhere=config.lm_size == "full",
        )
        return suite.plan(config, found, missing, chunks, work)

    def measuring(self, task: Task) -> Measure:
        work = Work.model_validate(task.work)
        arrays = ways.arrays(task.way, work.config)
        tokens = corpus.prepare(corpus.DataConfig(**work.corpus))  # type: ignore[arg-type]

        def row(name: str) -> NetRow:
            size, what = name.split()
            blocks, width, heads, context, batch, steps = SIZES[size]
            spec = LMSpec(blocks, width, heads, context, work.vocab)
            (inputs, targets), (asking, _) = (_windows(t, context) for t in (tokens.train, tokens.val))
            per_epoch = min(len(inputs), work.iterations * batch)
            return NetRow(spec, batch, inputs, targets, asking[:batch], None, per_epoch, what == TRAINED, steps)

        measure = Measuring(task, arrays, kinds.KINDS[task.way.backend].load_nets(), row, work.settings)

        def unless_too_large(name: str) -> Reading:
            if name.startswith("full") and not (task.way.accelerator or work.everywhere):
                why = "minutes an iteration without a GPU: lm_size=full measures it all the same"
                return NetReading(row=name, way=task.way.name, round=task.round, state=State.SKIPPED, reason=why)
            return measure(name)

        return unless_too_large


def _windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that do not overlap, and what follows each token: int32 (N, context)."""
    whole = len(tokens) // (context + 1)
    rows = np.asarray(tokens[: whole * (context + 1)], np.int32).reshape(whole, context + 1)
    return rows[:, :-1], rows[:, 1:]


SUITE = LM()
