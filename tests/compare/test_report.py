"""What a comparison's report says in the terminal and in markdown, and that nothing missing ends it."""

import copy
import re
from unittest.mock import MagicMock

import pytest
from fakes.pages import EVIL, alone, collected, many, sparse, with_levers

from nanogpt_mac.compare.report import chart_loss, chart_times, charts, measured, render, words
from nanogpt_mac.compare.report.sections import ordered, problems, verdict
from nanogpt_mac.compare.report.table import Row, Table
from nanogpt_mac.report import svg

pytestmark = pytest.mark.xdist_group("report")  # what its fixtures make is dear: one worker makes it


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("comparison"))


def cells(section, label):
    """Column -> cell of the row that begins so, in a section's first table."""
    table = section.tables[0]
    row = next(row for row in table.rows if row.cells[0].startswith(label))
    return dict(zip(table.columns, row.cells, strict=True))


def test_the_terminal_says_the_verdict_first(comparison, capsys):
    render.show(comparison)
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).startswith(comparison["verdict"]["sentence"][:80])
    for said in ("MPS compiled (WRONG)", "(FAILED)", "out of memory", "Its times do not count", "1.33", "fastest"):
        assert said in printed


def test_variants_are_ordered_and_marked(comparison):
    labels = [words.label(variant) for variant in ordered(comparison)]
    assert labels == ["MLX compiled", "MPS eager", "CPU eager", "MPS compiled (WRONG)", "CPU compiled (FAILED)"]
    section = measured.variants_section(comparison)
    fastest, second = cells(section, "MLX"), cells(section, "MPS eager")
    ratio = next(column for column in fastest if column.startswith("x the fastest"))
    assert fastest[ratio] == "fastest"
    found = next(variant for variant in comparison["variants"] if variant["name"] == "mps")["ratio"]
    assert second[ratio].startswith(f"{found['value']:.3f} [{found['ci'][0]:.3f}, {found['ci'][1]:.3f}]")
    assert cells(section, "MPS compiled")["parity"] == "WRONG"
    assert cells(section, "CPU compiled")["rounds"].startswith("0, ")
    assert [row.mark for row in section.tables[0].rows] == ["fastest", "", "", "wrong", "failed"]


def test_a_tie_is_called_one(comparison):
    made = copy.deepcopy(comparison)
    next(variant for variant in made["variants"] if variant["name"] == "mps")["ratio"] |= {"value": 1.004, "tie": True}
    assert "1.004" in render.markdown(made)
    assert re.search(r"1\.004 .* tie", render.markdown(made))


def test_wrong_follows_the_variant_everywhere(comparison):
    text = render.markdown(comparison)
    naming = [line for line in text.splitlines() if "MPS compiled" in line and not line.startswith("**")]
    published = [line for line in naming if line.startswith("| published")]
    assert len(naming) - len(published) > 6
    assert all("MPS compiled (WRONG)" in line for line in naming if line not in published)
    drawn = [chart for section in charts.draw(comparison).values() for chart in section]
    for chart in drawn:
        mentions = chart.svg.count("MPS compiled")
        assert mentions == chart.svg.count("MPS compiled (WRONG)")
        assert all("WRONG" in name for name, _ in chart.legend if name.startswith("MPS compiled"))
        if chart.id in ("chart-median", "chart-series", "chart-spread", "chart-mfu", "chart-ratio", "chart-memory"):
            assert mentions
    # A variant whose parity failed is wrong, whatever its state says.
    assert words.label({"label": "A", "state": "ok", "parity": "fail"}) == "A (WRONG)"


def test_markdown_is_safe_and_whole(comparison):
    text = render.markdown(with_levers(comparison))
    assert "<script>" not in text
    assert text.startswith("### Comparison: Apple M4 Pro, 20 GPU cores, 24 GiB")
    assert text.splitlines()[2].startswith(f"**{comparison['verdict']['sentence'][:30]}")
    assert text.count("<details>") == text.count("</details>") > 3
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        assert all(line.endswith(" |") for line in table.splitlines())


def test_controls_never_reach_the_terminal(comparison, capsys):
    made = copy.deepcopy(comparison)
    made["variants"][0]["label"] = "\x1b[31mred\x07\n\ttwo [bold]lines"
    render.show(made)
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "\x07" not in printed
    assert "[bold]lines" in printed


def paths(document, before=()):
    """Every key of a nested document, three levels deep."""
    items = document.items() if isinstance(document, dict) else enumerate(document[:2])
    for key, value in items:
        yield (*before, key)
        if isinstance(value, dict | list) and len(before) < 3:
            yield from paths(value, (*before, key))


@pytest.mark.parametrize("value", [None, "nan", 7, [], {"a": [None]}])
def test_whatever_is_missing_or_odd_the_report_is_made(comparison, value):
    small = alone(comparison)
    small["levers"] = with_levers(comparison)["levers"][:1]
    known = list(paths(small))
    assert len(known) > 200
    for path in known[::2] if value is None else known[::17]:
        made = copy.deepcopy(small)
        holder = made
        for key in path[:-1]:
            holder = holder[key]
        if value is None and isinstance(holder, dict):
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        assert render.markdown(made)


ODD = [None, "nan", 7, [], {"a": [None]}, [None, "x", {}]]


@pytest.mark.parametrize("value", ODD[:1])
def test_whatever_is_missing_or_odd_the_charts_are_made(comparison, value, monkeypatch):
    axes = MagicMock()
    axes.get_xlim.return_value = (0.5, 4.0)
    axes.plot.side_effect = lambda *_, **__: [MagicMock()]
    monkeypatch.setattr("nanogpt_mac.report.svg.figure", lambda _: (MagicMock(), axes))
    monkeypatch.setattr("nanogpt_mac.report.svg.inline", lambda *_: "")
    drawn = charts.draw(odd(comparison, value))
    assert len(drawn["times"]) == len(drawn["loss"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("value", ODD)
def test_whatever_is_missing_or_odd_the_page_is_made(comparison, value):
    assert "</html>" in render.html(odd(comparison, value))


def odd(comparison, value):
    """The comparison with a variant for each key of a variant, in which that key is `value`; so with each lever's."""
    whole = next(variant for variant in comparison["variants"] if variant["name"] == "mlx")
    made = copy.deepcopy(comparison) | {"levers": with_levers(comparison)["levers"]}
    made["variants"] += [copy.deepcopy(whole) | {key: value, "label": key} for key in whole]
    for outer in ("iter_ms", "ratio", "roofline", "recipe", "energy", "histogram"):
        for key in whole[outer] or {}:
            made["variants"].append(copy.deepcopy(whole) | {outer: whole[outer] | {key: value}})
    for outer in ("series", "evaluations", "rounds"):
        for key in whole[outer][0]:
            made["variants"].append(copy.deepcopy(whole) | {outer: [whole[outer][0] | {key: value}, *whole[outer][1:]]})
    for key in ("ratio", "base", "what", "name"):
        made["levers"].append(made["levers"][0] | {key: value})
    return made


def test_nothing_at_all_is_a_report_too(capsys):
    for nothing in (
        {},
        None,
        {"variants": None},
        {"variants": [None, {}]},
        {"schema": 99, "variants": "x", "verdict": []},
    ):
        assert "No verdict" in render.markdown(nothing)
        render.show(nothing)
        assert "No verdict" in capsys.readouterr().out


def test_sparse_old_records_show_what_they_have(comparison):
    made = sparse(comparison)
    section = measured.variants_section(made)
    row = cells(section, "mlx")
    assert row["ms an iteration [95 %]"] == words.ms(ordered(made)[0]["iter_ms"]["median"])
    assert {row[c] for c in ("tokens/s", "MFU: chip", "peak memory", "full recipe")} == {words.DASH}
    assert "parity gate was not run" in render.markdown(made)
    assert verdict(made) == "No verdict was recorded."


def test_every_warning_is_there_once(comparison):
    made = with_levers(comparison)
    made["warnings"] = ["on battery", "on battery"]
    lines = problems(made)
    assert lines.count("on battery") == 1
    assert "(WRONG)" in lines[0]
    assert len(lines) == len(set(lines))


def test_the_parity_table_names_what_failed(comparison):
    section = render.evidence.parity_section(comparison)
    row = cells(section, "MPS compiled (WRONG)")
    assert row["result"] == "WRONG"
    assert row["gradients"] == "3.0e-02 WRONG (1.0e-03 allowed)"
    assert cells(section, "MLX")["gradients"] == "1.0e-04"
    assert section.tables[1].rows[0].cells[0] == "float32"


def test_no_fallback_is_only_said_after_looking_everywhere(comparison):
    made = copy.deepcopy(comparison)
    variant = next(variant for variant in made["variants"] if variant["name"] == "mps")
    finding = {"op": "foo", "phase": "backward", "calls_per_iteration": 2, "bytes": 4096, "advice": "cast"}
    for document, words_ in [
        ({"complete": True, "phases": ["forward", "backward"], "findings": []}, "none in forward, backward"),
        (
            {"complete": False, "why_incomplete": ["no profiler"], "findings": []},
            "0 found, and there may be more: no profiler",
        ),
        ({}, "is not recorded"),
        ({"complete": True, "findings": [finding]}, "MPS eager: 1 found"),
    ]:
        variant["fallbacks"] = document
        section = render.evidence.fallbacks_section(made)
        assert any(words_ in item for item in section.items)
    assert cells(section, "foo") == {
        "op": "foo", "phase": "backward", "calls per iteration": "2", "bytes": "4096", "advice": "cast",
    }  # fmt: skip


def test_a_compile_report_is_taken_apart(comparison):
    made = copy.deepcopy(comparison)
    kernels = [{"kernel": "a", "launches": 2}, {"kernel": "b", "launches": 1}]
    made["variants"][0]["compile_report"] = {
        "graph_breaks": None,
        "iterations": {"train": {"ms": 1.5, "kernels": kernels}},
    }
    facts, launches = render.evidence.compile_section(made).tables
    assert [row.cells for row in facts.rows] == [["graph breaks", words.DASH], ["iterations train ms", "1.5"]]
    assert launches.caption.endswith(": iterations train kernels")
    assert [row.cells for row in launches.rows] == [["a", "2"], ["b", "1"]]


def test_twelve_variants_fit_a_terminal(comparison, capsys):
    render.show(many(comparison, points=50))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 160


def test_figures_as_words():
    assert [words.ms(v) for v in (7.4123, 30.2, 221.04, 1986.4, 0.012345, None, "nan", True)] == [
        "7.412", "30.20", "221.0", "1,986", "0.01235", "—", "—", "—",
    ]  # fmt: skip
    assert [words.seconds(v) for v in (0.0123, 2.345, 367, 7384)] == ["12.3 ms", "2.35 s", "6 min 07 s", "2 h 03 min"]
    assert [words.size(v) for v in (24 * 2**30, 1_500_000_000, 512, None)] == ["24 GiB", "1.4 GiB", "512 B", "—"]
    assert words.percent(0.4321) == "43.2 %"
    assert words.rate(1.1626e12, "FLOP") == "1.16 TFLOP"
    assert words.loss("nan") == "nan"  # a loss that is no number keeps its name
    assert words.loss(1.23456) == "1.2346"
    assert words.text(EVIL) == EVIL
    assert words.get({"a": [{"b": 3}]}, "a", 0, "b") == 3
    assert words.get({"a": 1}, "a", "b") is None


def test_columns_of_figures_are_right_aligned():
    table = Table("", ["variant", "a", "b", "c"], [Row(["x", "1.2", "text", "—"]), Row(["y", "—", "3", "—"])])
    assert table.right == [False, True, False, False]


def test_phases_are_those_of_the_projection(comparison):
    """Ten times as many batches an evaluation in the recipe as were measured: the bar must grow with it."""
    with svg.style():
        chart = charts._phases(comparison)
    for variant, row in zip(charts.shown(comparison), chart.table.rows, strict=True):
        parts = max(variant["compile_s"], 0), variant["recipe"]["iters"] * variant["iter_ms"]["median"] / 1e3
        evaluating = variant["recipe"]["seconds"] - parts[1]
        assert row.cells[1:] == [words.seconds(v) for v in (*parts, evaluating, sum(parts) + evaluating)]
        assert f">{row.cells[-1]}<" in chart.svg
    made = copy.deepcopy(comparison)
    made["variants"] = made["variants"][:1]
    recipe = made["variants"][0]["recipe"]
    recipe["seconds"] += 9 * recipe["evaluations"] * made["variants"][0]["eval_s"]
    with svg.style():
        row = charts._phases(made).table.rows[0]
    assert row.cells[3] == words.seconds(10 * recipe["evaluations"] * made["variants"][0]["eval_s"])


def test_the_first_evaluation_is_drawn_at_0(comparison):
    """It is before the first iteration, whose time, and the warm-up's, are not among the kept ones."""
    variant = next(variant for variant in comparison["variants"] if variant["name"] == "mlx")
    assert (variant["evaluations"][0]["iter"], variant["series"][0]["iter"][0] > 1) == (0, True)
    for key in ("iter", "seconds"):
        _, _, at, _ = chart_loss._line(variant, key)
        assert at[0] == 0


def test_a_ratio_far_from_1_is_drawn_on_a_logarithmic_axis(comparison, monkeypatch):
    asked = []
    monkeypatch.setattr("nanogpt_mac.compare.report.chart_times.log_x", lambda _: asked.append("log"))
    made = copy.deepcopy(comparison)
    for value in (1.2, 40.0):  # where matplotlib's own margin would begin below 0
        made["variants"][0]["ratio"] = {"value": value, "ci": [value, value], "tie": False, "pairs": [value]}
        made["variants"] = [
            variant for variant in made["variants"] if variant["name"] in (made["variants"][0]["name"], "mlx")
        ]
        with svg.style():
            chart_times.ratios(made)
    assert asked == ["log"]


def test_what_ties_is_not_called_the_fastest(comparison):
    made = copy.deepcopy(comparison)
    made["verdict"]["ties"] = ["mps"]
    assert "| tie |" in render.markdown(made)
    assert "| fastest |" not in render.markdown(made)


def test_a_variant_that_did_other_work_is_excepted(comparison):
    made = copy.deepcopy(comparison)
    made["variants"][0]["same_work"] = False
    assert measured.variants_section(comparison).notes[0].startswith("Every variant trained the same: ")
    assert measured.variants_section(made).notes[0].startswith("Every variant but MPS eager trained the same: ")
    for variant in made["variants"]:
        variant["iter_ms"] = None
    assert measured.variants_section(made).notes[0].startswith("What was to be trained: ")


def test_long_words_do_not_make_a_large_page(comparison):
    made = copy.deepcopy(comparison)
    for variant in made["variants"]:
        variant |= {"label": "x" * 10**6, "reason": "y" * 10**6, "warnings": ["z" * 10**6]}
    assert len(render.markdown(made)) < 100_000
    assert words.label({"label": "x" * 100, "parity": "fail"}).endswith("… (WRONG)")
    assert words.ms(1e308) == "1e+308"


def test_a_wrong_lever_is_marked_in_its_chart(comparison):
    made = with_levers(comparison)
    made["levers"] = [lever | {"name": "mps-compile"} for lever in made["levers"][:1]]  # which is wrong
    with svg.style():
        chart = charts._levers(made)
    assert chart.table.rows[0].cells[0].endswith("(WRONG)")
    assert "(WRONG)</text>" in chart.svg
    assert "var(--wrong)" in chart.svg
    made["levers"] = [made["levers"][0] | {"name": "mlx", "base": "mps-compile", "what": 90 * "w"}]
    with svg.style():
        assert charts._levers(made).table.rows[0].cells[0].endswith("w…, MPS compiled (WRONG)")
