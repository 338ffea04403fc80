"""The best matmul that a machine has shown: remembered under what it depends on, and never lowered."""

import json
import threading

import pytest
from fakes.support import CACHE

from nanogpt_mac import files
from nanogpt_mac.machine import peaks

MACHINE = {"chip": "Apple M4 Pro", "cpu_cores": 14, "gpu": "Apple M4 Pro", "gpu_cores": 20, "versions": {"mlx": "0.32"}}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nanogpt-mac"


def of(*rates):
    """A matmul that reaches these rates, one after the other."""
    return iter(rates).__next__


def test_no_test_writes_into_the_users_own_cache(monkeypatch):
    monkeypatch.undo()
    assert files.cache_folder().is_relative_to(CACHE)


def test_a_run_begins_with_what_is_remembered_and_never_lowers_it():
    first = peaks.Peak("a", of(3e9, 4e9))
    assert (first.own, first.best) == (3e9, 3e9)  # nothing is remembered: it is measured at once
    first.again()
    assert (first.own, first.best) == (4e9, 4e9)
    busy = peaks.Peak("a", of(2e9))
    assert (busy.own, busy.best) == (None, 4e9)
    busy.again()
    assert (busy.own, busy.best) == (2e9, 4e9)
    assert peaks.Peak("a", of()).best == 4e9
    assert peaks.best("b") is None


def test_a_rate_is_kept_under_all_that_it_depends_on(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usual = "mlx", "metal", "float32", "highest"
    names = {peaks.name(MACHINE, *usual), peaks.name(MACHINE, "mlx", "cpu", "float32", "highest")}
    names |= {
        peaks.name(MACHINE, "mlx", "metal", "bfloat16", "highest"),
        peaks.name(MACHINE, "mlx", "metal", "float32"),
    }
    names |= {peaks.name(MACHINE | {key: other}, *usual) for key, other in (("gpu_cores", 16), ("chip", "Apple M4"))}
    names.add(peaks.name(MACHINE | {"versions": {"mlx": "0.33"}}, *usual))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names.add(peaks.name(MACHINE, *usual))
    assert len(names) == 8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"schema": 1, "best": {"a": -1}}',
        '{"schema": 1, "best": {"a": "fast"}}',
        '{"schema": 1, "best": {"a": 1e300}}',
        '{"schema": "x"}',
        '{"another": "program"}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_or_foreign_file_counts_as_absent(folder, text):
    folder.mkdir()
    peaks.place().write_bytes(text if isinstance(text, bytes) else text.encode())
    measured = peaks.Peak("a", of(5e9))
    assert (measured.own, measured.best) == (5e9, 5e9)
    assert json.loads(peaks.place().read_text())["best"] == {"a": 5e9}


def test_a_cache_folder_that_cannot_be_written_only_forgets(folder):
    folder.parent.joinpath("nanogpt-mac").write_text("a file")
    measured = peaks.Peak("a", of(5e9, 4e9))
    measured.again()
    assert (measured.own, measured.best) == (5e9, 5e9)


def test_two_processes_at_once_lose_nothing():
    threads = [threading.Thread(target=peaks.keep, args=(str(i), 1e9 + i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [peaks.best(str(i)) for i in range(8)] == [1e9 + i for i in range(8)]
