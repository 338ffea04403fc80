"""Compare every variant of training that this machine has: `python compare.py`. See `--help`."""

from nanogpt_mac import script


def compare(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.compare.run import run

    return run(config)


if __name__ == "__main__":
    script.run("compare", compare)
