"""Prepared folders: several processes at once, killed ones, damaged files, folders that cannot be written."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.support import prepared

from nanogpt_mac.corpus import Corpus, DataConfig, prepare
from nanogpt_mac.errors import InputError

PREPARE = """
import sys
from nanogpt_mac.corpus import DataConfig, prepare
corpus = prepare(DataConfig(name="text", path=sys.argv[1], dir=sys.argv[2], tokenizer="bpe", vocab_size=400))
print(len(corpus.train), len(corpus.val), int(corpus.train.sum()), corpus.sha256)
"""
# As above, but stops for good when the tokens are written and meta.json is not.
HANG = (
    "import time; from nanogpt_mac.corpus import texts; texts.write_meta = lambda *a, **k: time.sleep(600)\n" + PREPARE
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "a text.txt"
    file.write_text("".join(f"In year {i} the river rose {i % 7} times; who counts them now?\n" for i in range(4000)))
    return file


def start(script: str, text: Path, folder: Path) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-c", script, str(text), str(folder)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_four_processes_at_once(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    processes = [start(PREPARE, text, folder) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1
    (only,) = prepared(folder)  # nothing temporary
    assert sorted(file.name for file in only.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_the_second_waits_for_the_first(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = start(HANG, text, folder)
    wait_for(lambda: any(folder.glob(".*/val.bin")))
    second = start(PREPARE, text, folder)
    assert second.stderr is not None
    assert "another process is preparing" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    out, _ = second.communicate(timeout=60)
    first.communicate()
    assert second.returncode == 0
    assert len(out.split()) == 4
    assert len(prepared(folder)) == 1


def test_killed(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    process = start(HANG, text, folder)
    wait_for(lambda: any(folder.glob(".*/val.bin")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert all(left.name.startswith(".") for left in folder.iterdir())
    cfg = DataConfig(name="text", path=str(text), dir=str(folder), tokenizer="bpe", vocab_size=400)
    prepare(cfg)
    (only,) = prepared(folder)
    assert not only.name.startswith(".")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def made(text: Path, folder: Path) -> tuple[Corpus, Path]:
    corpus = prepare(DataConfig(name="text", path=str(text), dir=str(folder)))
    (only,) = prepared(folder)
    return corpus, only


def test_what_is_on_disk(text: Path, tmp_path: Path) -> None:
    corpus, folder = made(text, tmp_path / "data")
    written = text.read_text()
    assert folder.name.startswith("text-a_text-")
    assert corpus.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    for tokens, name in ((corpus.train, "train.bin"), (corpus.val, "val.bin")):
        assert not tokens.flags.owndata
        assert not tokens.flags.writeable  # a mapped file, not a copy of it
        assert (tokens.dtype, tokens.ndim, tokens.flags.writeable) == (np.uint16, 1, False)
        assert np.array_equal(np.fromfile(folder / name, "<u2"), tokens)
    assert corpus.encoder.decode(corpus.train.tolist()) == written[: int(len(written) * 0.9)]
    assert corpus.encoder.decode(corpus.val.tolist()) == written[int(len(written) * 0.9) :]
    assert folder.stat().st_mode & 0o777 == 0o755


def flip(folder: Path) -> None:
    data = bytearray((folder / "train.bin").read_bytes())
    data[1000] ^= 1
    (folder / "train.bin").write_bytes(data)


def change_meta(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "file", "why"),
    [
        (flip, "train.bin", "checksum differs"),
        (lambda folder: os.truncate(folder / "val.bin", 100), "val.bin", "100 bytes"),
        (lambda folder: (folder / "val.bin").unlink(), "val.bin", "No such file"),
        (lambda folder: (folder / "meta.json").unlink(), "meta.json", "No such file"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe{"), "meta.json", "decode"),
        (lambda folder: (folder / "meta.json").write_text('{"format": 1'), "meta.json", "Expecting"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json", "not the fields"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "meta.json", "not the fields"),
        (change_meta(format=7), "meta.json", "format 7"),
        (change_meta(splits={"train": {}}), "meta.json", "not the fields"),
        (change_meta(sha256=5), "meta.json", "5 is not str"),
        (change_meta(stand_in="no"), "meta.json", "'no' is not bool"),
        (change_meta(encoder={"kind": "char", "chars": "zz"}), "meta.json", "character vocabulary"),
        (change_meta(encoder=None), "meta.json", "kind=None"),
        (
            change_meta(splits={name: {"tokens": "9", "sha256": ""} for name in ("train", "val")}),
            "meta.json",
            "'9' is not int",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], Any], file: str, why: str, text: Path, tmp_path: Path) -> None:
    _, folder = made(text, tmp_path / "data")
    damage(folder)
    with pytest.raises(InputError) as refusal:
        made(text, tmp_path / "data")
    message = str(refusal.value)
    assert message.startswith(f"{folder / file}: damaged (")
    assert why in message
    assert f"delete the folder {folder}" in message
    assert "\n" not in message


def test_a_place_that_cannot_be_written(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.dir=.*file.*: cannot prepare .* \((Not a directory|File exists)\)"):
        prepare(DataConfig(name="text", path=str(text), dir=str(tmp_path / "file" / "data")))


def test_opening_again_is_fast(text: Path, tmp_path: Path) -> None:
    made(text, tmp_path / "data")
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        made(text, tmp_path / "data")
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.05
