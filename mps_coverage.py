"""Which operators run on MPS, in any torch, and whether this model needs one that does not. See `--help`."""

import sys

from nanogpt_mac.cli import main


def coverage(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.coverage.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main("coverage", coverage))
