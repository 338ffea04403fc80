"""The stand-in: the same text everywhere, in the shape of a play, learnable but not trivial, and our own."""

import lzma
import os
import re
import subprocess
import sys
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nanogpt_mac.corpus import DataConfig, prepare
from nanogpt_mac.corpus.lexicon import lexicon
from nanogpt_mac.corpus.stand_in import SHA256, compose, generate
from nanogpt_mac.corpus.verse import rules

SYMBOLS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Compressed size over size of the real tiny Shakespeare (zlib level 9, lzma preset 9), measured once.
REAL_ZLIB, REAL_LZMA = 0.3890, 0.3264


@pytest.fixture(scope="module")
def text() -> str:
    return generate()


def test_pinned_text_on_another_python_hash(text: str) -> None:
    assert SHA256 == "31545b4e1fc31f377d751bbb2ddca3c3dc2f72f4e5a951342c9465a361e510f4"
    script = (
        "import hashlib; from nanogpt_mac.corpus.stand_in import generate; "
        "print(hashlib.sha256(generate().encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "4242", "LC_ALL": "C"}
    begin = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 10
    assert out.stdout.strip() == SHA256


def test_a_changed_text_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt_mac.corpus.stand_in.SEED", 7)
    with pytest.raises(RuntimeError, match="differs"):
        generate()


@pytest.mark.parametrize("seed", [1, 2])
def test_any_seed_has_the_exact_length(seed: int, text: str) -> None:
    other = compose(seed)
    assert len(other) == len(text) == 1_115_394
    assert other != text


def test_symbols_and_end(text: str) -> None:
    assert "".join(sorted(set(text))) == SYMBOLS
    assert set(text[: int(len(text) * 0.9)]) == set(SYMBOLS)  # all of them in the training split
    assert re.search(r"[a-z]\.\n\Z", text)


def test_shape_of_a_play(text: str) -> None:
    speeches = text.removesuffix("\n").split("\n\n")
    assert 4000 < len(speeches) < 9000
    verse = 0
    for speech in speeches:
        heading, *lines = speech.split("\n")
        assert re.fullmatch(r"[A-Z][A-Za-z ]*:", heading)
        assert lines
        assert re.search(r"([.!?]|--)$", lines[-1])
        for line in lines:
            assert line == line.strip()
            assert "  " not in line
            assert len(line) < 90
            verse += line[line[0] == "'"].isupper()
    lines_in_all = sum(speech.count("\n") for speech in speeches)
    assert 0.6 < verse / lines_in_all < 0.95  # the rest is prose
    names = [speech.split(":")[0] for speech in speeches]
    assert np.mean([one == next_one for one, next_one in pairwise(names)]) < 0.02  # nobody answers himself
    # Speakers stay together: most speeches are by someone who also had one of the last six.
    assert np.mean([names[i] in names[i - 6 : i] for i in range(6, len(names))]) > 0.75


def test_articles_agree(text: str) -> None:
    assert not re.search(r"\b[Aa] [aeio]", text)
    assert not re.search(r"\b[Aa]n [bcdfgjklmnpqrstvwxyz]", text)
    assert not re.search(r"\bI (?:is|hath|doth)\b|\bthou (?:is|are|hath)\b|\b[Tt]hey (?:is|hath|doth)\b", text)


def test_learnable_but_not_trivial(text: str) -> None:
    data = text.encode()
    assert 0.85 < len(zlib.compress(data, 9)) / len(data) / REAL_ZLIB < 1.15
    assert 0.85 < len(lzma.compress(data, preset=9)) / len(data) / REAL_LZMA < 1.15
    lines = [line for line in text.split("\n") if len(line) > 20]
    cut = int(len(lines) * 0.9)
    assert np.mean([line in set(lines[:cut]) for line in lines[cut : cut + 300]]) < 0.05  # not learnt by heart
    counts = np.unique(np.frombuffer(data, np.uint8), return_counts=True)[1] / len(data)
    assert 4.5 < -(counts * np.log2(counts)).sum() < 5.0  # bits a character; the real text has 4.77


def sentences(text: str) -> set[str]:
    """Every sentence or clause between stops of at least three words, without speakers' names and line ends."""
    spoken = " ".join(line for line in text.split("\n") if not re.fullmatch(r"[A-Z][A-Za-z ]*:", line))
    clauses = (re.findall(r"[a-z']+", clause.lower()) for clause in re.split(r"[.!?;:]|--", spoken))
    return {" ".join(words) for words in clauses if len(words) >= 3}


def test_not_one_sentence_of_shakespeare(text: str, tiny_shakespeare: Path) -> None:
    ours = sentences(text)
    assert len(ours) > 15_000
    assert not ours & sentences(tiny_shakespeare.read_text())


def test_every_rule_leads_to_words() -> None:
    slots, _ = lexicon()
    known = {*slots, *rules(), *(name[:-2] for name in rules() if "~" in name)}
    known |= {"name", "land", "voc", "voc1", "r1", "r2", "me", "us", "you"}
    for name, alternatives in rules().items():
        assert alternatives, name
        for depth, pieces in alternatives:
            assert depth < 20, name  # it ends
            assert {piece.text for piece in pieces if piece.kind == "slot"} <= known


def test_as_a_corpus(text: str, tmp_path: Path) -> None:
    corpus = prepare(DataConfig(name="stand_in", dir=str(tmp_path)))
    assert (corpus.label, corpus.stand_in, corpus.sha256) == ("stand-in", True, SHA256)
    assert (len(corpus.train), len(corpus.val), corpus.encoder.vocab_size) == (1_003_854, 111_540, 65)
    assert corpus.encoder.decode(corpus.val.tolist()) == text[1_003_854:]
    again = prepare(DataConfig(name="stand_in", dir=str(tmp_path)))
    assert again.stand_in
    assert np.array_equal(again.train, corpus.train)
