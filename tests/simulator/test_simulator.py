"""The simulated MPS device. Installing it changes torch for the whole process, so each group runs in a child.

The groups are pytest files under device/, named so that this process does not collect them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_mac import simulator
from nanogpt_mac.errors import InputError
from nanogpt_mac.simulator import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs python with these arguments, without the variables that would change what is tested."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTORCH_", "NANOGPT_MAC_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=env | environment, timeout=300
    )


@pytest.fixture(scope="session")
def supported() -> None:
    """Builds the device once for all groups, or skips them with the reason."""
    result = child("-c", "from nanogpt_mac import simulator; simulator.install()")
    if "InputError" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr


# Files under device/ that share a child; `refused` comes first, before any other warns.
GROUPS = {
    "device": ["refused", "api", "training", "faults", "timeline"],
    "kernels": ["metal", "inductor", "product", "matmul"],
    "opinfo": ["opinfo"],
    "fallback": ["fallback"],
}
ENVIRONMENT = {"fallback": {"PYTORCH_ENABLE_MPS_FALLBACK": "1"}}


def test_every_file_is_in_a_group() -> None:
    files = {f.stem.removeprefix("device_") for f in (HERE / "device").glob("*.py")}
    assert files == {name for group in GROUPS.values() for name in group}


@pytest.mark.usefixtures("supported")
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.slow if group == "opinfo" else ()) for group in GROUPS]
)
def test_group(group: str) -> None:
    files = [str(HERE / "device" / f"device_{name}.py") for name in GROUPS[group]]
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:logging", "--noconftest", "--durations=5")
    result = child("-m", "pytest", *options, *files, **ENVIRONMENT.get(group, {}))
    sys.stdout.write(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


@pytest.mark.usefixtures("supported")
def test_the_operators_of_another_wheel() -> None:
    """A table without gelu: what the installed torch has on MPS is missing on the device, as that wheel has it."""
    program = """
from dataclasses import replace
from nanogpt_mac import simulator
from nanogpt_mac.simulator.optable import installed_table
table = installed_table()
gone = table.variants("gelu")
native = {n: flags for n, flags in table.native.items() if n not in gone} | {"no_such_operator": 0}
simulator.install(replace(table, native=native, missing=[*table.missing, *gone]))
import torch
print(torch.relu(torch.ones(1, device="mps")).item())
torch.nn.functional.gelu(torch.ones(1, device="mps"))
"""
    result = child("-c", program)
    assert result.stdout == "1.0\n"
    assert "NotImplementedError: The operator 'aten::gelu.out' is not currently implemented" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("supported")
def test_the_whole_product_on_it(tmp_path: Path) -> None:
    """train.py under the variable, eager and compiled: the same losses, and records that are marked."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400)))
    smoke = ("experiment=smoke", "data=text", f"data.path={text}", f"data.dir={tmp_path / 'data'}", "gemm_seconds=0")
    quiet = ("logger=none", "log_interval=1")

    def train(folder: str, *overrides: str, **environment: str) -> list[float]:
        result = child("train.py", *overrides, *quiet, f"run_dir={tmp_path / folder}", **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["kind"] == "iteration"]

    on = {simulator.VARIABLE: "1"}
    eager = train("eager", *smoke, "backend=mps", "compile=false", **on)
    compiled = train("compiled", *smoke, "backend=mps", "compile=true", "fallbacks=off", **on)
    assert len(eager) == 20
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-4
    for folder in ("eager", "compiled"):
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert (summary["device"], summary["backend"], summary["exit_state"]) == ("simulated-mps", "mps", "finished")
        assert summary["mfu"] is summary["mfu_measured"] is summary["mfu_a100"] is None
        assert (tmp_path / folder / "sample.txt").stat().st_size > 0
        assert summary["fallbacks"] == ({"findings": 0, "why_incomplete": 0} if folder == "eager" else None)
    document = json.loads((tmp_path / "eager" / "fallbacks.json").read_text())
    assert (document["complete"], document["findings"], document["device"]) == (True, [], "simulated-mps")
    assert document["model"]["n_layer"] == 2
    assert not (tmp_path / "compiled" / "fallbacks.json").exists()


def test_without_the_variable_mps_is_refused_with_a_hint() -> None:
    result = child("train.py", "experiment=smoke", "backend=mps")
    assert result.returncode == 2
    assert "NANOGPT_MAC_SIMULATE_MPS=1" in result.stderr.strip().splitlines()[-1]


def test_this_process_is_untouched() -> None:
    import torch

    assert not simulator.active()
    assert not torch.backends.mps.is_available()


def test_the_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(simulator.VARIABLE, "yes")
    with pytest.raises(InputError, match="NANOGPT_MAC_SIMULATE_MPS='yes': use 1 or 0"):
        simulator.install_if_asked()
    for value in ("", "0"):
        monkeypatch.setenv(simulator.VARIABLE, value)
        assert simulator.install_if_asked() is False


@pytest.mark.usefixtures("supported")
def test_the_variable_installs() -> None:
    program = (
        "from nanogpt_mac import simulator; assert not simulator.active(); assert simulator.install_if_asked();"
        "assert simulator.active(); import torch; print(torch.ones(2, device='mps').sum().item())"
    )
    result = child("-c", program, NANOGPT_MAC_SIMULATE_MPS="1")
    assert (result.returncode, result.stdout) == (0, "2.0\n"), result.stderr


def test_importing_it_does_not_import_torch() -> None:
    result = child(
        "-c", "import sys; from nanogpt_mac import simulator; simulator.active(); print('torch' in sys.modules)"
    )
    assert result.stdout == "False\n", result.stderr


def test_no_compiler_is_one_line(tmp_path: Path) -> None:
    program = "from nanogpt_mac import simulator; simulator.install()"
    result = child("-c", program, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "InputError" in result.stderr.splitlines()[-1]
    assert "'no-such-compiler' is not there" in result.stderr.splitlines()[-1]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file/nanogpt-mac/simulator: .*Not a directory.*XDG_CACHE_HOME"):
        build.kept("x.so", lambda folder: folder)


def test_an_unsupported_torch_is_one_line() -> None:
    program = "import torch; torch.__version__ = '2.9.1'; from nanogpt_mac import simulator; simulator.install()"
    result = child("-c", program)
    assert "InputError: torch 2.9.1 is not supported by the simulated MPS device: use" in result.stderr


@pytest.mark.usefixtures("supported")
def test_a_source_that_does_not_build_is_one_line(tmp_path: Path) -> None:
    """As against a torch whose interfaces have changed."""
    program = f"""
import shutil
from pathlib import Path
from nanogpt_mac.simulator import build, install
shutil.copytree(build.NATIVE, "{tmp_path}/native")
build.NATIVE = Path("{tmp_path}/native")
(build.NATIVE / "timeline.cpp").write_text("int broken = no_such_name;")
build.SOURCES = ("timeline.cpp",)
install()
"""
    result = child("-c", program, XDG_CACHE_HOME=str(tmp_path / "cache"))
    last = result.stderr.splitlines()[-1]
    assert "InputError: the simulated MPS device does not build against torch" in last
    assert "no_such_name" in last


@pytest.mark.usefixtures("supported")
def test_a_fallback_variable_that_is_no_number_is_one_line() -> None:
    program = "from nanogpt_mac import simulator; simulator.install()"
    result = child("-c", program, PYTORCH_ENABLE_MPS_FALLBACK="yes")
    assert "InputError: PYTORCH_ENABLE_MPS_FALLBACK='yes': torch reads a number" in result.stderr


def test_two_builders_at_once(tmp_path: Path) -> None:
    """Both get the file, and only one of them built it."""
    from concurrent.futures import ThreadPoolExecutor

    program = """
import sys, time
from pathlib import Path
from nanogpt_mac.files import make_once
folder = Path(sys.argv[1])
def build(work):
    with (folder / "builds").open("a") as f: f.write("x")
    time.sleep(0.3)
    (work / "out").write_text("built")
    return work / "out"
print(make_once(folder / "target", build).read_text())
"""
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: child("-c", program, str(tmp_path)), range(3)))
    assert [r.stdout for r in results] == ["built\n"] * 3, results[0].stderr
    assert (tmp_path / "builds").read_text() == "x"
