"""What tests of the runner and of its folders share: plans whose variants are fakes, comparisons made up."""

import json
from pathlib import Path

import pytest
from fakes.comparisons import write_comparison

from nanogpt_mac.compare.collect import collect
from nanogpt_mac.compare.runner import ComparisonRunner
from nanogpt_mac.config import BackendConfig, Config
from nanogpt_mac.files import write_json
from nanogpt_mac.records.plan import Plan, Variant

FAKE = Path(__file__).parents[1] / "fakes" / "fake_train.py"


@pytest.fixture
def plan(tmp_path):
    """A plan of fake variants, written to a folder: plan(works="works", crash="segfault") -> its runner."""

    def make(rounds=2, iters=12, parity=False, time_wrong=False, stall=60.0, **behaviours):
        variants = []
        for name, behaviour in behaviours.items():
            script = tmp_path / f"{name}.py"
            script.write_text(FAKE.read_text().replace('BEHAVIOUR = "works"', f'BEHAVIOUR = "{behaviour}"'))
            variants.append(Variant(name=name, label=name.upper(), overrides=("backend=cpu",), script=str(script)))
        document = Plan(
            variants=tuple(variants),
            asked={"rounds": rounds, "iters": iters},
            overrides=(),
            seed=1,
            budget_minutes=1.0,
            gate={"parity": parity, "time_wrong": time_wrong},
            heat_wait_seconds=1.0,
            stall_seconds=stall,
            cwd=str(tmp_path),
        )
        folder = tmp_path / "comparison"
        folder.mkdir()
        write_json(folder / "plan.json", document.document())
        return runner(folder)

    def runner(folder):
        document, said = Plan.load(folder / "plan.json"), []
        made = ComparisonRunner(
            folder, document, {v.name: Config(backend=BackendConfig("cpu")) for v in document.variants}, said.append
        )
        made.said = said
        return made

    make.again = runner
    return make


@pytest.fixture
def compared(tmp_path):
    """write_comparison and collect, with small defaults; the document's variants also by name."""

    def build(variants, rounds=6, iters=30, noise=0.004, seed=1, damage=None, **options):
        folder = tmp_path / f"compare-{len(list(tmp_path.iterdir()))}"
        write_comparison(folder, variants, rounds, iters, noise, seed, **options)
        if damage:
            damage(folder)
        found = collect(folder).document()
        json.dumps(found, allow_nan=False)  # what it is for
        return found, {variant["name"]: variant for variant in found["variants"]}

    return build
