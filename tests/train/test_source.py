"""Where a model comes from, and that a corpus has its tokens: refused before a step is taken or a token drawn."""

import dataclasses
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from fakes.nanogpt_files import trained
from fakes.support import EACH_FRAMEWORK

from nanogpt_mac.cli import Command
from nanogpt_mac.config import Config, SampleConfig
from nanogpt_mac.corpus import CharEncoder, DataConfig, TrainedBPEEncoder, prepare
from nanogpt_mac.corpus.stand_in import generate
from nanogpt_mac.corpus.texts import folder_key
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig, TrainState
from nanogpt_mac.train import checkpoint, sample, session
from nanogpt_mac.train.source import corpus_of, open_model, open_source, same_tokens

OTHER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "zyxwvutsrqponmlkjihgfedcba")
HALF = 30_000


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Texts, checkpoints that were trained on the first of them, and its meta.pkl, in one folder."""
    folder = tmp_path_factory.mktemp("house")
    text = generate()[: 2 * HALF]
    texts = {"text": text, "other": text.translate(OTHER), "swapped": text.swapcase(), "more": text + "é"}
    texts |= {"fewer": text.replace("Z", "z"), "new": "My lord, who is it that comes? " * 300}
    for name, content in texts.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    for name, steps, lr in (("none", 0, 0), ("few", 6, 1e-3), ("ckpt", 80, 1e-2)):
        torch.save(trained(text, steps, lr), folder / f"{name}.pt")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": {c: i for i, c in enumerate(sorted(set(text)))}}))
    (folder / "fewer.pkl").write_bytes(pickle.dumps({"itos": sorted(set(texts["fewer"]))}))
    return folder


def config(house, init_from="ckpt.pt", text="text", given=(), **data):
    data = DataConfig(name="text", path=str(house / f"{text}.txt"), dir=str(house / "data"), **data)
    model = ModelConfig(block_size=16)
    return Config(data=data, init_from=str(house / init_from), model=model, given=list(given), max_iters=1000)


def opened(asked):
    return open_source(asked, corpus_of(asked))


def drawing(house, run="ckpt.pt", **data):
    return SampleConfig(run=str(house / run), data=DataConfig(name="text", dir=str(house / "data"), **data))


@pytest.mark.parametrize(
    ("init_from", "said"), [("ckpt.pt", "fits what it predicts to "), ("few.pt", "too little"), ("none.pt", "any ")]
)
def test_the_text_it_was_trained_on_fits(house, capsys, init_from, said):
    source = opened(config(house, init_from))
    assert source.spec.vocab_size == len(set((house / "text.txt").read_text()))
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "other",
            r"fit what it predicts to 0\.\d\d, where 0\.9\d or more is needed \(loss .*data\.symbols=.*meta\.pkl",
        ),
        ("swapped", r"fit what it predicts to -?0\.\d\d, where"),
        ("more", r"it knows \d\d, the corpus has \d\d; use the text that it was trained on"),
        ("fewer", r"it knows \d\d, the corpus has \d\d, and it predicts the others too"),
    ],
)
def test_any_other_text_is_refused_for_training_and_drawing(house, text, line):
    name = str(house / f"{text}.txt")
    with pytest.raises(
        InputError, match=rf"^init_from=.*ckpt\.pt: its tokens are not those of data=text.*{line}"
    ) as one:
        opened(config(house, text=text))
    with pytest.raises(InputError, match=rf"^run=.*ckpt\.pt: its tokens are not those of data=text.*{line}"):
        sample.run(drawing(house, path=name))
    assert "\n" not in str(one.value)


def test_a_beginner_is_refused_only_what_is_plain(house):
    with pytest.raises(InputError, match=r"fit what it predicts to -?0\.\d\d, where 0\.\d+ or more"):
        opened(config(house, "few.pt", "swapped"))


def test_a_new_text_is_taken_in_the_symbols_of_the_old(house, capsys):
    source = opened(config(house, text="new", symbols=str(house / "meta.pkl")))
    assert (source.state.iteration, source.trained) == (80, True)
    with pytest.raises(InputError, match="it predicts the others too"):
        opened(config(house, text="new"))


@pytest.mark.parametrize("given", [{"path": "text.txt"}, {"path": "meta.pkl"}, {"symbols": "meta.pkl"}])
@pytest.mark.parametrize("backend", EACH_FRAMEWORK)
def test_what_names_the_symbols_is_enough_to_draw(house, capsys, given, backend):
    asked = drawing(house, **{key: str(house / name) for key, name in given.items()})
    asked.backend.name, asked.max_new_tokens, asked.prompt = backend, 5, "The "
    assert sample.run(asked) == 0
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, r"run=.*ckpt\.pt: does not say which text its \d\d tokens stand for; name the text .*data\.path=FILE"),
        ({"symbols": "fewer.pkl"}, r"data\.symbols=.*fewer\.pkl: holds \d\d symbols, and run=.* knows \d\d; use"),
        ({"symbols": "ckpt.pt"}, r"data\.symbols=.*ckpt\.pt: .*use .*UTF-8"),
        ({"path": "ckpt.pt"}, r"data\.path=.*ckpt\.pt: .*use .*UTF-8"),
    ],
)
def test_without_a_proof_there_is_no_text(house, capsys, given, line):
    with pytest.raises(InputError, match=f"^{line}"):
        sample.run(drawing(house, **{key: str(house / name) for key, name in given.items()}))
    assert capsys.readouterr().out == ""


# -- models of ours, and Hugging Face's --------------------------------------------------------------------------------


@pytest.fixture
def run(house, tmp_path):
    """A checkpoint of ours, with the encoder of text.txt, at iteration 5."""
    corpus = prepare(config(house).data)
    spec = GPTSpec(1, 2, 16, 16, corpus.encoder.vocab_size)
    state = TrainState.fresh(spec.init_weights(1))
    state.exp_avg = {name: array + 1 for name, array in state.exp_avg.items()}
    state.iteration = state.optimizer_steps = 5
    facts = {"name": corpus.name, "label": corpus.label, "sha256": corpus.sha256}
    meta = {"spec": dataclasses.asdict(spec), "config": {}, "corpus": facts, "encoder": corpus.encoder.to_json()}
    with checkpoint.begun(tmp_path / "run" / "ckpt", state) as complete:
        complete(meta | {"cwd": str(tmp_path)}, True)
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["", "ckpt", "ckpt/best"])
def test_a_run_of_ours_is_a_model_to_start_from(house, run, place):
    source = opened(config(house, run / place))
    assert (source.state.iteration, source.trained) == (5, True)
    assert source.state.exp_avg["transformer.ln_f.weight"].all()
    assert open_model("run", str(run / place), weights_only=True).spec == dataclasses.replace(source.spec, dropout=0.0)


@pytest.mark.parametrize("text", ["other", "fewer", "new"])
def test_its_encoder_decides_whether_a_corpus_fits_a_run_of_ours(house, run, text):
    if text == "other":
        assert opened(config(house, run, text)).trained  # the same symbols: a text like any other
        return
    with pytest.raises(InputError, match=r"^init_from=.*run: its tokens are not those of .*, by the encoder"):
        opened(config(house, run, text))
    opened(config(house, run, text, symbols=str(house / "meta.pkl")))


def test_positions_are_cut_with_their_moments_where_the_command_line_says_so(house, run):
    asked = config(house, run, given=["model.block_size=8"])
    asked.model.block_size = 8
    source = opened(asked)
    assert source.spec.block_size == 8
    assert source.state.exp_avg["transformer.wpe.weight"].shape == (8, 16)
    source.spec.check(source.state.exp_avg_sq, "moments")
    asked.given = []
    assert opened(asked).spec.block_size == 16
    asked.given, asked.model.block_size = ["model.block_size=99"], 99
    with pytest.raises(InputError, match=r"model\.block_size=99: .* has 16, and weights keep their sizes; use 16"):
        opened(asked)


def huggingface(folder: Path, encoder: TrainedBPEEncoder) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": encoder.vocab_size}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    encoder.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_folders_own_tokenizer_says_what_its_tokens_mean(house, tmp_path, capsys):
    asked = config(house, tmp_path / "hf", tokenizer="bpe", vocab_size=300)
    encoder = prepare(asked.data).encoder
    assert isinstance(encoder, TrainedBPEEncoder)
    huggingface(tmp_path / "hf", encoder)
    assert same_tokens(opened(asked).encoder, encoder)
    drawn = SampleConfig(run=str(tmp_path / "hf"), prompt="The king", max_new_tokens=4)
    drawn.backend.name = "cpu"
    assert sample.run(drawn) == 0
    assert capsys.readouterr().out.startswith("The king")
    other = config(house, tmp_path / "hf", "new", tokenizer="bpe", vocab_size=300)
    with pytest.raises(InputError, match="its tokens are not those of data=text, by the encoder"):
        opened(other)


def test_encoders_are_the_same_where_every_number_is_the_same_text():
    assert same_tokens(CharEncoder("abc"), CharEncoder("abc"))
    assert not same_tokens(CharEncoder("abc"), CharEncoder("acb"))
    assert not same_tokens(CharEncoder("abc"), CharEncoder("abcd"))


# -- going on ----------------------------------------------------------------------------------------------------------


def resuming(house, run, text="text", given=("init_from=resume",)):
    return dataclasses.replace(config(house, text=text), init_from="resume", run=str(run), given=list(given))


def test_a_run_goes_on_with_its_prepared_text(house, run, tmp_path, capsys):
    gone = resuming(house, run)
    gone.data.path = str(tmp_path / "gone" / "text.txt")
    corpus = corpus_of(gone)
    assert open_source(gone, corpus).state.iteration == 5
    assert "No such file or directory; use a file that can be read: going on with the same" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"data\.path=.*: No such file"):
        corpus_of(dataclasses.replace(gone, given=[f"path={gone.data.path}"]))
    with pytest.raises(InputError, match=r"No such file.*; the prepared text is not in data\.dir=.*nowhere either"):
        corpus_of(dataclasses.replace(gone, data=dataclasses.replace(gone.data, dir=str(tmp_path / "nowhere"))))


def train(*overrides):
    quick = ["experiment=smoke", "backend=cpu", "model.n_layer=1", "gemm_seconds=0", "wandb.mode=disabled"]
    quick = quick if overrides[0] != "init_from=resume" else []
    return Command("config", ["train.py", *overrides, *quick]).run(session.run)


def test_a_run_with_relative_paths_resumes_from_any_folder_and_without_its_text(tmp_path, monkeypatch, capsys):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("text.txt").write_text("Jack and Jill went up the hill.\n" * 200)
    assert train("data=text", "path=text.txt", "run_dir=run", "max_iters=10") == 0
    monkeypatch.chdir(tmp_path / "there")
    for last, gone in ((12, False), (14, True)):
        if gone:
            (tmp_path / "here" / "text.txt").unlink()
        capsys.readouterr()
        assert train("init_from=resume", "run=../here/run", f"max_iters={last}", f"run_dir=to{last}") == 0
        assert ("going on with the same text" in capsys.readouterr().err) is gone
        assert checkpoint.read_meta(checkpoint.find(f"to{last}")).iteration == last
    assert not Path("data").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").replace(tmp_path / "moved")  # the project is now elsewhere
    assert train("init_from=resume", "run=moved/run", "max_iters=12", "run_dir=again") == 0


def test_a_text_that_was_changed_is_refused(house, run):
    with pytest.raises(InputError, match="was trained on other text"):
        opened(resuming(house, run, "other"))


def test_a_run_that_was_trained_on_carriage_returns_goes_on_with_them(house, run, tmp_path, capsys):
    """As all were until line ends were read as such: its checksum is the file's."""
    file = tmp_path / "windows.txt"
    file.write_bytes((house / "text.txt").read_bytes().replace(b"\n", b"\r\n"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    asked = resuming(house, run)
    prepared = house / "data" / folder_key(asked.data, prepare(asked.data).sha256)
    asked.data.path, asked.data.dir = str(file), str(tmp_path / "data")
    kept = shutil.copytree(prepared, tmp_path / "data" / folder_key(asked.data, sha256))
    meta = json.loads((kept / "meta.json").read_text())
    (kept / "meta.json").write_text(json.dumps(meta | {"sha256": sha256}))
    edit_state(run, sha256=sha256)
    assert opened(asked).state.iteration == 5
    assert "the run was trained on its line ends as they are: going on with the same text" in capsys.readouterr().err


def edit_state(run, **corpus):
    path = run / "ckpt" / "last" / "state.json"
    state = json.loads(path.read_text())
    state["corpus"] |= corpus
    path.write_text(json.dumps(state))


def test_a_run_of_the_former_stand_in_says_that_it_changed(run):
    edit_state(run, name="stand_in", label="stand-in", sha256="0" * 64)
    asked = Config(data=DataConfig(name="stand_in", dir=str(run)), init_from="resume", run=str(run), given=["run=x"])
    with pytest.raises(InputError, match="the stand-in of an older version, whose text has changed since; use that"):
        opened(asked)


def test_relative_paths_lead_where_they_led(run, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "texts").mkdir()
    elsewhere.mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    folder = checkpoint.find(str(run))
    meta = checkpoint.read_meta(folder)
    old, moved = (meta.model_copy(update={"cwd": cwd}) for cwd in (None, "/no/such/folder"))
    for known in (meta, old, moved):
        monkeypatch.chdir(elsewhere)
        for path in ("texts/a.txt", "texts", "texts/*.txt"):
            assert checkpoint.anchored(path, folder, known) == str(tmp_path / path)
        assert checkpoint.anchored("gone.txt", folder, known) == "gone.txt"
        assert checkpoint.anchored("/a/b", folder, known) == "/a/b"
        assert checkpoint.anchored(None, folder, known) is None
        monkeypatch.chdir(tmp_path)
        assert checkpoint.anchored("texts/a.txt", folder, known) == "texts/a.txt"
