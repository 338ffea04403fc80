"""Files that are whole or old, locks between processes, and things made once."""

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanogpt_mac import files
from nanogpt_mac.errors import InputError

HOLDER = """
import sys, time
from pathlib import Path
from nanogpt_mac import files
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, big = tmp_path / "a.json", {"a": "x" * 2_000_000}
    files.write_json(path, big)
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            files.write_json(path, big)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(json.loads(path.read_text()) == big for _ in range(20))
    finally:
        stop.set()
        writer.join()


def test_numbers_that_json_does_not_have_keep_their_names(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [math.nan, -math.inf], 1: (2.5,)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": ["nan", "-inf"], "1": [2.5]}


def test_a_link_is_replaced_whatever_it_pointed_to(tmp_path):
    files.point(tmp_path / "last", "one")
    files.point(tmp_path / "last", "two")
    assert (tmp_path / "last").readlink() == Path("two")
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_a_lock_that_another_process_holds_is_refused_or_waited_for(tmp_path, holder, capsys):
    with pytest.raises(InputError, match=r"^busy$"), files.lock(tmp_path / "lock", refuse="busy"):
        pass
    began = time.monotonic()
    threading.Timer(0.5, holder.kill).start()
    with files.lock(tmp_path / "lock", waiting="waiting for it"):
        assert time.monotonic() - began > 0.4
    assert capsys.readouterr().err == "waiting for it\n"


def test_threads_make_a_thing_once(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        time.sleep(0.2)
        (folder / "x").write_text("x")
        return folder / "x"

    target = tmp_path / "deep" / "x"
    threads = [threading.Thread(target=files.make_once, args=(target, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert target.read_text() == "x"


def test_nothing_is_kept_of_what_could_not_be_made(tmp_path):
    def make(folder):
        (folder / "x").write_text("half")
        raise InputError("no")

    with pytest.raises(InputError):
        files.make_once(tmp_path / "x", make)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lock"]


def test_the_cache_folder_obeys_the_environment_and_else_the_system(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.cache_folder("a", "b") == Path("/elsewhere/nanogpt-mac/a/b")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    own = "Library/Caches" if sys.platform == "darwin" else ".cache"
    assert files.cache_folder() == Path("/home/somebody", own, "nanogpt-mac")


def test_a_cache_file_is_read_and_made_again_where_it_is_damaged(tmp_path, capsys):
    made = []

    def make():
        made.append(1)
        return '{"a": 1}'

    path = tmp_path / "cache" / "a.json"
    for _ in range(2):
        assert files.kept(path, lambda text: json.loads(text)["a"], make) == 1
    assert len(made) == 1
    path.write_text('{"b": 1}')
    assert files.kept(path, lambda text: json.loads(text)["a"], make) == 1
    assert len(made) == 2
    assert "damaged ('a'); it is made again" in capsys.readouterr().err


def test_run_folders_are_named_by_the_pattern_and_never_shared(tmp_path):
    pattern = f"{tmp_path}/{{date}}/{{name}}"
    first, second = files.run_folder(pattern, "mps-compile"), files.run_folder(pattern, "mps-compile")
    assert first.name == "mps-compile"
    assert second.name == "mps-compile-2"
    assert len(first.parent.name) == len("2026-01-01")
    named = files.run_folder(f"{tmp_path}/mine", "cpu")
    assert named == tmp_path / "mine"
    for file in ("metrics.jsonl", "bench.json"):
        (named / file).touch()
        with pytest.raises(InputError, match="already holds a run"):
            files.run_folder(f"{tmp_path}/mine", "cpu")
        (named / file).unlink()
