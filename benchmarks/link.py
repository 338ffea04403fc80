"""How long a sum over all ranks takes, by its size: what docs/scale.md plans with. Start it as train.py is started.

    torchrun --nproc_per_node=2 benchmarks/link.py
    mlx.launch -n 2 --python .venv/bin/python benchmarks/link.py

Rank 0 prints the median and the least of five sums of float32, in ms, and what t = c + 2 (N - 1) / N bytes / B makes of
them: c, in ms, and B, in GB/s, through the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median

import _side_by_side as beside

from nanogpt_mac import ranks
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.errors import InputError

COUNTS = (1_000, 100_000, 1_000_000, 10_000_000)  # float32; GPT-2 124M has 124,475,904


def main(argv: Sequence[str] | None = None) -> int:
    parser = beside.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="*", default=COUNTS, help="float32 in each sum")
    counts = parser.parse_args(argv).counts
    launched = ranks.launched()
    if launched.size == 1:
        raise InputError("one process has nobody to sum with; start it by torchrun or mlx.launch, as --help shows")
    kind = KINDS["mlx" if launched.launcher == ranks.MLX else "cpu"]
    world = kind.load_world().join(launched, kind.name)
    times = {count: world.sum_ms(count) for count in counts}
    if world.rank == 0:
        (few, least), (many, most) = ((4 * count, median(times[count])) for count in (min(counts), max(counts)))
        share = 2 * (world.size - 1) / world.size
        per_byte = (most - least) / (share * (many - few)) if many > few else float("nan")  # ms
        found = {"size": world.size, "by": world.by, "constant_ms": least - per_byte * share * few}
        found |= {"gb_per_s": 1e-6 / per_byte, "ms": {n: [median(ms), min(ms)] for n, ms in times.items()}}
        print(json.dumps(found), flush=True)
    world.gather("")
    world.close()
    return 0


if __name__ == "__main__":
    beside.run(main)
