"""A network that does not answer is noticed in seconds; one that is slow is waited for."""

import socket
import time

import pytest

from nanogpt_mac import network
from nanogpt_mac.network import NoNetwork, reaching


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    monkeypatch.setattr(network, "PATIENCE_S", 0.4)
    monkeypatch.setattr(network, "getproxies", dict)


def test_what_is_quick_is_not_asked_about(capsys):
    assert reaching("http://nowhere.invalid", lambda: 7) == 7
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError):
        reaching("http://nowhere.invalid", lambda: {}["x"])


def test_a_host_that_never_answers_is_no_network_at_once(monkeypatch, capsys):
    def never(*_):
        time.sleep(9)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", never)
    began = time.monotonic()
    with pytest.raises(NoNetwork, match=r"no answer within 0\.4 s"):
        reaching("https://example.org/x", lambda: time.sleep(9))
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == "waiting for example.org\n"


def test_a_name_that_is_not_known_is_no_network(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(NoNetwork, match="Name or service not known"):
        reaching("https://example.org/x", lambda: time.sleep(9))


def test_a_slow_answer_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def slow():
            time.sleep(1)
            return "whole"

        assert reaching(url, slow) == "whole"
