"""The field's other comparisons, so that their numbers can be trusted: `python bench.py suite=ops`. See `--help`."""

from nanogpt_mac import script


def bench(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.suites.run import run

    return run(config)


if __name__ == "__main__":
    script.run("bench", bench)
