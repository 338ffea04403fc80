"""What every benchmark here shares: rounds that take turns, their figures, the machine's facts and one JSON document.

A *side* is one program of a comparison. A *round* runs every side once, back to back, in an order that moves on by one
each round, so that whatever else the machine does meanwhile hits all sides alike. Ratios are made within a round.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nanogpt_mac.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
# That change how fast something is, less those that hold a path.
VARIABLES = ("OMP_", "MKL_", "NANOGPT_MAC_", "PYTORCH_", "TORCHINDUCTOR_AUTOGRAD", "MLX_")
MAY_BE_0 = ("check", "dropout", "others", "seconds", "warmup")
PACKAGES = ("torch", "triton", "mlx", "mlx-lm", "numpy", "wandb")


# -- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Where a side's measurements lie."""

    count: int
    min: float
    p10: float
    median: float
    p90: float
    max: float


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the base: above 1 is faster. One value a round, and where those lie."""

    value: float  # geometric mean of the rounds
    min: float
    median: float
    max: float
    rounds: tuple[float, ...]


def figures(values: Iterable[float]) -> Figures:
    """Quantiles between measurements are interpolated linearly. ValueError without any."""
    array = np.asarray(list(values), float)
    if not len(array):
        raise ValueError("no measurements")
    low, p10, median, p90, high = (float(q) for q in np.quantile(array, [0, 0.1, 0.5, 0.9, 1]))
    return Figures(len(array), low, p10, median, p90, high)


def ratio(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """`base`'s time over `other`'s, round by round from the medians within a round; rounds as measured, in order."""
    pairs = [float(np.median(b) / np.median(o)) for b, o in zip(base, other, strict=True)]
    mean = math.exp(float(np.mean(np.log(pairs))))
    return Ratio(mean, min(pairs), float(np.median(pairs)), max(pairs), tuple(pairs))


# -- rounds that take turns -------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One program. `run()` makes one round's measurements, in `unit`; `facts` says what it is and how it was set."""

    name: str
    run: Callable[[], Sequence[float]]
    facts: dict[str, Any] = field(default_factory=dict)
    unit: str = "ms an iteration"
    rounds: list[list[float]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        every = figures(value for measured in self.rounds for value in measured)
        medians = [float(np.median(measured)) for measured in self.rounds]
        return {"name": self.name, "unit": self.unit, **self.facts, "figures": asdict(every), "round_medians": medians}


def interleave(sides: Sequence[Side], rounds: int, deadline: float) -> None:
    """Fill every side's `rounds`. The first round always runs; a later one only where it should end before `deadline`,
    a value of time.monotonic()."""
    for number in range(rounds):
        begin = time.monotonic()
        for index in range(len(sides)):
            side = sides[(number + index) % len(sides)]
            side.rounds.append(list(side.run()))
        now = time.monotonic()
        if now + (now - begin) > deadline:
            return


def compared(sides: Sequence[Side]) -> dict[str, Any]:
    """The sides' documents, and every side's ratio against the first."""
    base = sides[0]
    ratios = {side.name: asdict(ratio(base.rounds, side.rounds)) for side in sides[1:]}
    return {"base": base.name, "rounds": len(base.rounds), "sides": [s.document() for s in sides], "faster": ratios}


# -- what ran where ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Facts of this machine and its software. A package is named where it is installed, imported or not."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    torch = sys.modules.get("torch")
    card = None
    if torch is not None and torch.cuda.is_available():
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    return {
        "card": card,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": " ".join(filter(None, (platform.system(), platform.mac_ver()[0], platform.machine()))),
        "python": platform.python_version(),
        "versions": versions,
        "threads": torch.get_num_threads() if torch is not None else None,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
        "load": [round(value, 2) for value in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def checksum(folder: Path, pattern: str) -> str:
    """Of the files `pattern` in `folder`: names a checkout, which may have come without its git history."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit of this checkout, read from .git; None where there is none."""
    git = ROOT / ".git"
    with suppress(OSError):
        if git.is_file():  # a worktree
            git = Path(git.read_text().partition(":")[2].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        return (common / head[5:]).read_text().strip()
    return None


# -- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """That also refuses, with exit code 2, numbers that nothing can be made of, and files that are not there."""

    def parse_args(self, *given: Any) -> Any:
        found = super().parse_args(*given)
        for name, value in vars(found).items():
            of = f"argument --{name.replace('_', '-')}: {value}"
            for number in value if isinstance(value, list | tuple) else [value]:
                enough = type(number) not in (int, float) or number > 0 or (number == 0 and name in MAY_BE_0)
                if not enough:
                    self.error(f"{of}: use {'0 or more' if name in MAY_BE_0 else 'a number above 0'}")
            if name in ("text", "read") and value is not None and not value.is_file():
                self.error(f"{of}: there is no such file")
            if name in ("out", "plot", "results") and value is not None and not value.parent.is_dir():
                self.error(f"{of}: there is no such folder; make it first")
        return found


def run(main: Callable[[], int]) -> NoReturn:
    """What a script ends with: its exit code, and 2 with one line where something was given that cannot be used."""
    try:
        code = main()
    except InputError as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        code = 2
    sys.exit(code)


def parser(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """With the options that every script has."""
    made = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="how often each side runs (default %(default)s)")
    made.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="start no round that ends later")
    made.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes beside standard output")
    return made


def add_turns(parser: argparse.ArgumentParser) -> None:
    """For scripts that compile for long: several started together compile side by side and are timed one by one."""
    parser.add_argument("--turns", type=Path, metavar="FOLDER", help="shared with others, which are timed in turn")
    parser.add_argument("--others", type=int, default=0, help="that share it: timing starts when all have compiled")


@contextmanager
def turn(args: argparse.Namespace, deadline: float) -> Iterator[None]:
    """Within, nothing that shares `--turns` compiles or is timed. Waits for that, but no longer than `deadline`."""
    if args.turns is None:
        yield
        return
    args.turns.mkdir(parents=True, exist_ok=True)
    (args.turns / f"{os.getpid()}.ready").touch()
    while len(list(args.turns.glob("*.ready"))) <= args.others and time.monotonic() < deadline:
        time.sleep(0.1)
    with (args.turns / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def deadline(args: argparse.Namespace) -> float:
    """Call it first: `--limit` counts from here."""
    return time.monotonic() + args.limit


def finish(what: str, args: argparse.Namespace, found: Mapping[str, Any], done: bool = True) -> None:
    """Write the document where `--out` says, and print it once all is `done`."""
    document = {
        "what": what,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])]),
        "commit": commit(),
        "ours": checksum(ROOT / "nanogpt_mac", "**/*.py"),
        "machine": machine(),
        **found,
    }
    text = json.dumps(_rounded(document), indent=1, default=str) + "\n"
    text = re.sub(r"\[[-\d.e,\s+]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list of numbers: a line
    if done:
        sys.stdout.write(text)
    if args.out:
        args.out.write_text(text)


def _rounded(value: Any) -> Any:
    """Seven digits are more than any of these has."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _without_folder(argument: str) -> str:
    """A path on this machine is nobody else's business."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith(("/", "~", ".")) else argument


def say(text: str) -> None:
    """Progress, beside the document."""
    print(text, file=sys.stderr, flush=True)
