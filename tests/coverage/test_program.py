"""A watched program's report: what another torch makes of its operators, and bad input."""

import pytest
from fakes.support import ROOT

from nanogpt_mac.coverage import program
from nanogpt_mac.coverage.config import CoverageConfig, validate
from nanogpt_mac.errors import InputError


def test_another_torch_judges_what_was_seen(tables):
    old, new = tables
    seen = {"found": [], "refused": [], "rhythms": {}, "warned": {}, "unseen": {}, "ended": "ended by itself"}
    seen |= {"torch": "2.13.0", "python": "3.11", "device": "mps", "seconds": 1.0, "watched_s": 0.1, "steps": 0}
    seen |= {"kernels": 2, "waits": 0, "reached": {"alpha": 1, "beta": 2}, "mapped": []}
    made = program.document(seen, ["x.py"], ROOT, 0)
    assert program.page(program.judged(made, old)).exit_code == 0
    page = program.page(program.judged(made, new))
    assert page.exit_code == 1
    assert "1 operators of this program do not run on MPS" in page.verdict
    assert "beta" in page.verdict


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"script": "nowhere.py"}, "script=nowhere.py: no such file"),
        ({"script": "python train.py"}, "leave out the interpreter"),
        ({"script": "train.py 'x"}, "use quotes as in a shell"),
        ({"script": "train.py", "steps": 0}, "steps=0"),
        ({"script": "train.py", "map": "cuda"}, "map=cuda: use cuda:mps"),
        ({"script": "train.py", "limit_s": 0.0}, "limit_s=0.0"),
        ({"script": "train.py", "run": True}, "use one at a time"),
        ({"script": "train.py", "against": "2.13.0"}, "against=2.13.0: script takes no second torch"),
        ({"steps": 3}, "steps=3: only read with script"),
    ],
)
def test_bad_input_is_one_line(given, message):
    config = CoverageConfig(**given)

    def check():
        validate(config)
        program.command(config.script)

    with pytest.raises(InputError) as error:
        check()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
