"""Facts from the text that macOS commands print. A parser returns None for what the text does not say; none raises.

Tested against excerpts of real output from public sources, which tests/machine names one by one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

# The levels of <libkern/OSThermalNotification.h>, as `powermetrics` names them.
THERMAL_LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")


@dataclass(frozen=True)
class Gpu:
    """An Apple GPU. `utilisation` is 0..1 and comes from ioreg alone."""

    name: str | None
    cores: int | None
    utilisation: float | None = None


def sysctl(text: str) -> dict[str, str] | None:
    """`sysctl -i NAME ...`: one "name: value" a line."""
    pairs = (line.split(":", 1) for line in text.splitlines() if re.match(r"[\w.]+:", line))
    return {name: value.strip() for name, value in pairs} or None


def core_kinds(values: dict[str, str]) -> dict[str, int] | None:
    """CPU cores by kind, fastest first, from sysctl's hw.perflevelN.

    macOS 12 gives the levels no names; there they are performance and efficiency. M5 Pro and M5 Max have "Super"
    and "Performance" cores and no "Efficiency" ones (lablup/all-smi#167), so level 1 alone means nothing.
    """
    kinds: dict[str, int] = {}
    for level, unnamed in enumerate(("performance", "efficiency", "")):
        cores = positive(values.get(f"hw.perflevel{level}.physicalcpu"))
        name = values.get(f"hw.perflevel{level}.name", unnamed).lower()
        if cores and name:
            kinds[name] = kinds.get(name, 0) + cores
    return kinds or None


def ioreg_gpu(text: str) -> Gpu | None:
    """`ioreg -r -d 1 -w 0 -c AGXAccelerator`. The text form: it is the one that public sources show, and
    `ioreg -a` carries the same values."""
    model = re.search(r'"model" = <?"([^"]+)"', text)
    cores = re.search(r'"gpu-core-count" = (\d+)', text)
    busy = re.search(r'"PerformanceStatistics" = \{[^}]*"Device Utilization %"=(\d+)', text)
    percent = int(busy.group(1)) if busy else None
    if not (model or cores or busy):
        return None
    return Gpu(
        model.group(1) if model else None,
        positive(cores.group(1)) if cores else None,
        percent / 100 if percent is not None and percent <= 100 else None,
    )


def system_profiler_gpu(text: str) -> Gpu | None:
    """`system_profiler SPDisplaysDataType -json`. The name is `sppci_model`; `_name` was "kHW_AppleM1Item" once."""
    try:
        cards = json.loads(text)["SPDisplaysDataType"]
        names = [(str(card["sppci_model"]), card.get("sppci_cores")) for card in cards if "sppci_model" in card]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((Gpu(name, positive(cores)) for name, cores in names if name.startswith("Apple")), None)


def power_source(text: str) -> str | None:
    """`pmset -g batt`: "ac" or "battery"."""
    found = re.search(r"Now drawing from '(AC|Battery|UPS) Power'", text)
    return ("ac" if found.group(1) == "AC" else "battery") if found else None


def low_power_mode(text: str) -> bool | None:
    """`pmset -g`: `lowpowermode`, which is called `powermode` on chips that also have a high-power mode.

    0 is automatic, 1 low power, 2 high power (alfredapp/low-power-mode-workflow#4).
    """
    found = re.search(r"^\W*(?:low)?powermode\s+([012])\b", text, re.MULTILINE)
    return found.group(1) == "1" if found else None


def thermal_state(text: str) -> str | None:
    """`notifyutil -g com.apple.system.thermalpressurelevel`: one of THERMAL_LEVELS."""
    found = re.fullmatch(r"com\.apple\.system\.thermalpressurelevel\s+([0-4])", text.strip())
    return THERMAL_LEVELS[int(found.group(1))] if found else None


def git_status(text: str) -> tuple[str, bool] | None:
    """`git status --porcelain=v2 --branch`: the commit, and whether a tracked file differs from it."""
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40,64})$", text, re.MULTILINE)
    dirty = any(line and not line.startswith(("#", "?", "!")) for line in text.splitlines())
    return (commit.group(1), dirty) if commit else None


def cpu_model(text: str) -> str | None:
    """Linux's /proc/cpuinfo; Arm kernels do not name the model."""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def positive(text: object) -> int | None:
    digits = str(text)
    return int(digits) or None if digits.isascii() and digits.isdigit() else None
