"""MNIST's IDX files: whole, compressed or not, damaged in every way; the stand-in without a network."""

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanogpt_mac.corpus import mnist
from nanogpt_mac.corpus.download import NoNetwork
from nanogpt_mac.errors import InputError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four files in small, with checksums of their own."""
    rng = np.random.default_rng(1)
    made = []
    for file in mnist.FILES:
        shape = (7 if file.name.startswith("train") else 3, *file.shape[1:])
        plain = idx(rng.integers(0, 10, shape, np.uint8))
        packed = gzip.compress(plain, mtime=0)
        (tmp_path / f"{file.name}.gz").write_bytes(packed)
        md5, plain_md5 = (hashlib.md5(data).hexdigest() for data in (packed, plain))
        made.append(replace(file, shape=shape, size=len(packed), md5=md5, plain_md5=plain_md5))
    monkeypatch.setattr(mnist, "FILES", tuple(made))
    monkeypatch.setattr(mnist, "TRAIN", 7)
    monkeypatch.setattr(mnist, "TEST", 3)
    return tmp_path


def test_read(folder: Path) -> None:
    packed = mnist.load(folder, given=True)
    for file in mnist.FILES:
        place = folder / f"{file.name}.gz"
        (folder / file.name).write_bytes(gzip.decompress(place.read_bytes()))
        place.unlink()
    plain = mnist.load(folder, given=True)
    assert packed.label == "MNIST"
    assert packed.train.shape == (7, 784)
    assert packed.test_classes.shape == (3,)
    np.testing.assert_array_equal(packed.train, plain.train)
    np.testing.assert_array_equal(packed.test_classes, plain.test_classes)


def flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "follow its header|cannot be unpacked"),
        (lambda data: b"", "begins with nothing|cannot be unpacked|md5"),
        (flipped, "md5|cannot be unpacked"),
        (lambda data: b"\x80\x04" + data[2:], "begins with 8004|cannot be unpacked"),
        (lambda data: data + b"more", "follow its header|cannot be unpacked|md5"),
    ],
)
def test_damaged(folder: Path, damage, words: str, packed: bool) -> None:
    place = folder / f"{mnist.FILES[0].name}.gz"
    if not packed:
        plain = folder / mnist.FILES[0].name
        plain.write_bytes(gzip.decompress(place.read_bytes()))
        place.unlink()
        place = plain
    place.write_bytes(damage(place.read_bytes()))
    with pytest.raises(InputError, match=words) as caught:
        mnist.load(folder, given=True)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_file(folder: Path) -> None:
    train, labels = (folder / f"{file.name}.gz" for file in mnist.FILES[:2])
    train.write_bytes(labels.read_bytes())
    with pytest.raises(InputError, match="md5 is"):
        mnist.load(folder, given=True)
    train.unlink()
    (folder / mnist.FILES[0].name).write_bytes(gzip.decompress(labels.read_bytes()))
    with pytest.raises(InputError, match="holds 7, not 7 x 28 x 28"):
        mnist.load(folder, given=True)


def test_missing_from_a_given_folder(folder: Path) -> None:
    (folder / f"{mnist.FILES[3].name}.gz").unlink()
    with pytest.raises(InputError, match="has no t10k-labels"):
        mnist.load(folder, given=True)


def test_downloaded_from_the_mirror_that_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder / f"{mnist.FILES[1].name}.gz"
    whole, asked = place.read_bytes(), []
    place.unlink()

    def download(url: str, known: str, algorithm: str, **_: str) -> bytes:
        asked.append(url)
        assert (known, algorithm) == (mnist.FILES[1].md5, "md5")
        if "ossci" in url:
            raise NoNetwork("refused")
        return whole

    monkeypatch.setattr(mnist, "download", download)
    assert not mnist.load(folder).stand_in
    assert [url.split("/")[2] for url in asked] == ["ossci-datasets.s3.amazonaws.com", "storage.googleapis.com"]
    assert place.read_bytes() == whole


def test_stand_in_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object, **__: object) -> bytes:
        raise NoNetwork("no route")

    monkeypatch.setattr(mnist, "download", download)
    images = mnist.load(tmp_path / "mnist")
    assert "STAND-IN" in capsys.readouterr().err
    assert images.label == "stand-in"
    assert not (tmp_path / "mnist").exists()
    assert images.train.shape == (60_000, 784)
    assert images.test.shape == (10_000, 784)
    assert set(images.test_classes) == set(range(10))
    means = np.stack([images.train[images.train_classes == c].mean(0) for c in range(10)]).astype(float)
    nearest = ((images.test[:1000, None].astype(float) - means) ** 2).sum(2).argmin(1)
    assert (nearest == images.test_classes[:1000]).mean() > 0.5  # ten kinds, told apart by their means alone
    digest = hashlib.sha256(images.train.tobytes() + images.test_classes.tobytes()).hexdigest()
    assert digest == "d660da390375f99f5ab1195df491622b2495c8d7fed26edee611894af6557043"
