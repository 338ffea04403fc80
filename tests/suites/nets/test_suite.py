"""suite=mlp and suite=lm from the command line's side: rows, refusals, CSV files, the report's words."""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanogpt_mac.errors import InputError
from nanogpt_mac.records.bench import NetBench, NetReading, State, Way
from nanogpt_mac.report import show
from nanogpt_mac.suites import mlp
from nanogpt_mac.suites.config import BenchConfig, validate
from nanogpt_mac.suites.nets import contents
from nanogpt_mac.suites.nets.suite import asked

WAYS = (Way(name="cpu", label="CPU"), Way(name="mlx", label="MLX"))


def bench(**of: object) -> NetBench:
    readings = [
        NetReading(
            row=mlp.MAIN, way=way, round=n, state=State.OK, batch=256, epochs_s=(t, t + 0.01 * n),
            median_s=t + 0.005 * n, run_s=3 * t, cpu=1.5,
            accuracy=0.97, accuracy_last=0.98, distance=1e-6, distance_last=2e-6,
        )
        for way, t in (("cpu", 0.2), ("mlx", 0.1))
        for n in range(6)
    ]  # fmt: skip
    given = {
        "suite": "mlp", "created": "2026-11-27T01:00:00", "version": "1", "seconds": 5.0, "complete": True, "seed": 1,
        "rounds": 6, "ways": WAYS, "rows": (mlp.MAIN,), "work": {"data": "stand-in"}, "readings": tuple(readings),
    }  # fmt: skip
    return NetBench.model_validate(given | of)


def test_csv_in_the_original_columns() -> None:
    files = mlp.SUITE.files(bench())
    assert set(files) == {"training-cpu.csv", "training-mlx.csv"}
    rows = list(csv.DictReader(io.StringIO(files["training-mlx.csv"])))
    assert list(rows[0])[:5] == ["epoch_0", "epoch_1", "batch_size", "avg", "iter_total"]
    assert len(rows) == 6
    assert float(rows[1]["avg"]) == pytest.approx(0.105)
    assert (rows[0]["batch_size"], rows[0]["network"], rows[0]["data"]) == ("256", "784-32-32-10", "stand-in")


def test_report() -> None:
    made = contents.report(bench())
    tables = [table for section in made.sections for table in section.tables]
    assert all("stand-in" in table.caption for table in tables)
    assert any("stand-in" in line for line in made.alarms)
    text = show.markdown(made)
    assert "MLX is fastest" in text
    assert "112.5" in text  # the median over runs of 100, 105, ... 125 ms
    assert "651.8" in text  # what is published of MPS


def test_published_reference_is_whole() -> None:
    lines = contents.published()
    names = {name for chunk in mlp.CHUNKS for name in chunk}
    assert {line["row"] for line in lines} <= names
    assert all(float(line[way]) > 0 and line["wrong"] for line in lines for way in contents.PUBLISHED_WAYS)


def test_rows_by_name() -> None:
    given = BenchConfig(suite="mlp", rows="784-32-32-10 batch 16")
    assert asked(given, mlp.CHUNKS) == [("784-32-32-10 batch 16",)]  # and not 16384
    with pytest.raises(InputError, match="rows=nothing: no row is called so"):
        asked(BenchConfig(suite="mlp", rows="nothing"), mlp.CHUNKS)
    with pytest.raises(InputError, match="dtype=float16"):
        asked(BenchConfig(suite="mlp", dtype="float16"), mlp.CHUNKS)


@pytest.mark.parametrize(
    ("suite", "given", "words"),
    [
        ("ops", "epochs=3", "only read with suite=mlp or suite=lm"),
        ("lm", "images=2000", "only read with suite=mlp"),
        ("mlp", "lm_size=small", "only read with suite=lm"),
    ],
)
def test_keys_of_other_suites(suite: str, given: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        validate(BenchConfig(suite=suite, given=[given]))


@pytest.mark.parametrize(("images", "data"), [(60_000, "MNIST"), (1000, "MNIST, 1,000 images")])
def test_an_epoch_of_fewer_images_is_called_so(monkeypatch: pytest.MonkeyPatch, images: int, data: str) -> None:
    monkeypatch.setattr(mlp.mnist, "load", lambda *_, **__: SimpleNamespace(label="MNIST", stand_in=False))
    planned = mlp.SUITE.plan(BenchConfig(suite="mlp", images=images, ways=["cpu"]))
    assert planned.work["data"] == data


def test_a_given_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no train-images"):
        mlp.SUITE.plan(BenchConfig(suite="mlp", mnist=str(tmp_path), ways=["cpu"]))
