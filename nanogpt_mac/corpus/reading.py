"""Files of people: texts with any line ends, and nanoGPT's meta.pkl, of which nothing is run."""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
from pathlib import Path
from typing import Any

from nanogpt_mac.corpus.encoders import CharEncoder
from nanogpt_mac.errors import InputError

MOST_META = 8 << 20  # bytes of a meta.pkl: 65,535 symbols need about 2 MB
# What dict, list, str, int, bool and None are made of; there is nothing in it that could name a function.
PLAIN = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 UNICODE SHORT_BINUNICODE
    BINUNICODE BINUNICODE8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS MEMOIZE PUT BINPUT
    LONG_BINPUT GET BINGET LONG_BINGET"""


def lines(text: str) -> str:
    """`text` with each line end a newline and no byte order mark before it, as Python's text mode reads a file."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_text(data: bytes, what: str) -> str:
    """The text in a file's bytes; what was changed is said on stderr. InputError, beginning with `what`, for others."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(data) > 3 and data.count(0) / len(data) > 0.2):
        raise InputError(f"{what}: is UTF-16 or not text; use UTF-8 text (iconv -f UTF-16 -t UTF-8 makes it)")
    try:
        raw = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what}: byte {error.start} is not UTF-8; use a file of UTF-8 text (iconv -f LATIN1 -t UTF-8, say)"
        ) from error
    text = lines(raw)
    said = {
        "a byte order mark is left out": raw.startswith("\ufeff"),
        "CR and CRLF are read as line ends": "\r" in raw,
        f"it holds {text.count(chr(0))} NUL characters, which are symbols like others": "\0" in text,
    }
    if any(said.values()):
        print(f"{what}: {'; '.join(words for words, applies in said.items() if applies)}", file=sys.stderr)
    return text


def read_file(path: str, what: str) -> bytes:
    """The bytes of a file; InputError, beginning with `what`, where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}; use a file that can be read") from error


def symbols(path: str, what: str) -> CharEncoder:
    """The vocabulary that a file gives: nanoGPT's meta.pkl, or the characters of a text."""
    data = read_file(path, what)
    if Path(path).suffix != ".pkl":
        return CharEncoder.of(read_text(data, what))
    try:
        if len(data) > MOST_META:
            raise ValueError(f"{len(data)} bytes, at most {MOST_META} are read")
        meta = _plain(data)
        given = meta["itos"] if "itos" in meta else {number: symbol for symbol, number in meta["stoi"].items()}
        chars = [given[number] for number in range(len(given))]
        if not all(isinstance(char, str) and len(char) == 1 for char in chars):
            raise ValueError("its symbols are not single characters")
        stoi = meta.get("stoi", {char: number for number, char in enumerate(chars)})
        if stoi != {char: number for number, char in enumerate(chars)} or meta.get("vocab_size", len(chars)) != len(
            chars
        ):
            raise ValueError("its stoi, itos and vocab_size contradict each other")
        return CharEncoder("".join(chars))
    except Exception as error:  # a pickle can break its reader in any way
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"{what}: not a meta.pkl that can be read without running it ({type(error).__name__}: {why}); use "
            "nanoGPT's meta.pkl with stoi and itos, or the text itself"
        ) from error


def _plain(data: bytes) -> Any:
    """Unpickle dict, list, str, int, bool and None, of protocol 0 to 5; ValueError for anything else."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            raise ValueError(f"it names {module}.{name}")

    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in PLAIN.split():
            raise ValueError(f"it holds {opcode.name}, more than dict, list, str and int")
        if "PUT" in opcode.name and not 0 <= int(argument or 0) <= len(data):  # memory is taken for so many
            raise ValueError("a damaged memo")
    return Reader(io.BytesIO(data)).load()
