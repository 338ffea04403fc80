"""Where tokens come from: `prepare` makes a Corpus from a DataConfig, `starts` says where each window begins."""

from nanogpt_mac.corpus.batches import starts
from nanogpt_mac.corpus.config import TINY_SHAKESPEARE_SYMBOLS, DataConfig, check, vocab_size
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
    "starts",
    "vocab_size",
]


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
