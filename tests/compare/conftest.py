"""What tests of the runner share: plans whose variants are fakes."""

import json
from pathlib import Path

import pytest

from nanogpt_mac.compare import plan as plans
from nanogpt_mac.compare.runner import Runner
from nanogpt_mac.config import Config
from nanogpt_mac.records.plan import Variant

FAKE = Path(__file__).parents[1] / "fakes" / "fake_train.py"


@pytest.fixture
def plan(tmp_path):
    """A plan of fake variants, written to a comparison's folder: plan(works="works", crash="segfault") -> Runner."""

    def make(rounds=2, iters=12, parity=False, time_wrong=False, stall=60.0, **behaviours):
        variants = []
        for name, behaviour in behaviours.items():
            script = tmp_path / f"{name}.py"
            script.write_text(FAKE.read_text().replace('BEHAVIOUR = "works"', f'BEHAVIOUR = "{behaviour}"'))
            variants.append(
                Variant(name=name, label=name.upper(), overrides=("backend=cpu",), script=str(script)).model_dump()
            )
        document = {
            "schema": 1,
            "variants": variants,
            "rounds": None,
            "iters": None,
            "order": None,
            "asked": {"rounds": rounds, "iters": iters},
            "overrides": [],
            "experiment": None,
            "quick_by_default": False,
            "seed": 1,
            "budget_minutes": 1.0,
            "levers": False,
            "gate": {"parity": parity, "time_wrong": time_wrong},
            "cooldown_seconds": 0.0,
            "heat_wait_seconds": 1.0,
            "stall_seconds": stall,
            "missing": {},
            "cwd": str(tmp_path),
        }
        folder = tmp_path / "comparison"
        folder.mkdir()
        plans.write(folder, document)
        return runner(folder)

    def runner(folder):
        document = json.loads((folder / "plan.json").read_text())
        said = []
        made = Runner(folder, document, {variant["name"]: Config() for variant in document["variants"]}, said.append)
        made.said = said
        return made

    make.again = runner
    return make
