"""probe.py with real commands: fake ones on PATH stand for macOS, children for a run that is timed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nanogpt_mac.machine import chips, probe

ROOT = Path(__file__).resolve().parents[2]

# Shortened; test_machine_parse.py has them with their sources.
ANSWERS = {
    "sysctl": "machdep.cpu.brand_string: Apple M1 Pro\nhw.physicalcpu: 8\nhw.memsize: 17179869184\n"
    "hw.perflevel0.physicalcpu: 6\nhw.perflevel1.physicalcpu: 2\n",
    "ioreg": '"model" = "Apple M1 Pro"\n"gpu-core-count" = 14\n"PerformanceStatistics" = {"Device Utilization %"=34}\n',
    "system_profiler": '{"SPDisplaysDataType": [{"sppci_model": "Apple M1 Pro", "sppci_cores": "14"}]}',
    "notifyutil": "com.apple.system.thermalpressurelevel 2\n",
}
PMSET = """#!/bin/sh
case "$*" in
"-g batt") echo "Now drawing from 'Battery Power'" ;;
"-g") echo " lowpowermode         1" ;;
*) exit 64 ;;
esac
"""


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    """A directory that alone is searched for commands, on what probe.py takes for a Mac."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(probe, "SYSTEM_PATHS", ())
    monkeypatch.setattr(probe, "on_mac", lambda: True)
    return folder


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


def answering(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.txt").write_text(text)
    command(folder, name, f"#!/bin/sh\nexec /bin/cat '{folder / name}.txt'\n")


@pytest.fixture
def mac(bin_dir):
    for name, text in ANSWERS.items():
        answering(bin_dir, name, text)
    command(bin_dir, "pmset", PMSET)
    return bin_dir


def test_a_mac_tells_everything(mac):
    facts = probe.environment()
    assert facts["problems"] == []
    assert facts["chip"] == facts["gpu"] == "Apple M1 Pro"
    assert facts["cpu_cores"] == 8
    assert facts["cpu_core_kinds"] == {"performance": 6, "efficiency": 2}
    assert facts["gpu_cores"] == 14
    assert facts["memory_bytes"] == 16 * 2**30
    assert facts["power_source"] == probe.power_source() == "battery"
    assert facts["low_power_mode"] is probe.low_power_mode() is True
    assert facts["thermal_state"] == probe.thermal_state() == "heavy"
    assert probe.gpu_utilisation() == 0.34
    assert probe.chip() == chips.find("Apple M1 Pro", 14)
    assert json.loads(json.dumps(facts)) == facts
    assert os.uname().nodename not in json.dumps(facts).split('"')


def test_the_commands_are_asked_what_their_manuals_document(mac):
    log = mac.parent / "log"
    for name in ("sysctl", "ioreg", "notifyutil"):
        command(mac, name, f'#!/bin/sh\necho "{name} $*" >>{log}\nexec /bin/cat {mac / name}.txt\n')
    probe.environment()
    asked = log.read_text().splitlines()
    assert "ioreg -r -d 1 -w 0 -c AGXAccelerator" in asked
    assert "notifyutil -g com.apple.system.thermalpressurelevel" in asked
    assert any(line.startswith("sysctl -i machdep.cpu.brand_string ") for line in asked)


def test_system_profiler_stands_in_for_ioreg(mac):
    command(mac, "ioreg", "#!/bin/sh\nexit 1\n")
    assert probe.chip() == chips.find("Apple M1 Pro", 14)
    facts = probe.environment()
    assert facts["gpu_cores"] == 14
    assert facts["problems"] == ["ioreg -r -d: exit code 1"]


def test_without_the_core_count_no_bin_is_assumed(mac):
    answering(mac, "ioreg", '"model" = "Apple M1 Pro"\n')
    answering(mac, "system_profiler", "{}")
    assert dict(probe.chip().peak_flops) == {}
    assert probe.environment()["gpu_cores"] is None


def test_rosetta_is_noticed(mac):
    answering(mac, "sysctl", ANSWERS["sysctl"] + "sysctl.proc_translated: 1\n")
    assert any("Rosetta" in line for line in probe.environment()["problems"])


UNKNOWN = ("chip", "cpu_cores", "cpu_core_kinds", "gpu", "gpu_cores", "memory_bytes")
UNKNOWN_STATE = ("power_source", "low_power_mode", "thermal_state")


def test_absent_commands_are_nulls_and_problems(bin_dir):
    facts = probe.environment()
    assert all(facts[key] is None for key in UNKNOWN + UNKNOWN_STATE)
    assert [line.rpartition(": ")[2] for line in facts["problems"]] == ["not found"] * 6
    assert {line.split()[0] for line in facts["problems"]} == {
        "sysctl",
        "ioreg",
        "system_profiler",
        "pmset",
        "notifyutil",
    }
    assert probe.chip() is None
    assert probe.gpu_utilisation() is None


@pytest.mark.parametrize("garbage", ["", "\\000\\377\\376", "command not supported", "{"])
def test_garbled_answers_are_nulls_and_problems(bin_dir, garbage):
    for name in (*ANSWERS, "pmset"):
        command(bin_dir, name, f"#!/bin/sh\nprintf '{garbage}'\n")
    facts = probe.environment()
    assert all(facts[key] is None for key in UNKNOWN + UNKNOWN_STATE)
    assert len(facts["problems"]) == 6
    assert all(": not understood: " in line for line in facts["problems"])
    assert probe.chip() is None


def test_hanging_commands_are_ended_with_all_that_they_started(bin_dir, monkeypatch):
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.1)
    pids = bin_dir.parent / "pids"
    # The grandchild inherits the pipe: ending the script alone would leave its reader waiting.
    script = f"#!/bin/sh\n/bin/sleep 60 &\necho $! >>{pids}\n/bin/sleep 60\n"
    for name in (*ANSWERS, "pmset"):
        command(bin_dir, name, script)
    start = time.perf_counter()
    facts = probe.environment()
    assert time.perf_counter() - start < 6 * 0.1 + 3
    assert all(facts[key] is None for key in UNKNOWN + UNKNOWN_STATE)
    assert [line.rpartition(": ")[2] for line in facts["problems"]] == ["no answer within 0.1 s"] * 6
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 6
    deadline = time.monotonic() + 10  # what was killed ends when it next has a core
    while any(alive(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_run_tells_why(bin_dir):
    problems: list[str] = []
    command(bin_dir, "fails", "#!/bin/sh\necho half\nexit 3\n")
    assert probe.run(("fails", "-x"), problems=problems) is None
    (bin_dir / "unrunnable").write_text("")
    assert probe.run(("unrunnable",), problems=problems) is None
    assert problems == ["fails -x: exit code 3", "unrunnable: Permission denied"]
    command(bin_dir, "works", "#!/bin/sh\necho $LC_ALL\n")
    assert probe.run(("works",)) == "C\n"


def test_awake_holds_caffeinate_as_long_as_the_block(bin_dir):
    args = bin_dir.parent / "args"
    command(bin_dir, "caffeinate", f'#!/bin/sh\necho "$$ $*" >{args}\nexec /bin/sleep 60\n')
    with contextlib.suppress(KeyError), probe.awake() as held:
        assert held is True
        pid, *options = args.read_text().split()
        assert options == ["-i", "-m", "-s", "-w", str(os.getpid())]
        assert alive(int(pid))
        raise KeyError  # a run that fails lets the machine sleep again
    assert not alive(int(pid))


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 64\n"])
def test_awake_says_when_it_does_not_hold(bin_dir, script):
    if script:
        command(bin_dir, "caffeinate", script)
    with probe.awake() as held:
        assert held is False


@pytest.mark.skipif(sys.platform == "darwin", reason="what it does elsewhere")
def test_elsewhere_nothing_is_run(bin_dir, monkeypatch):
    monkeypatch.setattr(probe, "on_mac", lambda: False)
    marker = bin_dir.parent / "ran"
    for name in (*ANSWERS, "pmset", "caffeinate"):
        command(bin_dir, name, f"#!/bin/sh\n: >{marker}\n")
    probe.environment()
    probe.chip()
    probe.gpu_utilisation()
    assert probe.thermal_state() is None
    assert probe.low_power_mode() is None
    with probe.awake() as held:
        assert held is False
    assert not marker.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_linux_facts_are_this_machines(monkeypatch):
    facts = probe.environment()
    assert facts["os"] == "Linux"
    assert facts["macos_version"] is None
    assert facts["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert facts["cpu_cores"] is None or 1 <= facts["cpu_cores"] <= os.cpu_count()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"]["numpy"] == __import__("numpy").__version__
    assert list(facts["versions"]) == ["numpy", "wandb", "hydra-core", "nanogpt-mac"]
    assert probe.environment(["torch", "numpy"])["versions"]["torch"] == __import__("torch").__version__
    assert facts["problems"] == []
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has commands to wait for")
def test_the_probe_is_fast_and_imports_no_framework():
    code = (
        "import sys, time\nfrom nanogpt_mac.machine import probe\n"
        "times = []\nfor _ in range(3):\n"
        "    start = time.perf_counter(); probe.environment(); times.append(time.perf_counter() - start)\n"
        "print(min(times)); print(*sys.modules)"
    )
    seconds, modules = child(code).stdout.splitlines()
    assert float(seconds) < 0.1
    assert not {"torch", "mlx", "numpy", "wandb", "hydra"} & set(modules.split())


def child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(("plugged", "source"), [(True, "ac"), (False, "battery"), (None, None)])
def test_power_source_elsewhere(monkeypatch, plugged, source):
    monkeypatch.setattr(probe, "on_mac", lambda: False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=plugged), raising=False)
    assert probe.power_source() == source
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert probe.power_source() is None


def git(folder: Path, *args: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *identity, *args], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_git_is_the_projects_own_commit(tmp_path, monkeypatch):
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    source = package / "probe.py"
    source.write_text("one\n")
    monkeypatch.setattr(probe, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def told() -> object:
        return probe.environment()["git"]

    assert told() is None  # no repository
    git(package.parent, "init", "-q")
    (package.parent / "other").write_text("somebody else's project\n")
    git(package.parent, "add", "other")
    git(package.parent, "commit", "-q", "-m", "theirs")
    assert told() is None  # installed inside somebody else's repository
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "ours")
    commit = git(package.parent, "rev-parse", "HEAD")
    assert told() == {"commit": commit, "dirty": False}
    (package / "notes").write_text("not tracked\n")
    assert told() == {"commit": commit, "dirty": False}
    source.write_text("two\n")
    assert told() == {"commit": commit, "dirty": True}


TIMED = """
import json, subprocess, sys, time
from nanogpt_mac.machine import probe
BURN = "import time\\nwhile time.process_time() < 0.3: sum(range(50_000))"
exec(BURN)
subprocess.run([sys.executable, "-c", BURN], check=True)
block = bytearray(b"x" * (200 << 20))
del block
time.sleep(0.3)
print(json.dumps(probe.process_times()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's own unit of ru_maxrss is KiB")
def test_process_times_are_what_time_would_give():
    """The parent measures as /usr/bin/time does: a clock around the child, and wait4's account of it."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", TIMED], env=environment(), stdout=subprocess.PIPE)
    told = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = status
    process.stdout.close()
    assert status == 0
    assert told["wall"] == pytest.approx(wall, abs=0.4)
    assert told["wall"] > 0.3 + 0.3 + 0.3  # both at work, and its sleep
    assert told["user"] == pytest.approx(usage.ru_utime, abs=0.1)
    assert told["user"] + told["system"] > 0.6  # the grandchild's share is in it
    assert told["system"] == pytest.approx(usage.ru_stime, abs=0.1)
    assert told["max_rss_bytes"] == usage.ru_maxrss * 1024
    assert told["max_rss_bytes"] > 200 << 20


def test_max_rss_is_in_bytes_on_a_mac(monkeypatch):
    monkeypatch.setattr(probe, "on_mac", lambda: False)
    elsewhere = probe.process_times()["max_rss_bytes"]
    monkeypatch.setattr(probe, "on_mac", lambda: True)
    assert probe.process_times()["max_rss_bytes"] == pytest.approx(elsewhere / 1024, rel=0.05)
