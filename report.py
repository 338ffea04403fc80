"""Reports over runs that exist: `python report.py runs/a runs/b`. See `--help`."""

import sys

from nanogpt_mac.cli import main


def report(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.compare.leaderboard import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main("report", report))
