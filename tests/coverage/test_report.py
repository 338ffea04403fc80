"""Differences between two torches, the verdicts and exit codes, and what the command prints."""

import json
from dataclasses import replace

import pytest
from fakes import fake_wheels as fakes

from nanogpt_mac.coverage import page, report
from nanogpt_mac.coverage.config import CoverageConfig, validate
from nanogpt_mac.coverage.model_ops import Trace
from nanogpt_mac.coverage.run import run
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.operators import diff
from nanogpt_mac.operators.table import Kind
from nanogpt_mac.report import show


def names(changes):
    return [change.op for change in changes]


def test_every_kind_of_change(tables):
    old, new = tables
    changes = diff.compare(old, new)
    assert names(changes.lost) == ["beta"]
    assert names(changes.gained) == ["_linalg_svd", "_linalg_svd.U", "gamma", "linalg_svd", "linalg_svd.U"]
    assert changes.gained[0] == diff.Change("_linalg_svd", "missing, CPU kernel", "structured delegate")
    assert (changes.hand_added, changes.hand_removed) == ([], ["linalg_svd", "linalg_svd.U"])
    assert changes.removed == changes.moved == changes.unclear == []
    back = diff.compare(new, old)
    assert (names(back.lost), names(back.gained)) == (names(changes.gained), names(changes.lost))
    assert (back.hand_added, back.hand_removed) == (changes.hand_removed, changes.hand_added)
    assert diff.compare(old, old) == diff.Diff()


def altered(table, **kinds):
    """The table with other kinds; None takes the overload away."""
    entries = dict(table.entries)
    for op, kind in kinds.items():
        if kind is None:
            del entries[op]
        else:
            entries[op] = replace(entries[op], kind=kind)
    return replace(table, entries=entries)


def test_changes_that_are_no_loss_and_no_gain(tables):
    old = tables[0]
    new = altered(old, delta=Kind.MISSING_CPU, epsilon=Kind.NATIVE, gamma=None, eta=Kind.UNKNOWN)
    changes = diff.compare(old, new)
    assert names(changes.moved) == ["delta", "epsilon"]
    assert changes.removed == [diff.Change("gamma", "missing, CPU kernel", "absent")]
    assert names(changes.unclear) == ["eta"]
    assert changes.lost == changes.gained == []
    assert names(diff.compare(old, new, ["delta", "beta", "nowhere"]).moved) == ["delta"]
    assert diff.compare(new, old).moved[0].op == "delta"  # gamma is new there: no change


def verdict(table, *, scope="ops", ops=(), against=None, trace=None, no_trace=None):
    made = report.page(scope, table, list(ops), against, trace, no_trace)
    return made.exit_code, made.verdict


def test_exit_codes_of_one_torch(tables):
    table = tables[0]
    assert verdict(table, ops=["alpha", "beta"])[0] == 0
    for op in ("gamma", "delta", "embedding_renorm_", "_slow_conv2d_forward"):
        code, words = verdict(table, ops=["alpha", op])
        assert code == 1
        assert f"1 operators asked for are missing or run on the CPU: {op}" in words
    assert verdict(altered(table, alpha=Kind.UNKNOWN), ops=["alpha"])[0] == 2
    assert verdict(table, scope="surface", ops=table.entries)[0] == 0
    assert verdict(altered(table, alpha=Kind.UNKNOWN), scope="surface", ops=table.entries)[0] == 2


def test_a_composite_is_judged_by_its_parts(tables):
    read, unread = tables
    assert verdict(read, ops=["zeta.Scalar", "theta"])[0] == 0
    assert verdict(read, ops=["epsilon"]) == (
        2,
        "cannot tell whether epsilon runs: in some branch it calls gamma, which MPS does not have",
    )
    code, words = verdict(unread, ops=["epsilon"])
    assert (code, "binary=true reads it from the binary" in words) == (2, True)
    assert verdict(read, ops=["epsilon"], against=read)[0] == 0  # nothing new about it


def test_exit_codes_of_a_difference(tables):
    old, new = tables
    ops = ["alpha", "beta", "gamma"]
    assert verdict(old, ops=["alpha", "gamma"], against=old) == (
        0,
        "no operator asked for was lost since 9.1.0; 1 run in neither: gamma",
    )
    assert verdict(new, ops=ops, against=old) == (1, "1 operators asked for were lost since 9.1.0: beta")
    assert verdict(new, ops=["alpha"], against=old)[0] == 0
    assert verdict(new, scope="surface", ops=new.entries, against=old)[0] == 1
    assert verdict(altered(old, alpha=Kind.FALLBACK), ops=["alpha"], against=old)[0] == 1
    assert verdict(altered(old, alpha=None), ops=["alpha"], against=old)[0] == 1
    assert verdict(altered(old, alpha=None), scope="surface", ops=[], against=old)[0] == 0
    assert verdict(altered(old, alpha=Kind.UNKNOWN), ops=["alpha"], against=old)[0] == 2
    assert verdict(old, ops=["alpha"], against=altered(old, alpha=Kind.UNKNOWN))[0] == 2
    # A new overload that does not run, and that something calls, is a loss.
    assert verdict(old, ops=["gamma"], against=altered(old, gamma=None))[0] == 1


def traced(stopped=None, **calls):
    return Trace("predicted", "simulated-mps", "2.13.0", {"forward": calls}, stopped)


def test_exit_codes_of_a_model(tables):
    table = tables[0]

    def model(trace, **options):
        return verdict(table, scope="model", ops=trace.calls() if trace else [], trace=trace, **options)

    assert model(traced(alpha=3)) == (0, "all 1 operators that this model calls run on MPS")
    assert model(traced(alpha=3, gamma=1))[0] == 1
    assert model(traced(alpha=3, unheard=1))[0] == 2
    assert model(traced(stopped="no", alpha=3)) == (2, "the trace of this model stopped early: no")
    assert model(traced(stopped="no", gamma=3))[0] == 1  # what is known to be lost weighs more
    code, words = model(None, no_trace="no compiler")
    assert (code, words.startswith("cannot tell which operators this model calls: no compiler")) == (2, True)


def test_markdown_is_safe_in_a_comment(tables):
    old, new = tables
    new = replace(new, disagreements=["beta: one | other"])
    text = show.markdown(report.page("surface", new, sorted(new.entries), old, None, None).report)
    assert text.startswith("### MPS coverage of torch 9.2.0\n\n❌ **1 operators of the whole surface were lost")
    assert "| lost | beta | native | missing, CPU kernel |" in text
    assert "| 9.2.0 | beta: one \\| other |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in rows)
    assert text.count("<details>") == text.count("</details>")


def test_names_and_errors_are_no_markup():
    rows = [["_fused_adamw_", "__and__.Tensor"], ["linalg_svd", "TypeError: <class 'x'> *a*"]]
    text = show.markdown(page.Page("t", [], [page.section("s", ["a", "b"], rows)], page.OK, "_a_").report)
    assert r"**\_a\_**" in text
    assert r"| \_fused\_adamw\_ | \_\_and\_\_.Tensor |" in text
    assert r"| linalg\_svd | TypeError: &lt;class 'x'&gt; \*a\* |" in text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(RuntimeError("a bug"), 2), (PermissionError(13, "Permission denied", "/c"), "/c: cannot be read or written")],
)
def test_a_crash_is_no_loss(monkeypatch, capsys, error, outcome):
    def fail(*_):
        raise error

    monkeypatch.setattr("nanogpt_mac.coverage.run.load", fail)
    if outcome == 2:
        assert run(CoverageConfig()) == outcome
        assert "RuntimeError: a bug" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=outcome):
            run(CoverageConfig())


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_json_object(command, wheels):
    done = command("mps_coverage.py", f"torch={wheels[1]}", f"against={wheels[0]}", "scope=surface", "format=json")
    made = json.loads(done.stdout)
    assert (done.returncode, made["exit_code"], made["schema"]) == (1, 1, 1)
    assert made["torch"]["counts"]["native"] == 3
    assert names_of(made["diff"]["surface"]["lost"]) == ["beta"]
    assert {op["op"]: op["kind"] for op in made["ops"]}["linalg_svd"] == "composite"
    assert made["torch"]["sha256"] != made["against"]["sha256"]


def names_of(changes):
    return [change["op"] for change in changes]


def test_the_command_writes_a_page_beside_what_it_prints(command, wheels, tmp_path):
    asked = (f"torch={wheels[1]}", f"against={wheels[0]}", "scope=surface", "format=json", "html=page.html")
    done = command("mps_coverage.py", *asked)
    assert json.loads(done.stdout)["exit_code"] == done.returncode == 1
    text = (tmp_path / "page.html").read_text()
    assert "<h1" in text
    for words in (
        "1 operators of the whole surface were lost since 9.1.0: beta",
        "Where overloads run",
        "linalg_svd.U",
    ):
        assert words in text
    done = command("mps_coverage.py", f"torch={wheels[0]}", "scope=surface", "html=nowhere/page.html")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mps_coverage.py: html=nowhere/page.html: use a file in a folder that exists\n"


def test_a_difference_of_nothing_says_so(tables):
    text = show.markdown(report.page("surface", tables[0], [], tables[0], None, None).report)
    assert "Changes: whole surface, 9.1.0 to 9.1.0: none" in text
    assert "registrations by hand" not in text.replace("registrations by hand and from Python", "")


def test_the_command_prints_tables(command, wheels):
    done = command("mps_coverage.py", f"torch={wheels[0]}", "scope=ops", "op=[alpha,zeta]", "binary=true")
    assert done.returncode == 0, done.stderr
    for words in ("alpha.out", "zeta.Scalar", "structured delegate", "All 3 operators asked for run on MPS"):
        assert words in done.stdout


def test_bad_input_is_one_line_and_code_2(command, wheels):
    for overrides, words in [
        (
            [f"torch={wheels[0]}", "scope=ops", "op=alfa"],
            "op=alfa: torch 9.1.0 has no such operator; did you mean alpha",
        ),
        (["torhc=2.15.0"], "torhc=2.15.0: there is no such key; did you mean torch"),
    ]:
        done = command("mps_coverage.py", *overrides)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr


def test_the_second_torch_is_named_by_its_own_key(wheels):
    with pytest.raises(InputError, match=r"^against=newest: use installed, nightly"):
        run(CoverageConfig(torch=str(wheels[0]), against="newest", scope="surface"))


def test_values_that_cannot_be_meant():
    for values, words in [
        ({"scope": "everything"}, "scope=everything: use model, ops, surface or opinfo"),
        ({"format": "html"}, "format=html: use table, json or markdown"),
        ({"dtype": "float64"}, "dtype=float64: use float32"),
        ({"python": "latest"}, "python=latest: use a version such as 3.12"),
        ({"scope": "ops"}, "op=null: scope=ops needs the operators"),
        ({"scope": "ops", "op": []}, r"op=\[\]: scope=ops needs the operators"),
        ({"op": "gelu"}, "op=gelu: only scope=ops and scope=opinfo take operators"),
        ({"model": ModelConfig(n_layer=0)}, "model.n_layer=0: use at least 1"),
        ({"model": ModelConfig(n_head=5)}, "model.n_embd=384: model.n_head=5 does not divide it"),
        ({"model": ModelConfig(vocab_size=0)}, "model.vocab_size=0: use at least 1"),
    ]:
        with pytest.raises(InputError, match=words):
            validate(CoverageConfig(**values))
    validate(CoverageConfig(scope="ops", op=["aten::gelu"]))


def test_the_fakes_are_what_the_tables_say(tables):
    """The two fixtures differ in what their docstring says; everything above rests on it."""
    assert tables[0].entries["beta"].kind is Kind.NATIVE
    assert tables[1].entries["gamma"].kind is Kind.NATIVE
    assert sorted(tables[0].entries) == sorted(tables[1].entries)
    assert len(tables[0].entries) == fakes.OPERATORS.count("- func:")
