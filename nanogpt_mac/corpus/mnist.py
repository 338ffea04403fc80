"""MNIST: its four IDX files, downloaded and checked, or a labelled stand-in of the same shapes.

The files are read here, header and all; nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_mac.corpus.download import NoNetwork, download
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import write_aside

# The old address at lecun.com no longer serves them.
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
CLASSES, SIDE = 10, 28
TRAIN, TEST = 60_000, 10_000
UNSIGNED_BYTE = 8  # the third byte of an IDX header
STAND_IN_SEED = 784
STAND_IN = "stand-in"


@dataclass(frozen=True)
class _File:
    """One of the four. `md5` and `size` are of the compressed file, as torchvision has them, `plain_md5` of it
    unpacked."""

    name: str
    shape: tuple[int, ...]
    size: int
    md5: str
    plain_md5: str


FILES = (
    _File(
        "train-images-idx3-ubyte", (TRAIN, SIDE, SIDE), 9_912_422,
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb",
    ),
    _File(
        "train-labels-idx1-ubyte", (TRAIN,), 28_881,
        "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624",
    ),
    _File(
        "t10k-images-idx3-ubyte", (TEST, SIDE, SIDE), 1_648_877,
        "9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea",
    ),
    _File(
        "t10k-labels-idx1-ubyte", (TEST,), 4_542,
        "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637",
    ),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels are uint8 (N, 784), classes uint8 (N,)."""

    train: np.ndarray
    train_classes: np.ndarray
    test: np.ndarray
    test_classes: np.ndarray
    stand_in: bool

    @property
    def label(self) -> str:
        """What every record, table and page says of it."""
        return STAND_IN if self.stand_in else "MNIST"


def load(folder: Path, given: bool = False) -> Images:
    """The files in `folder`, compressed or not, downloaded into it where they are missing and it was not `given`.

    Without a network the stand-in, which stderr says. InputError, one line, for a file that is not what it should be.
    """
    try:
        arrays = [_parsed(*_found(folder, file, given), file) for file in FILES]
    except NoNetwork as error:
        print(
            f"WARNING: no network, so MNIST cannot be downloaded ({error}): using the built-in STAND-IN, ten glyphs "
            "shifted and speckled, in MNIST's shapes. Times compare with MNIST, accuracies do not. For the "
            "real images connect, or use the four files with mnist=FOLDER.",
            file=sys.stderr,
        )
        return stand_in()
    train, train_classes, test, test_classes = arrays
    return Images(train.reshape(TRAIN, -1), train_classes, test.reshape(TEST, -1), test_classes, False)


def _found(folder: Path, file: _File, given: bool) -> tuple[Path, bytes]:
    """Where a file is, and its bytes as they are there."""
    for path in (folder / f"{file.name}.gz", folder / file.name):
        if path.exists():
            try:
                return path, path.read_bytes()
            except OSError as error:
                raise InputError(f"mnist={path}: {error.strerror}; use a file that can be read") from error
    if given:
        raise InputError(f"mnist={folder}: has no {file.name}.gz; use a folder with the four files, or mnist=null")
    path = folder / f"{file.name}.gz"
    data = _downloaded(path.name, file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(path, data)
    except OSError as error:
        raise InputError(f"data.dir: {path}: {error.strerror}; use a folder that can be written") from error
    return path, data


def _downloaded(name: str, file: _File) -> bytes:
    """From the first mirror that answers as it should; what the last one said where none does."""
    failure: Exception = NoNetwork("no mirror")
    for mirror in MIRRORS:
        try:
            return download(mirror + name, file.md5, "md5", key="mnist", instead="mnist=FOLDER")
        except (NoNetwork, InputError) as error:
            failure = error if isinstance(failure, NoNetwork) else failure
    raise failure


def _parsed(path: Path, data: bytes, file: _File) -> np.ndarray:
    """The array of an IDX file. InputError for one that is damaged, cut short, or another than `file`."""
    if path.suffix == ".gz":
        packed, data = data, _unpacked(path, data)
        _require(path, packed, file.md5, f"{len(packed)} bytes of {file.size}")
    array = read_idx(path, data)
    if array.shape != file.shape:
        raise InputError(f"mnist={path}: holds {_spelt(array.shape)}, not {_spelt(file.shape)}; {_REPLACE}")
    if path.suffix != ".gz":
        _require(path, data, file.plain_md5, f"{len(data)} bytes")
    return array


_REPLACE = "remove it and it is downloaded again, or use the four files with mnist=FOLDER"


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"mnist={path}: cannot be unpacked ({error}); {_REPLACE}") from error


def _require(path: Path, data: bytes, md5: str, words: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise InputError(f"mnist={path}: md5 is {found} ({words}), not {md5}; {_REPLACE}")


def read_idx(path: Path, data: bytes) -> np.ndarray:
    """The array in the bytes of an IDX file of unsigned bytes: two zeros, the type, the number of dimensions, each as a
    big-endian uint32, the elements. `path` is for the InputError where they are not that."""
    dimensions = data[3] if len(data) > 3 else 0
    if data[:3] != bytes((0, 0, UNSIGNED_BYTE)) or not 1 <= dimensions <= 3:
        raise InputError(f"mnist={path}: begins with {data[:4].hex() or 'nothing'}, not as IDX images do; {_REPLACE}")
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * dimensions].ljust(4 * dimensions, b"\0"), ">u4"))
    elements = len(data) - 4 - 4 * dimensions
    expected = int(np.prod([int(n) for n in shape], dtype=object))
    if elements != expected:
        raise InputError(f"mnist={path}: {max(elements, 0)} bytes follow its header, which says {expected}; {_REPLACE}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _spelt(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


# -- the stand-in -----------------------------------------------------------------------------------------------------

SHIFT, FAINTEST = 4, 90  # pixels; the least of 255 that a glyph's strokes are drawn with
NOISE, SPECKLED = 100, 50  # of 255: the most that noise adds, and which of 256 random bytes make any


def stand_in() -> Images:
    """Ten fixed glyphs, strokes of a 7 x 7 grid at twice its size, shifted and speckled; the same on every
    machine (Philox's raw numbers). There is something to learn, and it is no measure of anything else."""
    draws = np.random.Philox(key=STAND_IN_SEED)
    cells = draws.random_raw(CLASSES * 49).reshape(CLASSES, 7, 7) >> np.uint64(63)
    glyphs = np.kron(cells.astype(np.uint8), np.ones((2, 2), np.uint8))
    train, test = (_drawn(draws, glyphs, count) for count in (TRAIN, TEST))
    return Images(*train, *test, stand_in=True)


def _drawn(draws: np.random.Philox, glyphs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    words = draws.random_raw(count)
    classes = (words % np.uint64(CLASSES)).astype(np.uint8)
    ink = (FAINTEST + (words >> np.uint64(8)) % np.uint64(256 - FAINTEST - NOISE)).astype(np.uint8)
    down, right = (((words >> np.uint64(by)) % np.uint64(SHIFT)).astype(np.intp) for by in (16, 24))
    noise = np.frombuffer(draws.random_raw(count * SIDE * SIDE // 8).tobytes(), np.uint8)
    images = np.where(noise < SPECKLED, noise * np.uint8(NOISE // SPECKLED), 0).reshape(count, SIDE, SIDE)
    images = images.astype(np.uint8)
    place = (SIDE - glyphs.shape[1] - SHIFT) // 2
    rows = place + down[:, None] + np.arange(glyphs.shape[1])
    columns = place + right[:, None] + np.arange(glyphs.shape[2])
    images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]] += (
        glyphs[classes] * ink[:, None, None]
    )
    return images.reshape(count, -1), classes
