"""Published figures stand beside the same work alone."""

import dataclasses

import pytest

from nanogpt_mac.compare import published
from nanogpt_mac.config import Config
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.comparison import Work


def full_recipe(**changes):
    model = dataclasses.asdict(GPTSpec(6, 6, 384, 256, 65, 0.2))
    facts = {"model": model, "batch_size": 64, "gradient_accumulation_steps": 1, "dtype": "float32"}
    return Work(**facts | {"matmul_precision": "highest"} | changes)


def test_full_recipe_is_trains_default():
    config = Config()
    model = dataclasses.asdict(config.model)
    assert all(key == "vocab_size" or model[key] == value for key, value in published.MODEL.items())
    assert published.beside(full_recipe(**{k: getattr(config, k) for k in ("batch_size", "dtype")}))


def test_rows_are_marked_and_complete():
    rows = published.beside(full_recipe())
    assert {(row.source, row.variant, row.ms_per_iter) for row in rows} == {
        ("State of training on Metal", "MPS eager", 221.0),
        ("State of training on Metal", "MPS compiled", 306.0),
        ("State of training on Metal", "CPU", 1986.0),
        ("nanogpt-rb", "MPS", 500.0),
        ("nanogpt-rb", "CPU", 8500.0),
    }
    assert {row.source: row.url for row in rows} == {
        "State of training on Metal": "https://vglazer.github.io/training-on-metal",
        "nanogpt-rb": "https://github.com/khasinski/nanogpt-rb",
    }
    assert all(row.published is True and row.note and row.machine and row.work for row in rows)


@pytest.mark.parametrize(
    "other",
    [
        full_recipe(dtype="bfloat16"),
        full_recipe(batch_size=12),
        full_recipe(gradient_accumulation_steps=2),
        full_recipe(matmul_precision="high"),
        full_recipe(model=dataclasses.asdict(GPTSpec(6, 6, 384, 256, 65, 0.0))),
        full_recipe(model=dataclasses.asdict(GPTSpec(6, 6, 384, 256, 50304, 0.2))),
        full_recipe(model=None),
        Work(),
    ],
)
def test_other_work_has_none(other):
    assert published.beside(other) == ()
