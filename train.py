"""Train nanoGPT's GPT on one back end: `python train.py backend=mps compile=false`. See `--help`."""

import sys

from nanogpt_mac.cli import main


def train(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.train.session import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main("config", train))
