"""The `data` group of the configuration, and which vocabulary a corpus gives."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import PATH, path_field

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_SYMBOLS = 65
MAX_VOCAB = 65535  # token numbers are stored as uint16
PADDED_GPT2_TOKENS = 50304  # nanoGPT trains from scratch with GPT-2's 50,257 rounded up to a multiple of 64
NAMES = ("shakespeare_char", "shakespeare", "openwebtext", "text", "stand_in")
TOKENIZERS = ("char", "gpt2", "bpe")


def _limited(
    default: Any,
    ok: Callable[[Any], object] = lambda value: True,
    use: str = "",
    only: Sequence[str] = NAMES,
    text: str | None = None,
) -> Any:
    """A field whose value, unless it is null, must pass `ok` (else the error says what to `use`) and whose corpora are
    `only` these."""
    return field(default=default, metadata={"ok": ok, "use": use, "only": only, "text": text})


@dataclass
class DataConfig:
    """One corpus. `check` enforces the limits beside the fields and those between fields."""

    name: str = _limited("shakespeare_char", NAMES.__contains__, f"one of {', '.join(NAMES)}")
    """Which corpus."""

    dir: str = path_field("data")
    """Folder that holds the prepared corpora, one folder each."""

    path: str | None = path_field(None)
    """shakespeare, shakespeare_char: a local copy, under the same checksum. text: the file. openwebtext: a file, folder
    or glob of documents (jsonl, json, csv, parquet with a column `text`; txt) in place of the Hub."""

    url: str | None = _limited(None, only=("shakespeare_char", "shakespeare"), text=PATH)
    """Where to download tiny Shakespeare. null: from its usual address."""

    sha256: str | None = _limited(
        None,
        re.compile("[0-9a-f]{64}").fullmatch,
        "64 hexadecimal digits in lower case",
        only=("shakespeare_char", "shakespeare", "text"),
        text=PATH,
    )
    """Checksum that the text, or its file, must have. null: tiny Shakespeare's; for text, none."""

    tokenizer: str = _limited("char", TOKENIZERS.__contains__, f"one of {', '.join(TOKENIZERS)}")
    """One token a character, GPT-2's BPE, or a BPE trained on the training split."""

    symbols: str | None = _limited(None, only=("text",), text=PATH)
    """The characters, where they are not the text's own: nanoGPT's meta.pkl, or another text that has them."""

    vocab_size: int | None = _limited(
        None,
        lambda tokens: 256 <= tokens <= MAX_VOCAB,
        f"256 (the bytes) to {MAX_VOCAB} (what fits in uint16)",
    )
    """Tokens that the trained BPE gets. null: 4096."""

    val_fraction: float = _limited(0.1, lambda share: 0 < share < 1, "a number between 0 and 1, both excluded")
    """Share of the text (its end) or of the documents (shuffled) that is held out for validation."""

    dataset: str | None = _limited(None, only=("openwebtext",), text=PATH)
    """NAME or NAME@REVISION on the Hugging Face Hub. null: Skylion007/openwebtext."""

    num_proc: int = _limited(8, lambda processes: processes >= 1, "at least 1")
    """openwebtext: processes that load and encode."""


def check(cfg: DataConfig) -> None:
    """Raises InputError for a value that cannot be used, whatever is on disk or on the network."""

    def refuse(key: str, why: str) -> InputError:
        value = getattr(cfg, key)
        return InputError(f"data.{key}={'null' if value is None else value}: {why}")

    for key, limits in ((item.name, item.metadata) for item in fields(cfg) if "ok" in item.metadata):
        value = getattr(cfg, key)
        if value is not None and not limits["ok"](value):
            raise refuse(key, f"use {limits['use']}")
        if value is not None and cfg.name not in limits["only"]:
            raise refuse(key, f"data={cfg.name} has no use for it; use it with data={' or '.join(limits['only'])}")
    if cfg.name == "shakespeare_char" and cfg.tokenizer != "char":
        raise refuse("tokenizer", "data=shakespeare_char has characters; use data=shakespeare for other tokens")
    if cfg.name == "openwebtext" and cfg.tokenizer != "gpt2":
        raise refuse("tokenizer", "data=openwebtext has GPT-2's tokens; use data.tokenizer=gpt2")
    if cfg.symbols is not None and cfg.tokenizer != "char":
        raise refuse("symbols", f"data.tokenizer={cfg.tokenizer} has its own; use data.tokenizer=char")
    if cfg.vocab_size is not None and cfg.tokenizer != "bpe":
        raise refuse("vocab_size", f"data.tokenizer={cfg.tokenizer} has its own size; use data.tokenizer=bpe")
    if cfg.name == "text" and cfg.path is None:
        raise refuse("path", "data=text needs a file; use data.path=FILE")
    if cfg.name == "stand_in" and cfg.path is not None:
        raise refuse("path", "data=stand_in is generated and reads no file; use data=text")


def vocab_size(cfg: DataConfig) -> int | None:
    """Vocabulary of a model trained from scratch on this corpus, where it is known before the corpus is prepared.

    65 characters for tiny Shakespeare and its stand-in; 50,304 for GPT-2's tokens, padded as nanoGPT does. None for
    another text's characters and for a trained BPE, which may need fewer tokens than it was allowed.
    """
    if cfg.tokenizer == "gpt2":
        return PADDED_GPT2_TOKENS
    return None if cfg.tokenizer == "bpe" or cfg.name == "text" else TINY_SHAKESPEARE_SYMBOLS
