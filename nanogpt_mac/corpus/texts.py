"""Corpora that are one text: tiny Shakespeare, any UTF-8 file, the stand-in.

A corpus's sha256 is that of its text, with line ends and byte order mark as `reading.lines` leaves them: one text has
one checksum, whatever system wrote its file. `data.sha256` may also be that of the file itself.
"""

import hashlib
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanogpt_mac.corpus import stand_in
from nanogpt_mac.corpus.config import MAX_VOCAB, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_URL, DataConfig
from nanogpt_mac.corpus.download import NoNetwork, download
from nanogpt_mac.corpus.encoders import CharEncoder, Encoder, GPT2Encoder, TrainedBPEEncoder
from nanogpt_mac.corpus.prepared import Corpus, key_of, open_or_build, write_meta, write_split
from nanogpt_mac.corpus.reading import read_file, read_text, symbols
from nanogpt_mac.errors import InputError

DEFAULT_BPE_VOCAB = 4096


def prepare_text(cfg: DataConfig) -> Corpus:
    if cfg.name == "stand_in":
        return _open(cfg, stand_in.SHA256, lambda: stand_in.generate().encode())
    if cfg.path is not None:
        what = f"data.path={cfg.path}"
        data = raw = read_file(cfg.path, what)
        if b"\r" in raw or raw.startswith(BOM_UTF8):
            data = read_text(raw, what).encode()
        sha256, of_file = (hashlib.sha256(each).hexdigest() for each in (data, raw))
        expected = cfg.sha256 or (None if cfg.name == "text" else TINY_SHAKESPEARE_SHA256)
        if expected not in (None, sha256, of_file):
            raise InputError(f"{what}: sha256 is {sha256}; data={cfg.name} needs {expected}; use another file")
        return _open(cfg, sha256, lambda: data)
    url, sha256 = cfg.url or TINY_SHAKESPEARE_URL, cfg.sha256 or TINY_SHAKESPEARE_SHA256
    try:
        return _open(cfg, sha256, lambda: download(url, sha256))
    except NoNetwork as error:
        if cfg.name != "shakespeare_char":
            raise InputError(
                f"data.url={url}: no network ({error}); connect, or use a local copy with data.path=FILE"
            ) from error
        print(
            f"WARNING: no network, so tiny Shakespeare cannot be downloaded ({error}): using the built-in STAND-IN, "
            "generated text of the same length and symbols. Times compare with the real text, losses do not. "
            "For the real text connect, or use a local copy with data.path=FILE.",
            file=sys.stderr,
        )
        return prepare_text(replace(cfg, name="stand_in"))


def folder_key(cfg: DataConfig, sha256: str) -> str:
    """The name of the folder of the prepared text with this checksum."""
    name = cfg.name
    if name == "text":
        name = "text-" + re.sub("[^a-z0-9]+", "_", Path(cfg.path or "").stem.lower())[:40]
    identity = {
        "sha256": sha256,
        "tokenizer": cfg.tokenizer,
        "vocab_size": (cfg.vocab_size or DEFAULT_BPE_VOCAB) if cfg.tokenizer == "bpe" else None,
        "val_fraction": cfg.val_fraction,
    }
    if cfg.symbols is not None:
        identity["symbols"] = hashlib.sha256(read_file(cfg.symbols, f"data.symbols={cfg.symbols}")).hexdigest()
    return key_of(name, identity)


def _open(cfg: DataConfig, sha256: str, read: Callable[[], bytes]) -> Corpus:
    """The prepared corpus of the text with this checksum; `read` is called only if it must be prepared first."""

    def build(folder: Path) -> None:
        text = read_text(read(), f"data.path={cfg.path}")
        if not text:
            raise InputError(f"data.path={cfg.path}: empty; use a file that holds text")
        cut = int(len(text) * (1 - cfg.val_fraction))
        train, val = text[:cut], text[cut:]
        encoder = _encoder(cfg, text, train)
        splits = {}
        for split, part in (("train", train), ("val", val)):
            try:
                tokens = encoder.array(part)
            except InputError as error:  # a character that is not among data.symbols
                raise InputError(f"data.path={cfg.path}: {error}") from error
            if len(tokens) < 2:
                raise InputError(
                    f"data.val_fraction={cfg.val_fraction}: leaves {len(tokens)} {split} tokens of a text of "
                    f"{len(text)} characters; each split needs at least 2; use a longer text or another fraction"
                )
            splits[split] = write_split(folder / f"{split}.bin", [tokens])
        is_stand_in = cfg.name == "stand_in"
        write_meta(folder, name=cfg.name, sha256=sha256, encoder=encoder, splits=splits, stand_in=is_stand_in)

    return open_or_build(Path(cfg.dir), folder_key(cfg, sha256), build)


def _encoder(cfg: DataConfig, text: str, train: str) -> Encoder:
    if cfg.tokenizer == "gpt2":
        return GPT2Encoder()
    if cfg.symbols is not None:
        return symbols(cfg.symbols, f"data.symbols={cfg.symbols}")
    if cfg.tokenizer == "bpe":
        # Trained on the training split alone: the held-out text must not shape the tokens that it is judged by.
        return TrainedBPEEncoder.train(train, cfg.vocab_size or DEFAULT_BPE_VOCAB)
    different = len(set(text))
    if different > MAX_VOCAB:
        raise InputError(
            f"data.tokenizer=char: the text has {different} different characters and at most {MAX_VOCAB} fit; "
            "use data.tokenizer=bpe"
        )
    return CharEncoder.of(text)
