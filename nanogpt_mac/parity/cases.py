"""What the parity gate computes: weights, batches and changed tokens, the same for the reference and every variant."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.config import Config
from nanogpt_mac.corpus import Corpus, starts
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.plan import CaseShape

RATES = [1e-3, 2e-3, 1.5e-3]  # of the three optimizer steps
REFERENCE_FLOPS = 1.5e11  # of a step in float64, five seconds on two cores, unless two windows are more
STEPS_FLOPS = 1e11  # of a step of the whole batch: where it is more, one step is compared and not three
FEWEST, MOST = 2, 64  # windows of a batch that differ: one alone would not show that rows are mixed up
LOGITS_BYTES = 4e9  # of float32 logits that a variant hands over, at most
ODD_BATCH, ODD_LENGTH = 9, 11  # above 8 and no multiple of anything, where kernels have their special cases
NO_DROPOUT = 1e-12  # takes the code path of dropout and drops nothing: 1 - p is 1 in float32
RESIDUES = 8  # no leak in aligned groups of 2, 4, 8, ... tokens hides from changes at every residue
AHEAD = 32  # tokens behind the one in question whose gradients are looked at


@dataclass(frozen=True)
class Case:
    """Weights and batches on which everything is compared."""

    name: str
    spec: GPTSpec
    batch: int
    accumulation: int
    clip: float | None  # in norms of the first gradient: 0.5 binds, 4 does not; None: switched off
    steps: int = 3  # optimizer steps
    distinct: int = MOST  # windows of one batch that differ, at most; the other rows repeat them
    looked_at: int | None = None  # rows whose logits are compared; None: the whole batch

    @property
    def drops(self) -> bool:
        """Whether NO_DROPOUT may drop a few elements all the same: CUDA's random numbers are 1 once in 2**25."""
        s = self.spec
        elements = self.batch * s.block_size * ((2 * s.n_layer + 1) * s.n_embd + s.n_layer * s.n_head * s.block_size)
        return s.dropout > 0 and elements > 1e-3 * 2**25

    def shape(self) -> CaseShape:
        shape = CaseShape(batch=self.batch, block_size=self.spec.block_size, accumulation=self.accumulation)
        return shape.model_copy(update={"windows": min(self.distinct, self.batch)})


def cases(config: Config, spec: GPTSpec) -> list[Case]:
    """What is compared, all of it along the run's own path of dropout, with nothing dropped.

    `full`: a fresh model and the run's own batch and length. Where the reference would take long, rows repeat windows:
    a variant computes all of them, the reference each window once. `odd`: weights under which every operation leaves
    its mark, in a shape that no kernel likes. `own`: the weights that the run starts from, where that is not a fresh
    model.
    """
    clips = config.grad_clip > 0
    exact = dataclasses.replace(spec, dropout=NO_DROPOUT if spec.dropout else 0.0)
    window = spec.flops_per_token() * spec.block_size
    rows = LOGITS_BYTES / (4 * spec.block_size * spec.vocab_size)
    full = Case(
        "full",
        exact,
        config.batch_size,
        1,
        0.5 if clips else None,
        steps=3 if window * config.batch_size <= STEPS_FLOPS else 1,
        distinct=max(FEWEST, min(MOST, int(REFERENCE_FLOPS / window))),
        looked_at=None if rows >= config.batch_size else max(1, int(rows)),
    )
    short = dataclasses.replace(exact, block_size=min(ODD_LENGTH, spec.block_size))
    compared = [full, Case("odd", short, ODD_BATCH, 2, 4.0 if clips else None)]
    if config.init_from != "scratch":
        compared.append(dataclasses.replace(full, name="own", steps=1))
    return compared


def unchecked(config: Config, spec: GPTSpec) -> tuple[str, ...]:
    """What the cases leave out of what a run computes."""
    full, odd, *_ = cases(config, spec)
    left = []
    if config.gradient_accumulation_steps > odd.accumulation:
        left.append(f"accumulation over {config.gradient_accumulation_steps} batches (over {odd.accumulation} it was)")
    if full.looked_at is not None:
        left.append(f"logits of {config.batch_size} rows at once (of {full.looked_at} they were)")
    if spec.block_size > 1 and spec.vocab_size < 4:
        left.append("causality in training (a vocabulary of four tokens shows it)")
    return tuple(left)


def drawn_weights(spec: GPTSpec, seed: int) -> dict[str, np.ndarray]:
    """Float32 weights under which every operation leaves its mark, as those of a fresh model do not.

    Attention far from uniform, GELU in its bend, biases and norms other than 0 and 1.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    weights = {}
    for name, shape in spec.shapes().items():
        drawn = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            weights[name] = 0.3 * drawn + np.float32(name.endswith(".weight"))
        else:
            weights[name] = drawn * np.float32((2.0 if "transformer.w" in name else 1.5) / np.sqrt(shape[1]))
    return weights


# -- batches ----------------------------------------------------------------------------------------------------------


def _placed(case: Case, seed: int, distinct: np.ndarray) -> np.ndarray:
    """A batch whose rows are `distinct` windows, each at least once, in places and numbers that have no pattern."""
    rng = np.random.Generator(np.random.Philox(key=[seed, case.batch]))
    rows = np.concatenate([np.arange(len(distinct)), rng.integers(0, len(distinct), case.batch - len(distinct))])
    return distinct[rng.permutation(rows)]


def _starts(case: Case, seed: int, step: int, split: str, batches: int, length: int) -> np.ndarray:
    """Starts (batches, batch) of windows in a split of `length` tokens."""
    each = min(case.distinct, case.batch)
    drawn = starts(seed, step, split, batches * each, length, case.spec.block_size).reshape(batches, each)
    return np.stack([_placed(case, seed + i, some) for i, some in enumerate(drawn)])


def windows(corpus: Corpus, case: Case, config: Config, step: int) -> np.ndarray:
    """Starts (accumulation, batch) of optimizer step `step`."""
    return _starts(case, config.seed, step, f"parity-{case.name}", case.accumulation, len(corpus.train))


def val_windows(corpus: Corpus, case: Case, config: Config) -> np.ndarray:
    """Starts (2, batch) that windows of an evaluation are chosen from."""
    return _starts(case, config.seed, 0, "parity-val", 2, len(corpus.val))


def tokens_of(corpus: Corpus, case: Case) -> Tokens:
    return Tokens({"train": corpus.train, "val": corpus.val}, case.spec.block_size)


# -- causality --------------------------------------------------------------------------------------------------------


def places(length: int, rows: int, seed: int) -> np.ndarray:
    """Tokens (calls, rows) to change: the last one, the second, one at every residue of 8, and others by chance."""
    rng = np.random.Generator(np.random.Philox(key=[seed, length]))
    must = [length - 1, 1, length // 2]
    for residue in range(RESIDUES):
        fitting = np.arange(residue or RESIDUES, length, RESIDUES)
        must += [int(rng.choice(fitting))] if len(fitting) else []
    must = [t for t in dict.fromkeys(must) if 0 < t < length]
    more = rng.integers(1, length, -len(must) % rows)
    return np.concatenate([must, more]).astype(int).reshape(-1, rows)


def changed(idx: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Tokens (B, T) with that at place `at[b]` of row b another one."""
    other, rows = idx.copy(), np.arange(len(idx))
    other[rows, at] = np.where(idx[rows, at] > 0, idx[rows, at] - 1, 1)
    return other


@dataclass(frozen=True)
class Probe:
    """Tokens and targets in which some targets change, and the tokens whose gradients this may not touch.

    A target's loss must not depend on a later token, so changing the target leaves that token's gradient as it was, bit
    for bit. The tokens behind the changed target of a row are all one `marker`, which stands nowhere else and is never
    a target: the gradient of its embedding's row shows whether they were looked at. It comes from one call to
    `gradients`, in training mode.
    """

    idx: np.ndarray  # (B, T)
    targets: np.ndarray  # (B, T)
    other: np.ndarray  # (B, T): the targets once more, one of each row changed
    markers: np.ndarray  # (at most B,)


def probe(corpus: Corpus, case: Case, config: Config) -> Probe | None:
    """None where there are too few tokens for it."""
    T, vocab = case.spec.block_size, case.spec.vocab_size
    if T == 1 or vocab < 4:
        return None
    begin = starts(config.seed, 9, f"parity-{case.name}", min(case.distinct, case.batch), len(corpus.train), T)
    distinct = tokens_of(corpus, case).windows("train", begin)
    count = min(len(distinct), vocab // 2)
    markers = np.arange(vocab - count, vocab)
    # What was text keeps to the other tokens; the targets that change are the first two.
    distinct = np.where(distinct < vocab - count, distinct, 2)
    idx, targets = distinct[:, :-1].copy(), distinct[:, 1:].copy()
    at = places(T, 1, config.seed)[:, 0] - 1
    at = np.resize(np.concatenate([at[at % AHEAD == 0], at[at % AHEAD != 0]]), len(distinct))
    other = targets.copy()
    for row, i in enumerate(at):
        idx[row, i + 1 : i + 1 + AHEAD] = markers[row % count]
        targets[row, i], other[row, i] = 0, 1
    rows = _placed(case, config.seed, np.arange(len(distinct)))
    return Probe(idx[rows], targets[rows], other[rows], markers)
