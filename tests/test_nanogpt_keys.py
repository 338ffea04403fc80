"""nanoGPT's own commands get the equivalent in one line, and that line is a command that composes."""

import re
import shlex
import sys

import pytest

from nanogpt_mac import cli
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import merged

TRAIN = [
    ("--device=mps", "backend=mps"),
    ("device=mps", "backend=mps"),
    ("--device mps --compile", "backend=mps compile=true"),
    ("device=cuda:0", "backend=cuda"),
    ("--batch_size=12", "batch_size=12"),
    ("--compile=False", "compile=false"),
    ("config/train_shakespeare_char.py", ""),
    ("config/train_shakespeare_char.py --device=mps --compile=False", "backend=mps compile=false"),
    ("config/train_gpt2.py", "experiment=gpt2"),
    ("config/finetune_shakespeare.py --init_from=gpt2-xl", "experiment=finetune_shakespeare init_from=gpt2-xl"),
    (
        "config/eval_gpt2_xl.py",
        "experiment=gpt2 batch_size=8 eval_iters=500 max_iters=1 checkpoint=false init_from=gpt2-xl",
    ),
    ("dataset=shakespeare", "data=shakespeare"),
    ("dataset=mine", "data=text path=data/mine/input.txt"),
    ("out_dir=out-x", "run_dir=out-x"),
    ("--init_from=resume --out_dir=out-x", "init_from=resume run=out-x"),
    ("--init_from=resume", "init_from=resume run=runs/DATE/TIME-NAME"),
    ("wandb_log=True wandb_project=owt wandb_run_name='a b'", "wandb.mode=online wandb.project=owt 'wandb.name=a b'"),
    ("wandb_log=False", "wandb.mode=disabled"),
    ("eval_only=True", "max_iters=1 checkpoint=false"),
    ("always_save_checkpoint=False max_iters=9", "max_iters=9"),
    ("backend=nccl", ""),
    (
        "n_layer=4 n_head=4 n_embd=128 block_size=64 dropout=0.0 bias=False",
        "model.n_layer=4 model.n_head=4 model.n_embd=128 model.block_size=64 model.dropout=0.0 model.bias=false",
    ),
    ("--learning_rate=1e-3 --learning_rate=1e-4", "learning_rate=1e-4"),
    ("experiment=smoke --decay_lr=False", "experiment=smoke decay_lr=false"),
    ("--dtype=bfloat16 --gradient_accumulation_steps=2", "dtype=bfloat16 gradient_accumulation_steps=2"),
]  # fmt: skip
SAMPLE = [
    ("--out_dir=out-x", "run=out-x"),
    ("--init_from=resume --out_dir=out-x --start='To be'", "run=out-x 'prompt=To be'"),
    ("--init_from=gpt2-xl --start=FILE:prompt.txt --num_samples=5", "prompt=FILE:prompt.txt num_samples=5 run=gpt2-xl"),
    ("run=x device=cpu top_k=200", "run=x backend=cpu top_k=200"),
    ("--run=x", "run=x"),
]


@pytest.mark.parametrize(
    ("command", "typed", "ours"),
    [("config", *case) for case in TRAIN] + [("sample", *case) for case in SAMPLE],
)
def test_the_equivalent_is_one_line_and_a_command(command, typed, ours):
    script = {"config": "train.py"}.get(command, f"{command}.py")
    with pytest.raises(InputError) as error:
        cli.compose(shlex.split(typed), command)
    assert str(error.value).endswith(f"written as for nanoGPT; use: python {script} {ours}".rstrip())
    if command != "sample" or "run=" in ours:
        cli.compose(shlex.split(ours), command)


@pytest.mark.parametrize(
    "typed",
    [["--config-dir", "conf", "seed=1"], ["backend=mps", "compile=False"], ["data=shakespeare", "batch_size=12"]],
)
def test_what_is_ours_is_left_alone(typed):
    from nanogpt_mac import nanogpt_keys

    nanogpt_keys.refuse("train.py", typed, cli._keys("config"), cli.OPTIONS)


def test_every_key_of_nanogpts_scripts_is_known():
    """train.py's, sample.py's and bench.py's globals at karpathy/nanoGPT 3adf61e."""
    keys = shlex.split("""
    out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
    wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
    dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters
    min_lr backend device dtype compile seed
    """)
    values = {"device": "cpu", "dataset": "shakespeare", "backend": "nccl", "init_from": "gpt2", "dtype": "float32",
              "compile": "False", "out_dir": "x", "wandb_project": "x", "wandb_run_name": "x"}  # fmt: skip
    values |= dict.fromkeys(("eval_only", "wandb_log", "bias", "decay_lr", "always_save_checkpoint"), "False")
    for command, script, some in (
        ("config", "train.py", keys),
        ("sample", "sample.py", ["out_dir", "start", "num_samples", "max_new_tokens", "temperature", "top_k", "seed"]),
    ):
        ours = []
        for key in some:
            with pytest.raises(InputError) as error:
                cli.compose([f"--{key}={values.get(key, '1')}"], command)
            ours.append(shlex.split(str(error.value).partition(f"use: python {script}")[2]))
        cli.compose(merged(*ours), command)


def test_a_config_file_of_ones_own_and_the_exit_code(monkeypatch, capsys):
    for argument, line in (
        ("config/mine.py", r"train\.py: config/mine\.py: a file of Python is not read; use its keys as key=value\n"),
        ("--device=mps", r"train\.py: --device=mps: written as for nanoGPT; use: python train\.py backend=mps\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", argument])
        assert cli.main("config", lambda config: 0) == 2
        assert re.fullmatch(line, capsys.readouterr().err)
