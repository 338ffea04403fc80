"""The command line as a user meets it: what it accepts, and the one line it answers to everything else."""

import contextlib
import re
import resource
import subprocess
import sys

import pytest
from fakes.support import ROOT

from nanogpt_mac import cli
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.config import Config, validate
from nanogpt_mac.errors import InputError
from nanogpt_mac.overrides import merged


def test_the_command_that_the_user_asked_for_parses(compose):
    code, config, _ = compose("backend=mps", "compile=false")
    assert (code, config.backend.name, config.compile) == (0, "mps", False)


def test_defaults_are_nanogpts_shakespeare_char(compose):
    _, config, _ = compose()
    expected = {
        "max_iters": 5000, "batch_size": 64, "gradient_accumulation_steps": 1, "learning_rate": 1e-3,
        "warmup_iters": 100, "lr_decay_iters": 5000, "min_lr": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99,
        "grad_clip": 1.0, "eval_interval": 250, "eval_iters": 200, "log_interval": 10, "dtype": "float32", "seed": 1337,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    model = config.model
    sizes = (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout, model.bias)
    assert sizes == (6, 6, 384, 256, 0.2, False)
    assert (config.data.name, config.wandb.mode_here({}), config.compile) == ("shakespeare_char", "offline", "auto")
    assert config == Config(data=config.data)  # yaml and dataclasses say the same


def test_quick_is_nanogpts_macbook_recipe_and_keys_still_override(compose):
    _, config, _ = compose("experiment=quick", "model.n_layer=3", "path=x.txt")
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (3, 4, 128, 64, 0.0)
    assert (config.batch_size, config.max_iters, config.lr_decay_iters, config.eval_iters) == (12, 2000, 2000, 20)
    assert config.data.path == "x.txt"


@pytest.mark.parametrize("experiment", ["gpt2", "finetune_shakespeare", "smoke"])
def test_every_experiment_composes_and_is_valid(compose, experiment):
    code, config, _ = compose(f"experiment={experiment}")
    assert code == 0
    validate(config)


@pytest.mark.parametrize("data", ["shakespeare", "openwebtext", "text", "stand_in"])
def test_every_corpus_composes(compose, data):
    assert compose(f"data={data}")[1].data.name == data


BACKENDS = ("auto", *KINDS)
VALUES = [
    (["max_iters=0"], "max_iters=0: must be at least 1"),
    (["eval_interval=-1"], "eval_interval=-1: must be at least 0"),
    (["learning_rate=nan"], "learning_rate=nan: must be at least 0"),
    (["beta2=1.0"], "beta2=1.0: must be at least 0 and below 1"),
    (["compile=maybe"], "compile=maybe: use auto, true or false"),
    (["compile=1"], "compile=1: use auto, true or false"),
    (["dtype=float64"], "dtype=float64: use float32, bfloat16 or float16"),
    (["matmul_precision=low"], "matmul_precision=low: use highest, high or medium"),
    (["sync=never"], "sync=never: use completion, iteration or interval"),
    (["wandb.mode=on"], "wandb.mode=on: use offline, online or disabled"),
    (["backend.name=tpu"], f"backend=tpu: use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"),
    (["lr_decay_iters=2"], "lr_decay_iters=2: must be more than warmup_iters=2"),
    (["init_from=resume"], "run=null: init_from=resume needs the run"),
    (["run=runs/x"], "run=runs/x: only init_from=resume takes a run"),
    (["init_from=resume", "run=nowhere"], "run=nowhere: there is no such folder"),
    (["init_from=gpt3"], "init_from=gpt3: not a known name, file or folder"),
    (
        ["model.n_embd=130", "model.n_head=4"],
        "model.n_embd=130: model.n_head=4 does not divide it; use a multiple of 4",
    ),
    (["model.dropout=1.5"], "model.dropout=1.5: use a number from 0"),
    (
        ["model.block_size=500"],
        r"model.block_size=500: the shorter split of data=text has only 200 tokens; use at most 199",
    ),
    (["data.path=nowhere.txt"], "data.path=nowhere.txt: "),
    (["backend=cpu", "backend.fused_adamw=true", "model.n_layer=0"], "model.n_layer=0: use at least 1"),
    (["run_dir=data.txt/x"], "run_dir=data.txt/x: "),
    (["run_dir=data.txt"], "run_dir=data.txt: cannot be made: "),
    (["hydra.run.dir=data.txt"], "run_dir=data.txt: cannot be made: "),
    (["seed=99999999999999999999999"], "seed=99999999999999999999999: must be at least 0 and below 2\\*\\*63"),
]


@pytest.mark.parametrize(("overrides", "line"), VALUES)
def test_an_impossible_value_is_one_line_and_leaves_no_run(compose, tmp_path, overrides, line):
    from nanogpt_mac.train.session import run

    (tmp_path / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 44 + "0123456789" * 2)
    code, _, err = compose(
        *merged(["experiment=smoke", "backend=cpu", "wandb.mode=disabled", "data=text", "path=data.txt"], overrides),
        task=run,
    )
    assert code == 2
    assert re.fullmatch(rf"train\.py: .*{line}.*\n", err), err
    assert not (tmp_path / "runs").exists()


def test_an_absent_back_end_names_those_that_are_there(compose, tmp_path, monkeypatch):
    from nanogpt_mac.train.session import run

    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    code, _, err = compose("backend=mps", task=run)
    assert code == 2
    assert re.fullmatch(r"train\.py: backend=mps: not available here: .*Available: auto, .*cpu.*\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_needs_no_quotes_of_its_own(compose):
    for prompt in ("ROMEO: it's (a) test", "é", "12", "a=b", "{x}", "back\\", "'quoted'"):
        code, config, err = compose("run=x", f"prompt={prompt}", command="sample")
        assert code == 0, err
        assert config.prompt == prompt


@pytest.mark.parametrize("value", ["0", ""])
def test_hydra_full_error_that_is_off_is_off(compose, monkeypatch, value):
    monkeypatch.setenv("HYDRA_FULL_ERROR", value)
    code, _, err = compose("max_iters=abc")
    assert code == 2
    assert err.startswith("train.py: max_iters=abc: ")


@pytest.mark.parametrize("flags", [["-m", "seed=1,2", "--cfg", "job"], ["--resolve"]])
def test_flags_that_exclude_each_other_are_one_line(compose, flags):
    code, config, err = compose(*flags)
    assert (code, config) == (2, None)
    assert re.fullmatch(r"train\.py: .*--cfg.*\n", err)


def test_own_groups_of_configs_reach_what_is_composed_inside(compose, tmp_path):
    """As in compare.py, which composes its variants from the overrides of its command line."""
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "slow.yaml").write_text("# @package _global_\nlearning_rate: 3e-6\n")
    inside = []

    def task(config):
        inside.append(cli.compose([*config.given, "backend=cpu"]))
        return 0

    for place in (["--config-dir", "mine"], ["hydra.searchpath=[file://mine]"]):
        assert compose(*place, "+recipe=slow", task=task)[0] == 0
        assert (inside.pop().learning_rate, inside) == (3e-6, [])
    assert compose("+recipe=slow")[0] == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("compile", True), ("compile", False), ("compile", "auto"), ("eval_interval", 0), ("grad_clip", 0.0)],
)
def test_values_at_the_edge_are_allowed(key, value):
    config = Config()
    setattr(config, key, value)
    validate(config)


def test_validate_does_not_take_one_for_true():
    with pytest.raises(InputError, match="compile=1"):
        validate(Config(compile=1))


def test_help_costs_little_more_than_hydra():
    """A ratio of CPU seconds, which a busy machine stretches alike: 1.5 was measured."""

    def seconds(*arguments):
        """Of a core: a busy machine takes longer on the clock."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout

    rounds = [(seconds(str(ROOT / "train.py"), "--help"), seconds("-c", "import hydra.utils, numpy")) for _ in range(3)]
    (_, told), _ = rounds[0]
    assert f"backend: {', '.join(sorted(BACKENDS))}" in told
    assert "experiment: finetune_shakespeare, full, gpt2, quick, smoke" in told
    assert "max_iters: 5000" in told
    least, imports = (min(taken) for taken in zip(*((a, b) for (a, _), (b, _) in rounds), strict=True))
    assert least < 2.2 * imports


def test_the_command_line_imports_nothing_that_computes():
    code = "import sys, nanogpt_mac.cli, nanogpt_mac.config, nanogpt_mac.compare.config\n"
    code += "print([m for m in ('numpy', 'psutil', 'pydantic', 'rich', 'urllib.request') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["config", "compare", "report"])
def test_help_is_hydras_own(capsys, monkeypatch, name):
    """Word for word: it is printed without Hydra because that takes three times as long."""

    def printed():
        monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
        with contextlib.suppress(SystemExit):  # Hydra's end
            cli.main(name, lambda _: 0)
        return capsys.readouterr().out

    ours = printed()
    monkeypatch.setattr(cli, "_helped", lambda *_: False)
    assert ours == printed()


def test_sigterm_before_a_run_is_one_line():
    """And an exception, so that what waits for a child ends it: nothing may outlive us."""
    code = """
import subprocess, sys
from nanogpt_mac import cli
sleeper = [sys.executable, "-c", "import time; print('asleep', flush=True); time.sleep(60)"]
sys.exit(cli.main("config", lambda _: subprocess.run(sleeper, check=True).returncode))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "asleep\n"
    process.terminate()
    rest, said = process.communicate(timeout=30)  # ends when the sleeper has: it holds the pipe
    assert (process.returncode, rest, said) == (143, "", "-c: terminated\n")


def test_nothing_heavy_is_imported_before_it_is_used():
    heavy = [
        "torch",
        "mlx",
        "jax",
        "tinygrad",
        "wandb",
        "datasets",
        "tiktoken",
        "tokenizers",
        "scipy",
        "transformers",
        "safetensors",
        "matplotlib",
    ]
    modules = "cli config corpus backends.base backends.kinds gpt.spec gpt.pretrained machine.probe machine.chips "
    modules += (
        "machine.energy machine.gemm train.loop train.recorder train.checkpoint train.session train.sinks train.sample"
    )
    imports = "; ".join(f"import nanogpt_mac.{m}" for m in modules.split())
    code = f"import sys; {imports}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_root_scripts_are_thin(script):
    assert len((ROOT / script).read_text().splitlines()) < 30


def test_compose_is_the_command_line_without_a_run():
    config = cli.compose(["experiment=quick", "backend=mps", "compile=true", "batch_size=3"])
    assert (config.backend.name, config.compile, config.batch_size, config.model.n_embd) == ("mps", True, 3, 128)
    assert config.given == ["experiment=quick", "backend=mps", "compile=true", "batch_size=3"]
    assert config.named == {"experiment", "backend", "compile", "batch_size"}
    for override, words in (
        ("batch_sise=3", "did you mean batch_size"),
        ("backend=tpu", "use one of"),
        ("+x=1", "no such"),
    ):
        with pytest.raises(InputError, match=words):
            cli.compose([override])
