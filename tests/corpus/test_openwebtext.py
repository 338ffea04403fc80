"""Documents: nanoGPT's split and encoding from local files of every kind, and the Hub that is not there."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiktoken
from fakes.support import prepared
from tiktoken_ext.openai_public import r50k_pat_str

from nanogpt_mac.corpus import DataConfig, GPT2Encoder, reopen
from nanogpt_mac.corpus.openwebtext import prepare_documents
from nanogpt_mac.errors import InputError

DOCUMENTS = [f"Page {i}.\n" + "The ferry leaves at noon, \u00e9t\u00e9 comme hiver. " * (i % 9) for i in range(60)]
RANKS = {bytes([i]): i for i in range(256)} | {b" t": 256, b"he": 257, b" the": 258}
ENCODING = tiktoken.Encoding(
    "small", pat_str=r50k_pat_str, mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": 259}
)


def config(path: Path | str | None, folder: Path, num_proc: int = 1, val_fraction: float = 0.2) -> DataConfig:
    return DataConfig(
        name="openwebtext",
        tokenizer="gpt2",
        path=None if path is None else str(path),
        dir=str(folder),
        num_proc=num_proc,
        val_fraction=val_fraction,
    )


def expected(documents: list[str], test_size: float) -> list[list[int]]:
    """nanoGPT, data/openwebtext/prepare.py, in a few lines: the tokens of both splits."""
    whole = datasets.Dataset.from_dict({"text": documents})
    split = whole.train_test_split(test_size=test_size, seed=2357, shuffle=True)
    return [
        [token for text in split[name]["text"] for token in [*ENCODING.encode_ordinary(text), ENCODING.eot_token]]
        for name in ("train", "test")
    ]


def jsonl(folder: Path) -> None:
    for part in range(3):
        lines = (json.dumps({"url": "x", "text": text}) for text in DOCUMENTS[part * 20 : part * 20 + 20])
        (folder / f"{part}.jsonl").write_text("\n".join(lines))


def parquet(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(folder / "all.parquet")


def csv(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_csv(folder / "all.csv")


def txt(folder: Path) -> None:
    for i, text in enumerate(DOCUMENTS):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / f"{i:03}.txt").write_text(text)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("write", "num_proc"), [(jsonl, 2), (parquet, 1), (csv, 1), (txt, 1)])
def test_as_nanogpt_prepares_it(
    write: Callable[[Path], None], num_proc: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanogpt_mac.corpus.openwebtext.SHARD", 7)  # several pieces, the last one short
    write(source)
    corpus = prepare_documents(config(source, tmp_path / "data", num_proc), GPT2Encoder(ENCODING))
    train, val = expected(DOCUMENTS, 0.2)
    assert corpus.train.tolist() == train
    assert corpus.val.tolist() == val
    digests = [hashlib.sha256(np.array(part, "<u2").tobytes()).hexdigest() for part in (train, val)]
    assert corpus.sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert (corpus.label, corpus.stand_in, corpus.encoder.to_json()) == ("openwebtext", False, {"kind": "gpt2"})
    (only,) = prepared(tmp_path / "data")
    assert sorted(file.name for file in only.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    if write is jsonl:
        again = prepare_documents(config(f"{source}/*.jsonl", tmp_path / "data"), GPT2Encoder(ENCODING))
        assert again.sha256 == corpus.sha256
        assert len(prepared(tmp_path / "data")) == 1  # found, not made again
        (source / "2.jsonl").unlink()
        fewer = prepare_documents(config(source, tmp_path / "data"), GPT2Encoder(ENCODING))
        assert fewer.train.tolist() == expected(DOCUMENTS[:40], 0.2)[0]


def test_nanogpts_fraction_of_few_documents(source: Path, tmp_path: Path) -> None:
    jsonl(source)
    corpus = prepare_documents(config(source, tmp_path / "data", val_fraction=0.0005), GPT2Encoder(ENCODING))
    assert (corpus.val == ENCODING.eot_token).sum() == 1
    assert (corpus.train == ENCODING.eot_token).sum() == 59


def other_column(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')


def empty_cell(folder: Path) -> None:
    (folder / "a.csv").write_text("text,n\none,1\n,2\ntwo,3\n")


def test_an_empty_cell_is_an_empty_document(source: Path, tmp_path: Path) -> None:
    empty_cell(source)
    corpus = prepare_documents(config(source, tmp_path / "data", val_fraction=0.3), GPT2Encoder(ENCODING))
    both = [*corpus.train.tolist(), *corpus.val.tolist()]
    assert both.count(ENCODING.eot_token) == 3
    assert len(both) == len("one") + len("two") + 3


def numbers(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": 1}\n{"text": 2}\n')


def one_document(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "alone"}\n')


def broken(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')


def mixed(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "x"}\n')
    (folder / "b.txt").write_text("y")


def nothing(folder: Path) -> None:
    (folder / "a.pdf").write_text("z")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (other_column, r"has .*body.*; use documents with a column text of strings"),
        (numbers, r"use documents with a column text of strings"),
        (one_document, r"1 documents; use at least 2"),
        (broken, r"Error|Invalid"),
        (mixed, r"holds json, text files together"),
        (nothing, r"no documents there; use files of one kind: \.jsonl"),
    ],
)
def test_refused(write: Callable[[Path], None], message: str, source: Path, tmp_path: Path) -> None:
    write(source)
    with pytest.raises(InputError, match=message) as refusal:
        prepare_documents(config(source, tmp_path / "data"), GPT2Encoder(ENCODING))
    assert str(refusal.value).startswith(f"data.path={source}: ")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "data").exists() or not prepared(tmp_path / "data")


def test_hub_out_of_reach(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    with pytest.raises(InputError, match=r"data\.dataset=Skylion007/openwebtext: cannot reach .*HF_HUB_OFFLINE=1"):
        prepare_documents(config(None, tmp_path), GPT2Encoder(ENCODING))
    assert prepared(tmp_path) == []


def test_hub_offline_and_nothing_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    cfg = config(None, tmp_path)
    cfg.dataset = "nobody/has-this@v1"
    with pytest.raises(InputError, match=r"data\.dataset=nobody/has-this@v1: "):
        prepare_documents(cfg, GPT2Encoder(ENCODING))
    assert prepared(tmp_path) == []


def test_line_ends_in_local_documents_are_newlines_and_their_corpus_is_found_again(tmp_path: Path) -> None:
    corpora = []
    for name, eol in (("lf", "\n"), ("crlf", "\r\n")):
        texts = [text.replace("\n", eol) for text in DOCUMENTS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        corpora.append(prepare_documents(config(tmp_path / f"{name}.jsonl", tmp_path / name), GPT2Encoder(ENCODING)))
    assert corpora[0].sha256 == corpora[1].sha256
    (tmp_path / "lf.jsonl").unlink()
    again = reopen(config(tmp_path / "lf.jsonl", tmp_path / "lf"), corpora[0].sha256)
    assert again is not None
    assert np.array_equal(again.val, corpora[0].val)
    assert reopen(config(None, tmp_path / "lf"), "0" * 64) is None
