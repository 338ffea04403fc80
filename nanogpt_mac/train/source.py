"""Where a run's model comes from, and whether a corpus has its tokens.

A model is drawn (scratch), or it is a run or checkpoint of ours, GPT-2's weights, or nanoGPT's own ckpt.pt. What its
tokens mean is known from an encoder that came with it; where none did, the corpus must be shown to fit: a name in a
config, and a vocabulary of the same size, prove nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_mac.config import Config
from nanogpt_mac.corpus import Corpus, DataConfig, prepare, reopen
from nanogpt_mac.corpus.config import PADDED_GPT2_TOKENS
from nanogpt_mac.corpus.encoders import GPT2_TOKENS, CharEncoder, Encoder, GPT2Encoder, encoder_from_json
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt import fit, pretrained
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig, TrainState
from nanogpt_mac.records.checkpoint import CheckpointState
from nanogpt_mac.train import checkpoint

# What a fit (gpt/fit.py) must be at least, where the text's own symbols are taken, by how far training has come: the
# mean change of a norm's gain, 0.001 an iteration at nanoGPT's learning rate. Measured on tiny Shakespeare with models
# of 16 channels: the text that they were trained on has 0.12, 0.45, 0.97 and 0.997 at 0.001, 0.003, 0.015 and 0.04;
# with one letter in another's place 0.11, 0.38, 0.86 and 0.89; with capitals and small letters exchanged below 0.1.
PROGRESS, FIT_OF_ITS_TEXT = (0.001, 0.005, 0.015, 0.03), (0.05, 0.4, 0.85, 0.975)
FIT_OF_OTHERS = 0.6  # at most so much, where the symbols were given, and the text may be a new one


@dataclass
class Source:
    """A model to start from, how far its training has come, and what its tokens mean where that came with it."""

    spec: GPTSpec
    state: TrainState
    best: float = float("inf")
    description: str = "scratch"
    trained: bool = False
    encoder: Encoder | None = None
    meta: CheckpointState | None = None  # of a checkpoint of ours


def open_model(key: str, place: str, dropout: float = 0.0, which: str = "last", weights_only: bool = False) -> Source:
    """Read the model that `key`=`place` names: everything that `init_from` takes but scratch and resume."""
    description = f"{key}={place}"
    if not pretrained.is_pretrained(place) and (key == "run" or checkpoint.is_ours(Path(place))):
        _, (spec, state, meta) = checkpoint.open_run(place, which, weights_only)
        spec, best = dataclasses.replace(spec, dropout=dropout), meta.best_val_loss
        best = float("inf") if best is None else best
        return Source(spec, state, best, description, True, encoder_from_json(meta.encoder), meta)
    loaded = pretrained.load(place, dropout, key)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    encoder = encoder_from_json(loaded.encoder) if loaded.encoder else None
    return Source(loaded.spec, loaded.state, loaded.best, description, loaded.trained, encoder)


def corpus_of(config: Config) -> Corpus:
    """The corpus that `config` names; that of a resumed run as it was prepared, where its text is gone."""
    if config.init_from != "resume" or {"data", "path", "data.path"} & config.named:
        return prepare(config.data)
    meta = checkpoint.read_meta(checkpoint.find(str(config.run)))
    try:
        corpus = prepare(config.data)
        if corpus.sha256 == meta.corpus.sha256 or not _is_file_with(config.data, meta.corpus.sha256):
            return corpus
        reason = f"data.path={config.data.path}: the run was trained on its line ends as they are"
    except InputError as error:
        reason = str(error)
    kept = reopen(config.data, str(meta.corpus.sha256))
    if kept is None:
        raise InputError(f"{reason}; the prepared text is not in data.dir={config.data.dir} either")
    print(f"{reason}: going on with the same text as it was prepared in data.dir={config.data.dir}", file=sys.stderr)
    return kept


def _is_file_with(data: DataConfig, sha256: str | None) -> bool:
    """Whether the text's file, as it lies on the disk, has this checksum: until 0.1 that was a corpus's own."""
    file = Path(data.path or "")
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def open_source(config: Config, corpus: Corpus) -> Source:
    """Read or draw what `init_from` names, and check that it fits the corpus; InputError says what does not."""
    source = _open(config, corpus)
    spec = source.spec
    shortest = min(len(corpus.train), len(corpus.val))
    if spec.block_size >= shortest:
        raise InputError(
            f"model.block_size={spec.block_size}: the shorter split of data={corpus.name} has only {shortest} tokens; "
            f"use at most {shortest - 1}"
        )
    if config.init_from not in ("scratch", "resume"):
        check_tokens(source, corpus, config.data)
    if source.state.iteration >= config.max_iters:
        raise InputError(
            f"max_iters={config.max_iters}: {source.description} is already at iteration {source.state.iteration}; "
            f"give max_iters above {source.state.iteration}"
        )
    return source


def _open(config: Config, corpus: Corpus) -> Source:
    if config.init_from == "scratch":
        vocabulary, symbols = config.model.vocab_size, corpus.encoder.vocab_size
        if vocabulary is None:
            vocabulary = PADDED_GPT2_TOKENS if isinstance(corpus.encoder, GPT2Encoder) else symbols
        if vocabulary < symbols:
            raise InputError(
                f"model.vocab_size={vocabulary}: data={corpus.name} has {symbols} symbols; use at least {symbols}"
            )
        spec = GPTSpec(**dataclasses.asdict(config.model) | {"vocab_size": vocabulary})
        return Source(spec, TrainState.fresh(spec.init_weights(config.seed)))
    resumes, size = config.init_from == "resume", config.model.block_size
    key, place = ("run", str(config.run)) if resumes else ("init_from", config.init_from)
    source = open_model(key, place, config.model.dropout)
    if resumes and source.meta is not None:
        _same_corpus(source.meta, corpus, place)
    shorter = "model.block_size" in config.named or not source.trained
    if shorter and size < source.spec.block_size:
        source.spec, source.state = pretrained.crop(source.spec, source.state, size)
    _refuse_other_sizes(config, source.spec, place)
    return source


def _refuse_other_sizes(config: Config, spec: GPTSpec, source: str) -> None:
    """Sizes that the command line itself names must be those of the weights; a recipe's own sizes give way to them."""
    for key in (f.name for f in dataclasses.fields(ModelConfig) if f.name != "dropout"):
        new, old = getattr(config.model, key), getattr(spec, key)
        if {"model", f"model.{key}"} & config.named and new not in (None, old):
            raise InputError(f"model.{key}={new}: {source} has {old}, and weights keep their sizes; use {old}")


def _same_corpus(meta: CheckpointState, corpus: Corpus, place: str) -> None:
    if meta.corpus.sha256 == corpus.sha256 and meta.encoder == corpus.encoder.to_json():
        return
    if meta.corpus.label == corpus.label == "stand-in":
        raise InputError(
            f"data={corpus.label}: {place} was trained on the stand-in of an older version, whose text has changed "
            "since; use that version to resume it, or init_from= in place of resume to train it on this one"
        )
    raise InputError(
        f"data={corpus.label}: {place} was trained on other text ({meta.corpus.label}, sha256 "
        f"{str(meta.corpus.sha256)[:12]}..., here {corpus.sha256[:12]}...) or with other tokens; use the same text "
        "and tokenizer"
    )


# -- what tokens mean -------------------------------------------------------------------------------------------------


def check_tokens(source: Source, corpus: Corpus, data: DataConfig) -> None:
    """InputError unless the corpus has the model's tokens: by its encoder, or else by what the model predicts."""
    encoder, vocabulary = corpus.encoder, corpus.encoder.vocab_size
    remedy = "use the text that it was trained on (data=text data.path=FILE)"
    if isinstance(encoder, CharEncoder):
        beside = Path(data.path or "").with_name("meta.pkl") if data.path else Path("meta.pkl")
        remedy += f", or its symbols (data.symbols={beside if beside.is_file() else 'meta.pkl'})"
    if source.spec.vocab_size in (GPT2_TOKENS, PADDED_GPT2_TOKENS):
        remedy = "use data.tokenizer=gpt2, or the tokens that it was trained on"
    whose = f"{source.description}: its tokens are not those of data={corpus.name}"
    if source.encoder is not None:
        if not same_tokens(source.encoder, encoder):
            raise InputError(f"{whose}, by the encoder that came with it; {remedy}")
        return
    if source.spec.vocab_size < vocabulary:
        raise InputError(f"{whose}: it knows {source.spec.vocab_size}, the corpus has {vocabulary}; {remedy}")
    found = fit.measure(source.spec, source.state, np.asarray(corpus.train), vocabulary)
    is_gpt2 = isinstance(encoder, GPT2Encoder) and source.spec.vocab_size in (GPT2_TOKENS, PADDED_GPT2_TOKENS)
    if found.beyond > 0.01 and not is_gpt2:
        raise InputError(
            f"{whose}: it knows {source.spec.vocab_size}, the corpus has {vocabulary}, and it predicts the others too, "
            f"so that they are no padding; {remedy}"
        )
    if fit.is_untrained(source.state):
        print(f"{source.description}: no iteration has changed it, so any {vocabulary} tokens fit", file=sys.stderr)
        return
    gains = [a for n, a in source.state.weights.items() if a.ndim == 1 and not n.endswith(".bias")]
    progress = float(np.mean([np.abs(gain - 1).mean() for gain in gains]))
    needed = float(np.interp(progress, PROGRESS, FIT_OF_ITS_TEXT))
    if not isinstance(encoder, CharEncoder) or data.symbols is not None:
        needed = min(needed, FIT_OF_OTHERS)
    if not found.share >= needed:
        raise InputError(
            f"{whose}: they fit what it predicts to {found.share:.2f}, where {needed:.2g} or more is needed (loss "
            f"{found.loss:.2f}, chance {np.log(source.spec.vocab_size):.2f}); {remedy}"
        )
    doubt = "; it is trained too little for more than a guess" if progress < PROGRESS[-1] else ""
    print(
        f"{source.description}: data={corpus.name} fits what it predicts to {found.share:.2f}{doubt}", file=sys.stderr
    )


def same_tokens(one: Encoder, other: Encoder) -> bool:
    """Whether two encoders give each number the same text."""
    if one.to_json() == other.to_json():
        return True
    if one.vocab_size != other.vocab_size:
        return False
    return all(one.decode([number]) == other.decode([number]) for number in range(one.vocab_size))
