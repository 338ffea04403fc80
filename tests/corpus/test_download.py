"""Tiny Shakespeare's way here: whole, cut short, altered, refused, or nobody there."""

import hashlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from fakes.support import prepared

from nanogpt_mac.corpus import DataConfig, prepare
from nanogpt_mac.corpus import download as module
from nanogpt_mac.corpus.download import NoNetwork, download
from nanogpt_mac.errors import InputError

BODY = b"A play that nobody has seen.\n" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()
Serve = Callable[[Callable[[BaseHTTPRequestHandler], None]], str]


def whole(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    handler.wfile.write(BODY)


def altered(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(BODY[:-2] + b"!\n")


def cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    handler.wfile.write(BODY[:70_000])


def cut_short_without_length(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(BODY[:70_000])


def missing(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(404, "Not Found")


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def config(url: str, folder: Path, name: str = "shakespeare_char") -> DataConfig:
    return DataConfig(name=name, dir=str(folder), url=url, sha256=SHA256)


def test_whole(serve: Serve, tmp_path: Path) -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        whole(handler)

    cfg = config(serve(answer), tmp_path)
    for _ in range(2):
        corpus = prepare(cfg)
        tokens = [*corpus.train.tolist(), *corpus.val.tolist()]
        assert corpus.encoder.decode(tokens).encode() == BODY
        assert (corpus.sha256, corpus.stand_in, corpus.label) == (SHA256, False, "shakespeare_char")
    assert asked == ["/input.txt"]  # once


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (altered, "cut short or altered"),
        (cut_short, "broke off"),
        (cut_short_without_length, "cut short or altered"),
        (missing, "404 Not Found"),
        (hangs_up, "broke off"),
    ],
)
def test_refused_and_nothing_kept(
    answer: Callable[[BaseHTTPRequestHandler], None],
    why: str,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, temporary = tmp_path / "data", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    url = serve(answer)
    with pytest.raises(InputError) as refusal:
        prepare(config(url, folder))
    text = str(refusal.value)
    assert text.startswith(f"data.url={url}: ")
    assert "\n" not in text
    for part in (why, SHA256, "nothing was kept"):
        assert part in text
    assert prepared(folder) == []
    assert list(temporary.iterdir()) == []


def test_stalled(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", (1, 0.2))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(1)  # comes when the client has given up

    with pytest.raises(InputError, match=r"stopped answering for 0\.2 s"):
        download(serve(answer), SHA256)


def test_nobody_there(nobody: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoNetwork, match="refused"):
        download(nobody, SHA256)
    with pytest.raises(InputError, match=r"data\.url=http.*: no network .*data\.path=FILE"):
        prepare(DataConfig(name="shakespeare", dir=str(tmp_path), url=nobody, tokenizer="bpe"))
    assert prepared(tmp_path) == []
    capsys.readouterr()
    corpus = prepare(config(nobody, tmp_path))
    assert corpus.stand_in
    assert corpus.label == "stand-in"
    assert (len(corpus.train), len(corpus.val), corpus.encoder.vocab_size) == (1_003_854, 111_540, 65)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "STAND-IN" in warnings[0]
    assert "refused" in warnings[0]


def test_a_dead_proxy_is_no_network(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", nobody)
    with pytest.raises(NoNetwork, match="proxy"):
        download("https://example.org/input.txt", SHA256)


def test_not_an_address() -> None:
    with pytest.raises(InputError, match=r"data\.url=gopher://a/b: .*InvalidSchema"):
        download("gopher://a/b", SHA256)
