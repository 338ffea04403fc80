"""Texts with any line ends, and meta.pkl files, harmless and not."""

import pickle

import pytest

from nanogpt_mac.corpus.encoders import CharEncoder
from nanogpt_mac.corpus.reading import MOST_META, lines, read_text, symbols
from nanogpt_mac.errors import InputError

CHARS = "\n abcé☃"
META = {"vocab_size": 7, "itos": dict(enumerate(CHARS)), "stoi": {char: i for i, char in enumerate(CHARS)}}


@pytest.mark.parametrize("text", ["a\r\nb\rc\n\r\nd", "\ufeffa\rb", "\r", "", "a\u2028b\x0cc\x85", "\r\r\n\n\r"])
def test_lines_are_those_of_pythons_text_mode(text, tmp_path):
    (tmp_path / "text").write_bytes(text.encode())
    assert lines(text) == (tmp_path / "text").read_text(encoding="utf-8-sig")


def test_what_is_changed_is_said(capsys):
    assert read_text("\ufeffdéjà\r\nvu\0".encode(), "data.path=x") == "déjà\nvu\0"
    assert capsys.readouterr().err == (
        "data.path=x: a byte order mark is left out; CR and CRLF are read as line ends; it holds 1 NUL characters, "
        "which are symbols like others\n"
    )
    assert read_text("déjà\nvu".encode(), "data.path=x") == "déjà\nvu"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_other_codings_are_one_line(coding):
    with pytest.raises(InputError, match=r"^data\.path=x: .*use .*UTF-8") as raised:
        read_text(("a quick brown fox, déjà vu\n" * 9).encode(coding), "data.path=x")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("keys", [("vocab_size", "itos", "stoi"), ("itos",), ("stoi",)])
def test_nanogpts_symbols_are_read_in_every_protocol(tmp_path, protocol, keys):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({key: META[key] for key in keys}, protocol))
    assert symbols(str(tmp_path / "meta.pkl"), "data.symbols=x").chars == CHARS


def test_symbols_keep_the_order_of_the_file_and_a_text_sorts_its_own(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": ["b", "a"]}))
    encoder = symbols(str(tmp_path / "meta.pkl"), "x")
    assert (encoder.encode("ab"), encoder.decode([0, 1])) == ([1, 0], "ba")
    assert encoder.array("aab").tolist() == [1, 1, 0]
    (tmp_path / "text").write_bytes(b"ba\r\nab")
    assert symbols(str(tmp_path / "text"), "x").to_json() == CharEncoder("\nab").to_json()


class Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def nested(levels):
    inner = ()
    for _ in range(levels):
        inner = (inner, inner)
    return inner


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"itos": Evil()}, 0),
        pickle.dumps(META | {"extra": print}),
        pickle.dumps(META | {"extra": {1, 2}}),
        pickle.dumps(META | {"extra": 1.5}),
        b"\x80\x02}" + pickle.dumps(nested(60), 2)[2:-1] + b"K\x01s.",  # a key whose hash would never end
        pickle.dumps(META)[:-9],
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",  # a string as long as memory
        b"hello",
        b"",
        b"N" * (MOST_META + 1),
        pickle.dumps([1, 2]),
        pickle.dumps({"vocab_size": 7}),
        pickle.dumps(META | {"vocab_size": 8}),
        pickle.dumps(META | {"stoi": META["stoi"] | {"a": 0}}),
        pickle.dumps({"itos": {0: "a", 2: "b"}}),
        pickle.dumps({"itos": ["a", "bc"]}),
        pickle.dumps({"itos": ["a", "a"]}),
        pickle.dumps({"itos": [97, 98]}),
        pickle.dumps({"itos": []}),
    ],
)
def test_what_is_no_meta_is_one_line_and_never_run(tmp_path, capsys, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"^data\.symbols=x: not a meta\.pkl .*use nanoGPT's") as raised:
        symbols(str(tmp_path / "meta.pkl"), "data.symbols=x")
    assert "\n" not in str(raised.value)
    assert "must not run" not in capsys.readouterr().out


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^data\.symbols=x: No such file or directory; use a file"):
        symbols(str(tmp_path / "meta.pkl"), "data.symbols=x")
