"""Encoders: round trips on any Unicode, exact chunking, JSON, what they refuse."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from nanogpt_mac.corpus import CharEncoder, Encoder, GPT2Encoder, TrainedBPEEncoder, encoder_from_json
from nanogpt_mac.corpus.encoders import chunks
from nanogpt_mac.errors import InputError

TEXT = "Of all the bells in Velmar, none rings so late as mine;\nand all the bells in Velmar ring for thine.\n\n" * 40


def small_gpt2() -> GPT2Encoder:
    """GPT-2's splitting pattern over the 256 bytes and a few merges: the real library, small tables."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in (b" t", b"he", b" the", b"ll", b"\n\n", b"  ", b"be", b"an"):
        ranks[merge] = len(ranks)
    special = {"<|endoftext|>": len(ranks)}
    return GPT2Encoder(tiktoken.Encoding("small", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special))


def random_texts(count: int) -> Iterator[str]:
    """Texts from every plane of Unicode, thick with white space, quotes and line ends."""
    dice = random.Random(7)
    plain = "ab e'st 12.,\n\t\r\u00a0\u2028\u3000\x1c\x85"
    for _ in range(count):
        letters = []
        for _ in range(dice.randrange(60)):
            point = dice.choice((0x80, 0x800, 0xD800, 0x1F600, 0x110000))
            wild = chr(dice.randrange(point))
            usable = dice.random() < 0.3 and not 0xD800 <= ord(wild) < 0xE000
            letters.append(wild if usable else dice.choice(plain))
        yield "".join(letters)


@pytest.fixture(scope="module")
def trained() -> TrainedBPEEncoder:
    return TrainedBPEEncoder.train(TEXT, 300)


def test_char_is_nanogpts_vocabulary() -> None:
    encoder = CharEncoder.of("hello, World\n")
    assert encoder.chars == "\n ,Wdehlor"
    assert encoder.encode("hold") == [6, 8, 7, 4]
    assert encoder.decode(np.array([6, 8, 7, 4], np.uint16)) == "hold"  # type: ignore[arg-type]
    assert encoder.vocab_size == 10


def test_char_shows_unknown_characters() -> None:
    for encode in (CharEncoder("abc").encode, CharEncoder("abc").array):
        with pytest.raises(InputError, match=r"characters '#Zé' .* use only 'abc'"):
            encode("aZb#éZ")


@pytest.mark.parametrize("chars", ["", "aab"])
def test_char_refuses_a_wrong_vocabulary(chars: str) -> None:
    with pytest.raises(InputError, match="each once"):
        CharEncoder(chars)


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
def test_round_trip_array_and_json(kind: str, trained: TrainedBPEEncoder) -> None:
    wild = "".join(random_texts(200))
    encoder: Encoder = {"char": CharEncoder.of(wild + TEXT), "gpt2": small_gpt2(), "bpe": trained}[kind]
    for text in (*random_texts(300), TEXT, ""):
        known = text if kind != "char" else "".join(c for c in text if c in encoder.chars)  # type: ignore[attr-defined]
        tokens = encoder.encode(known)
        assert encoder.decode(tokens) == known
        assert max(tokens, default=0) < encoder.vocab_size
        array = encoder.array(known)
        assert array.dtype == np.uint16
        assert array.tolist() == tokens
    description = json.loads(json.dumps(encoder.to_json()))
    again = encoder_from_json(description)
    assert again.to_json() == description
    if kind != "gpt2":  # that one names the public tables, which are not on every machine
        assert again.encode(TEXT) == encoder.encode(TEXT)
        assert again.vocab_size == encoder.vocab_size


@pytest.mark.parametrize("size", [1, 3, 20])
def test_chunks_encode_as_the_whole_does(size: int, trained: TrainedBPEEncoder) -> None:
    cuts = 0
    for text in random_texts(300):
        pieces = list(chunks(text, size))
        cuts += len(pieces) - 1
        assert "".join(pieces) == text
        for encoder in (small_gpt2(), trained):
            assert [token for piece in pieces for token in encoder.encode(piece)] == encoder.encode(text)
    assert cuts > 50  # else nothing was put to the test


def test_streaming_survives_a_character_cut_in_two(trained: TrainedBPEEncoder) -> None:
    for encoder in (small_gpt2(), trained):
        tokens = encoder.encode("x\u20ac")  # the euro sign is three bytes, and here three tokens
        assert len(tokens) == 4
        assert encoder.decode(tokens[:1]) == "x"
        assert encoder.decode(tokens[:2]).startswith("x\ufffd")
        assert encoder.decode(tokens) == "x\u20ac"


def test_gpt2_decodes_numbers_past_its_vocabulary() -> None:
    encoder = small_gpt2()
    assert encoder.decode([ord("a"), encoder.vocab_size + 40, ord("b")]) == "a\ufffdb"


def test_bpe_refuses_half_a_surrogate_pair(trained: TrainedBPEEncoder) -> None:
    for encoder in (small_gpt2(), trained):
        with pytest.raises(InputError, match=r"\\udcff"):
            encoder.encode("broken \udcff byte")


def test_bpe_training_is_deterministic_and_merges(trained: TrainedBPEEncoder) -> None:
    assert 256 < trained.vocab_size <= 300
    assert len(trained.encode(TEXT)) < len(TEXT) / 2
    script = (
        "import json, sys; from nanogpt_mac.corpus import TrainedBPEEncoder; "
        "print(json.dumps(TrainedBPEEncoder.train(sys.stdin.read(), 300).to_json()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "3"}
    other = subprocess.run(
        [sys.executable, "-c", script], input=TEXT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(other.stdout) == trained.to_json()


@pytest.mark.parametrize(
    "description",
    [
        None,
        {},
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "chars": "bb"},
        {"kind": "bpe"},
        {"kind": "bpe", "tokenizer": {"model": "none"}},
    ],
)
def test_json_that_is_no_encoder(description: Any) -> None:
    with pytest.raises(InputError):
        encoder_from_json(description)


def test_gpt2_without_its_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, nobody: str) -> None:
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", nobody)
    encoder = GPT2Encoder()
    assert encoder.vocab_size == 50257  # known without the tables: a prepared corpus trains offline
    with pytest.raises(InputError, match=r"data\.tokenizer=gpt2: .*TIKTOKEN_CACHE_DIR"):
        encoder.encode("hello")


def test_gpt2_itself() -> None:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's tables need the internet once; TIKTOKEN_CACHE_DIR names a folder that has them")
    encoder = GPT2Encoder()
    assert encoder.encode("Hello world<|endoftext|>")[:2] == [15496, 995]
    assert encoder.end_of_text == 50256 not in encoder.encode("<|endoftext|>")
    for text in random_texts(100):
        assert encoder.decode(encoder.encode(text)) == text
