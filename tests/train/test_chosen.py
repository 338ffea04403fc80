"""What a comparison found decides backend=auto and compile=auto, where it is of this work, machine and programs."""

import shutil
import time
from dataclasses import replace

import pytest
from fakes.comparisons import LINUX, write_comparison

from nanogpt_mac import ranks
from nanogpt_mac.backends import kinds
from nanogpt_mac.compare import collect
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.files import write_json
from nanogpt_mac.records.comparison import Comparisons
from nanogpt_mac.train import chosen

EAGER = {"name": "cpu", "label": "CPU eager", "backend": "cpu", "device": "cpu", "compile": False, "ms": 30.0}
COMPILED = EAGER | {"name": "cpu-compile", "label": "CPU compiled", "compile": True, "ms": 20.0}
LENT = ["backend=mlx", "compile=true", "backend.blas=torch"]
MLX = EAGER | {"name": "mlx", "label": "MLX compiled", "backend": "mlx", "compile": True, "ms": 25.0, "overrides": LENT}
VARIANTS = [EAGER, COMPILED, MLX]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kinds, "missing", lambda name: None if name in ("cpu", "mlx") else "is not here")


@pytest.fixture
def compared(tmp_path):
    """A comparison that has been carried out, and remembered."""

    def carry_out(variants=VARIANTS, name="compared", seed=1, noise=0.002, **options):
        folder = write_comparison(tmp_path / name, variants, 4, 20, noise, seed, machine=LINUX, **options)
        found = collect.collect(folder)
        write_json(folder / "comparison.json", found.document())
        chosen.remember(found, folder)
        return folder

    return carry_out


def config(**changes):
    made = Config()
    made.backend.name = changes.pop("backend", "auto")
    return replace(made, **changes)


def choose(environment=LINUX, **changes):
    return chosen.choose(config(**changes), lambda: environment)


def test_without_a_comparison_it_is_the_rule():
    name = kinds.resolve("auto")
    assert choose() == chosen.Choice(name, kinds.resolve_compile("auto", name))


def test_the_fastest_is_taken_and_said(compared):
    folder = compared()
    assert choose() == ("cpu", True, {}, f"backend=auto compile=auto: CPU compiled, the fastest in {folder}")
    assert choose(compile=False)[:2] == ("cpu", False)
    assert choose(backend="cpu") == ("cpu", True, {}, f"compile=auto: CPU compiled, the fastest in {folder}")
    assert choose(backend="mlx")[:3] == ("mlx", True, {"blas": "torch"})
    assert choose(backend="cpu", compile=False) == ("cpu", False, {}, None)  # both are obeyed, and nothing looked for
    with pytest.raises(InputError, match="backend=cuda: not available here"):
        choose(backend="cuda")


def test_only_a_comparison_of_the_same_work_counts(compared):
    compared()
    other_model = replace(Config().model, n_layer=5)
    elsewhere = [LINUX | {"chip": "another"}, LINUX | {"versions": LINUX["versions"] | {"torch": "2.14.0"}}]
    elsewhere.append(LINUX | {"versions": LINUX["versions"] | {"nanogpt-mac": "0.2.0"}})
    for changes in (
        {"batch_size": 8},
        {"gradient_accumulation_steps": 2},
        {"dtype": "bfloat16"},
        {"matmul_precision": "high"},
        {"model": other_model},
        {"given": ["backend.fused_adamw=false"]},
        {"init_from": "gpt2"},
        *({"environment": environment} for environment in elsewhere),
    ):
        assert choose(**changes).why is None, changes


def test_what_is_wrong_unchecked_shared_or_a_lever_is_not_taken(compared):
    compared([EAGER, COMPILED | {"parity": "fail"}, MLX | {"parity": "error"}])
    assert choose()[:2] == ("cpu", False)
    compared([EAGER, COMPILED], gate=False, name="unchecked")
    assert choose()[:2] == ("cpu", False)  # of the older one: the newer has nothing to say
    custom = COMPILED | {"overrides": ["backend=cpu", "compile=true", "sync=interval"]}
    compared([EAGER, custom], name="custom")
    assert choose()[:2] == ("cpu", False)


def test_the_newest_counts_and_one_that_is_gone_does_not(compared):
    compared()
    newer = compared([EAGER | {"ms": 10.0}, COMPILED], name="newer")
    assert choose()[:2] == ("cpu", False)
    shutil.rmtree(newer)
    assert choose()[:2] == ("cpu", True)
    again = compared(name="newer", seed=3)
    assert [one.folder for one in Comparisons.load(chosen.place()).found] == [
        str(again),
        str(again.with_name("compared")),
    ]


def test_what_this_machine_has_no_more_is_passed_over(compared, monkeypatch):
    compared([EAGER, MLX])
    assert choose()[0] == "mlx"
    monkeypatch.setattr(kinds, "missing", lambda name: None if name == "cpu" else "is not here")
    assert choose()[0] == "cpu"


def test_under_a_launcher_only_what_it_starts_several_of_is_taken(compared):
    compared([EAGER, COMPILED, MLX])
    assert chosen.choose(config(), lambda: LINUX, ranks.MLX)[:2] == ("mlx", True)
    assert chosen.choose(config(), lambda: LINUX, ranks.TORCHRUN)[:2] == ("cpu", True)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1, "found": [1]}', '{"found": "elsewhere"}'])
def test_a_damaged_memory_counts_as_none(compared, text):
    compared()
    chosen.place().write_text(text)
    assert choose().why is None


def test_looking_takes_milliseconds_however_many_comparisons_there_were(compared):
    folder = compared()
    (one,) = Comparisons.load(chosen.place()).found
    work = one.work.model_copy(update={"batch_size": 1})
    others = tuple(one.model_copy(update={"folder": f"{folder}-{i}", "work": work}) for i in range(200))
    write_json(chosen.place(), Comparisons(found=(*others[:49], one)).document())
    took = []
    for _ in range(5):
        begin = time.process_time()
        assert choose().why
        took.append(time.process_time() - begin)
    assert min(took) < 0.05
    asked = []
    assert chosen.choose(config(batch_size=2), lambda: asked.append(1)).why is None
    assert asked == []  # the machine's facts are only waited for where the work is the same
