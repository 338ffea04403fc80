"""The stand-in: the same text everywhere, of tiny Shakespeare's size and symbols, with something to learn in it."""

import hashlib
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nanogpt_mac.corpus import DataConfig, prepare
from nanogpt_mac.corpus.stand_in import generate

SYMBOLS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SHA256 = "f8a2855f63ff2fc788d44958d38ec59f00cb42cd7dac78830b6fec4875fd45a7"
TRAINING = 1_003_854  # characters of the training split


@pytest.fixture(scope="module")
def text() -> str:
    return generate()


def test_the_same_text_in_another_process() -> None:
    script = (
        "import sys; from nanogpt_mac.corpus.stand_in import generate; sys.stdout.buffer.write(generate().encode())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "4242", "LC_ALL": "C"}
    begin = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    assert time.perf_counter() - begin < 10
    assert hashlib.sha256(out).hexdigest() == SHA256


def test_a_changed_text_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt_mac.corpus.stand_in.SEED", 7)
    with pytest.raises(RuntimeError, match="differs"):
        generate()


def test_length_and_symbols(text: str) -> None:
    assert len(text) == 1_115_394
    assert "".join(sorted(set(text))) == SYMBOLS
    assert set(text[:TRAINING]) == set(SYMBOLS)


def test_length_and_symbols_are_tiny_shakespeares(text: str, tiny_shakespeare: Path) -> None:
    real = tiny_shakespeare.read_text()
    assert len(text) == len(real)
    assert set(text) == set(real)


def test_layout_of_a_play(text: str) -> None:
    speeches = text.split("\n\n")[:-1]  # the last one is cut short
    assert 5000 < len(speeches) < 10_000
    for speech in speeches:
        assert re.fullmatch(r"[A-Z ]+:(\n['A-Z$][^\n]{10,89})+[.?!]", speech)
    called = [re.search(r":\n(.*?),", speech) for speech in speeches]
    answers = [
        m[1].upper() == after.split(":")[0] for m, (_, after) in zip(called, pairwise(speeches), strict=False) if m
    ]
    assert np.mean(answers) > 0.6  # whoever is spoken to answers


def bits_a_character(text: str, context: int) -> float:
    """Cross entropy on the held-out part of a model that counted, in the training part, what follows `context` symbols.

    What it never saw there it takes from the next shorter context (Witten and Bell's smoothing).
    """
    tokens = np.searchsorted(np.array(list(SYMBOLS)), np.array(list(text)))
    size = len(SYMBOLS)
    probability = np.full(len(tokens) - context, 1 / size)
    for length in range(context + 1):
        columns = [tokens[context - length + i : len(tokens) - length + i] for i in range(length)]
        before = sum(column * size**i for i, column in enumerate(columns)) if columns else np.zeros(1, int)
        before = np.broadcast_to(before, probability.shape)
        both = before * size + tokens[context:]
        training = slice(0, TRAINING - context)
        counts = np.bincount(both[training], minlength=size ** (length + 1))
        totals = counts.reshape(-1, size).sum(1)
        kinds = (counts.reshape(-1, size) > 0).sum(1)
        seen = np.maximum(totals + kinds, 1)[before]
        mixed = (counts[both] + kinds[before] * probability) / seen
        probability = np.where(totals[before] > 0, mixed, probability)
    return float(-np.log2(probability[TRAINING - context :]).mean())


def test_there_is_something_to_learn(text: str) -> None:
    unigram, bigram, trigram = (bits_a_character(text, context) for context in range(3))
    assert 4.0 < unigram < 5.0
    assert bigram < unigram - 0.8
    assert trigram < bigram - 0.6
    assert trigram > 1.0  # and it is not learnt in a moment


def test_it_is_not_learnt_by_heart(text: str) -> None:
    lines = [line for line in text.split("\n") if len(line) > 20]
    known = set(lines[: int(len(lines) * 0.9)])
    assert np.mean([line in known for line in lines[-1000:]]) < 0.05


def test_as_a_corpus(text: str, tmp_path: Path) -> None:
    corpus = prepare(DataConfig(name="stand_in", dir=str(tmp_path)))
    assert (corpus.label, corpus.stand_in, corpus.sha256) == ("stand-in", True, SHA256)
    assert (len(corpus.train), len(corpus.val), corpus.encoder.vocab_size) == (TRAINING, 111_540, 65)
    assert corpus.encoder.decode(corpus.val.tolist()) == text[TRAINING:]
    again = prepare(DataConfig(name="stand_in", dir=str(tmp_path)))
    assert again.stand_in
    assert np.array_equal(again.train, corpus.train)
