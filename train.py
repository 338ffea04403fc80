"""Train nanoGPT's GPT on one back end: `python train.py backend=mps compile=false`. See `--help`."""

from nanogpt_mac import script


def train(config):  # imported late: `--help` needs no framework
    from nanogpt_mac.train.session import run

    return run(config)


if __name__ == "__main__":
    script.run("config", train)
