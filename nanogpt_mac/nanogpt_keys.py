"""nanoGPT's own commands (`train.py config/train_gpt2.py --device=mps`), answered with the same in this project's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence

from nanogpt_mac.errors import InputError

# A file of nanoGPT's config/ -> overrides here. Its eval_only is a run of one iteration, which evaluates before it.
EVALUATE = ("experiment=gpt2", "batch_size=8", "eval_iters=500", "max_iters=1", "checkpoint=false")
FILES = {
    "train_shakespeare_char": (),
    "train_gpt2": ("experiment=gpt2",),
    "finetune_shakespeare": ("experiment=finetune_shakespeare",),
    "eval_gpt2": (*EVALUATE, "init_from=gpt2"),
    "eval_gpt2_medium": (*EVALUATE, "init_from=gpt2-medium"),
    "eval_gpt2_large": (*EVALUATE, "init_from=gpt2-large"),
    "eval_gpt2_xl": (*EVALUATE, "init_from=gpt2-xl"),
}
# A key of nanoGPT's train.py, sample.py or bench.py that has another name here, or none; those with the same name and
# meaning are not listed. {} is its value.
RENAMED: dict[str, tuple[str, ...]] = {
    "out_dir": ("run_dir={}",),
    "start": ("prompt={}",),
    "wandb_project": ("wandb.project={}",),
    "wandb_run_name": ("wandb.name={}",),
    **{key: (f"model.{key}={{}}",) for key in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")},
    "always_save_checkpoint": (),  # `last` is always kept, and `best` apart from it
    "real_data": (),
    "profile": (),
}
BY_VALUE: dict[str, dict[str, tuple[str, ...]]] = {  # where the value decides
    "wandb_log": {"true": ("wandb.mode=online",), "false": ("wandb.mode=disabled",)},
    "eval_only": {"true": ("max_iters=1", "checkpoint=false"), "false": ()},
    "backend": {"nccl": (), "gloo": (), "mpi": ()},  # of several processes, which there are none of here
    "dataset": {name: (f"data={name}",) for name in ("shakespeare_char", "shakespeare", "openwebtext")},
    "device": {},
}
CONFIG_FILE = re.compile(r"(?:.*/)?(\w+)\.py")
OPTION = re.compile(r"--([A-Za-z]\w*)(?:=(.*))?", re.DOTALL)
PAIR = re.compile(r"(\w+)=(.*)", re.DOTALL)


def refuse(program: str, arguments: Sequence[str], keys: Collection[str], options: Collection[str]) -> None:
    """InputError with the command that does what `arguments` ask of nanoGPT's script, where they are written as its.

    `keys` are those of this command, `options` what it takes with dashes (Hydra's). A word after an option without `=`
    is its value, as other programs have it.
    """
    theirs, made = list[str](), list[str]()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, pair = OPTION.fullmatch(argument), PAIR.fullmatch(argument)
        file = CONFIG_FILE.fullmatch(argument)
        if option and (option[1] not in options or (option[1] in keys and option[2])):
            key, value = option[1], option[2]
            if value is None:
                value = rest.pop(0) if rest and re.fullmatch(r"(?!-)[^=]+(?<!\.py)", rest[0]) else "true"
        elif pair and _only_theirs(pair[1], pair[2], keys):
            key, value = pair[1], pair[2]
        elif file and not pair and "runs" not in keys:
            if file[1] not in FILES:
                raise InputError(f"{argument}: a file of Python is not read; use its keys as key=value")
            theirs.append(argument)
            made += FILES[file[1]]
            continue
        else:
            made.append(argument)
            continue
        theirs.append(argument)
        made += _ours(key, value)
    if theirs:
        ours = shlex.join(["python", program, *_settled(made, "prompt" in keys)])
        raise InputError(f"{shlex.join(theirs)}: written as for nanoGPT; use: {ours}")


def _only_theirs(key: str, value: str, keys: Collection[str]) -> bool:
    if key in BY_VALUE and key in keys:
        return value in BY_VALUE[key]
    return key not in keys and (key in RENAMED or key in BY_VALUE)


def _ours(key: str, value: str) -> tuple[str, ...]:
    value = value.lower() if value in ("True", "False", "None") else value
    value = {"none": "null"}.get(value, value)
    if key == "device":
        return (f"backend={value.partition(':')[0]}",)
    if key == "dataset" and value not in BY_VALUE[key]:
        return ("data=text", f"path=data/{value}/input.txt")
    if key in BY_VALUE and value in BY_VALUE[key]:
        return BY_VALUE[key][value]
    return tuple(each.format(value) for each in RENAMED.get(key, (f"{key}={{}}",)))


def _settled(made: Sequence[str], samples: bool) -> list[str]:
    """Of overrides of one key the last, as in nanoGPT; and where a checkpoint lies is `run` to whoever reads one."""
    last: dict[str, str] = {}
    for override in made:
        key = override.partition("=")[0]
        last.pop(key, None)
        last[key] = override
    source = last.get("init_from", "init_from=resume" if samples else "")
    if "run_dir" in last and source == "init_from=resume":
        last["run_dir"] = last["run_dir"].replace("run_dir=", "run=", 1)
    elif source == "init_from=resume" and not samples:
        last.setdefault("run", "run=runs/DATE/TIME-NAME")
    if samples and "init_from" in last:
        given = last.pop("init_from").partition("=")[2]
        if given != "resume":
            last.setdefault("run_dir", f"run={given}")
    return list(last.values())
