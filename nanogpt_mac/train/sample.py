"""sample.py's work: draw text from a checkpoint and stream it to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Tokens
from nanogpt_mac.backends.generate import generate
from nanogpt_mac.config import SampleConfig, backend_options, validate_sample
from nanogpt_mac.corpus import Corpus, prepare
from nanogpt_mac.corpus.config import PADDED_GPT2_TOKENS
from nanogpt_mac.corpus.encoders import GPT2_TOKENS, Encoder, GPT2Encoder
from nanogpt_mac.corpus.reading import read_file, read_text, symbols
from nanogpt_mac.corpus.stand_in import generate as generate_stand_in
from nanogpt_mac.errors import InputError
from nanogpt_mac.train.source import Source, check_tokens, open_model, same_tokens


def run(config: SampleConfig) -> int:
    """Print `num_samples` continuations of the prompt; tokens a second goes to stderr."""
    validate_sample(config)
    name = kinds.resolve(config.backend.name)
    source, encoder = _open(config)
    spec = source.spec
    try:
        prompt = encoder.encode(_prompt(config.prompt))
    except InputError as error:
        raise InputError(f"prompt={config.prompt!r}: {error}") from error
    if not prompt:
        raise InputError("prompt='': is empty; give at least one symbol")
    backend = kinds.create(spec, backend_options(config, name), Tokens(block_size=spec.block_size))
    backend.restore(source.state)
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


def _open(config: SampleConfig) -> tuple[Source, Encoder]:
    """The model, and what its tokens mean: by its own encoder, by what `data` names, or GPT-2's."""
    source, data = open_model("run", config.run, which=config.checkpoint, weights_only=True), config.data
    if data.name == "text" and (data.path or "").endswith(".pkl"):
        data = replace(data, path=None, symbols=data.path)
    if data.name == "text" and data.path is None and data.symbols is not None:
        encoder: Encoder = symbols(data.symbols, f"data.symbols={data.symbols}")
        if source.spec.vocab_size != encoder.vocab_size:
            raise InputError(
                f"data.symbols={data.symbols}: holds {encoder.vocab_size} symbols, and {source.description} knows "
                f"{source.spec.vocab_size}; use the meta.pkl of the data that it was trained on"
            )
        if source.encoder is not None and not same_tokens(source.encoder, encoder):
            raise InputError(
                f"data.symbols={data.symbols}: not those that {source.description} came with; leave it out"
            )
        return source, encoder
    if data.name != "text" or data.path is not None:
        corpus = prepare(data)
        check_tokens(source, corpus, data)
        return source, source.encoder or corpus.encoder
    if source.encoder is not None:
        return source, source.encoder
    if source.spec.vocab_size not in (GPT2_TOKENS, PADDED_GPT2_TOKENS):
        raise InputError(
            f"{source.description}: does not say which text its {source.spec.vocab_size} tokens stand for; name the "
            "text that it was trained on (data.path=FILE), tiny Shakespeare (data=shakespeare_char), or its symbols "
            "(data.symbols=meta.pkl)"
        )
    encoder = GPT2Encoder()
    sample = encoder.array(generate_stand_in()[:40_000])
    check_tokens(source, Corpus("English in GPT-2's tokens", sample, sample, encoder, "", True), data)
    return source, encoder


def _prompt(text: str) -> str:
    if not text.startswith("FILE:"):
        return text
    what = f"prompt={text}"
    return read_text(read_file(text.removeprefix("FILE:"), what), what)


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
