"""What watching costs: a program under the detector and without it, on the same simulated device, in turns.

`python program_overhead.py ROUNDS STEPS MAP PROGRAM ARGUMENTS...` in the program's folder, with STEPS and MAP as
program_reference.py has them; prints, as JSON, the middle and the range of the rounds' ratios of wall and of CPU time,
and the seconds. A run is a whole process: Python and torch start in both. It ends where the watched run ends.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanogpt_mac import simulator

HERE = Path(__file__).resolve().parent


def timed(argv):
    """Wall and CPU seconds of a process, its own children's included, and its exit code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = simulator.environment(fallback=True) | {"KINETO_LOG_LEVEL": "99", "TORCHDYNAMO_DISABLE": "1"}
    code = subprocess.run(argv, env=os.environ | environment, capture_output=True, check=False).returncode
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, code


def main():
    rounds, steps, mapped, *argv = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        task = {"argv": argv, "steps": int(steps) or None, "map_cuda": mapped == "cuda"}
        task |= {"path": os.environ.get("PYTHONPATH", ""), "answer": f"{folder}/answer.json"}
        Path(folder, "task.json").write_text(json.dumps(task))
        runs = {
            "plain": [sys.executable, str(HERE / "program_reference.py"), "-", steps, mapped, *argv],
            "watched": [sys.executable, "-m", "nanogpt_mac.fallbacks.program", f"{folder}/task.json"],
        }
        seen = {name: [] for name in runs}
        for number in range(int(rounds)):
            for name in sorted(runs, reverse=bool(number % 2)):
                seen[name].append(timed(runs[name]))
        answer = json.loads(Path(folder, "answer.json").read_text())
    made = {"codes": {name: sorted({code for *_, code in one}) for name, one in seen.items()}}
    for i, what in enumerate(("wall", "cpu")):
        ratios = sorted(w[i] / p[i] for w, p in zip(seen["watched"], seen["plain"], strict=True))
        middle = {name: round(statistics.median(run[i] for run in one), 2) for name, one in seen.items()}
        made[what] = middle | {"ratio": [round(r, 2) for r in (statistics.median(ratios), ratios[0], ratios[-1])]}
    print(json.dumps(made | {"reading_s": round(answer["watched_s"], 2)}))


if __name__ == "__main__":
    main()
