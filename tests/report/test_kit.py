"""The kit that every report is made of: one report in the terminal, in markdown and as a page."""

import re

import pytest

from nanogpt_mac.report import charts, page, show, svg, words
from nanogpt_mac.report.table import Mark, Report, Row, Section, Table, rows

EVIL = "<script>alert('x')</script> | `a` $x_1$ [b]\x1b[31m"


@pytest.fixture
def report():
    """Two sections with tables, one of warnings, an empty one that matters and one that does not."""
    figures = Table("Speed", ["what", "ms", "loss", "note"],
                    [Row(["A", "1.5", "2.1", EVIL], Mark.BEST), Row(["B", "12.0", "—", "—"], Mark.WRONG)])  # fmt: skip
    links = Table("Links", ["source", "where"], [Row(["paper", "https://a.example/b"], link="https://a.example/b")])
    return Report(
        "Test", "Test: a machine", "A is fastest: 1.5 ms. B is WRONG.", facts=["a machine", "today"],
        figures=[("1.5 ms", "an iteration", "")], alarms=["look out"], version="1.2", symbol="✅",
        first_screen=("first",),
        sections=[
            Section("first", "First", ["a note"], [figures], "Nothing ran.", matters=True),
            Section("warn", "Warnings", items=["beware"], alarming=True),
            Section("links", "Links", tables=[links], folded=True),
            Section("gone", "Gone", empty="Not looked for.", matters=True),
            Section("quiet", "Quiet", empty="Nothing here."),
        ],
    )  # fmt: skip


def test_markdown_folds_escapes_and_names_what_is_missing(report):
    text = show.markdown(report)
    assert text.startswith("### Test: a machine\n\n✅ **A is fastest: 1.5 ms. B is WRONG.**\n\n")
    assert "<script" not in text
    assert "| **A** | 1.5 | 2.1 |" in text
    assert "| what | ms | loss | note |\n| --- | ---: | ---: | --- |" in text
    assert "<details><summary>Links</summary>" in text
    assert "| <https://a.example/b> |" in text
    assert "- beware" in text
    assert "Not looked for." in text
    assert "Nothing here." not in text
    assert text.endswith("nanogpt-mac 1.2\n")


def test_the_first_screen_is_the_verdict_and_one_table(report, capsys):
    show.show(report)
    first = capsys.readouterr().out
    assert first.splitlines()[0] == "A is fastest: 1.5 ms. B is WRONG."
    assert "! look out" in first
    assert "12.0" in first
    for later in ("beware", "Links", "a note", "Nothing here."):
        assert later not in first
    show.show(report, details=True)
    whole = capsys.readouterr().out
    for shown in ("2.1", "! beware", "paper", "a note", "Not looked for.", "script>"):
        assert shown in whole
    assert "\x1b[31m" not in whole


def test_the_first_screen_cuts_what_is_long(report, capsys):
    report.first_screen = ("first", "warn")
    wide = [f"figure {i}" for i in range(30)]
    report.sections[0].tables = [Table("Wide", ["variant", *wide], rows([["A", *("1,234.5" for _ in wide)]]))]
    report.sections[1].items = [f"warning {i}" for i in range(9)]
    show.show(report)
    first = capsys.readouterr().out
    assert first.count("Wide") == 1
    assert "warning 4" in first
    assert "warning 5" not in first
    assert "and 4 more" in first
    show.show(report, details=True)
    assert "warning 8" in capsys.readouterr().out


def test_a_report_without_a_first_screen_shows_everything(report, capsys):
    report.first_screen = ()
    show.show(report)
    assert "paper" in capsys.readouterr().out


def test_a_wide_table_is_cut_into_tables_that_fit(capsys):
    columns = ["variant", *(f"round {i}" for i in range(30)), "note"]
    table = Table("Rounds", columns, rows([["MLX compiled", *("1,234.5" for _ in range(30)), "word " * 40]]))
    show.show(Report("k", "t", "v", [Section("s", "S", tables=[table])]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count("MLX compiled") > 2  # the first column stands before each part
    assert printed.count("1,234.5") == 30  # no figure is broken
    assert printed.count("word") == 40


def test_words_are_wrapped_instead_of_cutting_the_table(capsys):
    table = Table("Operators", ["operator", "why", "evidence"], rows([["aten::foo", "long words " * 12, "more " * 20]]))
    show.show(Report("k", "t", "v", [Section("s", "S", tables=[table])]))
    assert capsys.readouterr().out.count("aten::foo") == 1


def test_the_page_holds_the_report_and_no_more(report):
    html = page.html(report)
    for shown in ("Test: a machine", '<h1 id="verdict">A is fastest: 1.5 ms.</h1>', "B is WRONG.", "look out", "a note",
                  'class="best"', 'class="wrong"', "Not looked for.", "Nothing here.", "nanogpt-mac 1.2"):  # fmt: skip
        assert shown in html
    assert "<script" not in html
    assert html.count("href=") == 2 + len(report.sections)  # the empty icon, the link, one for each section
    bare = page.html(Report("Coverage", "Coverage", "All operators run.", []))
    assert "figures" not in re.sub(r"<style>.*</style>", "", bare, flags=re.S)


def test_a_link_that_is_no_web_address_is_text(report):
    odd = Table("T", ["a", "b"], [Row(["x", 'https://x"><script>|`'], link='https://x"><script>|`')])
    report.sections = [Section("s", "S", tables=[odd])]
    assert "<script" not in page.html(report) + show.markdown(report)


def test_charts_stand_over_their_section(report):
    kind = charts.RowsChart("chart-a", "Times", "ms", ["what", "ms"], "Dots.")

    def draw(axes, i):
        charts.dot_and_interval(axes, i, 1.0 + i, (0.9 + i, 1.2 + i), "ink")
        return f"{1.0 + i} ms", Row(["AB"[i], str(1.0 + i)])

    with svg.style():
        drawn = kind.of(["A", "B"], draw)
        assert kind.of(["A", "B"], draw) == drawn  # the same bytes every time
    assert drawn.description == "Dots. A: 1.0; B: 2.0."
    html = page.html(report, {"first": [drawn]})
    assert html.index('id="chart-a"') < html.index("Speed</caption>")
    assert "2.0 ms</text>" in html


def test_figures_as_words():
    assert [words.ms(v) for v in (7.4123, 30.2, 221.04, 1986.4, 0.012345, 0, None, 1e308)] == [
        "7.412", "30.20", "221.0", "1,986", "0.01235", "0", "—", "1e+308",
    ]  # fmt: skip
    assert [words.seconds(v) for v in (0.0123, 2.345, 367, 7384)] == ["12.3 ms", "2.35 s", "6 min 07 s", "2 h 03 min"]
    assert [words.size(v) for v in (24 * 2**30, 1_500_000_000, 512, None)] == ["24 GiB", "1.4 GiB", "512 B", "—"]
    assert words.percent(0.4321) == "43.2 %"
    assert words.rate(1.1626e12, "FLOP") == "1.16 TFLOP"
    assert words.loss(float("nan")) == "nan"  # a loss that is not finite keeps its name
    assert words.loss(1.23456) == "1.2346"
    assert words.interval((1.5, 2.5)) == "[1.500, 2.500]"
    assert words.text("a\x1b[31m\n\tb") == "a [31m b"
    assert words.text({"a": [1.0, True, None]}) == "a: 1, yes, —"
    assert words.text("x" * 100, 10) == "xxxxxxxxx…"
    assert words.listed(["A", "B", "C"]) == "A, B and C"
    assert words.plural(2, "entry", "entries") == "2 entries"


def test_columns_of_figures_are_right_aligned():
    table = Table("", ["variant", "a", "b", "c"], [Row(["x", "1.2", "text", "—"]), Row(["y", "—", "3", "—"])])
    assert table.right == [False, True, False, False]
    assert table.known == [0, 1, 2]


def test_a_bound_of_two_rounds_is_no_line_of_digits():
    assert [words.ratio(value) for value in (1.5, 25.44, 3.1e40)] == ["1.500", "25.4", "3e+40"]
