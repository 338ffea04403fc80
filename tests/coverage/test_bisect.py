"""The search by halves, and a bisection over an index of builds under nightly names."""

import json
import random

import pytest
from fakes import fake_wheels

from nanogpt_mac.coverage import bisect
from nanogpt_mac.coverage.config import CoverageConfig, validate
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.history import Bisection
from nanogpt_mac.report import show

BUILDS = 64


def looking(change, broken=()):
    """Builds that differ from `change` on, of which `broken` cannot be looked at; and what was looked at."""
    asked = []

    def look(number):
        asked.append(number)
        if number in broken:
            raise InputError(f"build {number} is broken")
        return "new" if number >= change else "old"

    return look, asked


@pytest.mark.parametrize("change", range(1, BUILDS))
def test_every_change_among_64_builds_is_found_in_seven_looks(change):
    look, asked = looking(change)
    found = bisect.search(BUILDS, look)
    assert (found.good, found.bad) == (change - 1, change)
    assert len(asked) == len(set(asked)) <= 7


@pytest.mark.parametrize("seed", range(40))
def test_broken_builds_are_stepped_over(seed):
    draw = random.Random(seed)
    broken = draw.sample(range(1, BUILDS - 1), 20)
    change = draw.randrange(1, BUILDS)
    look, asked = looking(change, broken)
    found = bisect.search(BUILDS, look)
    readable = [n for n in range(BUILDS) if n not in broken]
    assert found.good == max(n for n in readable if n < change)
    assert found.bad == min(n for n in readable if n >= change)
    assert len(asked) == len(set(asked)) <= 7 + len(broken)


def test_nothing_differs_or_an_end_cannot_be_looked_at():
    assert bisect.search(BUILDS, looking(BUILDS)[0]).bad is None
    assert bisect.search(2, looking(1)[0]).bad == 1
    with pytest.raises(InputError, match="build 0 is broken"):
        bisect.search(BUILDS, looking(5, [0])[0])
    with pytest.raises(InputError, match="build 63 is broken"):
        bisect.search(BUILDS, looking(BUILDS, [63])[0])


# -- an index ---------------------------------------------------------------------------------------------------------


def day(number):
    return f"9.3.0.dev2026{1 + number // 28:02}{1 + number % 28:02}"


@pytest.fixture
def nightlies(index, tmp_path):
    """Serves builds under nightly names: `operators(number)` are each one's, None where its wheel is damaged."""

    def serve(numbers, operators):
        for number in numbers:
            text = operators(number)
            path = fake_wheels.wheel(tmp_path, day(number), operators=text or fake_wheels.OPERATORS)
            if text is None:
                path.write_bytes(path.read_bytes()[:2000])
            index.add(path)
        return index

    return serve


def wheels_read(index):
    return {path for path, asked, _ in index.requests if asked and path.endswith(".whl")}


def test_a_bisection_over_an_index(nightlies, tmp_path):
    lost = fake_wheels.OPERATORS.replace("    MPS: beta_mps\n", "")
    broken = [9, 12]
    present = [n for n in range(20) if n not in (4, 5)]  # holes
    served = nightlies(present, lambda n: None if n in broken else lost if n >= 11 else fake_wheels.OPERATORS)
    config = CoverageConfig(bisect="beta", good=day(0), bad="nightly", nightly_index=served.url)
    validate(config)
    made = bisect.check(config)
    document = Bisection.parse(made.data, "answer")
    assert (document.good.version, document.bad.version) == (day(10), day(11))
    assert document.changes == ("beta: native -> missing, CPU kernel",)
    assert (document.builds, document.skipped) == (18, ())
    git = "ab" * 20
    assert document.link == f"{bisect.COMPARE}{git}...{git}"
    assert made.exit_code == 1
    assert len(wheels_read(served)) == document.read <= 7
    text = show.markdown(made.report)
    assert document.link in text.replace("\\", "")
    assert "skipped" in text or not any(b.state.startswith("skipped") for b in document.seen)
    gained = bisect.check(CoverageConfig(bisect="beta", good=day(0), bad=day(3), nightly_index=served.url))
    assert (gained.exit_code, gained.data["good"]) == (0, None)
    assert "beta is the same" in gained.verdict


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"good": day(5), "bad": day(2)}, "good is not older than bad; exchange them"),
        ({"good": day(1), "bad": "9.3.0.dev20270101"}, "the nightly index has no such build"),
        ({"good": "soon", "bad": day(2)}, "good=soon: use a release such as"),
        ({"good": day(1), "bad": day(2), "bisect": "nowhere"}, "have no such operator"),
    ],
)
def test_ends_that_cannot_be_meant(nightlies, given, message):
    served = nightlies(range(1, 6), lambda n: fake_wheels.OPERATORS)
    config = CoverageConfig(**{"bisect": "beta", "nightly_index": served.url} | given)
    with pytest.raises(InputError, match=message):
        bisect.check(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bisect": "gelu"}, "good=null: use a name and both ends"),
        ({"bisect": "", "good": "2.13.0", "bad": "nightly"}, "bisect=: use a name and both ends"),
        ({"bisect": "script", "good": "2.13.0", "bad": "nightly"}, "use bisect=script with the program in script="),
        ({"bisect": "gelu", "good": "2.13.0", "bad": "nightly", "run": True}, "run=true runs bisect=model"),
        ({"bisect": "gelu", "good": "2.13.0", "bad": "nightly", "torch": "2.13.0"}, "bisect has all of its range"),
        ({"good": "2.13.0"}, "good=2.13.0: only read with bisect"),
    ],
)
def test_bad_input_is_one_line(given, message):
    with pytest.raises(InputError, match=message):
        validate(CoverageConfig(**given))


def test_run_compares_what_was_found(monkeypatch):
    """Of run=true only the environments are replaced: what the script is found to do decides."""
    names = [day(n) for n in range(8)]
    looked = {
        name: bisect.Looked({"mode (x.py:3)": "missing, CPU kernel"} if n < 5 else {}, None)
        for n, name in enumerate(names)
    }
    found = bisect.search(8, lambda n: looked[names[n]])
    made = bisect.document(CoverageConfig(bisect="script", run=True), names, found)
    assert (made.good.version, made.bad.version, made.link) == (names[4], names[5], None)
    assert made.changes == ("mode (x.py:3): missing, CPU kernel -> absent",)
    assert (bisect.page(made, run=True).exit_code, bisect.page(made).exit_code) == (0, 1)
    json.dumps(made.document())
