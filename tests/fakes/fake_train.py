"""A stand-in for train.py, in milliseconds: writes the records of a run, or fails as BEHAVIOUR says.

The tests copy it with BEHAVIOUR set. Every start is noted in `starts.txt` beside it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

BEHAVIOUR = "works"
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder, iters = Path(given["run_dir"].strip("'")), int(given["max_iters"])
with (Path(__file__).parent / "starts.txt").open("a") as file:
    file.write(f"{folder.name} {os.getpid()}\n")
pilot = folder.name.startswith("pilot")
how = BEHAVIOUR.removeprefix("later-") if BEHAVIOUR.startswith("later-") and not pilot else BEHAVIOUR


def record(count, ms=10.0):
    rest = {"loss": 4.0, "lr": 1e-3, "grad_norm": 1.0, "dispatch_ms": 1.0, "tokens_per_s": 1e3, "memory": 0}
    rows = [{"kind": "iteration", "iter": i, "iter_ms": ms} | rest for i in range(count)]
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.writelines(json.dumps(row) + "\n" for row in rows)


def hang(*_signal):
    time.sleep(600)


if how == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "memory":
    raise MemoryError
if how == "mps-memory":
    print("RuntimeError: MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 GB)")
    print("another line")
    sys.exit(1)
if how == "missing-op":
    raise NotImplementedError("The operator 'aten::foo' is not currently implemented for the MPS device. More words.")
if how == "bad-input":
    print("train.py: backend.fused_adamw=true: torch has none", file=sys.stderr)
    sys.exit(2)
if how == "diverged":
    print("iter 7: loss is nan: training has diverged and stops here\ndiverged: somewhere")
    sys.exit(1)
if how == "nothing":
    sys.exit(0)
if how == "raises":
    raise RuntimeError("the first line\nand a second")
if how == "hangs":
    signal.signal(signal.SIGTERM, hang)
    hang()
if how == "hangs-later":
    record(3)
    hang()
if how == "endless":
    while True:
        record(1)
        time.sleep(0.05)

code, done = 0, iters
if how in ("slow", "later-slow", "crawls"):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(143))
    for done in range(1, iters + 1):  # noqa: B007
        record(1)
        time.sleep(0.1)
        if stopped:
            code = 143
            break
else:
    record(iters)
summary = {
    "schema": 2,
    "times": {"median": 10.0, "min": 10.0, "count": done},
    "first_iter_s": 0.01,
    "exit_state": "finished" if not code else "stopped",
    "flops_per_iter": 1e6,
    "backend": given["backend"],
    "device": "cpu",
    "compile": False,
    "dtype": "float32",
    "matmul_precision": "highest",
    "sync": "completion",
    "seed": 1337,
    "model": {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "vocab_size": 9},
    "parameters": 100,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_iters": iters,
    "corpus": "text",
    "corpus_facts": {"name": "text", "label": "text", "sha256": "0" * 64},
    "init_from": "scratch",
}
(folder / "summary.json").write_text(json.dumps(summary))
if how == "lingers":
    time.sleep(60 if pilot else 0)
sys.exit(code)
