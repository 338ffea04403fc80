"""Free text and paths arrive as the shell handed them over, in every command, whatever Hydra or OmegaConf see in it."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.support import ROOT

from nanogpt_mac import cli
from nanogpt_mac.overrides import TextKey, for_hydra, literal, mapped, text_keys

NASTY = [
    "", " ", "  both ends  ", "do ${seed}", "${oc.env:HOME}", "\\${seed}", "\\\\${seed}", "${", "}", "$HOME", "$$",
    r"a\n b", "a real\nline end", "\ttab", '"Hello," he said.', "'quoted'", '"quoted"', "it's", "'", '"', "back\\",
    "back\\\\", "\\'", "a=b", "#1 # not a comment", "one, two,three", "book (1).txt", "(", ")", "[a]", "[a,b]", "]",
    "{x}", "{a: 1}", "null ", "Null", "true", "12", "1e3", "007", "2.10", "0x1F", "nan", "-5", "--flag", "@pkg", "~",
    "key@pkg=1", "a:b", "C:\\dir\\file", "%20", "<>|&;*?", "!", "`x`", "é", "日本語", "شعر", "🎭", "???", "???x",
    "\u00a0", "''", "choice(a,b)", "range(1,3)", "FILE:x.txt", "x" * 3000, "${a:b,'c'}", "a ${b} 'c' \"d\" \\",
    "\u2028",
]  # fmt: skip
COMMANDS = {name: text_keys(cli._schema(name)) for name in cli.SCHEMAS}


def get(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def expanded(value, key):
    return str(Path.home()) if key.is_path and value == "~" else value


def test_the_keys_are_those_of_the_schemas():
    assert set(COMMANDS["config"]) == {
        "init_from", "run", "run_dir", "data_dir", "path", "data.dir", "data.path", "data.url", "data.sha256",
        "data.dataset", "data.symbols", "wandb.project", "wandb.entity", "wandb.group", "wandb.name", "wandb.tags",
    }  # fmt: skip
    assert set(COMMANDS["config"]) <= set(COMMANDS["compare"])
    assert {"run", "prompt", "data_dir"} <= set(COMMANDS["sample"])
    assert set(COMMANDS["report"]) == {"runs", "output"}
    assert {"torch", "against", "output", "html"} <= set(COMMANDS["coverage"])
    assert COMMANDS["config"]["wandb.tags"] == TextKey(is_path=False, is_list=True, nullable=False)
    assert COMMANDS["config"]["data.path"] == TextKey(is_path=True, is_list=False, nullable=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_text_arrives_through_every_key(command):
    """Each key gets every text in turn, all keys at once, so that what is typed for one can spoil no other either."""
    keys = {name: key for name, key in COMMANDS[command].items() if not key.is_list}
    base = {"config": [], "compare": [], "sample": ["run=x"], "report": [], "coverage": [], "bench": []}[command]
    for start in range(0, len(NASTY), max(len(keys), 6)):
        chosen = {name: NASTY[(start + i) % len(NASTY)] for i, name in enumerate(keys)}
        others = [text for text in base if text.split("=")[0] not in chosen]
        config = cli.compose([*others, *(f"{name}={value}" for name, value in chosen.items())], command)
        assert {name: get(config, name) for name in chosen} == {
            name: expanded(value, keys[name]) for name, value in chosen.items()
        }


def test_short_forms_reach_what_they_stand_for_and_are_given_as_typed():
    config = cli.compose(["path=a ${seed} (1).txt", "data_dir=it's \\"])
    assert (config.data.path, config.data.dir) == ("a ${seed} (1).txt", "it's \\")
    assert config.given == ["path=a ${seed} (1).txt", "data_dir=it's \\"]
    assert config.named == {"path", "data_dir"}


def test_any_text_survives_hydras_grammar_and_omegaconf():
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parser, rng = OverridesParser.create(), random.Random(11)
    drawn = ["".join(rng.choice("\\${}'\"ab ,#=()[]\n~é") for _ in range(rng.randint(0, 9))) for _ in range(400)]
    for value in [*NASTY, *drawn]:
        given = parser.parse_override(f"key={literal(value)}").value()
        config = OmegaConf.create({"key": given, "seed": 1, "other": "${key}"})
        back = OmegaConf.to_container(config, resolve=True)
        assert mapped(back, cli.found_again) == {"key": value, "seed": 1, "other": value}


def test_what_a_command_records_is_what_was_typed(monkeypatch):
    for value in NASTY:
        command = cli.Command("config", ["train.py", f"wandb.name={value}"])
        assert [command._as_typed(each) for each in command.arguments] == [f"wandb.name={value}"]


def test_null_is_null_where_a_key_may_be_null_and_home_is_expanded_in_paths_alone():
    config = cli.compose(["wandb.name=null", "path=null", "wandb.project=null", "run_dir=~/x y", "wandb.group=~/x"])
    assert (config.wandb.name, config.path) == (None, None)
    assert (config.run_dir, config.wandb.group) == (f"{Path.home()}/x y", "~/x")
    assert cli.compose(["path=~nobody-of-this-name/x"]).path == "~nobody-of-this-name/x"


@pytest.mark.parametrize(
    ("typed", "tags"),
    [
        ("[a,b]", ["a", "b"]),
        ("[it's, (x) ,${seed},a#b]", ["it's", "(x)", "${seed}", "a#b"]),
        ("""["a, b",'c d ',"say \\"hi\\"",'\\${x}']""", ["a, b", "c d ", 'say "hi"', "\\${x}"]),
        ("[]", []),
        ("one", ["one"]),
        ("[null,true,12]", ["null", "true", "12"]),
    ],
)
def test_a_list_of_texts(typed, tags):
    config = cli.compose([f"wandb.tags={typed}"])
    assert config.wandb.tags == tags
    command = cli.Command("config", ["train.py", f"wandb.tags={typed}"])
    given = [command._as_typed(each) for each in command.arguments]
    assert cli.compose(given).wandb.tags == tags


def test_reports_take_any_folder_as_a_bare_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a (1)", "b, c", "it's", "d=${e}", "'q'"]
    for name in names:
        (tmp_path / name).mkdir()
    assert cli.compose(names, "report").runs == names


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("a.txt,b.txt", ["a.txt", "b.txt"]),
        ("book (1).txt,it's ${x}.txt", ["book (1).txt", "it's ${x}.txt"]),
        ("'x, y.txt',z.txt", ["x, y.txt", "z.txt"]),
        ("choice(a.txt,b.txt)", ["a.txt", "b.txt"]),
        ("one (1).txt", ["one (1).txt"]),
        ("there, is.txt", ["there, is.txt"]),
    ],
)
def test_a_sweep_over_paths_keeps_its_commas(typed, values, tmp_path, monkeypatch):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    monkeypatch.chdir(tmp_path)
    (tmp_path / "there, is.txt").touch()
    command = cli.Command("config", ["train.py", "-m", f"data.path={typed}"])
    override = OverridesParser.create().parse_override(command.arguments[1])
    members = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_string()]
    assert [command._as_typed(f"data.path={member}") for member in members] == [f"data.path={v}" for v in values]


def test_a_name_is_never_swept_over():
    assert for_hydra(["wandb.name=a,b"], COMMANDS["config"], sweeps=True) == ["wandb.name='a,b'"]


def test_an_interpolation_in_a_file_still_works(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\nwandb: {name: 'seed-${seed}-${oc.env:NAME_OF_MINE}'}\n"
    )
    code = "import sys; from nanogpt_mac import cli; cli.main('config', lambda config: print(config.wandb.name))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config-dir", str(tmp_path), "experiment=own", "seed=7"],
        capture_output=True, text=True, cwd=ROOT, env={"NAME_OF_MINE": "x", "PATH": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("seed-7-x\n", "")


def test_through_a_real_shell():
    code = "from nanogpt_mac import cli; cli.main('sample', lambda config: print(repr((config.run, config.prompt))))"
    line = f"""{sys.executable} -c "{code}" run='~/my (1) ${{seed}}' prompt='"Hello," he said: it'\\''s \\n $HOME #1'"""
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)
    expected = (f"{Path.home()}/my (1) ${{seed}}", '"Hello," he said: it\'s \\n $HOME #1')
    assert done.stdout == f"{expected!r}\n", done.stderr


def test_the_plan_of_an_earlier_comparison_keeps_its_texts():
    """Until schema 3 texts were kept in Hydra's grammar."""
    from nanogpt_mac.records.plan import Plan

    document = {
        "schema": 2, "variants": [{"name": "cpu", "label": "CPU"}], "asked": {}, "seed": 1, "budget_minutes": 1,
        "stall_seconds": 1, "gate": {}, "cwd": "/", "overrides": [r"path='it\'s (1).txt'", "seed=1", 'data.dir="a b"'],
    }  # fmt: skip
    assert Plan.parse(document, "plan.json").overrides == ("path=it's (1).txt", "seed=1", "data.dir=a b")
