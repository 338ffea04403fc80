"""The real wheels: every claim about them that docs/coverage.md makes. Needs the internet and about 500 MB of it."""

import time

import pytest
from packaging.version import Version

from nanogpt_mac.coverage.config import NIGHTLY_INDEX
from nanogpt_mac.operators import diff, macho, table, wheel
from nanogpt_mac.operators.table import Kind

pytestmark = [pytest.mark.online, pytest.mark.slow]

# Version: overloads with an MPS kernel (own or delegate's), and missing ones beside the one registered to raise.
VERSIONS = {
    "2.9.1": (847, 387),
    "2.12.0": (878, 370),
    "2.13.0": (890, 360),
    "2.14.1": (912, 343),
    "2.15.0": (928, 333),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The tables of all five, read once with their binaries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {version: table.load(version, binary=True) for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_yaml_and_hand_list_agree_with_the_binary(read, version):
    made = read[version]
    assert made.disagreements == []
    kinds = [entry.kind for entry in made.entries.values()]
    assert Kind.UNKNOWN not in kinds
    missing = sum(kind in (Kind.MISSING, Kind.MISSING_CPU) for kind in kinds)
    assert (kinds.count(Kind.NATIVE) + kinds.count(Kind.DELEGATE), missing - 1) == VERSIONS[version]
    assert not [e.op for e in made.entries.values() if e.kind is Kind.COMPOSITE and e.decomposes_to is None]
    svd = ["linalg_svd", "linalg_svd.U"] if Version(version) < Version("2.14") else []
    assert made.hand_list() == ["_slow_conv2d_forward", "embedding_renorm_", *svd]


def test_what_changed_from_the_oldest_to_the_newest(read):
    changes = diff.compare(read["2.9.1"], read["2.15.0"])
    gained = {change.op for change in changes.gained}
    assert changes.lost == []
    assert len(gained) == 80  # 78 got a kernel; linalg_svd and linalg_svd.U left the hand list
    assert {"_embedding_bag", "_ctc_loss", "_linalg_svd", "_linalg_eigh", "linalg_qr", "poisson", "vdot"} <= gained
    assert changes.hand_removed == ["linalg_svd", "linalg_svd.U"]


def test_composites_that_are_known_to_decompose(read):
    entries = read["2.15.0"].entries
    for op, part in [
        ("cross_entropy_loss", "nll_loss_nd"),
        ("layer_norm", "native_layer_norm"),
        ("linalg_svd", "_linalg_svd"),
        ("scaled_dot_product_attention", "_scaled_dot_product_attention_math_for_mps"),
        ("embedding", "index_select"),
        ("_foreach_norm.Scalar", "linalg_vector_norm"),
    ]:
        assert part in entries[op].decomposes_to
    assert read["2.15.0"].left_behind("pdist") == ["_pdist_forward"]
    assert read["2.15.0"].left_behind("dropout") == []
    assert read["2.13.0"].left_behind("nuclear_norm") == ["_linalg_svd"]


def test_python_registrations_are_where_we_look(tmp_path):
    """Nothing else in these wheels registers for MPS from Python, in what runs without being asked for."""
    import re
    import zipfile

    found = {}
    for version in ("2.12.0", "2.15.0"):
        path = wheel._downloaded(wheel.find(version), "3.12", NIGHTLY_INDEX)
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".py") and name.startswith("torch/") and "/testing/" not in name:
                    source = archive.read(name).decode()
                    if re.search(r"""["']MPS["']""", source) and (ops := table.python_registrations(source)):
                        found[version, name] = ops
    assert found == {
        ("2.12.0", "torch/backends/mps/__init__.py"): {"native_group_norm", "native_group_norm_backward"},
        ("2.12.0", "torch/_refs/linalg/__init__.py"): {"linalg_lu_solve.out"},
    }


def test_the_yaml_needs_less_than_ten_megabytes_and_a_warm_cache_five_seconds(monkeypatch):
    import requests

    sizes = []
    send = requests.Session.send

    def counted(session, request, **options):
        response = send(session, request, **options)
        sizes.append(int(response.headers.get("Content-Length", 0)))
        return response

    monkeypatch.setattr(requests.Session, "send", counted)
    table.load("2.15.0")
    assert 500_000 < sum(sizes) < 10_000_000
    sizes.clear()
    started = time.perf_counter()
    table.load("2.15.0")
    assert time.perf_counter() - started < 5
    assert sizes == []


def test_the_decoder_against_a_live_dispatcher(tmp_path):
    """The macOS binary of the installed version against this process, in what every platform compiles."""
    import torch

    version = torch.__version__.split("+")[0]
    with wheel.unpacked(wheel.find(version), binary=True) as root:
        found = macho.registrations(macho.Image(root / wheel.DYLIB))
    equal = total = 0
    for key in ("CPU", "BackendSelect", "AutocastMPS", "Functionalize", *table.COMPOSITE_KEYS):
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        live = {name.removeprefix("aten::") for name in names if name.startswith("aten::")}
        decoded = {r.op for r in found if r.key == key and r.namespace in ("aten", "_") and r.op}
        equal += len(live & decoded)
        total += len(live | {op for op in decoded if "::" not in op})
    assert total > 4000
    assert equal / total >= 0.999
