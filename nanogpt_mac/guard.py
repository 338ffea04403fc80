"""Whether all ranks of a run are alive: where one is gone, hangs or has failed, the run ends on every rank.

A collective waits for its last rank, for half an hour or for ever, whatever has become of that one. So a thread of each
rank says every second that it is there and how far it has come, over a connection to rank 0, which decides for all.
The system closes the connection of a process that was killed; one that was stopped (SIGSTOP, a laptop asleep, a cable
pulled) falls silent; one whose main thread hangs comes no further.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nanogpt_mac import signals

BEAT_S = 1.0
SILENT_S = 15.0  # without a word of a rank
STALLED_S = 30.0  # in which all are there and none comes further; or five times the longest of the last iterations
PATIENT_S = 900.0  # the same while something compiles or is written
GRACE_S = 6.0  # for the main thread to end by itself, once the run is over
LINGER_S = 2.0  # for the others to hear why
POLL_S = 0.25

Progress = Callable[[], tuple[int, bool]]  # how far the main thread has come, and whether it may take long now


@dataclass
class _Peer:
    """Another rank, as the one at the other end of a connection knows it."""

    connection: socket.socket
    rank: int = -1  # not said yet
    pid: int = 0
    host: str = ""
    turns: int = 0
    patient: bool = True
    heard: float = field(default_factory=time.monotonic)
    left: bool = False  # it has ended, and said so
    rest: bytes = b""

    def messages(self) -> list[dict[str, Any]] | None:
        """What has come; None where the other end is closed."""
        try:
            data = self.connection.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [message for line in lines if isinstance(message := json.loads(line), dict)]

    def tell(self, **message: Any) -> None:
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def kill(self) -> None:
        """It hangs and hears nothing: a launcher that only asked it to end would wait for ever."""
        if self.host == socket.gethostname() and self.pid != os.getpid():
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Guard:
    """One rank's. `lost` says why the run is over; `hint`, which one rank shows behind it, what to do."""

    hint: Callable[[], str] = staticmethod(lambda: "start again")

    def __init__(self, rank: int, size: int, progress: Progress) -> None:
        self.rank, self.size, self.progress = rank, size, progress
        self.lost: str | None = None
        self._parent = os.getppid()
        self._over, self._done = threading.Event(), threading.Event()
        self._bye = ""
        self._peers: list[_Peer] = []
        self._server: socket.socket | None = None
        self.token = ""

    def listen(self, address: str) -> dict[str, Any]:
        """On rank 0: where the others find it, and the word that they are known by."""
        self._server = socket.create_server((address, 0), backlog=self.size)
        self.token = secrets.token_hex(16)
        return {"address": address, "port": self._server.getsockname()[1], "token": self.token}

    def start(self, place: dict[str, Any]) -> None:
        """Watch from now on; `place` is what `listen` gave on rank 0."""
        self.token = place["token"]
        if self._server is None:
            connection = socket.create_connection((place["address"], place["port"]), timeout=SILENT_S)
            self._peers = [_Peer(connection, rank=0)]
            mine = {"token": self.token, "rank": self.rank, "pid": os.getpid(), "host": socket.gethostname()}
            self._peers[0].tell(**mine)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def why(self, seconds: float = 3.0) -> str | None:
        """After an error in a collective: what has become of another rank, as soon as it is known; None: nothing."""
        self._over.wait(seconds)
        return self.lost

    def line(self) -> str:
        """What the user reads; empty on all ranks but one, the first of those that are left."""
        speaks = self.rank == 0 or (self.rank == 1 and str(self.lost).startswith("rank 0 "))
        return f"train.py: the run ends on every rank: {self.lost}; {self.hint()}" if speaks else ""

    def leave(self, reason: str = "") -> None:
        """This rank ends; with a reason, which is one line, so do all others."""
        if not self._done.is_set():
            self._bye = reason
            self._done.set()
            self._thread.join(2 * LINGER_S)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for source in (self._server, *self._peers):
            if source is not None:
                entry = source.connection if isinstance(source, _Peer) else source
                entry.setblocking(False) if entry is self._server else entry.settimeout(SILENT_S)
                selector.register(entry, selectors.EVENT_READ, source)
        self._still, self._seen = time.monotonic(), -1  # since when, at which turn
        self._gaps: deque[float] = deque([0.0], maxlen=4 * self.size)
        beat = began = time.monotonic()
        while self.lost is None and not self._done.is_set():
            for key, _ in selector.select(POLL_S):
                peer = key.data
                if not isinstance(peer, _Peer):
                    connection, _ = peer.accept()
                    connection.settimeout(SILENT_S)
                    selector.register(connection, selectors.EVENT_READ, found := _Peer(connection))
                    self._peers.append(found)
                elif not self._heard(peer):
                    selector.unregister(peer.connection)
            now = time.monotonic()
            if now >= beat:
                beat = now + BEAT_S
                turns, patient = self.progress()
                self._tell(turns=turns, patient=patient)
            self._judge(now, began)
        self._tell(bye=self._bye) if self.lost is None else self._tell(end=self.lost)
        if self.lost is not None:
            self._over.set()
            self._end()
        until = time.monotonic() + (LINGER_S if self._bye or self.lost else 0.0)
        for peer in self._peers:  # closed with words unread, a connection would lose those that were told last
            peer.connection.settimeout(max(0.01, until - time.monotonic()))
            with suppress(OSError):
                while not peer.left and peer.connection.recv(1 << 16):
                    peer.connection.settimeout(max(0.01, until - time.monotonic()))
            peer.connection.close()
        if self._server is not None:
            self._server.close()
        selector.close()

    def _tell(self, **message: Any) -> None:
        for peer in self._peers:
            if not peer.left:
                peer.tell(**message)

    def _heard(self, peer: _Peer) -> bool:
        """Take what a rank says; False once there will be no more of it."""
        messages = peer.messages()
        if messages is None:
            if peer.rank >= 0 and not peer.left:
                self.lost = self.lost or f"{peer.name} is gone: it was killed, or has crashed"
            peer.left = True
            return False
        for message in messages:
            if self._server is not None and peer.rank < 0:
                if message.get("token") != self.token:  # not one of ours
                    peer.connection.close()
                    self._peers.remove(peer)
                    return False
                peer.rank, peer.pid, peer.host = message["rank"], message["pid"], message["host"]
                peer.tell(pid=os.getpid(), host=socket.gethostname())
            peer.pid, peer.host = message.get("pid", peer.pid), message.get("host", peer.host)
            peer.turns, peer.patient = message.get("turns", peer.turns), message.get("patient", peer.patient)
            if "end" in message:
                self.lost = self.lost or message["end"]
            if "bye" in message:
                peer.left = True
                if message["bye"]:
                    self.lost = self.lost or f"{peer.name} has ended: {message['bye']}"
        return True

    def _judge(self, now: float, began: float) -> None:
        """What silence and stillness mean."""
        if self.lost is not None:
            return
        for peer in self._peers:
            if not peer.left and peer.rank >= 0 and now - peer.heard > SILENT_S:
                self.lost = f"{peer.name} has not answered for {now - peer.heard:.0f} s: it hangs or is cut off"
                peer.kill()
                return
        if os.getppid() != self._parent:
            self.lost = "the launcher is gone"
        if self._server is None:
            return
        if now - began > PATIENT_S and len(self._peers) < self.size - 1:
            self.lost = f"only {len(self._peers) + 1} of {self.size} ranks have come within {PATIENT_S:.0f} s"
        mine, patient = self.progress()
        turns = [mine, *(peer.turns for peer in self._peers)]
        if sum(turns) != self._seen:
            self._gaps.append(now - self._still)
            self._still, self._seen = now, sum(turns)
        patient = patient or any(peer.patient and not peer.left for peer in self._peers)
        still, limit = now - self._still, PATIENT_S if patient else max(STALLED_S, 5 * max(self._gaps))
        if still > limit:
            behind = [peer.name for peer in self._peers if peer.turns < max(turns)]
            behind = (["rank 0"] if turns[0] < max(turns) else []) + behind
            who = f"{', '.join(behind)} hangs" if behind else "all ranks are there and none goes on"
            self.lost = f"no iteration for {still:.0f} s: {who}"

    def _end(self) -> None:
        """The run is over. The main thread may be in a collective that never returns: it has some seconds."""
        if not self._done.wait(GRACE_S):
            signals.end_now(1, self.line())
