"""Several processes as one run: they find each other, make sure that they do the same work, and end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nanogpt_mac import files, ranks, signals
from nanogpt_mac.backends.base import BackendOptions
from nanogpt_mac.backends.kinds import KINDS, frameworks
from nanogpt_mac.backends.world import World
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.gpt.spec import TrainState
from nanogpt_mac.guard import Guard
from nanogpt_mac.ranks import STARTED_BY, Launched
from nanogpt_mac.records.run import Rank, Times, WorldFacts
from nanogpt_mac.train import checkpoint

OF_ONE_MACHINE = ("data.dir", "data.path", "data.symbols", "data_dir", "path", "run", "run_dir", "given")
CLOSE_S = 20.0
OF_THIS_ONE = (InputError, OSError, MemoryError)  # errors that no other rank is behind


class LostError(Exception):
    """Another rank is gone, hangs or has failed: everything here is to be put away, and the process to end."""


@dataclass
class Together:
    """The ranks of a run: this process's place among them, and who watches that all live. Alone, both do nothing."""

    launched: Launched = field(default_factory=Launched)
    world: World = field(default_factory=World)
    guard: Guard | None = None
    hosts: list[str] = field(default_factory=list)  # by rank
    code: int = 0  # of the run, once it is over

    @property
    def first(self) -> bool:
        """Whether this rank writes the records, shows them and keeps the checkpoints."""
        return self.world.rank == 0

    def stop(self, received: list[int]) -> int | None:
        """The signal that asks for the end, once all ranks know of one; `received` has those that came here."""
        if self.world.size == 1:
            return received[0] if received else None
        self.world.asked = bool(received)
        return (received[0] if received else signal.SIGTERM) if self.world.agreed else None

    def lost(self, error: BaseException) -> str | None:
        """After `error`: what has become of another rank, where that is behind it, for the records."""
        if self.guard is None or isinstance(error, OF_THIS_ONE) or not isinstance(error, Exception):
            return None
        if (why := self.guard.why()) is not None:
            self.guard.leave()
        return why

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Within, a mistake of one rank becomes every rank's: InputError on all, the same."""
        mistake = ""
        try:
            yield
        except InputError as error:
            mistake = str(error)
        every = self.world.gather(mistake)
        for rank, text in enumerate(every):
            if text:
                raise InputError(text if len(set(every)) == 1 else f"rank {rank}: {text}")

    def watched(self, hint: Callable[[], str]) -> None:
        """From now on `hint` says what to do should another rank end the run."""
        if self.guard is not None:
            self.guard.hint = hint

    def close(self) -> None:
        """Hang up. All is written by now, so a library that waits for ever then costs the run nothing."""
        line = f"train.py: rank {self.world.rank} ends without hanging up, after {CLOSE_S:.0f} s; the run is complete"
        late = threading.Timer(CLOSE_S, signals.end_now, (self.code, line))
        late.daemon = True
        late.start()
        self.world.close()
        late.cancel()

    def leave(self, reason: str) -> None:
        """This rank ends, and with it all others."""
        if self.guard is not None:
            self.guard.leave(reason)

    def same(
        self, config: Config, options: BackendOptions, environment: Mapping[str, Any], corpus: str, state: TrainState
    ) -> None:
        """InputError, on every rank the same, unless all ranks do the same work, as `options` say, by the same
        programs: what auto means may differ from machine to machine."""
        if self.world.size == 1:
            return
        backend = replace(config.backend, name=options.name, **options.settings)
        config = replace(config, backend=backend, compile=options.compile)
        facts = {
            f"{key.removesuffix('.name')}=": value
            for key, value in _flat(asdict(config)).items()
            if key not in OF_ONE_MACHINE
        }
        facts |= {f"{name} ": (environment.get("versions") or {}).get(name) for name in (*frameworks(), "numpy")}
        facts["nanogpt-mac at commit "] = (environment.get("git") or {}).get("commit")
        facts["a corpus with sha256 "] = corpus[:12]
        facts["iteration "] = state.iteration
        facts["weights with checksum "] = _checksum(state)
        facts["device "] = f"{socket.gethostname()} {own}" if (own := self.world.device()) else None
        every = [json.loads(text) for text in self.world.gather(json.dumps(facts, default=str))]
        devices = [one.pop("device ") for one in every]
        for rank, one in enumerate(every):
            for key in {**every[0], **one}:
                mine, theirs = every[0].get(key), one.get(key)
                if mine != theirs:
                    raise InputError(
                        f"rank {rank} has {key}{theirs}, rank 0 has {key}{mine}; start every rank with the same "
                        "command line, programs and files"
                    )
            if devices[rank] and devices[rank] in devices[:rank]:
                raise InputError(
                    f"backend={config.backend.name}: ranks {devices.index(devices[rank])} and {rank} share one GPU; "
                    "start as many processes as there are GPUs"
                )

    def spread(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        return self.world.gather(text if self.first else "")[0]

    def facts(self, times: Times, peak_memory: int, gradients: int) -> WorldFacts | None:
        """What the summary says of the ranks: their times, and what communication costs an iteration."""
        world = self.world
        if world.size == 1:
            return None
        alone = world.alone_ms(gradients)
        waited = sorted(world.waited_ms[len(world.waited_ms) // 2 :])  # the first iterations wait for compilers
        mine = Rank(
            rank=world.rank,
            machine=list(dict.fromkeys(self.hosts)).index(self.hosts[world.rank]),
            times=times,
            waited_ms=waited[len(waited) // 2] if waited else None if world.unmeasured else alone,
            peak_memory=peak_memory,
        )
        every = [Rank.model_validate_json(text) for text in world.gather(mine.model_dump_json())]
        waits = min((rank.waited_ms for rank in every if rank.waited_ms is not None), default=None)
        middle = every[0].times.median
        return WorldFacts(
            machines=len(set(self.hosts)),
            by=world.by,
            bytes_per_iter=4 * gradients,
            alone_ms=alone,
            exposed_ms=waits,
            exposed_share=waits / middle if waits is not None and middle else None,
            exposed_missing=world.unmeasured or None,
            ranks=every,
        )


@contextmanager
def joined(launched: Launched, config: Config, options: BackendOptions) -> Iterator[Together]:
    """Within, all ranks have found each other and are watched. Where another one ends the run, this process ends."""
    if launched.size == 1:
        yield Together(launched)
        return
    kind, count, size = KINDS[options.name], config.gradient_accumulation_steps, launched.size
    if not kind.world:
        raise InputError(f"backend={kind.name}: trains in one process; start it without {launched.launcher}")
    if launched.launcher != kind.launcher:
        use = STARTED_BY[kind.launcher].format(size)
        raise InputError(f"backend={kind.name}: is not for {launched.launcher}; use {use} train.py ...")
    if count % size:
        same = config.batch_size * count
        other = f" and batch_size={same // size}, the same work" if same % size == 0 else ""
        raise InputError(
            f"gradient_accumulation_steps={count}: {size} ranks cannot share them; use a multiple of {size}, such as "
            f"gradient_accumulation_steps={size if other else -(-count // size) * size}{other}"
        )
    kind.prepare(options)
    world = kind.load_world().join(launched, kind.name)
    hosts = world.gather(socket.gethostname())
    together = Together(launched, world, guard := Guard(world.rank, world.size, world.progress), hosts)
    place = guard.listen(launched.address if len(set(hosts)) > 1 else "127.0.0.1") if together.first else {}
    guard.start(json.loads(together.spread(json.dumps(place))))
    try:
        yield together
    except LostError:
        signals.end_now(1, guard.line())  # at once: libraries would wait for the others until they give up
    except Exception as error:
        if together.lost(error) is not None:
            signals.end_now(1, guard.line())
        guard.leave(f"{type(error).__name__}: {reason(error)}")
        raise
    except BaseException:
        guard.leave("it was ended")
        raise
    else:
        world.gather("")  # no rank hangs up on the others' last word
        guard.leave()
        together.close()


# -- torchrun --max-restarts ------------------------------------------------------------------------------------------


def _note() -> Path:
    """Where rank 0 writes down its folder for the processes that torchrun may start in place of these."""
    return ranks.shared_folder() / "run"


def note(launched: Launched, folder: Path) -> None:
    """Remember that the run under way has `folder`, if it may be started anew."""
    if launched.rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        files.write_aside(_note(), str(folder.resolve()))


def again(config: Config, launched: Launched) -> Config:
    """Where torchrun has started the run anew: the same run from its last checkpoint, in a folder beside the first."""
    if launched.restarts == 0:
        return config
    note = _note()
    last = Path(note.read_text()) if note.is_file() else None
    fixed = "{" not in config.run_dir
    config = replace(config, run_dir=f"{config.run_dir}-{launched.restarts + 1}" if fixed else config.run_dir)
    if last is None or not checkpoint.is_ours(last):
        return config
    return replace(config, init_from="resume", run=str(last))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _checksum(state: TrainState) -> int:
    found = 0
    for name in sorted(state.weights):
        found = zlib.crc32(state.weights[name].tobytes(), found)
    return found
