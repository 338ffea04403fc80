"""sample.py's work: draw text from a checkpoint and stream it to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.backends.generate import generate
from nanogpt_mac.config import SampleConfig, backend_options, validate_sample
from nanogpt_mac.corpus import DataConfig, prepare
from nanogpt_mac.corpus.encoders import Encoder, GPT2Encoder, encoder_from_json
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt import pretrained
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.train import checkpoint


def run(config: SampleConfig) -> int:
    """Print `num_samples` continuations of the prompt; tokens a second goes to stderr."""
    validate_sample(config)
    name = kinds.resolve(config.backend.name)
    spec, state, encoder = _open(config)
    try:
        prompt = encoder.encode(_prompt(config.prompt))
    except InputError as error:
        raise InputError(f"prompt={config.prompt!r}: {error}") from error
    if not prompt:
        raise InputError("prompt='': is empty; give at least one symbol")
    backend = kinds.create(spec, backend_options(config, name), Tokens(block_size=spec.block_size))
    backend.restore(state)
    for number in range(config.num_samples):
        if number:
            print("\n---------------")
        begin = time.perf_counter()
        drawn = generate(
            backend,
            spec,
            prompt,
            config.max_new_tokens,
            config.temperature,
            config.top_k,
            config.seed + number,
            min(encoder.vocab_size, spec.vocab_size),
        )
        sys.stdout.write(encoder.decode(prompt))
        for text in _stream(encoder, drawn):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
        seconds = time.perf_counter() - begin
        print(f"{config.max_new_tokens / seconds:.0f} tokens/s on {backend.device_name}", file=sys.stderr)
    return 0


def _open(config: SampleConfig) -> tuple[GPTSpec, TrainState, Encoder]:
    if Path(config.run).exists() and not pretrained.is_pretrained(config.run):
        _, (spec, state, meta) = checkpoint.open_run(config.run, config.checkpoint, weights_only=True)
        return spec, state, encoder_from_json(meta.encoder)
    if not pretrained.is_pretrained(config.run):
        checkpoint.find(config.run)  # words the mistake
    loaded = pretrained.load(config.run, dropout=0.0)
    if loaded.dataset is None:
        if loaded.spec.vocab_size < GPT2Encoder().vocab_size:
            raise InputError(
                f"run={config.run}: its {loaded.spec.vocab_size} symbols are neither GPT-2's nor those of nanoGPT's "
                "shakespeare_char, so its tokens cannot be read; use a checkpoint with either vocabulary"
            )
        return loaded.spec, loaded.state, GPT2Encoder()
    corpus = prepare(DataConfig(name=loaded.dataset, dir=config.data_dir))
    return loaded.spec, loaded.state, corpus.encoder


def _prompt(text: str) -> str:
    if not text.startswith("FILE:"):
        return text
    path = Path(text.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt={text}: cannot be read: {error}") from error


def _stream(encoder: Encoder, drawn: Iterator[int]) -> Iterator[str]:
    """Decode as tokens come; a character whose bytes are split over tokens waits for its last."""
    tokens: list[int] = []
    shown = ""
    for token in drawn:
        tokens.append(token)
        text = encoder.decode(tokens)
        if not text.endswith("�"):
            yield text[len(shown) :]
            tokens, shown = tokens[-8:], encoder.decode(tokens[-8:])
    yield encoder.decode(tokens)[len(shown) :]
