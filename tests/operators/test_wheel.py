"""Finding and reading a torch: on this machine, and on an index on loopback with and without HTTP ranges."""

import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import fake_wheels as fakes

from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import table, wheel


def nothing_kept(cache):
    return not [path for path in cache.rglob("*") if path.is_file()]


# -- on this machine --------------------------------------------------------------------------------------------------


def test_names_that_mean_nothing(tmp_path):
    for asked in ("newest", "2.15.0.0.whatever", ""):
        with pytest.raises(InputError, match=r"use installed, nightly, a release such as 2\.15\.0, or the path"):
            wheel.find(asked)
    with pytest.raises(InputError, match=r"no such file; use installed"):
        wheel.find(str(tmp_path / "torch-2.15.0-cp312-cp312-macosx_14_0_arm64.whl"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "torch-9.1.0-cp312-cp312-manylinux_2_28_x86_64.whl",
            "is for manylinux_2_28_x86_64; only macOS arm64 wheels have MPS",
        ),
        (
            "torch-9.1.0-cp312-cp312-macosx_11_0_x86_64.whl",
            "is for macosx_11_0_x86_64; only macOS arm64 wheels have MPS",
        ),
        ("torch-9.1.0-cp312-cp312-win_amd64.whl", "is for win_amd64"),
        ("numpy-9.1.0-cp312-cp312-macosx_14_0_arm64.whl", "is a wheel of numpy, not of torch"),
        ("torch.whl", "is not the file name of a wheel"),
    ],
)
def test_wheels_that_are_not_a_macs(wheels, tmp_path, cache, name, words):
    path = shutil.copy(wheels[0], tmp_path / name)
    with pytest.raises(InputError, match=words):
        table.load(str(path))
    assert nothing_kept(cache)


def test_a_file_that_is_no_wheel_or_is_cut_short(wheels, tmp_path, cache):
    path = tmp_path / wheels[0].name
    whole = wheels[0].read_bytes()
    for content in (b"", b"not a zip archive at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"not a wheel, or cut short"):
            table.load(str(path))
    position = whole.index(b"torchgen/gen.py") + 2000
    path.write_bytes(whole[:position] + bytes(64) + whole[position + 64 :])
    with pytest.raises(InputError, match=r"is damaged or broke off"):
        table.load(str(path))
    assert nothing_kept(cache)


def test_a_wheel_without_what_is_looked_for(tmp_path, cache):
    files = fakes.members()
    del files["torch/lib/libtorch_cpu.dylib"]
    path = fakes.wheel(tmp_path, files=files)
    assert table.load(str(path)).entries
    with pytest.raises(InputError, match=r"has no torch/lib/libtorch_cpu\.dylib"):
        table.load(str(path), binary=True)
    del files[wheel.YAML]
    with pytest.raises(InputError, match=r"has no torchgen/packaged/ATen/native/native_functions\.yaml"):
        table.load(str(fakes.wheel(tmp_path, files=files)))


def test_members_that_point_out_of_the_archive(tmp_path):
    path = fakes.wheel(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("torchgen/../../../outside.py", "print('hello')")
    with pytest.raises(InputError, match=r"points out of the archive"):
        table.load(str(path))
    assert not list(tmp_path.parent.rglob("outside.py"))


def test_the_installed_torch_is_read_where_it_lies(monkeypatch):
    import torchgen

    found = wheel.find("installed")
    with wheel.unpacked(found) as root:
        assert (root / "torchgen/__init__.py").samefile(torchgen.__file__)
    monkeypatch.setattr(wheel, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="torch=installed: torch is not installed here; run `make setup`"):
        wheel.find("installed")


# -- on an index ------------------------------------------------------------------------------------------------------


def test_a_release_is_read_in_ranges(index, wheels, cache):
    index.add(wheels[0])
    made = table.load("9.1.0")
    assert (made.version, made.wheel) == ("9.1.0", wheels[0].name)
    assert made.entries == table.load(str(wheels[0])).entries
    parts = [(asked, size) for path, asked, size in index.requests if path == f"/{wheels[0].name}"]
    assert parts
    assert all(asked for asked, _ in parts)  # never the whole file
    assert not (cache / "wheels").exists()
    # Without the dylib and the padding, of which a real wheel is made.
    assert sum(size for _, size in parts) < wheels[0].stat().st_size - 500_000
    index.requests.clear()
    assert table.load("9.1.0") == made
    assert index.requests == []  # no network at all


@pytest.fixture
def found(index, wheels):
    """What wheel.find gives for a release, without asking pip."""
    index.add(wheels[0])
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    url = index.url.replace("/simple", f"/{wheels[0].name}")
    return wheel.Torch("9.1.0", "9.1.0", "9.1.0-py3.12", wheels[0].name, url=url, sha256=digest)


def test_the_binary_is_read_in_ranges_too(found, cache):
    with wheel.unpacked(found, binary=True) as root:
        assert (root / wheel.DYLIB).read_bytes() == fakes.dylib()
    assert not cache.exists()


def test_without_ranges_the_whole_wheel_is_kept(found, index, wheels, cache, capfd):
    index.ranges = False
    with wheel.unpacked(found) as root:
        assert not (root / wheel.DYLIB).exists()
    assert "downloading all of it" in capfd.readouterr().err
    assert (cache / "wheels" / wheels[0].name).read_bytes() == wheels[0].read_bytes()
    index.requests.clear()
    with wheel.unpacked(found, binary=True) as root:
        assert (root / wheel.DYLIB).read_bytes() == fakes.dylib()
    assert index.requests == []
    kept = cache / "wheels" / wheels[0].name
    kept.write_bytes(kept.read_bytes()[:-100])  # a disk that fails
    with wheel.unpacked(found):
        pass
    assert kept.read_bytes() == wheels[0].read_bytes()


def test_a_download_that_breaks_off_leaves_nothing(found, index, cache):
    index.cut = 20_000
    for index.ranges in (True, False):
        with pytest.raises(InputError) as caught, wheel.unpacked(found):
            pytest.fail("there is nothing to look at")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("torch=9.1.0: ")
        assert nothing_kept(cache)


def test_a_wheel_with_another_checksum_leaves_nothing(found, index, wheels, cache):
    """Whether the index names the checksum, and pip sees it, or we were told it."""
    index.ranges = False
    for sha256, ours in (("0" * 64, found.sha256), (found.sha256, "0" * 64)):
        index.sha256[found.wheel] = sha256
        told = replace(found, sha256=ours)
        with pytest.raises(InputError, match=r"torch=9\.1\.0: .*(HASH|hash|sha256)"), wheel.unpacked(told):
            pytest.fail("there is nothing to look at")
        assert nothing_kept(cache)


def test_versions_that_the_index_does_not_have(index, wheels):
    index.add(wheels[0])
    index.add(wheels[1])
    with pytest.raises(InputError, match=r"has no macOS arm64 wheel of it for Python 3\.12; newest: 9\.1\.0, 9\.2\.0"):
        wheel.find("9.9.9")
    linux = fakes.wheel(wheels[0].parent, "9.3.0", tag="cp312-cp312-manylinux_2_28_x86_64")
    index.files = {}
    index.add(linux)
    with pytest.raises(InputError, match=r"has no macOS arm64 wheel of torch for Python 3\.12"):
        wheel.find("9.3.0")


def test_nightly_is_the_newest_of_its_own_index(index, tmp_path):
    versions = ("9.3.0.dev20270101", "9.3.0.dev20270215", "9.3.0.dev20270214")
    for version in versions:
        index.add(fakes.wheel(tmp_path, version))
    found = wheel.find("nightly", nightly_index=index.url)
    assert (found.version, found.asked) == ("9.3.0.dev20270215", "nightly")
    assert table.load("nightly", nightly_index=index.url).version == found.version
    index.files = {name: content for name, content in index.files.items() if "dev" not in name}
    index.add(fakes.wheel(tmp_path, "9.3.0"))
    with pytest.raises(InputError, match=r"has no macOS arm64 wheel of it for Python 3\.12; newest: 9\.3\.0$"):
        wheel.find("nightly", nightly_index=index.url)


def test_an_index_that_nobody_answers_for(index):
    index.server.shutdown()
    index.server.server_close()
    with pytest.raises(InputError, match=r"torch=9\.1\.0: the package index that pip is set to cannot be reached"):
        wheel.find("9.1.0")
    with pytest.raises(InputError, match=r"torch=nightly: the index http://127\.0\.0\.1:\d+/simple cannot be reached"):
        wheel.find("nightly", nightly_index=index.url)


# As PyTorch's own index writes it (to_simple_package_html in pytorch/test-infra's s3_management/manage.py): no digests
# of nightlies, addresses from the server's root, `+` escaped in them, every platform, a comment behind the end.
NIGHTLY_PAGE = Path(__file__).with_name("nightly_index.html").read_text()


def simple_json(names):
    """The same API as JSON, as PyPI has it."""
    one = {"hashes": {"sha256": "0" * 64}, "requires-python": ">=3.10", "size": 5, "yanked": False}
    one |= {"core-metadata": {"sha256": "1" * 64}, "upload-time": "2026-11-01T10:11:12.123456Z"}
    files = [{"filename": name, "url": f"/whl/nightly/cpu/{name.replace('+', '%2B')}"} | one for name in names]
    return json.dumps({"meta": {"api-version": "1.4"}, "name": "torch", "files": files, "versions": []})


@pytest.mark.parametrize("form", ["html", "json"])
def test_the_nightly_indexs_own_page(index, form):
    names = re.findall(r">(torch-\S+\.whl)<", NIGHTLY_PAGE)
    index.page = NIGHTLY_PAGE if form == "html" else simple_json(names)
    found = wheel.available("nightly", "3.12", index.url)
    assert [str(version) for version in found] == ["2.16.0.dev20261101", "2.16.0.dev20261104"]
    root = index.url.removesuffix("/simple")
    for torch, macos in zip(found.values(), (14, 11), strict=True):
        name = f"torch-{torch.version}-cp312-cp312-macosx_{macos}_0_arm64.whl"
        assert (torch.url, torch.wheel, torch.sha256) == (f"{root}/whl/nightly/cpu/{name}", name, None)
    assert wheel.find("nightly", nightly_index=index.url).version == "2.16.0.dev20261104"
