"""The `data` group of the configuration and what is allowed in it."""

import re
from dataclasses import dataclass

from nanogpt_mac.corpus.encoders import MAX_VOCAB
from nanogpt_mac.errors import InputError

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMES = ("shakespeare_char", "shakespeare", "openwebtext", "text", "stand_in")
TOKENIZERS = ("char", "gpt2", "bpe")
USERS = {  # fields that only these corpora take
    "url": ("shakespeare_char", "shakespeare"),
    "sha256": ("shakespeare_char", "shakespeare", "text"),
    "dataset": ("openwebtext",),
}


@dataclass
class DataConfig:
    """One corpus: the `data` group of the configuration.

    - `name`: one of NAMES.
    - `dir`: prepared corpora live in folders under it.
    - `path`: shakespeare*: a local copy, under the same checksum; text: the file; openwebtext: a file, folder
      or glob of documents (jsonl, json, csv, parquet with a column `text`; txt) in place of the Hub.
    - `url`, `sha256`: where tiny Shakespeare is and what it must be (null: the usual ones). For text, `sha256`
      is checked where it is given.
    - `tokenizer`: char, gpt2, or bpe (trained on the training split).
    - `vocab_size`: how many tokens that BPE gets; null means 4096.
    - `val_fraction`: share held out: the end of a text, or shuffled documents.
    - `dataset`: openwebtext: NAME or NAME@REVISION on the Hugging Face Hub (null: Skylion007/openwebtext).
    - `num_proc`: openwebtext: processes that load and encode.
    """

    name: str = "shakespeare_char"
    dir: str = "data"
    path: str | None = None
    url: str | None = None
    sha256: str | None = None
    tokenizer: str = "char"
    vocab_size: int | None = None
    val_fraction: float = 0.1
    dataset: str | None = None
    num_proc: int = 8


def check(cfg: DataConfig) -> None:
    """Raises InputError for a value that is not allowed, whatever is on disk or on the network."""

    def refuse(key: str, why: str) -> InputError:
        value = getattr(cfg, key)
        return InputError(f"data.{key}={'null' if value is None else value}: {why}")

    if cfg.name not in NAMES:
        raise refuse("name", f"not one of {', '.join(NAMES)}")
    if cfg.tokenizer not in TOKENIZERS:
        raise refuse("tokenizer", f"not one of {', '.join(TOKENIZERS)}")
    if cfg.name == "shakespeare_char" and cfg.tokenizer != "char":
        raise refuse("tokenizer", "data=shakespeare_char has characters; data=shakespeare takes any")
    if cfg.name == "openwebtext" and cfg.tokenizer != "gpt2":
        raise refuse("tokenizer", "data=openwebtext has gpt2")
    if cfg.tokenizer == "bpe":
        if cfg.vocab_size is not None and not 256 <= cfg.vocab_size <= MAX_VOCAB:
            raise refuse("vocab_size", f"allowed are 256 (the bytes) to {MAX_VOCAB} (what fits in uint16)")
    elif cfg.vocab_size is not None:
        raise refuse("vocab_size", f"data.tokenizer={cfg.tokenizer} has its own size; only bpe takes one")
    if not 0 < cfg.val_fraction < 1:
        raise refuse("val_fraction", "must lie between 0 and 1, both excluded")
    if cfg.num_proc < 1:
        raise refuse("num_proc", "must be at least 1")
    if cfg.name == "text" and cfg.path is None:
        raise refuse("path", "data=text needs a file")
    if cfg.name == "stand_in" and cfg.path is not None:
        raise refuse("path", "data=stand_in is generated and reads no file")
    for key, users in USERS.items():
        if getattr(cfg, key) is not None and cfg.name not in users:
            raise refuse(key, f"data={cfg.name} has no use for it; only {', '.join(users)}")
    if cfg.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", cfg.sha256):
        raise refuse("sha256", "must be 64 hexadecimal digits in lower case")
