"""Does PyObjC's Metal have on a Mac what backends/by_hand/metal.py calls? And do our simulated objects?"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fakes.support import ROOT

from nanogpt_mac.simulator import pyobjc_metal

DRIVER = (ROOT / "nanogpt_mac" / "backends" / "by_hand" / "metal.py").read_text(encoding="utf-8")
SELECTORS = set(re.findall(r"\.(\w+_)\b", DRIVER))
NAMES = set(re.findall(r"self\.metal\.(MTL\w+)", DRIVER))
PLAIN = {"commandBuffer", "computeCommandEncoder", "endEncoding", "commit", "waitUntilCompleted", "status", "contents"}
PLAIN |= {"GPUStartTime", "GPUEndTime", "error"}


def test_what_is_looked_for() -> None:
    assert {"setBuffer_offset_atIndex_", "newCommandQueueWithMaxCommandBufferCount_"} < SELECTORS
    assert {"MTLSize", "MTLCommandBufferStatusCompleted"} < NAMES
    assert all(f".{name}(" in DRIVER for name in PLAIN)


def test_the_simulated_objects_have_it() -> None:
    source = Path(pyobjc_metal.__file__).read_text(encoding="utf-8")
    assert {name for name in SELECTORS | PLAIN if f"def {name}(" not in source} == set()
    assert {name for name in NAMES if not hasattr(pyobjc_metal, name)} == set()
    metadata_values = {"MTLResourceStorageModeShared": 0, "MTLCommandBufferStatusCompleted": 4}
    assert {name: getattr(pyobjc_metal, name) for name in metadata_values} == metadata_values


@pytest.mark.online
def test_the_macos_wheel_has_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    argv += ["--implementation=cp", "--python-version=3.12", "--platform=macosx_15_0_universal2"]
    argv += ["--platform=macosx_10_13_universal2", "--dest", str(tmp_path), "pyobjc-framework-Metal>=11,<13"]
    assert subprocess.run(argv, capture_output=True, text=True, check=False).returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    metadata = zipfile.ZipFile(wheel).read("Metal/_metadata.py").decode()
    selectors = {name.replace("_", ":") for name in SELECTORS} | PLAIN
    assert {name for name in selectors if f'b"{name}"' not in metadata} <= {"error"}  # a plain object
    assert {name for name in NAMES if name not in metadata} == set()
    for name in ("MTLResourceStorageModeShared", "MTLCommandBufferStatusCompleted"):
        assert f"{name}@{getattr(pyobjc_metal, name)}$" in metadata
