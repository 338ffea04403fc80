"""A stand-in for train.py under Hydra's launchers: the real command line, a planted loss in place of the training.

The loss is |log10(learning_rate) + 3| + seed / 1000. Seed 13 diverges, seed 100 trains until a signal comes.
"""

import math
import signal
import sys
import time

from nanogpt_mac.cli import main
from nanogpt_mac.files import run_folder, write_json


def train(config):
    if config.batch_size == 3:
        sys.exit(2)
    folder, received = run_folder(config.run_dir, config.backend.name), []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: received.append(number))
    (folder / "began").touch()
    while config.seed == 100 and not received:
        time.sleep(0.02)
    loss, diverged = abs(math.log10(config.learning_rate) + 3) + config.seed / 1000, config.seed == 13
    state = "stopped" if received else "diverged" if diverged else "finished"
    model = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "vocab_size": 9}
    summary = {
        "schema": 2, "times": {"median": 10.0, "min": 10.0, "count": 9}, "exit_state": state, "flops_per_iter": 1e6,
        "backend": "cpu", "device": "cpu", "compile": False, "dtype": config.dtype, "matmul_precision": "highest",
        "sync": "completion", "seed": config.seed, "model": model, "parameters": 100, "batch_size": 1,
        "gradient_accumulation_steps": 1, "max_iters": 9, "corpus": "text", "init_from": "scratch",
        "corpus_facts": {"name": "text", "label": "text", "sha256": "0" * 64}, "best_val_loss": loss, "val_loss": loss,
        "tokens_per_s": 100.0 * config.seed, "shared_machine": config.shared_machine,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    return 128 + received[0] if received else int(diverged)


if __name__ == "__main__":
    sys.exit(main("config", train))
