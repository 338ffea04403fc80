"""Where a run's model comes from: scratch, a checkpoint of ours, GPT-2's weights, or nanoGPT's own ckpt.pt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nanogpt_mac.config import Config
from nanogpt_mac.corpus import Corpus
from nanogpt_mac.corpus.encoders import PADDED_GPT2_TOKENS, GPT2Encoder
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt import pretrained
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig, TrainState
from nanogpt_mac.records.checkpoint import CheckpointState
from nanogpt_mac.train import checkpoint


@dataclass
class Source:
    """A model to start from, and how far its training has come."""

    spec: GPTSpec
    state: TrainState
    best: float = float("inf")
    description: str = "scratch"


def open_source(config: Config, corpus: Corpus) -> Source:
    """Read or draw what `init_from` names, and check that it fits the corpus; InputError says what does not."""
    source = _open(config, corpus)
    spec, vocabulary = source.spec, corpus.encoder.vocab_size
    if spec.vocab_size < vocabulary:
        raise InputError(
            f"data={corpus.name}: has {vocabulary} symbols, but the model of init_from={config.init_from} "
            f"knows {spec.vocab_size}; use the data that it was trained on"
        )
    shortest = min(len(corpus.train), len(corpus.val))
    if spec.block_size >= shortest:
        raise InputError(
            f"model.block_size={spec.block_size}: the shorter split of data={corpus.name} has only {shortest} tokens; "
            f"use at most {shortest - 1}"
        )
    if source.state.iteration >= config.max_iters:
        raise InputError(
            f"max_iters={config.max_iters}: {source.description} is already at iteration {source.state.iteration}; "
            f"give max_iters above {source.state.iteration}"
        )
    return source


def _open(config: Config, corpus: Corpus) -> Source:
    if config.init_from == "scratch":
        vocabulary = config.model.vocab_size
        if vocabulary is None:
            is_gpt2 = isinstance(corpus.encoder, GPT2Encoder)
            vocabulary = PADDED_GPT2_TOKENS if is_gpt2 else corpus.encoder.vocab_size
        spec = GPTSpec(**dataclasses.asdict(config.model) | {"vocab_size": vocabulary})
        return Source(spec, TrainState.fresh(spec.init_weights(config.seed)))

    if config.init_from == "resume":
        folder, (spec, state, meta) = checkpoint.open_run(str(config.run))
        _same_corpus(meta, corpus, folder)
        _refuse_other_sizes(config, spec, str(config.run))
        spec = dataclasses.replace(spec, dropout=config.model.dropout)
        best = meta.best_val_loss
        return Source(spec, state, float("inf") if best is None else best, f"run={config.run}")

    loaded = pretrained.load(config.init_from, config.model.dropout)
    if not loaded.trained and config.model.block_size < loaded.spec.block_size:
        loaded = loaded.crop(config.model.block_size)
    _refuse_other_sizes(config, loaded.spec, config.init_from)
    return Source(loaded.spec, loaded.state, loaded.best, f"init_from={config.init_from}")


def _refuse_other_sizes(config: Config, spec: GPTSpec, source: str) -> None:
    """Sizes that the command line itself names must be those of the weights; a recipe's own sizes give way to them."""
    for key in (f.name for f in dataclasses.fields(ModelConfig) if f.name != "dropout"):
        new, old = getattr(config.model, key), getattr(spec, key)
        if {"model", f"model.{key}"} & config.named and new not in (None, old):
            raise InputError(f"model.{key}={new}: {source} has {old}, and weights keep their sizes; use {old}")


def _same_corpus(meta: CheckpointState, corpus: Corpus, folder: Path) -> None:
    if meta.corpus.sha256 != corpus.sha256 or meta.encoder != corpus.encoder.to_json():
        raise InputError(
            f"data={corpus.label}: {folder} was trained on other text ({meta.corpus.label}, sha256 "
            f"{str(meta.corpus.sha256)[:12]}..., here {corpus.sha256[:12]}...) or with other tokens; use the same text "
            "and tokenizer"
        )
