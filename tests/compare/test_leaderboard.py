"""`report.py`: only runs of the same work are ranked together; what it reads, writes and refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from fakes import comparisons as fakes

from nanogpt_mac.compare import leaderboard
from nanogpt_mac.compare.config import ReportConfig
from nanogpt_mac.compare.leaderboard import Board, Entry, ranks, run
from nanogpt_mac.errors import InputError
from nanogpt_mac.records.comparison import Machine, VariantResult, Work
from nanogpt_mac.report import show

pytestmark = pytest.mark.xdist_group("leaderboard")  # what its fixtures make is expensive: one worker makes it

MAX = fakes.MAC | {"chip": "Apple M4 Max", "gpu": "Apple M4 Max", "gpu_cores": 40, "memory_bytes": 64 * 2**30}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Comparisons of two Macs."""
    at = tmp_path_factory.mktemp("runs")
    mac, bigger = at / "pro", at / "max"
    wrong = {"name": "mps-compile", "label": "MPS compiled", "ms": 100.0, "parity": "fail"}
    sim = {"name": "mps-2", "label": "MPS simulated", "device": "simulated-mps", "ms": 50.0}
    fakes.write_comparison(mac, [fakes.VARIANTS[0], fakes.VARIANTS[3], wrong, sim], 5, 20, 0.003, 1)
    variants = [fakes.VARIANTS[0] | {"ms": 130.0}, fakes.VARIANTS[3] | {"ms": 95.0}]
    fakes.write_comparison(bigger, variants, 5, 20, 0.003, 2, machine=MAX)
    return mac, bigger


@pytest.fixture
def entries(folders):
    return [entry for folder in folders for entry in leaderboard.entries(folder)]


def rows(section, table=0):
    found = section.tables[table]
    return [dict(zip(found.columns, row.cells, strict=True)) for row in found.rows]


def test_machines_side_by_side_the_fastest_first(entries):
    board = Board(entries)
    (group,) = board.groups
    first, *_ = sections = board.report().sections
    shown = rows(first)
    assert [(row["variant"], row["machine"]) for row in shown] == [
        ("MLX compiled", "Apple M4 Max"),
        ("MPS eager", "Apple M4 Max"),
        ("MLX compiled", "Apple M4 Pro"),
        ("MPS eager", "Apple M4 Pro"),
    ]
    assert [row["rank"] for row in shown] == ["1", "2", "3", "4"]
    assert shown[2]["GPU cores"] == "20"
    assert shown[0]["memory"] == "64 GiB"
    assert shown[3]["framework"] == "torch 2.13.0"
    assert float(shown[2]["time relative to fastest"]) == pytest.approx(2.0, rel=0.02)
    by_machine = rows(first, 1)
    assert list(by_machine[0]) == [
        "variant",
        "Apple M4 Max, 40 GPU cores, 64 GiB",
        "Apple M4 Pro, 20 GPU cores, 24 GiB",
    ]
    assert by_machine[1]["variant"] == "MPS eager"
    assert len(group) == 4
    assert board.sentence().startswith("MLX compiled on Apple M4 Max is fastest: 9")
    assert [section.id for section in sections] == ["work-1", "unranked", "sources"]


def test_wrong_and_simulated_variants_take_no_rank(entries):
    board = Board(entries)
    unranked = {row["variant"]: row["why"] for row in rows(board.report().sections[1])}
    assert set(unranked) == {"MPS compiled (WRONG)", "MPS simulated"}
    assert unranked["MPS compiled (WRONG)"].startswith("WRONG: failed parity")
    assert "simulated" in unranked["MPS simulated"]
    assert "50.0" not in board.sentence()  # the fastest of all, and it does not count


OTHER_WORK = [
    ("batch_size", 32),
    ("gradient_accumulation_steps", 2),
    ("dtype", "bfloat16"),
    ("matmul_precision", "high"),
    ("corpus_sha256", "0" * 64),
    ("stand_in", True),
    ("model.dropout", 0.0),
    ("model.n_layer", 12),
    ("model.block_size", 128),
    ("model.vocab_size", 50304),
]


def with_work(entry, key, value):
    """The entry, having done other work."""
    work = entry.work.model_dump()
    holder = work["model"] if key.startswith("model.") else work
    holder[key.removeprefix("model.")] = value
    return dataclasses.replace(entry, work=Work(**work))


@pytest.mark.parametrize(("key", "value"), OTHER_WORK)
def test_other_work_is_never_ranked_with_it(entries, key, value):
    other = with_work(next(entry for entry in entries if entry.unranked() is None), key, value)
    board = Board([*entries, other])
    assert [len(group) for group in board.groups] == [4, 1]
    assert board.groups[1] == [other]
    assert board.sentence().startswith("2 kinds of work, ranked apart.")


@pytest.mark.parametrize("key", ["batch_size", "dtype", "corpus_sha256", "model"])
def test_unknown_work_is_not_ranked(entries, key):
    other = with_work(next(entry for entry in entries if entry.unranked() is None), key, None)
    board = Board([*entries, other])
    assert [len(group) for group in board.groups] == [4]
    assert "not fully recorded" in str(other.unranked())


def entry(median, bounds, work=None, **more):
    facts = {"label": "A", "name": "a", "state": "ok", "times": {"median": median, "ci95": bounds}}
    return Entry(VariantResult(**facts | more), work or Work(), Machine(), None, Path(), None)


def test_entries_that_cannot_be_told_apart_share_a_rank():
    group = [entry(100, [99, 101]), entry(100.5, [99.5, 102]), entry(110, [108, 112]), entry(111, None)]
    assert ranks(group) == [1, 1, 3, None]


def test_a_median_and_its_interval_must_make_sense():
    assert entry(100, [1, 2]).bounds is None  # it does not even hold the median
    assert entry(100, [101, 99]).bounds is None
    assert entry(0, None).unranked() == "nothing was timed"


def ranked(*pairs):
    """A board of such entries, all of the same fully known work."""
    model = {"n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "vocab_size": 1}
    facts = {"batch_size": 1, "gradient_accumulation_steps": 1, "dtype": "x", "matmul_precision": "x"}
    work = Work(model=model, corpus_sha256="x", **facts)
    return Board([entry(median, bounds, work, label=str(median)) for median, bounds in pairs])


def test_the_sentence_claims_no_more_than_the_intervals():
    assert "Only 1.0 on an unknown machine could be ranked" in ranked((1.0, [1, 1])).sentence()
    assert "1.0 on an unknown machine is fastest" in ranked((1.0, [1, 1]), (2, [2, 2])).sentence()
    for board in (ranked((1.0, None), (2, [2, 2])), ranked((1.0, [1, 1]), (2, None))):
        assert "1.0 on an unknown machine has the lowest median" in board.sentence()
        assert [row.mark for row in board.report().sections[0].tables[0].rows] == ["", ""]
    assert "and 1 more cannot be told apart" in ranked(*((i, [1, 9]) for i in range(2, 7))).sentence()


def test_a_diverged_run_takes_no_rank(entries):
    reason = "diverged: the loss is not a number"
    board = Board([*entries, entry(1.0, None, entries[0].work, state="partial", reason=reason)])
    assert "diverged" in {row["why"].split(":")[0] for row in rows(board.report().sections[1])}


def test_nothing_known_is_a_board_too():
    nothing = VariantResult(name="x", label="x", state="failed")
    board = Board([Entry(nothing, Work(), Machine(), None, Path("x"), None)])
    assert board.sentence() == "Nothing here can be ranked."
    assert "nothing was timed" in show.markdown(board.report())
    assert "</html>" in board.html()


def test_single_runs_join_in(folders, tmp_path):
    """A train.py run of the same work is ranked with the comparisons, by the interval of its own iterations."""
    runs = folders[1] / "rounds"
    single = next(path for path in sorted(runs.iterdir()) if path.name.endswith("-mlx") and "pilot" not in path.name)
    shutil.copytree(single, tmp_path / "one")
    found = leaderboard.entries(tmp_path / "one")
    board = Board([*leaderboard.entries(folders[0]), *found])
    assert [len(group) for group in board.groups] == [3]
    assert board.groups[0][0] == found[0]
    row = rows(board.report().sections[0])[0]
    assert (row["variant"], row["parity"], row["runs"]) == ("MLX compiled", "not run", "1")


def test_a_run_that_shared_its_machine_takes_no_rank(folders, tmp_path):
    """As a member of a sweep whose launcher ran others beside it."""
    one = tmp_path / "one"
    shutil.copytree(next(iter(sorted((folders[1] / "rounds").glob("0-mlx")))), one)
    summary = json.loads((one / "summary.json").read_text())
    (one / "summary.json").write_text(json.dumps(summary | {"shared_machine": True}))
    (found,) = leaderboard.entries(one)
    assert found.median > 0
    assert "other runs used this machine at the same time" in found.unranked()
    assert Board([found]).sentence() == "Nothing here can be ranked."


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_takes_bare_paths(command, folders, tmp_path):
    odd = tmp_path / "a=b, c'd"
    shutil.copytree(folders[0], odd)
    done = command("report.py", str(odd), str(folders[1]), "output=out/board")
    assert (done.returncode, done.stderr) == (0, "")
    assert "MLX compiled on Apple M4 Max is fastest" in done.stdout
    page, text = (tmp_path / "out" / "board" / name for name in ("report.html", "report.md"))
    assert "Apple M4 Max" in page.read_text()
    assert text.read_text().startswith("### Leaderboard: 6 entries, 2 machines")


def test_one_comparison_has_its_report_made_anew(folders, tmp_path, capsys):
    folder = tmp_path / "c"
    shutil.copytree(folders[1], folder)
    assert run(ReportConfig([str(folder)])) == 0
    assert "MLX compiled" in capsys.readouterr().out
    assert (folder / "report.md").read_text().startswith("### Comparison: Apple M4 Max")
    # What someone sent: only comparison.json, of a newer version and with much missing.
    sent = tmp_path / "sent"
    sent.mkdir()
    variant = {"name": "mps", "label": "MPS eager", "state": "ok", "times": {"median": 221}}
    document = {"schema": 9, "variants": [variant], "verdict": {"sentence": "MPS eager it is."}, "unheard": 1}
    (sent / "comparison.json").write_text(json.dumps(document))
    assert run(ReportConfig([str(sent)], output=str(tmp_path / "out"))) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "schema 9, newer" in text
    assert "| MPS eager | 221.0 |" in text
    assert [path.name for path in sent.iterdir()] == ["comparison.json"]


def test_details_are_shown_on_request(folders, tmp_path, capsys):
    options = {"output": str(tmp_path / "out")}
    assert run(ReportConfig([str(folders[1])], **options)) == 0
    brief = capsys.readouterr().out
    assert run(ReportConfig([str(folders[1])], details=True, **options)) == 0
    whole = capsys.readouterr().out
    for later in ("Iteration times", "What each switch", "How each variant was started", "drift in a round"):
        assert later not in brief
    assert "Iteration times" in whole
    assert "details=true" in brief
    assert "details=true" not in whole
    for printed in (brief, whole):
        assert printed.startswith("MLX compiled is fastest")
        assert max(map(len, printed.splitlines()[:-2])) <= 100  # the last two have the folder's name


def test_a_folder_of_runs_stands_for_them(folders):
    found = leaderboard._folders([str(folders[0].parent), str(folders[0])])
    assert sorted(path.name for path in found) == ["max", "pro"]  # each once


def test_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "comparison.json").write_text("{")
    for runs, words in [
        ([], r"^runs=\[\]: name the folders"),
        ([str(tmp_path / "none")], r"none: is not a folder"),
        ([str(tmp_path / "empty")], r"empty: holds no run"),
        ([str(tmp_path / "bad")], r"comparison\.json: cannot be read"),
    ]:
        with pytest.raises(InputError, match=words):
            run(ReportConfig(runs, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "comparison.json").write_text('{"schema": 2, "variants": [], "verdict": {"sentence": ""}}')
    with pytest.raises(InputError, match=r"^output=.*file"):
        run(ReportConfig([str(tmp_path)], output=str(tmp_path / "file" / "x")))


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot be read: Permission denied$"):
        run(ReportConfig([str(tmp_path)]))


def test_a_path_of_any_bytes_is_shown(folders, tmp_path, capsys):
    odd = tmp_path / "a\udcff\u202e|[red]"  # not UTF-8, and written from right to left
    shutil.copytree(folders[1], odd)
    assert run(ReportConfig([str(odd), str(folders[0])], output=str(tmp_path / "out"))) == 0
    assert "[red]" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
