"""Text corpora: what they hold, what is refused, the configuration files, what is imported when."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.support import prepared
from omegaconf import OmegaConf

from nanogpt_mac.corpus import CharEncoder, DataConfig, TrainedBPEEncoder, prepare, reopen, vocab_size
from nanogpt_mac.errors import InputError

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"Week {i}: rain, and the mill wheel turned {i * i} times.\n" for i in range(500))


def text_config(tmp_path: Path, content: str | bytes = TEXT, **fields: Any) -> DataConfig:
    file = tmp_path / "text.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataConfig(**{"name": "text", "path": str(file), "dir": str(tmp_path / "data"), **fields})


def test_tiny_shakespeare_is_nanogpts(tiny_shakespeare: Path, tmp_path: Path) -> None:
    corpus = prepare(DataConfig(path=str(tiny_shakespeare), dir=str(tmp_path)))
    assert (len(corpus.train), len(corpus.val), corpus.encoder.vocab_size) == (1_003_854, 111_540, 65)
    assert (corpus.label, corpus.stand_in) == ("shakespeare_char", False)
    # nanoGPT, data/shakespeare_char/prepare.py
    data = tiny_shakespeare.read_text()
    stoi = {char: i for i, char in enumerate(sorted(set(data)))}
    assert np.array_equal(corpus.train, [stoi[char] for char in data[: int(len(data) * 0.9)]])
    assert np.array_equal(corpus.val, [stoi[char] for char in data[int(len(data) * 0.9) :]])


def test_tiny_shakespeare_in_gpt2_tokens(tiny_shakespeare: Path, tmp_path: Path) -> None:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's tables need the internet once; TIKTOKEN_CACHE_DIR names a folder that has them")
    corpus = prepare(DataConfig(name="shakespeare", tokenizer="gpt2", path=str(tiny_shakespeare), dir=str(tmp_path)))
    assert (len(corpus.train), len(corpus.val)) == (301_966, 36_059)  # nanoGPT, data/shakespeare/readme.md


def test_bpe_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    held_out = "zyxxyz " * 400
    cfg = text_config(tmp_path, TEXT + held_out, tokenizer="bpe", vocab_size=400)
    cfg.val_fraction = len(held_out) / len(TEXT + held_out)
    corpus = prepare(cfg)
    assert isinstance(corpus.encoder, TrainedBPEEncoder)
    assert 256 < corpus.encoder.vocab_size <= 400
    assert corpus.encoder.decode(corpus.train.tolist()) == TEXT
    assert corpus.encoder.decode(corpus.val.tolist()) == held_out
    assert len(corpus.train) < len(TEXT) / 2
    assert len(corpus.val) > len(held_out) * 0.8  # "zyxxyz" was never merged


def test_settings_and_contents_do_not_collide(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"content": TEXT + "One more week.\n"},
        {"val_fraction": 0.2},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"tokenizer": "bpe", "vocab_size": 301},
        {},
    ]
    corpora = [prepare(text_config(tmp_path, **variant)) for variant in variants]
    assert len(prepared(tmp_path / "data")) == 5
    assert len({(corpus.sha256, len(corpus.train), corpus.encoder.vocab_size) for corpus in corpora}) == 5
    assert np.array_equal(corpora[0].train, corpora[5].train)


def test_a_text_has_its_own_characters(tmp_path: Path) -> None:
    corpus = prepare(text_config(tmp_path, "déjà vu, déjà lu \U0001f600\n" * 20))
    assert isinstance(corpus.encoder, CharEncoder)
    assert corpus.encoder.chars == "\n ,djluvàé\U0001f600"
    assert corpus.label == "text"


@pytest.mark.parametrize("eol", ["\r\n", "\r"])
def test_line_ends_and_a_mark_change_neither_tokens_nor_checksum(tmp_path: Path, eol: str) -> None:
    expected = prepare(text_config(tmp_path))
    other = "\ufeff" + TEXT.replace("\n", eol)
    corpora = [prepare(text_config(tmp_path, other, dir=str(tmp_path / "again")))]
    for data in (other, TEXT):  # the file's checksum, or the text's
        sha256 = hashlib.sha256(data.encode()).hexdigest()
        corpora.append(prepare(text_config(tmp_path, other, sha256=sha256)))
    for corpus in corpora:
        assert (corpus.sha256, corpus.encoder.to_json()) == (expected.sha256, expected.encoder.to_json())
        assert np.array_equal(corpus.train, expected.train)
    assert len(prepared(tmp_path / "data")) == 1


def test_tiny_shakespeare_with_windows_line_ends_is_tiny_shakespeare(tiny_shakespeare: Path, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_bytes(tiny_shakespeare.read_bytes().replace(b"\n", b"\r\n"))
    corpus = prepare(DataConfig(path=str(tmp_path / "input.txt"), dir=str(tmp_path)))
    assert (corpus.sha256, len(corpus.train), corpus.encoder.vocab_size) == (TINY_SHA256, 1_003_854, 65)


def test_a_text_in_the_symbols_of_another(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("xyz" + TEXT)
    given = text_config(tmp_path, symbols=str(tmp_path / "other.txt"))
    corpus = prepare(given)
    assert corpus.encoder.vocab_size == prepare(text_config(tmp_path)).encoder.vocab_size + 3
    assert corpus.encoder.decode(corpus.train.tolist()) == TEXT[: len(corpus.train)]
    (tmp_path / "other.txt").write_text("xyz")
    with pytest.raises(InputError, match=r"data\.path=.*text\.txt: characters .* are not in the vocabulary"):
        prepare(given)


def test_a_prepared_text_is_found_again_by_its_checksum(tmp_path: Path) -> None:
    cfg = text_config(tmp_path)
    corpus = prepare(cfg)
    (tmp_path / "text.txt").unlink()
    again = reopen(cfg, corpus.sha256)
    assert again is not None
    assert np.array_equal(again.train, corpus.train)
    assert reopen(cfg, "0" * 64) is None
    assert reopen(replace(cfg, val_fraction=0.3), corpus.sha256) is None
    assert reopen(replace(cfg, tokenizer="gpt2"), corpus.sha256) is None


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (b"caf\xe9" * 100, {}, r"data\.path=.*text\.txt: byte 3 is not UTF-8"),
        ("", {}, r"data\.path=.*: empty"),
        ("ab", {}, r"data\.val_fraction=0\.1: leaves 1 train tokens of a text of 2 characters"),
        (TEXT, {"val_fraction": 1e-6}, r"data\.val_fraction=1e-06: leaves 1 val tokens"),
        ("".join(map(chr, range(0x10000, 0x20010))), {}, r"data\.tokenizer=char: .* 65552 different .* 65535"),
        (TEXT, {"val_fraction": 0.0}, r"data\.val_fraction=0\.0: use a number between"),
        (TEXT, {"val_fraction": 1.0}, r"data\.val_fraction=1\.0: use a number between"),
        (TEXT, {"val_fraction": float("nan")}, r"data\.val_fraction=nan: use a number between"),
        (TEXT, {"tokenizer": "words"}, r"data\.tokenizer=words: use one of char, gpt2, bpe"),
        (TEXT, {"tokenizer": "bpe", "vocab_size": 255}, r"data\.vocab_size=255: use 256"),
        (TEXT, {"tokenizer": "bpe", "vocab_size": 65536}, r"data\.vocab_size=65536: use .* 65535"),
        (TEXT, {"vocab_size": 500}, r"data\.vocab_size=500: data\.tokenizer=char has its own size"),
        (TEXT, {"sha256": "0" * 64}, r"data\.path=.*: sha256 is .*; data=text needs 0000"),
        (TEXT, {"sha256": "ABC"}, r"data\.sha256=ABC: use 64 hexadecimal"),
        (TEXT, {"path": "/no/such/file"}, r"data\.path=/no/such/file: No such file.*; use a file that can be read"),
        (TEXT.encode("utf-16"), {}, r"data\.path=.*: is UTF-16 or not text; use UTF-8"),
        (TEXT, {"symbols": "/no/such/file"}, r"data\.symbols=/no/such/file: No such file"),
        (TEXT, {"symbols": "x", "tokenizer": "bpe"}, r"data\.symbols=x: data\.tokenizer=bpe has its own"),
        (TEXT, {"url": "https://a/b"}, r"data\.url=https://a/b: data=text has no use .* with data=shakespeare_char or"),
        (TEXT, {"dataset": "a/b"}, r"data\.dataset=a/b: .* with data=openwebtext"),
        (TEXT, {"path": None}, r"data\.path=null: data=text needs a file"),
        (TEXT, {"name": "shakespeare_char"}, r"data\.path=.*: sha256 is .*; data=shakespeare_char needs 86c4e6aa"),
        (TEXT, {"name": "shakespeare"}, r"data\.path=.*: sha256 is .*; data=shakespeare needs 86c4e6aa"),
        (TEXT, {"name": "shakespeare_char", "tokenizer": "gpt2"}, r"data\.tokenizer=gpt2: data=shakespeare_char"),
        (TEXT, {"name": "stand_in"}, r"data\.path=.*: data=stand_in is generated"),
        (TEXT, {"name": "openwebtext"}, r"data\.tokenizer=char: data=openwebtext .* use data\.tokenizer=gpt2"),
        (TEXT, {"name": "openwebtext", "tokenizer": "gpt2", "num_proc": 0}, r"data\.num_proc=0: use at least 1"),
        (TEXT, {"name": "shakespear"}, r"data\.name=shakespear: use one of shakespeare_char, "),
    ],
)
def test_refused(content: str | bytes, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        prepare(text_config(tmp_path, content, **fields))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "data").exists() or not prepared(tmp_path / "data")


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare", "openwebtext", "text", "stand_in"])
def test_configuration_files(name: str) -> None:
    top = OmegaConf.create({"data_dir": "here", "path": "there.txt"})
    top.data = OmegaConf.merge(
        OmegaConf.structured(DataConfig), OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml")
    )
    cfg = OmegaConf.to_object(top.data)
    assert isinstance(cfg, DataConfig)
    assert (cfg.name, cfg.dir, cfg.path) == (name, "here", "there.txt")
    if name.startswith("shakespeare"):
        assert (cfg.url, cfg.sha256) == (TINY_URL, TINY_SHA256)
    assert cfg.tokenizer == ("gpt2" if name in ("shakespeare", "openwebtext") else "char")
    assert cfg.val_fraction == (0.0005 if name == "openwebtext" else 0.1)
    assert vocab_size(cfg) == {"shakespeare_char": 65, "stand_in": 65, "text": None}.get(name, 50304)


def test_vocabulary_follows_the_tokenizer() -> None:
    assert vocab_size(DataConfig(name="shakespeare", tokenizer="char")) == 65
    assert vocab_size(DataConfig(name="shakespeare", tokenizer="bpe", vocab_size=300)) is None
    assert vocab_size(DataConfig(name="text", tokenizer="gpt2")) == 50304


TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = "torch mlx datasets tokenizers tiktoken requests pooch scipy transformers pyarrow"
    script = f"import sys, nanogpt_mac.corpus; print([m for m in {heavy.split()} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
