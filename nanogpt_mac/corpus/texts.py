"""Corpora that are one text: tiny Shakespeare, any UTF-8 file, the stand-in."""

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanogpt_mac.corpus import stand_in
from nanogpt_mac.corpus.config import TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_URL, DataConfig
from nanogpt_mac.corpus.download import NoNetwork, download
from nanogpt_mac.corpus.encoders import MAX_VOCAB, CharEncoder, Encoder, GPT2Encoder, TrainedBPEEncoder
from nanogpt_mac.corpus.prepared import Corpus, key_of, open_or_build, write_meta, write_split
from nanogpt_mac.errors import InputError

DEFAULT_BPE_VOCAB = 4096


def prepare_text(cfg: DataConfig) -> Corpus:
    if cfg.name == "stand_in":
        return _open(cfg, "stand_in", stand_in.SHA256, lambda: stand_in.generate().encode())
    if cfg.path is not None:
        try:
            data = Path(cfg.path).read_bytes()
        except OSError as error:
            why = f"{error.strerror}; data={cfg.name} needs a file"
            raise InputError(f"data.path={cfg.path}: {why}") from error
        sha256 = hashlib.sha256(data).hexdigest()
        expected = cfg.sha256 or (None if cfg.name == "text" else TINY_SHAKESPEARE_SHA256)
        if expected not in (None, sha256):
            raise InputError(
                f"data.path={cfg.path}: sha256 is {sha256}; data={cfg.name} needs {expected}; use another file"
            )
        name = cfg.name
        if name == "text":
            name = "text-" + re.sub("[^a-z0-9]+", "_", Path(cfg.path).stem.lower())[:40]
        return _open(cfg, name, sha256, lambda: data)
    url, sha256 = cfg.url or TINY_SHAKESPEARE_URL, cfg.sha256 or TINY_SHAKESPEARE_SHA256
    try:
        return _open(cfg, cfg.name, sha256, lambda: download(url, sha256))
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


def _open(cfg: DataConfig, name: str, sha256: str, read: Callable[[], bytes]) -> Corpus:
    """The prepared corpus of the text with this checksum; `read` is called only if it must be prepared first."""
    vocab_size = (cfg.vocab_size or DEFAULT_BPE_VOCAB) if cfg.tokenizer == "bpe" else None
    identity = {
        "sha256": sha256,
        "tokenizer": cfg.tokenizer,
        "vocab_size": vocab_size,
        "val_fraction": cfg.val_fraction,
    }

    def build(folder: Path) -> None:
        text = _decode(read(), cfg)
        cut = int(len(text) * (1 - cfg.val_fraction))
        train, val = text[:cut], text[cut:]
        encoder = _encoder(cfg, text, train, vocab_size)
        splits = {}
        for split, part in (("train", train), ("val", val)):
            tokens = encoder.array(part)
            if len(tokens) < 2:
                raise InputError(
                    f"data.val_fraction={cfg.val_fraction}: leaves {len(tokens)} {split} tokens of a text of "
                    f"{len(text)} characters; each split needs at least 2; use a longer text or another fraction"
                )
            splits[split] = write_split(folder / f"{split}.bin", [tokens])
        is_stand_in = cfg.name == "stand_in"
        write_meta(folder, name=cfg.name, sha256=sha256, encoder=encoder, splits=splits, stand_in=is_stand_in)

    return open_or_build(Path(cfg.dir), key_of(name, identity), build)


def _decode(data: bytes, cfg: DataConfig) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data.path={cfg.path}: byte {error.start} is not UTF-8; use a file of UTF-8 text") from error
    if not text:
        raise InputError(f"data.path={cfg.path}: empty; use a file that holds text")
    return text


def _encoder(cfg: DataConfig, text: str, train: str, vocab_size: int | None) -> Encoder:
    if cfg.tokenizer == "gpt2":
        return GPT2Encoder()
    if vocab_size is not None:
        # Trained on the training split alone: the held-out text must not shape the tokens that it is judged by.
        return TrainedBPEEncoder.train(train, vocab_size)
    symbols = len(set(text))
    if symbols > MAX_VOCAB:
        raise InputError(
            f"data.tokenizer=char: the text has {symbols} different characters and at most {MAX_VOCAB} fit; "
            "use data.tokenizer=bpe"
        )
    return CharEncoder.of(text)
