"""Text from a checkpoint, on any back end: `python sample.py run=runs/DATE/TIME-NAME`. See `--help`."""

from nanogpt_mac import script


def sample(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.train.sample import run

    return run(config)


if __name__ == "__main__":
    script.run("sample", sample)
