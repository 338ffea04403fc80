"""The finder of names that macOS wheels lack: against wheels of our own, and online against the real ones."""

import subprocess
import sys
import zipfile

import pytest
from fakes.support import ROOT

from tools import mac_api

MPS = """
from .event import Event
def synchronize(): ...
if True:
    _rng = None
"""
EVENT = "class Base:\n    def wait(self): ...\nclass Event(Base):\n    def record(self): ...\n"
CORE = "from .fast import *\nclass array:\n    shape: tuple\nclass Device:\n    def __init__(self): self.kind = 1\n"
CORE += "float32: object\ndef zeros() -> array: ...\n"


@pytest.fixture
def wheels(tmp_path):
    """Two small wheels: a torch of sources, and an MLX and a zeus of stubs and of an extension without one."""
    files = {
        "torch.whl": {"torch/__init__.py": "", "torch/mps/__init__.py": MPS, "torch/mps/event.py": EVENT},
        "mac.whl": {
            "mlx/core/__init__.pyi": CORE,
            "mlx/core/fast.pyi": "def layer_norm(): ...",
            "mlx/utils.py": "def tree_map(): ...",
            "zeus_apple_silicon/__init__.py": "from .ext import Monitor",
            "zeus_apple_silicon/ext.cpython-312-darwin.so": b"\0Monitor\0begin_window\0joules\0",
        },
    }
    for wheel, members in files.items():
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    return mac_api.Wheels([tmp_path / wheel for wheel in files])


RIGHT = """
import torch, mlx.core as mx
from mlx.utils import tree_map
from mlx import core
from zeus_apple_silicon import Monitor
torch.mps.synchronize(); torch.mps._rng; mx.layer_norm(); core.float32
one, other = torch.mps.Event(), torch.mps.Event()
one.record(); other.wait()
class A:
    def f(self, name):
        self.device = None if name == "cpu" else getattr(torch, name)
        self.device.synchronize()
        self.monitor = Monitor()
        self.monitor.begin_window().joules
        mx.Device().kind
"""


def judged(source, wheels):
    return mac_api.compare({name: f"x.py:{line}" for name, line in mac_api.names_in(source)}, wheels)


def test_names_that_are_there_are_found(wheels):
    names = {name for name, _ in mac_api.names_in(RIGHT)}
    expected = {"torch.mps.Event().wait", "torch.mps.synchronize", "mlx.core.layer_norm", "mlx.utils.tree_map"}
    assert expected <= names
    assert judged(RIGHT, wheels) == ([], [])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.mps.synchronise()", "torch.mps.synchronise"),
        ("from torch import mps\nmps.Event().recrd()", "torch.mps.Event().recrd"),
        ("import torch\n\ndevice = getattr(torch, name)\ndevice.memory_allocated()", "torch.mps.memory_allocated"),
        ("import mlx.core as mx\nmx.layer_nrm", "mlx.core.layer_nrm"),
        ("import mlx.core as mx\nmx.Device().knd", "mlx.core.Device().knd"),
        ("from mlx.utils import tree_mapp", "mlx.utils.tree_mapp"),
        ("import mlx.cores", "mlx.cores"),
        ("from zeus_apple_silicon import Monitr", "zeus_apple_silicon.Monitr"),
        ("from zeus_apple_silicon import Monitor\nm = Monitor()\nm.jouls", "zeus_apple_silicon.Monitor().jouls"),
        ("code = 'import torch; torch.mps.sync()'", "torch.mps.sync"),
    ],
)
def test_a_planted_wrong_name_is_a_line_with_its_place(wheels, source, name):
    wrong, _ = judged(source, wheels)
    assert f"x.py:{len(source.splitlines())}: {name} is not in the macOS wheel" in wrong


def test_what_a_function_gives_is_not_judged(wheels):
    assert judged("import mlx.core as mx\nmx.zeros().shape", wheels) == ([], ["mlx.core.zeros().shape"])


def test_the_package_names_what_the_tool_is_for():
    names = mac_api.used(ROOT / "nanogpt_mac")
    assert {"torch.mps.Event", "torch.backends.mps.is_available", "mlx.core.compile"} <= names.keys()
    assert "zeus_apple_silicon.AppleEnergyMonitor().begin_window" in names
    path, line = names["mlx.core.compile"].split(":")
    assert "mx.compile" in (ROOT / path).read_text().splitlines()[int(line) - 1]


def test_the_versions_are_a_macs():
    assert sorted(line.split("<")[0].split(">")[0] for line in mac_api.requirements()) == sorted(mac_api.WHEELS)


@pytest.mark.online
def test_the_macos_wheels_have_every_name():
    argv = [sys.executable, str(ROOT / "tools" / "mac_api.py")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 are not there" in done.stdout
