"""Ranks that watch each other, in one process: what each is told when one leaves, fails, falls silent or hangs."""

import socket
import time

import pytest

from nanogpt_mac import guard
from nanogpt_mac.guard import Guard


class Rank:
    def __init__(self, rank, size=3):
        self.turns, self.patient = 0, False
        self.guard = Guard(rank, size, lambda: (self.turns, self.patient))
        self.ended = []


@pytest.fixture
def start(monkeypatch):
    """Three ranks whose `signals.end_now` notes what it was given."""
    monkeypatch.setattr(guard, "BEAT_S", 0.05)
    monkeypatch.setattr(guard, "POLL_S", 0.02)
    monkeypatch.setattr(guard, "GRACE_S", 0.1)
    monkeypatch.setattr(guard, "LINGER_S", 0.2)
    ended = []
    monkeypatch.setattr(guard.signals, "end_now", lambda code, text: ended.append((code, text)))
    every = []

    def started(size=3):
        every.extend(Rank(rank, size) for rank in range(size))
        place = every[0].guard.listen("127.0.0.1")
        for one in every:
            one.guard.start(place)
        deadline = time.monotonic() + 10
        while sum(peer.rank >= 0 for peer in every[0].guard._peers) < size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return every, ended

    yield started
    for one in every:
        one.guard.leave()
        one.guard._thread.join(10)


def test_ranks_that_leave_one_after_the_other_end_nothing(start):
    ranks, ended = start()
    for one in reversed(ranks):
        one.guard.leave()
        time.sleep(0.1)
    assert [one.guard.lost for one in ranks] == [None] * 3
    assert not ended


def test_a_rank_that_fails_says_why_to_all(start):
    ranks, ended = start()
    ranks[2].guard.leave("OSError: no space left")
    whys = [one.guard.why(10) for one in ranks[:2]]
    assert all(why.startswith("rank 2 (process ") and why.endswith("has ended: OSError: no space left") for why in whys)
    time.sleep(0.5)
    assert len(ended) == 2  # both were ended, their main threads being elsewhere
    assert sorted(text != "" for _, text in ended) == [False, True]  # and one has spoken
    assert all(code == 1 for code, _ in ended)


def test_rank_0_that_fails_is_told_to_all(start):
    ranks, _ = start()
    ranks[0].guard.leave("MemoryError")
    for one in ranks[1:]:
        assert "rank 0 (process " in one.guard.why(10)
    assert ranks[1].guard.line().endswith("has ended: MemoryError; start again")
    assert ranks[2].guard.line() == ""


def test_a_connection_that_breaks_is_a_rank_that_is_gone(start):
    ranks, _ = start()
    ranks[1].guard._peers[0].connection.shutdown(socket.SHUT_RDWR)
    assert "is gone: it was killed, or has crashed" in ranks[0].guard.why(10)
    assert "rank 1 (process " in ranks[2].guard.why(10)


def test_a_main_thread_that_takes_itself_out_is_not_ended(start, monkeypatch):
    monkeypatch.setattr(guard, "GRACE_S", 2.0)
    ranks, ended = start(2)
    ranks[1].guard.leave("ValueError")
    assert ranks[0].guard.why(10)
    ranks[0].guard.leave()
    time.sleep(2.2)
    assert not ended


def test_a_silent_rank_is_killed(start, monkeypatch):
    monkeypatch.setattr(guard, "SILENT_S", 0.5)
    killed = []
    monkeypatch.setattr(guard._Peer, "kill", lambda peer: killed.append(peer.rank))
    ranks, _ = start()
    ranks[2].guard._tell = lambda **message: None  # as of a process that is stopped
    assert "rank 2 (process " in (why := ranks[0].guard.why(10))
    assert "has not answered for" in why
    assert killed == [2]


def test_the_rank_that_is_behind_hangs(start, monkeypatch):
    monkeypatch.setattr(guard, "STALLED_S", 0.3)
    ranks, _ = start()
    for one in ranks:
        one.turns = 8
    time.sleep(0.2)
    ranks[0].turns = ranks[2].turns = 9
    why = ranks[0].guard.why(10)
    assert why.startswith("no iteration for ")
    assert "rank 1 (process " in why
    assert "rank 2" not in why


def test_patience_of_one_is_patience_with_all(start, monkeypatch):
    monkeypatch.setattr(guard, "STALLED_S", 0.3)
    ranks, _ = start(2)
    ranks[1].patient = True
    assert ranks[0].guard.why(1.0) is None
    ranks[1].patient = False
    assert ranks[0].guard.why(10) is not None


def test_a_stranger_is_not_listened_to(start):
    ranks, _ = start(2)
    port = ranks[0].guard._server.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"token": "guessed", "rank": 1, "pid": 1, "host": "h"}\n{"bye": "all is lost"}\n')
        time.sleep(0.4)
    assert ranks[0].guard.lost is None
    assert [peer.rank for peer in ranks[0].guard._peers] == [1]


def test_ranks_end_with_their_launcher(start, monkeypatch):
    ranks, _ = start(2)
    monkeypatch.setattr(guard.os, "getppid", lambda: 1)
    assert all(one.guard.why(10) == "the launcher is gone" for one in ranks)
