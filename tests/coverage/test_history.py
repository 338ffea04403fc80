"""The history of an index of fake wheels: which torches, rows with reasons, changes, the page."""

import json

import pytest
from fakes import fake_wheels
from fakes.browser import Browser, programs

from nanogpt_mac.coverage import history
from nanogpt_mac.coverage.config import CoverageConfig, validate
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import table
from nanogpt_mac.records.history import Checked
from nanogpt_mac.report import page, show


@pytest.fixture
def served(index, wheels, tmp_path):
    """Two torches, a damaged one between them, and a nightly; another index without nightlies would be `index.url`."""
    for wheel in wheels:
        index.add(wheel)
    damaged = fake_wheels.wheel(tmp_path, "9.1.5")
    damaged.write_bytes(damaged.read_bytes()[:3000])
    index.add(damaged)
    index.add(fake_wheels.wheel(tmp_path, "9.3.0.dev20260101"))
    return index


def made(served, asked, **given):
    config = CoverageConfig(history=asked, nightly_index=served.url, **given)
    validate(config)
    return history.history(config, ["beta", "alpha"], "this model")


def test_every_overload_in_every_release(served):
    found = made(served, "9..nightly")
    old = "9.1.0"
    assert [r.version for r in found.releases] == ["9.1.0", "9.1.5", "9.2.0", "9.3.0.dev20260101"]
    assert [bool(r.error) for r in found.releases] == [False, True, False, False]
    assert "damaged or broke off" in found.releases[1].error
    independent = {v: table.load(v) for v in (old, "9.2.0")}
    for op, kinds in found.overloads.items():
        for i, version in ((0, old), (2, "9.2.0")):
            entry = independent[version].entries.get(op)
            assert kinds[i] == (entry.kind.value if entry else None)
        assert kinds[1] is None
    assert found.overloads["gamma"] == ("missing, CPU kernel", None, "native", "missing, CPU kernel")
    size = {r.version: r.bytes for r in found.releases}
    for version, read in size.items():
        served_bytes = sum(n for path, asked, n in served.requests if asked and f"-{version}-" in path)
        assert read == served_bytes


def test_the_page_in_all_forms(served):
    found = made(served, "9..nightly")
    shown = history.page(found)
    assert shown.exit_code == 2
    assert "9.1.5 could not be read" in shown.verdict
    rows = [row.cells for row in shown.sections[1].tables[0].rows]
    assert rows[0][:2] == ["beta", "this model"]
    assert rows[0][2:] == [
        "9.3.0.dev20260101",
        "9.2.0",
        "native; 9.2.0: missing, CPU kernel; 9.3.0.dev20260101: native",
    ]
    by_op = {row[0]: row for row in rows}
    assert by_op["gamma"][2:4] == ["9.2.0", "9.3.0.dev20260101"]
    assert "alpha" not in by_op
    assert json.loads(json.dumps(shown.data))["overloads"]["beta"][0] == "native"
    text = show.markdown(shown.report)
    assert "damaged or broke off" in text
    html = page.html(shown.report, shown.charts)
    assert html.count("<svg") >= 1
    assert 'type="search"' in html
    assert "script-src 'sha256-" in html
    assert html.count("<script") == 1


SEARCH = """
const field = document.querySelector("input[type=search]");
const count = words => { field.value = words; field.dispatchEvent(new Event("input"));
  const rows = [...document.querySelectorAll("#changes tbody tr")];
  return rows.filter(row => row.getBoundingClientRect().height > 0).length; };
return [count(""), count("BETA"), count("this model native"), count("nowhere"), count("")];
"""


def test_the_page_is_searched_in_a_browser(served, tmp_path):
    programs()
    shown = history.page(made(served, "9..9.2"))
    file = tmp_path / "history.html"
    file.write_text(page.html(shown.report, shown.charts), encoding="utf-8")
    rows = len(shown.sections[1].tables[0].rows)
    with Browser(tmp_path / "profile") as browser:
        browser.open(file)
        assert browser.run(SEARCH) == [rows, 1, 1, 0, rows]
        assert browser.logs("browser") == []  # the page's own policy lets the script run
        assert browser.requests() == [file.as_uri()]


def test_which_torches(served):
    old = "9.1.0"

    def names(asked):
        return list(history.chosen(asked, "3.12", served.url))

    assert names("9.2..9.2") == ["9.2.0"]
    assert names(f"{old},nightly") == [old, "9.3.0.dev20260101"]
    assert names("9.2..,9.3.0.dev20260101") == ["9.2.0", "9.3.0.dev20260101"]
    missing = history.chosen("9.2.0,9.3.0.dev20250101", "3.12", served.url)
    assert "no such build" in str(missing["9.3.0.dev20250101"])
    unreachable = history.chosen("9.2.0,nightly", "3.12", "http://127.0.0.1:9/simple")
    assert "cannot be reached" in str(unreachable["nightly"])
    for bad, message in (("1..2", "no release in 1..2"), ("soon", "not a version"), ("9.9.9", "no torch 9.9.9")):
        with pytest.raises(InputError, match=message):
            names(bad)


def test_what_binaries_said_is_recorded(served, tables, tmp_path, monkeypatch):
    path = tmp_path / "checked.json"
    history.record(tables, path)
    assert json.loads(path.read_text()) == {tables[0].version: []}  # the second was read without its binary
    monkeypatch.setattr(history, "CHECKED", path)
    history.checked.cache_clear()
    try:
        found = made(served, "9..9.2")
        assert [r.checked for r in found.releases] == [Checked.AGREES, Checked.NOT, Checked.NOT]
    finally:
        history.checked.cache_clear()
    found = made(served, "9.2.0", binary=True)  # its binary still is the first's
    assert found.releases[0].checked is Checked.DISAGREES
    assert any(line.startswith("beta: ") for line in found.releases[0].disagreements)


def test_the_record_holds_every_release_checked_by_hand_list():
    assert {"2.6.0", "2.7.1", "2.8.0", "2.10.0"} <= history.checked().keys()
    assert not any(history.checked().values())


def test_history_takes_no_torch():
    with pytest.raises(InputError, match="history has all of its range"):
        validate(CoverageConfig(history="2.5..nightly", torch="2.13.0"))
