"""Text to token numbers and back: characters, GPT-2's BPE (tiktoken), a BPE trained on the text (tokenizers).

Every encoder turns into a small JSON object and back, so a checkpoint carries its own.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from nanogpt_mac.corpus.config import MAX_VOCAB
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.network import NoNetwork, reaching
from nanogpt_mac.report.progress import progress

GPT2_TOKENS = 50257
GPT2_TABLES = "https://openaipublic.blob.core.windows.net"  # where tiktoken fetches them
CHUNK = 1 << 20  # characters handed to a BPE at a time, so that memory stays flat
LONGEST = 1 << 20  # characters of a word, or of white space, that chunks leave whole
LONG = re.compile(r"\S{1024}(?=\S)|\s{1024}(?=\s)")  # more than a BPE learns from at once
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n])")
NOTICEABLE = 4_000_000  # characters; encoding them takes about a second


class Encoder(Protocol):
    """What every encoder offers. `array` is `encode` for whole corpora: uint16, made piece by piece."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def array(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def to_json(self) -> dict[str, object]: ...


def chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cuts text into pieces of about `size` characters; a GPT-2 style BPE gives them the tokens of the whole text.

    Its splitting pattern never joins a line end, or a blank, with a printable character before it, so such a place is a
    safe cut. A word (or white space) of more than LONGEST characters beyond `size` is cut where it then is: the tokens
    on both sides may differ from the whole's there, but neither memory nor time grows with the longest word.
    """
    begin = 0
    while len(text) - begin > size:
        found = SAFE_CUT.search(text, begin + size, begin + size + LONGEST)
        if found is None and len(text) - begin - size <= LONGEST:
            break
        end = found.start() if found else begin + size + LONGEST
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _shown(parts: Iterator[str], length: int, what: str) -> Iterator[str]:
    """The parts of a text of `length` characters, with how far they have come."""
    with progress(what, length, NOTICEABLE, "characters") as advance:
        for part in parts:
            yield part
            advance(len(part))


def _whole_characters(text: str) -> str:
    """The text itself, if it is text: half of a surrogate pair (a broken byte on a command line) is not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = text[error.start : error.end]
        raise InputError(f"text with {broken!r} in it is not valid Unicode; use UTF-8 text") from None
    return text


def _learnt(part: str) -> Iterator[str]:
    """A part in pieces without a longer word than is learnt from; nearly always itself."""
    begin = 0
    for long in LONG.finditer(part):
        yield part[begin : long.end()]
        begin = long.end()
    yield part[begin:]


class CharEncoder:
    """One token a character; of a text, the sorted set of its characters, as in nanoGPT."""

    def __init__(self, chars: str) -> None:
        if not 0 < len(chars) <= MAX_VOCAB or len(chars) != len(set(chars)):
            raise InputError(f"character vocabulary of {len(chars)}: use 1 to {MAX_VOCAB} characters, each once")
        self.chars = chars
        self._numbers = {char: number for number, char in enumerate(chars)}

    @classmethod
    def of(cls, text: str) -> "CharEncoder":
        """The encoder of exactly the characters that occur in `text`."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._numbers[char] for char in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - set(self.chars)))
            raise InputError(
                f"characters {unknown!r} are not in the vocabulary of this corpus; use only {self.chars!r}"
            ) from None

    def array(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        table = np.full(0x110000, MAX_VOCAB, np.uint16)  # a number of no character
        table[[ord(char) for char in self.chars]] = np.arange(len(self.chars), dtype=np.uint16)
        tokens = table[points]
        if (tokens == MAX_VOCAB).any():
            self.encode(text)  # raises and shows which
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.chars[token] for token in tokens)

    def to_json(self) -> dict[str, object]:
        return {"kind": "char", "chars": self.chars}


class GPT2Encoder:
    """GPT-2's byte-level BPE of 50,257 tokens, by tiktoken, which fetches its tables (1.5 MB) once.

    The tables are loaded when text is first encoded or decoded: training on a prepared corpus does not need
    them. `encoding` may be another `tiktoken.Encoding`.
    """

    def __init__(self, encoding: Any = None) -> None:
        self._encoding = encoding

    @property
    def encoding(self) -> Any:
        if self._encoding is None:
            import tiktoken

            try:
                self._encoding = reaching(GPT2_TABLES, lambda: tiktoken.get_encoding("gpt2"))
            except (OSError, ValueError, NoNetwork) as error:  # every error of requests is an OSError
                raise InputError(
                    f"data.tokenizer=gpt2: tiktoken could not load its GPT-2 tables ({type(error).__name__}); "
                    "connect once, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept them before"
                ) from error
        return self._encoding

    @property
    def vocab_size(self) -> int:
        return GPT2_TOKENS if self._encoding is None else int(self._encoding.n_vocab)

    @property
    def end_of_text(self) -> int:
        return int(self.encoding.eot_token)

    def encode(self, text: str) -> list[int]:
        return list(self.encoding.encode_ordinary(_whole_characters(text)))

    def array(self, text: str) -> np.ndarray:
        parts = _shown(chunks(text), len(text), "encoding")
        return np.concatenate([np.array(self.encoding.encode_ordinary(part), np.uint16) for part in parts])

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that form no character (the tail of a stream cut mid-character) become U+FFFD.

        So does a number past the vocabulary, which a model with a padded vocabulary (nanoGPT's 50,304) may draw.
        """
        single = self.encoding.decode_single_token_bytes
        size = self.vocab_size
        pieces = [single(token) if token < size else b"\xef\xbf\xbd" for token in map(int, tokens)]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, object]:
        return {"kind": "gpt2"}


class TrainedBPEEncoder:
    """A byte-level BPE trained on a text. All 256 bytes are tokens, so it encodes any text without loss."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "TrainedBPEEncoder":
        """Merges the most frequent pairs until there are `vocab_size` tokens, or no pair occurs twice.

        Words are learnt from whole up to 1024 characters, longer ones in pieces of that length: the time is bounded by
        the text's length, and a text without such words gives the same tokens as ever.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        parts = (piece for part in chunks(text, 1 << 16) for piece in _learnt(part))
        tokenizer.train_from_iterator(_shown(parts, len(text), "learning tokens from"), trainer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(_whole_characters(text)).ids)

    def array(self, text: str) -> np.ndarray:
        parts = _shown(chunks(text, 1 << 16), len(text), "encoding")
        return np.concatenate([np.array(self.tokenizer.encode(part).ids, np.uint16) for part in parts])

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that form no character (the tail of a stream cut mid-character) become U+FFFD."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def to_json(self) -> dict[str, object]:
        return {"kind": "bpe", "tokenizer": json.loads(self.tokenizer.to_str())}


def encoder_from_json(description: object) -> Encoder:
    """The encoder that `to_json` described. Raises InputError for anything else."""
    given = description if isinstance(description, dict) else {}
    kind, chars, tokenizer = (given.get(key) for key in ("kind", "chars", "tokenizer"))
    if kind == "gpt2":
        return GPT2Encoder()
    if kind == "char" and isinstance(chars, str):
        return CharEncoder(chars)
    if kind == "bpe" and isinstance(tokenizer, dict):
        from tokenizers import Tokenizer

        try:
            return TrainedBPEEncoder(Tokenizer.from_str(json.dumps(tokenizer)))
        except Exception as error:  # tokenizers raises bare Exception for JSON that is not a tokenizer
            raise InputError(f"encoder kind=bpe: its tokenizer cannot be read ({reason(error)})") from error
    raise InputError(f"encoder kind={kind!r}: use char (with chars), gpt2 or bpe (with tokenizer)")
