"""Facts about this machine, from its operating system.

The one place that runs sysctl, ioreg, system_profiler, pmset, notifyutil, caffeinate and git. Every command has a time
limit; one that is absent, hangs, fails or prints something else yields None, and `environment()` lists why.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import psutil

from nanogpt_mac.machine import chips, nvml, parse

T = TypeVar("T")

TIMEOUT_S = 5.0
SYSTEM_PATHS = ("/usr/bin", "/usr/sbin", "/bin", "/sbin")  # a cron job's PATH may lack /usr/sbin
PACKAGES = ("numpy", "wandb", "hydra-core", "nanogpt-mac")  # and the back ends' frameworks

SYSCTL = (
    "sysctl",
    "-i",  # unknown names are left out instead of failing
    "machdep.cpu.brand_string",
    "hw.physicalcpu",
    "hw.memsize",
    "sysctl.proc_translated",
    *(f"hw.perflevel{level}.{key}" for level in range(3) for key in ("physicalcpu", "name")),
)
IOREG = ("ioreg", "-r", "-d", "1", "-w", "0", "-c", "AGXAccelerator")
SYSTEM_PROFILER = ("system_profiler", "SPDisplaysDataType", "-json")


def on_mac() -> bool:
    return sys.platform == "darwin"


def _command_environment() -> dict[str, str]:
    path = os.pathsep.join((os.environ.get("PATH", ""), *SYSTEM_PATHS))
    return os.environ | {"PATH": path, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}


def run(
    argv: Sequence[str],
    timeout: float | None = None,
    problems: list[str] | None = None,
    cwd: Path | None = None,
) -> str | None:
    """What `argv` prints, or None: absent, longer than `timeout` seconds (TIMEOUT_S), or a non-zero exit code.

    The reason is added to `problems`. Undecodable bytes are replaced.
    """
    limit = TIMEOUT_S if timeout is None else timeout
    reason = None
    output = ""
    try:
        # Its own session, so that a time-out also ends what the command started and what holds the pipe open.
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_command_environment(),
            cwd=cwd,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        ) as process:
            try:
                output, _ = process.communicate(timeout=limit)
                if process.returncode:
                    reason = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                reason = f"no answer within {limit:g} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    except FileNotFoundError:
        reason = "not found"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason and problems is not None:
        problems.append(f"{_short(argv)}: {reason}")
    return None if reason else output


def _short(argv: Sequence[str]) -> str:
    return " ".join(argv[:3])


def _ask(argv: Sequence[str], parser: Callable[[str], T | None], problems: list[str] | None = None) -> T | None:
    text = run(argv, problems=problems)
    fact = None if text is None else parser(text)
    if text is not None and fact is None and problems is not None:
        problems.append(f"{_short(argv)}: not understood: {text.strip()[:60]!r}")
    return fact


def power_source(problems: list[str] | None = None) -> str | None:
    """What feeds the machine: "ac", "battery", or None if that is unknown (Linux without a battery)."""
    if on_mac():
        return _ask(("pmset", "-g", "batt"), parse.power_source, problems)
    battery = psutil.sensors_battery()
    if battery is None or battery.power_plugged is None:
        return None
    return "ac" if battery.power_plugged else "battery"


def low_power_mode(problems: list[str] | None = None) -> bool | None:
    """Whether macOS's Low Power Mode is on; None elsewhere."""
    return _ask(("pmset", "-g"), parse.low_power_mode, problems) if on_mac() else None


def thermal_state(problems: list[str] | None = None) -> str | None:
    """macOS's thermal pressure: nominal, moderate, heavy (throttling), trapping or sleeping; None elsewhere.

    The notification that `powermetrics` prints as "Current pressure level", readable without root (angristan/
    MacThrottle). Neither alternative serves: `pmset -g therm` says "No thermal warning level has been recorded" on
    Apple silicon whatever happens (exelban/stats#749), and ProcessInfo.thermalState calls "heavy" still "fair"
    (macmade/Hot#118).
    """
    if not on_mac():
        return None
    return _ask(("notifyutil", "-g", "com.apple.system.thermalpressurelevel"), parse.thermal_state, problems)


def gpu_utilisation() -> float | None:
    """The share of recent time in which the GPU was busy, 0..1, or None if that is unknown."""
    if on_mac():
        gpu = _ask(IOREG, parse.ioreg_gpu)
        return gpu.utilisation if gpu else None
    try:
        with nvml.device() as (pynvml, handle):
            return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NvmlError:
        return None


def chip() -> chips.Chip | None:
    """This machine's accelerator, when chips.py knows it."""
    if on_mac():
        brand, gpu = apple_brand(), _apple_gpu(None)
        return chips.find(brand, gpu.cores if gpu else None) if brand else None
    name, _ = _nvidia_gpu()
    return chips.find(name, None) if name else None


def apple_brand() -> str | None:
    """ "Apple M4 Pro"; None on anything but a Mac."""
    values = _ask(SYSCTL, parse.sysctl) if on_mac() else None
    return values.get("machdep.cpu.brand_string") if values else None


def _apple_gpu(problems: list[str] | None) -> parse.Gpu | None:
    """ioreg answers in about 20 ms, system_profiler in 260 and more (wandb/wandb#12680)."""
    gpu = _ask(IOREG, parse.ioreg_gpu, problems)
    return gpu if gpu and gpu.cores else _ask(SYSTEM_PROFILER, parse.system_profiler_gpu, problems)


def _nvidia_gpu() -> tuple[str | None, str | None]:
    """Name and driver version. A machine without one gets no problem line."""
    try:
        with nvml.device() as (pynvml, handle):
            return pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
    except nvml.NvmlError:
        return None, None


def environment(frameworks: Sequence[str] = ()) -> dict[str, object]:
    """Everything a record of a run needs to know about the machine, ready for JSON. Unknown facts are None.

    Keys: os, os_version, macos_version, machine, python, chip (the processor's name), cpu_cores, cpu_core_kinds (name
    -> cores, fastest first), gpu, gpu_cores, gpu_driver, memory_bytes, power_source, low_power_mode, thermal_state,
    versions (distribution -> version), git ({"commit", "dirty"} of this project), problems (one line for each fact that
    is missing). The host's name is not among them.
    """
    problems: list[str] = []
    facts = _mac_facts(problems) if on_mac() else _linux_facts()
    return {
        "os": platform.system(),
        "os_version": platform.release(),
        "macos_version": platform.mac_ver()[0] or None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        **facts,
        "power_source": power_source(problems),
        "low_power_mode": low_power_mode(problems),
        "thermal_state": thermal_state(problems),
        "versions": {package: _version(package) for package in dict.fromkeys((*frameworks, *PACKAGES))},
        "git": _git(problems),
        "problems": problems,
    }


def _mac_facts(problems: list[str]) -> dict[str, object]:
    values = _ask(SYSCTL, parse.sysctl, problems) or {}
    gpu = _apple_gpu(problems)
    if values.get("sysctl.proc_translated") == "1":
        problems.append("this Python is an Intel one, translated by Rosetta; use an arm64 Python")
    brand = values.get("machdep.cpu.brand_string")
    return {
        "chip": brand,
        "cpu_cores": parse.positive(values.get("hw.physicalcpu")),
        "cpu_core_kinds": parse.core_kinds(values),
        "gpu": gpu.name if gpu and gpu.name else brand,
        "gpu_cores": gpu.cores if gpu else None,
        "gpu_driver": None,  # part of macOS
        "memory_bytes": parse.positive(values.get("hw.memsize")),
    }


def _linux_facts() -> dict[str, object]:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    gpu, driver = _nvidia_gpu()
    return {
        "chip": parse.cpu_model(cpuinfo),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_core_kinds": None,
        "gpu": gpu,
        "gpu_cores": None,
        "gpu_driver": driver,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(problems: list[str]) -> dict[str, str | bool] | None:
    """The project's commit, or None where this file is not in its repository (installed, or an archive)."""
    here = Path(__file__).resolve()
    # The repository may be somebody else's, with the package installed inside it: then this file is not tracked.
    if run(("git", "ls-files", "--error-unmatch", here.name), cwd=here.parent) is None:
        return None
    text = run(("git", "status", "--porcelain=v2", "--branch"), problems=problems, cwd=here.parent)
    status = parse.git_status(text) if text else None
    return {"commit": status[0], "dirty": status[1]} if status else None


@contextmanager
def awake() -> Iterator[bool]:
    """Keeps the Mac from sleeping while the block runs; yields whether that holds. Elsewhere it does nothing.

    `caffeinate -i -m -s`: no idle sleep, no disk sleep, no system sleep on mains power (a closed lid still puts a
    MacBook on battery to sleep). `-w`: it ends with this process even when that is killed.
    """
    held = _caffeinate() if on_mac() else None
    try:
        yield held is not None
    finally:
        if held:
            held.terminate()
            try:
                held.wait(timeout=2)
            except subprocess.TimeoutExpired:
                held.kill()
                held.wait()


def _caffeinate() -> subprocess.Popen[bytes] | None:
    try:
        process = subprocess.Popen(
            ("caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_command_environment(),
            start_new_session=True,  # Ctrl-C must not end it before the last checkpoint is written
        )
    except OSError:
        return None
    try:
        process.wait(timeout=0.1)  # it only ends by itself when it could not take the assertion
    except subprocess.TimeoutExpired:
        return process
    return None


def process_times() -> dict[str, float]:
    """wall, user and system seconds of this process since it started, and max_rss_bytes, as `/usr/bin/time` gives them.

    Like there, children that have been waited for count in user and system, and the largest process in max_rss_bytes.
    """
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    # getrusage(2): bytes on macOS, KiB on Linux.
    unit = 1 if on_mac() else 1024
    return {
        "wall": _seconds_since_start(),
        "user": own.ru_utime + children.ru_utime,
        "system": own.ru_stime + children.ru_stime,
        "max_rss_bytes": max(own.ru_maxrss, children.ru_maxrss) * unit,
    }


def _seconds_since_start() -> float:
    """psutil on Linux adds the boot time, which the kernel rounds to a second; /proc's own clock has 10 ms."""
    if sys.platform == "linux":
        stat = Path("/proc/self/stat").read_text()
        started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return time.time() - psutil.Process().create_time()
