"""Where tokens come from: `prepare` makes a Corpus from a DataConfig, `starts` says where each window begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_mac.corpus.config import TINY_SHAKESPEARE_SYMBOLS, DataConfig, check, vocab_size

if TYPE_CHECKING:
    from nanogpt_mac.corpus.batches import starts
    from nanogpt_mac.corpus.encoders import CharEncoder, Encoder, GPT2Encoder, TrainedBPEEncoder, encoder_from_json
    from nanogpt_mac.corpus.prepared import Corpus

__all__ = [
    "TINY_SHAKESPEARE_SYMBOLS",
    "CharEncoder",
    "Corpus",
    "DataConfig",
    "Encoder",
    "GPT2Encoder",
    "TrainedBPEEncoder",
    "encoder_from_json",
    "prepare",
    "reopen",
    "starts",
    "vocab_size",
]


def __getattr__(name: str) -> Any:
    """What needs numpy, imported when it is asked for: the command line needs a DataConfig alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanogpt_mac.corpus import batches, encoders, prepared

    return next(getattr(module, name) for module in (batches, encoders, prepared) if hasattr(module, name))


def prepare(cfg: DataConfig) -> Corpus:
    """The corpus that `cfg` describes, prepared under `cfg.dir` the first time and opened from there later.

    Without a network, `shakespeare_char` becomes the built-in stand-in, and says so on stderr;
    `Corpus.stand_in` is then true. Raises InputError, one line, for everything else that cannot be found or
    used.
    """
    check(cfg)
    if cfg.name == "openwebtext":
        from nanogpt_mac.corpus.openwebtext import prepare_documents

        return prepare_documents(cfg)
    from nanogpt_mac.corpus.texts import prepare_text

    return prepare_text(cfg)


def reopen(cfg: DataConfig, sha256: str) -> Corpus | None:
    """The corpus that was prepared from `cfg` under this checksum, though its text is gone; None: it is not there."""
    from nanogpt_mac.corpus.prepared import load
    from nanogpt_mac.corpus.texts import folder_key

    name = "openwebtext-*" if cfg.name == "openwebtext" else folder_key(cfg, sha256)
    for folder in sorted(Path(cfg.dir).glob(name)):
        if folder.is_dir() and (corpus := load(folder)).sha256 == sha256:
            return corpus
    return None
