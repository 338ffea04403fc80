"""What a comparison's report says, in the terminal, in markdown and in its charts."""

import re

import pytest
from fakes.pages import EVIL, alone, collected, edited, empty, many, sparse, with_levers

from nanogpt_mac.compare import charts, contents, doubts, evidence
from nanogpt_mac.compare import page as compare_page
from nanogpt_mac.records.comparison import Comparison
from nanogpt_mac.report import show, svg, words

pytestmark = pytest.mark.xdist_group("report")  # what its fixtures make is expensive: one worker makes it


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("comparison"))


def section(comparison, name):
    return next(part for part in contents.report(comparison).sections if part.id == name)


def cells(part, label):
    """Column -> cell of the row that begins so, in a section's first table."""
    table = part.tables[0]
    row = next(row for row in table.rows if row.cells[0].startswith(label))
    return dict(zip(table.columns, row.cells, strict=True))


def markdown(comparison):
    return show.markdown(contents.report(comparison))


def test_the_first_screen_is_the_verdict_and_one_table(comparison, capsys):
    show.show(contents.report(comparison))
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).startswith(comparison.verdict.sentence[:80])
    for shown in ("MPS compiled (WRONG)", "(FAILED)", "out of memory", "Its times do not count", "1.33", "fastest"):
        assert shown in printed
    assert printed.count("───\n") + printed.count("─── \n") == 1  # one table
    assert max(map(len, printed.splitlines())) <= 100


def test_variants_are_ordered_and_marked(comparison):
    labels = [doubts.label(variant) for variant in contents.ordered(comparison)]
    assert labels == ["MLX compiled", "MPS eager", "CPU eager", "MPS compiled (WRONG)", "CPU compiled (FAILED)"]
    part = section(comparison, "variants")
    fastest, second = cells(part, "MLX"), cells(part, "MPS eager")
    ratio = next(column for column in fastest if column.startswith("time relative to fastest [99 %"))
    assert fastest[ratio] == "fastest"
    found = comparison.named("mps").ratio
    assert second[ratio] == f"{found.value:.3f} [{found.ci[0]:.3f}, {found.ci[1]:.3f}]"
    assert cells(part, "MPS compiled")["parity"] == "WRONG"
    assert cells(part, "CPU compiled")["rounds"].startswith("0, ")
    assert [row.mark for row in part.tables[0].rows] == ["best", "", "", "wrong", "failed"]


def test_the_sentence_and_the_table_give_one_number(comparison):
    """The verdict says how many times as fast; the column is the other's time over the fastest's: the same figure."""
    said = re.search(r"is fastest: ([\d.]+) x as fast as MPS eager", comparison.verdict.sentence)
    found = comparison.named("mps").ratio
    assert float(said[1]) == pytest.approx(found.value, rel=0.005)
    assert found.value > 1


def test_a_tie_is_called_one(comparison):
    made = edited(comparison, lambda document, named: named["mps"]["ratio"].update({"value": 1.004, "tie": True}))
    assert re.search(r"1\.004 .* tie", markdown(made))
    made = edited(comparison, lambda document, named: document["verdict"].update({"ties": ["mps"]}))
    assert "| tie |" in markdown(made)
    assert "| fastest |" not in markdown(made)


def test_wrong_follows_the_variant_everywhere(comparison):
    text = markdown(comparison)
    naming = [line for line in text.splitlines() if "MPS compiled" in line and not line.startswith("**")]
    published = [line for line in naming if line.startswith("| published")]
    assert len(naming) - len(published) > 6
    assert all("MPS compiled (WRONG)" in line for line in naming if line not in published)
    drawn = [chart for some in charts.draw(comparison).values() for chart in some]
    assert [chart.id for chart in drawn] == ["chart-ratio", "chart-series", "chart-loss-time", "chart-roofline"]
    for chart in drawn:
        mentions = chart.svg.count("MPS compiled")
        assert mentions == chart.svg.count("MPS compiled (WRONG)") > 0
        assert all("WRONG" in name for name, _ in chart.legend if name.startswith("MPS compiled"))


def test_markdown_is_safe_and_whole(comparison):
    text = markdown(with_levers(comparison))
    assert "<script>" not in text
    assert text.startswith("### Comparison: Apple M4 Pro, 20 GPU cores, 24 GiB")
    assert text.splitlines()[2].startswith(f"**{comparison.verdict.sentence[:30]}")
    assert text.count("<details>") == text.count("</details>") > 3
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        assert all(line.endswith(" |") for line in table.splitlines())


def test_controls_never_reach_the_terminal(comparison, capsys):
    evil = {"label": "\x1b[31mred\x07\n\ttwo [bold]lines"}
    made = edited(comparison, lambda document, _: document["variants"][0].update(evil))
    show.show(contents.report(made), details=True)
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "\x07" not in printed
    assert "[bold]lines" in printed


@pytest.mark.parametrize("made", [empty, None], ids=["empty", "sparse"])
def test_what_is_missing_is_a_dash_or_a_sentence(comparison, made, capsys):
    sparse_one = sparse(comparison) if made is None else made()
    report = contents.report(sparse_one)
    show.show(report, details=True)
    assert "The parity gate was not run" in capsys.readouterr().out
    assert "The parity gate was not run" in show.markdown(report)
    assert "</html>" in compare_page.html(sparse_one)
    if made is None:
        row = cells(section(sparse_one, "variants"), "mlx")
        assert row["ms an iteration [95 %]"] == words.ms(comparison.named("mlx").median)
        assert {row[c] for c in ("tokens/s", "MFU: chip", "peak memory", "full recipe")} == {words.DASH}
    else:
        assert "Nothing ran." in show.markdown(report)


def test_every_optional_key_may_be_missing(comparison):
    """Each field of a variant that has a default, left out in turn: the report and every chart are made."""
    whole = comparison.named("mlx")
    document = comparison.document()
    mlx = next(variant for variant in document["variants"] if variant["name"] == "mlx")
    optional = [name for name, field in type(whole).model_fields.items() if not field.is_required()]
    assert len(optional) > 30
    document["variants"] = [
        {key: value for key, value in mlx.items() if key != name} | {"name": name, "label": name} for name in optional
    ]
    made = Comparison.parse(document, "comparison.json")
    text = markdown(made)
    assert all(name in text.replace("\\", "") for name in optional)
    assert len(charts.draw(made)) == 3  # none is called fastest, and no lever was tried


def test_every_warning_is_there_once(comparison):
    def edit(document, named):
        document["warnings"] = ["on battery", "on battery"]
        for name in ("mlx", "cpu"):
            named[name]["warnings"] = ["too few rounds"]

    made = edited(comparison, edit)
    lines = doubts.problems(made, contents.ordered(made))
    assert lines.count("on battery") == 1
    assert "(WRONG)" in lines[0]
    assert "MLX compiled, CPU eager: too few rounds" in lines
    assert len(lines) == len(set(lines))


def test_the_parity_table_names_what_failed(comparison):
    part = section(comparison, "parity")
    row = cells(part, "MPS compiled (WRONG)")
    assert row["result"] == "WRONG"
    assert row["gradients"] == "3.0e-02 WRONG (limit 1.0e-03)"
    assert cells(part, "MLX")["gradients"] == "1.0e-04"
    assert part.tables[1].rows[0].cells[0] == "float32"


FINDING = {"op": "foo", "phase": "backward", "calls_per_iteration": 2, "bytes": 4096, "advice": "cast"}


@pytest.mark.parametrize(("document", "said"), [
    ({"complete": True, "phases": ["forward", "backward"], "findings": []}, "none in forward, backward"),
    ({"complete": False, "why_incomplete": ["no profiler"], "findings": []},
     "0 found, and there may be more: no profiler"),
    ({}, "is not recorded"),
    ({"complete": True, "findings": [FINDING]}, "MPS eager: 1 found"),
])  # fmt: skip
def test_no_fallback_is_only_said_after_looking_everywhere(comparison, document, said):
    made = edited(comparison, lambda _, named: named["mps"].update({"fallbacks": document}))
    part = evidence.fallbacks(contents.ordered(made))
    assert any(said in item for item in part.items)
    if document.get("findings"):
        assert cells(part, "foo") == {
            "op": "foo", "phase": "backward", "calls per iteration": "2", "bytes": "4096", "advice": "cast",
        }  # fmt: skip


def test_a_compile_report_is_taken_apart(comparison):
    kernels = [{"kernel": "a", "launches": 2}, {"kernel": "b", "launches": 1}]
    document = {"graph_breaks": None, "iterations": {"train": {"ms": 1.5, "kernels": kernels}}}
    made = edited(comparison, lambda _, named: named["mps"].update({"compile_report": document}))
    facts, launches = evidence.compile_report(contents.ordered(made)).tables
    assert [row.cells for row in facts.rows] == [["graph breaks", words.DASH], ["iterations train ms", "1.5"]]
    assert launches.caption.endswith(": iterations train kernels")
    assert [row.cells for row in launches.rows] == [["a", "2"], ["b", "1"]]


def test_twelve_variants_fit_a_terminal(comparison, capsys):
    show.show(contents.report(many(comparison, points=50)), details=True)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_first_evaluation_is_drawn_at_0(comparison):
    """It is before the first iteration, whose time, and the warm-up's, are not among the kept ones."""
    variant = comparison.named("mlx")
    assert (variant.evaluations[0].iter, variant.series[0].iter[0] > 1) == (0, True)
    _, _, at, _ = charts._line(variant)
    assert at[0] == 0


def test_a_ratio_far_from_1_is_drawn_on_a_logarithmic_axis(comparison, monkeypatch):
    asked = []
    monkeypatch.setattr("nanogpt_mac.compare.charts.log_x", lambda _: asked.append("log"))
    for value in (1.2, 40.0):  # where matplotlib's own margin would begin below 0
        ratio = {"value": value, "ci": [value, value], "tie": False, "pairs": [value]}

        def edit(document, named, ratio=ratio):
            named["mps"]["ratio"] |= ratio
            document["variants"] = [named["mps"], named["mlx"]]

        with svg.style():
            charts._ratios(edited(comparison, edit))
    assert asked == ["log"]


def test_a_variant_that_did_other_work_is_excepted(comparison):
    def note(made):
        return section(made, "variants").notes[0]

    assert note(comparison).startswith("Same work for every variant: ")
    other = edited(comparison, lambda _, named: named["mps"].update({"same_work": False}))
    assert note(other).startswith("Same work for all but MPS eager: ")
    untimed = edited(comparison, lambda _, named: [variant.update({"times": None}) for variant in named.values()])
    assert note(untimed).startswith("Work that was planned: ")


def test_a_note_stands_once_for_all_that_have_it(comparison):
    def edit(document, named):
        for name in ("mlx", "cpu"):
            named[name]["note"] = "CPU, torch's BLAS"

    made = edited(comparison, edit)
    assert "MLX compiled and CPU eager: CPU, torch's BLAS." in section(made, "variants").notes
    assert cells(section(made, "variants"), "MLX")["variant"] == "MLX compiled"


def test_long_words_do_not_make_a_large_page(comparison):
    def edit(document, named):
        for variant in named.values():
            variant |= {"label": "x" * 10**6, "reason": "y" * 10**6, "warnings": ["z" * 10**6]}

    made = edited(comparison, edit)
    assert len(markdown(made)) < 100_000
    wrong = next(variant for variant in made.variants if variant.state == "wrong")
    assert doubts.label(wrong).endswith("… (WRONG)")


def test_a_wrong_lever_is_marked_in_its_chart(comparison):
    def edit(name, base, **more):
        def change(document, _):
            document["levers"] = [document["levers"][0] | {"name": name, "base": base} | more]

        return change

    with svg.style():
        chart = charts._levers(edited(with_levers(comparison), edit("mps-compile", "mlx")))
        assert chart.table.rows[0].cells[0].endswith("(WRONG)")
        assert "(WRONG)</text>" in chart.svg
        assert "var(--wrong)" in chart.svg
        chart = charts._levers(edited(with_levers(comparison), edit("mlx", "mps-compile", what=90 * "w")))
        assert chart.table.rows[0].cells[0].endswith("w…, MPS compiled (WRONG)")


def test_evil_words_are_text(comparison):
    assert words.text(EVIL) == EVIL
    assert f"{EVIL}: {EVIL}." in section(with_levers(comparison), "variants").notes


def test_one_run_alone_is_a_report(comparison):
    made = alone(comparison)
    assert "Time relative" not in compare_page.html(made)
    assert "chart-series" in compare_page.html(made)


def test_every_warning_says_what_to_do():
    facts_only = {"OTHER_WORK", "SIMULATED", "STAND_IN"}  # nothing is wrong that a user could mend
    for doubt in doubts.Doubt:
        assert bool(doubt.hint) is (doubt.name not in facts_only), doubt
        assert not doubt.words.endswith(".")
        assert doubt.hint.endswith(".") or not doubt.hint
