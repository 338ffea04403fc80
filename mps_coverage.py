"""Which operators run on MPS, in any torch, and whether this model needs one that does not. See `--help`."""

from nanogpt_mac import script


def coverage(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.coverage.run import run

    return run(config)


if __name__ == "__main__":
    script.run("coverage", coverage)
