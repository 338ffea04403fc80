"""A config handed to another process arrives as it was, or not at all."""

import json
import math
from dataclasses import asdict

import pytest

from nanogpt_mac import composed
from nanogpt_mac.compare.config import CompareConfig
from nanogpt_mac.config import BackendConfig, Config, SampleConfig, WandbConfig
from nanogpt_mac.errors import InputError

CONFIGS = [
    Config(),
    Config(learning_rate=1e-4, min_lr=math.inf, compile=False, path=None, given=["a='b c'", "x=[1,2]"]),
    Config(wandb=WandbConfig(tags=["naïve ☃", "a,b", "${x}"], group=None), run_dir="C:\\n ' \" {name}"),
    Config(backend=BackendConfig(name="mlx", fused_adamw=True), compile="auto", seed=2**62),
    SampleConfig(prompt="do ${seed}\n\t'(x)'", top_k=None),
    CompareConfig(variants=["cpu", "cpu backend.fused_adamw=false"], chip=["m1"], budget_minutes=0.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_comes_back_as_it_was(tmp_path, config):
    flag, path = composed.write(tmp_path / "composed.json", config, ["file:///ö x"])
    assert flag == "--composed"
    assert composed.read(path, type(config)) == (config, ["file:///ö x"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["config"].update(surplus=1), "surplus: is of another version"),
        (lambda d: d["config"]["model"].pop("n_layer"), "model.n_layer: is of another version"),
        (lambda d: d["config"].update(max_iters="many"), "max_iters='many': "),
        (lambda d: d.pop("config"), "is damaged"),
        (lambda d: d.update(config=[]), "config|is damaged|=\\[\\]"),
    ],
)
def test_damage_is_one_line(tmp_path, change, words):
    path = tmp_path / "composed.json"
    composed.write(path, Config())
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=words) as raised:
        composed.read(str(path), Config)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "half").write_text(json.dumps({"config": asdict(Config())})[:99])
    for name, words in (("half", "is damaged"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=words):
            composed.read(str(tmp_path / name), Config)
