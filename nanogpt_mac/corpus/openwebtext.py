"""OpenWebText, or local documents in its place, as GPT-2 tokens: nanoGPT's recipe with memory kept flat.

Documents are shuffled and split with nanoGPT's seed, encoded by several processes, and written one shard
after the other; each document ends with GPT-2's end-of-text token. `Corpus.sha256` is the sha256 of the two
splits' sha256 (hexadecimal, training first), so it stands for the tokens themselves, wherever the documents
came from. Line ends of local documents become newlines; the Hub's are left alone, as nanoGPT leaves them.
"""

import glob
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac.corpus.config import DataConfig
from nanogpt_mac.corpus.download import TIMEOUT_S
from nanogpt_mac.corpus.encoders import GPT2Encoder
from nanogpt_mac.corpus.prepared import Corpus, key_of, open_or_build, write_meta, write_split
from nanogpt_mac.corpus.reading import lines
from nanogpt_mac.errors import InputError

DATASET = "Skylion007/openwebtext"
SPLIT_SEED = 2357  # nanoGPT, data/openwebtext/prepare.py
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SHARD = 8192  # documents written at a time, about 10 million tokens


def prepare_documents(cfg: DataConfig, encoder: GPT2Encoder | None = None) -> Corpus:
    """See `prepare`. `encoder` is GPT-2's unless another is given."""
    encoder = encoder or GPT2Encoder()
    files = _files(cfg.path) if cfg.path is not None else []
    dataset = cfg.dataset or DATASET
    asked = f"data.path={cfg.path}" if files else f"data.dataset={dataset}"
    identity = {
        "source": [_stamp(file) for file in files] or dataset,
        "tokenizer": cfg.tokenizer,
        "val_fraction": cfg.val_fraction,
        "seed": SPLIT_SEED,
    }
    if files:
        identity["lines"] = "\n"

    def build(folder: Path) -> None:
        import datasets

        encoder.encode("")  # fails now, not after all documents are fetched, if GPT-2's tables are missing
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        caches = folder / "caches"
        caches.mkdir()
        try:
            documents = _load_files(files, caches) if files else _load_hub(dataset, cfg.num_proc)
            if getattr(documents.features.get("text"), "dtype", None) not in ("string", "large_string"):
                raise InputError(f"{asked}: has {documents.features}; use documents with a column text of strings")
            if len(documents) < 2:
                raise InputError(f"{asked}: {len(documents)} documents; use at least 2, one for each split")
            parts = documents.train_test_split(test_size=cfg.val_fraction, seed=SPLIT_SEED, shuffle=True)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise InputError(f"{asked}: {type(cause).__name__}: {str(cause).splitlines()[0]}") from error
        splits = {}
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            encoded = part.map(
                _encode,
                fn_kwargs={"encoder": encoder, "tidy": lines if files else str},
                remove_columns=part.column_names,
                features=datasets.Features({"ids": datasets.List(datasets.Value("uint16"))}),
                num_proc=min(cfg.num_proc, len(part)) if cfg.num_proc > 1 else None,
                cache_file_name=str(caches / f"{split}.arrow"),
                load_from_cache_file=False,
                desc=f"encoding the {split} split",
            )
            splits[split] = write_split(folder / f"{split}.bin", _tokens(encoded))
        shutil.rmtree(caches)
        sha256 = hashlib.sha256((splits["train"].sha256 + splits["val"].sha256).encode()).hexdigest()
        write_meta(folder, name=cfg.name, sha256=sha256, encoder=encoder, splits=splits)

    return open_or_build(Path(cfg.dir), key_of(cfg.name, identity), build)


def _encode(document: dict[str, str | None], encoder: GPT2Encoder, tidy: Callable[[str], str]) -> dict[str, np.ndarray]:
    # An empty cell of a table is an empty document.
    return {"ids": np.array([*encoder.encode(tidy(document["text"] or "")), encoder.end_of_text], np.uint16)}


def _tokens(encoded: Any) -> Iterator[np.ndarray]:
    """The token numbers of every document, SHARD documents at a time, without a Python object per token."""
    arrow = encoded.with_format("arrow")
    for begin in range(0, len(arrow), SHARD):
        yield arrow[begin : begin + SHARD]["ids"].combine_chunks().flatten().to_numpy()


def _files(path: str) -> list[Path]:
    """The document files that `path` names: a file, those of a folder and its sub-folders, or of a glob."""
    place = Path(path)
    if place.is_dir():
        found = list(place.rglob("*"))
    else:
        found = [place] if place.exists() else [Path(name) for name in glob.glob(path)]  # noqa: PTH207 - absolute too
    files = sorted(file for file in found if file.is_file() and file.suffix in BUILDERS)
    kinds = {BUILDERS[file.suffix] for file in files}
    if len(kinds) != 1:
        what = f"holds {', '.join(sorted(kinds))} files together" if kinds else "no documents there"
        raise InputError(f"data.path={path}: {what}; use files of one kind: {', '.join(BUILDERS)}")
    return files


def _stamp(file: Path) -> list[str | int]:
    """Identifies a file by path, size and time: documents may be too many to be read whenever a run starts."""
    state = file.stat()
    return [str(file.resolve()), state.st_size, state.st_mtime_ns]


def _load_files(files: list[Path], caches: Path) -> Any:
    import datasets

    builder = BUILDERS[files[0].suffix]
    options = {"sample_by": "document"} if builder == "text" else {}  # one document a file, not one a line
    names = [str(file) for file in files]
    return datasets.load_dataset(builder, data_files=names, split="train", cache_dir=str(caches), **options)


def _load_hub(dataset: str, num_proc: int) -> Any:
    """The training split of `NAME` or `NAME@REVISION` on the Hub; HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME count."""
    import datasets
    import requests
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        # One request first: the library itself would try for half a minute.
        try:
            requests.head(constants.ENDPOINT, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise InputError(
                f"data.dataset={dataset}: cannot reach the Hugging Face Hub ({type(error).__name__}); connect, "
                "set HF_HUB_OFFLINE=1 to use its cache on this machine, or use local files with data.path="
            ) from error
    name, _, revision = dataset.partition("@")
    return datasets.load_dataset(name, revision=revision or None, split="train", num_proc=num_proc)
