"""Constants that several tests share."""

from pathlib import Path

from nanogpt_mac.backends import detect

ROOT = Path(__file__).resolve().parents[1]

# Every way of computing the model that this machine has: (back end, compiled).
WAYS = [("cpu", False), ("cpu", True), ("mlx", False), ("mlx", True)]
WAYS += [(name, compiled) for name in ("mps", "cuda") if detect.missing(name) is None for compiled in (False, True)]


def prepared(folder: Path) -> list[Path]:
    """Everything in a data folder but the lock files, which stay."""
    return [place for place in folder.iterdir() if place.suffix != ".lock"]
