"""Constants that several tests share."""

from pathlib import Path

from nanogpt_mac.backends import detect

ROOT = Path(__file__).resolve().parents[2]

# Every variant of computing the model that this machine has: (back end, compiled).
VARIANTS = [("cpu", False), ("cpu", True), ("mlx", False), ("mlx", True)]
VARIANTS += [(name, compiled) for name in ("mps", "cuda") if detect.missing(name) is None for compiled in (False, True)]
