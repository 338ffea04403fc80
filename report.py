"""Reports over runs that exist: `python report.py runs/a runs/b`. See `--help`."""

from nanogpt_mac import script


def report(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.compare.leaderboard import run

    return run(config)


if __name__ == "__main__":
    script.run("report", report)
