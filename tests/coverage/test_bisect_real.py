"""Bisections over 64 builds made of two real releases under nightly names. Needs the internet, about 5 MB of it."""

import io
import random
import zipfile
from datetime import date, timedelta

import pytest

from nanogpt_mac.coverage import bisect
from nanogpt_mac.coverage.config import CoverageConfig
from nanogpt_mac.operators import native_yaml, table, wheel

pytestmark = [pytest.mark.online, pytest.mark.slow]

BUILDS, TRIALS = 64, 20
OLD, NEW = "2.13.0", "2.14.1"  # in between linalg_svd left the CPU


@pytest.fixture(scope="module")
def pieces():
    """What is read of each of the two wheels: name in the archive to content."""
    found = {}
    for version in (OLD, NEW):
        with wheel.unpacked(wheel.find(version)) as root:
            files = [path for path in root.rglob("*") if path.is_file()]
            found[version] = {str(path.relative_to(root)): path.read_bytes() for path in files}
    return found


def archive(content):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for name, text in content.items():
            if name != "torch/version.py":
                made.writestr(name, text)
    return data.getvalue()


def build(base, version, commit):
    """A wheel of the archive `base`, under another name and commit."""
    data = io.BytesIO(base)
    with zipfile.ZipFile(data, "a") as made:
        made.writestr("torch/version.py", f"__version__ = '{version}'\ngit_version = '{commit}'\n")
    return data.getvalue()


def test_planted_changes_are_found_in_seven_wheels(pieces, index, tmp_path, monkeypatch):
    # Two contents make all builds: torchgen runs once for each, as everything else is done anew.
    answers = {}
    run = table._run_torchgen

    def once(torch, root):
        content = (root / native_yaml.FOLDER / "native_functions.yaml").read_bytes()
        if content not in answers:
            answers[content] = run(torch, root)
        return answers[content]

    monkeypatch.setattr(table, "_run_torchgen", once)
    bases = {version: archive(content) for version, content in pieces.items()}
    days = [f"2.15.0.dev{date(2026, 1, 1) + timedelta(days=n):%Y%m%d}" for n in range(BUILDS)]
    draw = random.Random(17)
    for trial in range(TRIALS):
        change = draw.randrange(1, BUILDS)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{trial}"))
        index.files.clear()
        for n, day in enumerate(days):
            name = f"torch-{day}-cp312-cp312-macosx_14_0_arm64.whl"
            base = bases[NEW if n >= change else OLD]
            metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {day}\n".encode()
            index.files |= {f"/{name}": build(base, day, f"{n:040x}"), f"/{name}.metadata": metadata}
        index.requests.clear()
        config = CoverageConfig(bisect="linalg_svd", good=days[0], bad="nightly", nightly_index=index.url)
        made = bisect.check(config).data
        assert (made["good"]["version"], made["bad"]["version"]) == (days[change - 1], days[change])
        assert made["link"] == f"{bisect.COMPARE}{change - 1:040x}...{change:040x}"
        assert any(line.startswith("linalg_svd: explicit fallback -> ") for line in made["changes"])
        read = {path for path, asked, _ in index.requests if asked and path.endswith(".whl")}
        assert len(read) == made["read"] <= 7
        sent = sum(size for path, asked, size in index.requests if asked and path.endswith(".whl"))
        print(f"trial {trial}: change at {change}, {len(read)} wheels, {sent / 1e6:.1f} MB")
