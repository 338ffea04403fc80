"""Prepared corpora on disk: `<dir>/<key>/` with train.bin, val.bin (little-endian uint16) and meta.json.

A folder is written aside under a lock and renamed into place, so it is either whole or absent.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanogpt_mac import files
from nanogpt_mac.corpus.encoders import Encoder, encoder_from_json
from nanogpt_mac.errors import InputError, reason

FORMAT = 1
WINDOWS_ABOVE_BYTES = 256 << 20  # what a back end does not keep on its device (BackendOptions.resident_tokens)
CHECK_BELOW_BYTES = 64 << 20  # corpora up to this size have their checksums verified whenever they are opened
SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of one prepared corpus.

    `train` and `val` are one-dimensional uint16 memory maps, read-only. `sha256` is that of the source text;
    for openwebtext, of the two splits' tokens (see `openwebtext.py`).
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    encoder: Encoder
    sha256: str
    stand_in: bool

    @property
    def label(self) -> str:
        """What every record carries: the name, or "stand-in" where the text is not the real one."""
        return "stand-in" if self.stand_in else self.name


@dataclass(frozen=True)
class Split:
    """How many tokens a split's file holds, and the sha256 of the file."""

    tokens: int
    sha256: str


def write_split(path: Path, parts: Iterable[np.ndarray]) -> Split:
    """Writes token arrays one after the other, so that a corpus larger than memory can pass through."""
    digest = hashlib.sha256()
    tokens = 0
    with files.named(path), path.open("wb") as file:
        for part in parts:
            data = np.ascontiguousarray(part, "<u2").tobytes()
            digest.update(data)
            file.write(data)
            tokens += len(part)
        file.flush()
        os.fsync(file.fileno())
    return Split(tokens, digest.hexdigest())


def write_meta(
    folder: Path,
    *,
    name: str,
    sha256: str,
    encoder: Encoder,
    splits: dict[str, Split],
    stand_in: bool = False,
) -> None:
    meta = {
        "format": FORMAT,
        "name": name,
        "stand_in": stand_in,
        "sha256": sha256,
        "splits": {split: asdict(splits[split]) for split in SPLITS},
        "encoder": encoder.to_json(),
    }
    files.write(folder / "meta.json", json.dumps(meta))


def open_or_build(root: Path, key: str, build: Callable[[Path], None]) -> Corpus:
    """The corpus under `root/key`, built first if it is missing.

    `build(folder)` fills an empty folder with both splits and meta.json. Only one process builds a key at a
    time; others wait and then open what it made. The lock ends with its process, so whatever a killed one
    left behind is removed by the next to hold the lock.
    """
    final = root / key
    if not final.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with files.lock(root / f".{key}.lock", f"another process is preparing {final}; waiting for it"):
                if not final.is_dir():
                    _build(root, key, build)
        except OSError as error:
            why = error.strerror or error
            raise InputError(
                f"data.dir={root}: cannot prepare {key} there ({why}); make room there, or use another folder"
            ) from error
    return load(final)


def load(folder: Path) -> Corpus:
    """Opens a prepared folder. Raises InputError that names the damaged file and the remedy."""

    def damaged(file: str, why: str) -> InputError:
        return InputError(f"{folder / file}: damaged ({why}); delete the folder {folder} and run again")

    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged("meta.json", reason(error)) from error
    try:
        if meta["format"] != FORMAT:
            raise damaged("meta.json", f"format {meta['format']!r}, not {FORMAT}")
        splits = {split: Split(**meta["splits"][split]) for split in SPLITS}
        name, sha256, stand_in, encoder = meta["name"], meta["sha256"], meta["stand_in"], meta["encoder"]
    except (KeyError, TypeError) as error:
        raise damaged("meta.json", f"not the fields of a corpus: {error}") from error
    typed = [(name, str), (sha256, str), (stand_in, bool)]
    typed += [item for split in splits.values() for item in ((split.tokens, int), (split.sha256, str))]
    for value, kind in typed:
        if not isinstance(value, kind):
            raise damaged("meta.json", f"{value!r} is not {kind.__name__}")
    check = 2 * sum(split.tokens for split in splits.values()) < CHECK_BELOW_BYTES
    tokens = {}
    for split, expected in splits.items():
        file = folder / f"{split}.bin"
        try:
            size = file.stat().st_size
            if size != 2 * expected.tokens or not size:
                raise damaged(file.name, f"{size} bytes where {2 * expected.tokens} were written")
            if check and hashlib.sha256(file.read_bytes()).hexdigest() != expected.sha256:
                raise damaged(file.name, "its checksum differs")
            tokens[split] = mapped(file)
        except OSError as error:
            raise damaged(file.name, error.strerror or str(error)) from error
    try:
        return Corpus(name, tokens["train"], tokens["val"], encoder_from_json(encoder), sha256, stand_in)
    except InputError as error:
        raise damaged("meta.json", str(error)) from error


def mapped(file: Path) -> np.ndarray:
    """The tokens of a file, uint16. Of a large one windows are read, and what lies around each is not wanted."""
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if len(pages) > WINDOWS_ABOVE_BYTES and hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, "<u2")


def _build(root: Path, key: str, build: Callable[[Path], None]) -> None:
    prefix = f".{key}.tmp-"
    for stale in root.glob(f"{prefix}*"):
        shutil.rmtree(stale)
    folder = root / f"{prefix}{os.getpid()}"
    with files.unfinished(folder):
        folder.mkdir(mode=0o755)
        build(folder)
        files.sync_folder(folder)
        folder.rename(root / key)
        files.sync_folder(root)


def key_of(name: str, identity: Mapping[str, object]) -> str:
    """Folder name: readable, and different for anything that changes the tokens."""
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
