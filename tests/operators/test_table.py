"""The table of a small torch of our own, and the installed torch's against its own dispatcher."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from fakes import fake_wheels as fakes

from nanogpt_mac import child
from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import macho, table
from nanogpt_mac.operators.table import Kind

KINDS = {
    "alpha": Kind.DELEGATE,
    "alpha_": Kind.DELEGATE,
    "alpha.out": Kind.NATIVE,
    "beta": Kind.NATIVE,
    "gamma": Kind.MISSING_CPU,
    "delta": Kind.MISSING,
    "epsilon": Kind.COMPOSITE,
    "zeta.Scalar": Kind.COMPOSITE,
    "eta": Kind.MISSING_CPU,
    "eta.out": Kind.MISSING_CPU,
    "theta": Kind.COMPOSITE,
    "theta.out": Kind.PYTHON,
    "embedding_renorm_": Kind.FALLBACK,
    "_linalg_svd": Kind.MISSING_CPU,
    "_linalg_svd.U": Kind.MISSING_CPU,
    "linalg_svd": Kind.FALLBACK,
    "linalg_svd.U": Kind.FALLBACK,
    "_slow_conv2d_forward": Kind.MISSING,
}


@pytest.mark.parametrize("binary", [False, True])
def test_every_kind(wheels, binary):
    made = table.load(str(wheels[0]), binary=binary)
    assert {op: entry.kind for op, entry in made.entries.items()} == KINDS
    assert (made.version, made.git, made.disagreements) == ("9.1.0", "ab" * 20, [])
    assert sum(made.counts().values()) == len(KINDS)
    assert made.counts()["missing, CPU kernel"] == 5
    assert made.hand_list() == ["_slow_conv2d_forward", "embedding_renorm_", "linalg_svd", "linalg_svd.U"]
    assert made.entries["eta"].reported_as == "eta.out"  # as torch's own message names it
    assert made.entries["gamma"].reported_as == "gamma"
    assert made.entries["beta"].facts.no_device_check


def test_what_composites_are_made_of(tables):
    read, unread = tables
    parts = {op: entry.decomposes_to for op, entry in read.entries.items() if entry.kind is Kind.COMPOSITE}
    assert parts == {"epsilon": ["gamma", "zeta.Scalar"], "zeta.Scalar": ["beta"], "theta": ["theta.out"]}
    assert read.left_behind("epsilon") == ["gamma"]
    assert read.left_behind("zeta.Scalar") == read.left_behind("theta") == read.left_behind("beta") == []
    assert read.left_behind("delta") == ["delta"]
    assert unread.left_behind("epsilon") is None
    assert unread.left_behind("theta") == []


def test_branches_for_other_devices_and_tensors_are_not_held_against_a_composite(tables):
    read = replace(tables[0], entries=dict(tables[0].entries))
    parts = ["_sparse_gamma", "delta", "epsilon", "zeta.Scalar"]  # delta has no CPU kernel: no branch of a CPU's either
    read.entries["_sparse_gamma"] = replace(read.entries["gamma"], op="_sparse_gamma")
    read.entries["epsilon"] = replace(read.entries["epsilon"], decomposes_to=parts)
    assert read.left_behind("epsilon") == []


def test_the_hand_list_follows_the_kernels(tables):
    """When _linalg_svd gets an MPS kernel, linalg_svd is an ordinary composite, as in torch 2.14."""
    newer = tables[1]
    assert newer.entries["linalg_svd"].kind is Kind.COMPOSITE
    assert newer.entries["_linalg_svd"].kind is Kind.DELEGATE
    assert newer.hand_list() == ["_slow_conv2d_forward", "embedding_renorm_"]


def test_the_evidence_says_how_far_the_hand_list_was_checked(tables):
    made = replace(tables[0], binary=False)
    assert "NOT checked for this version (only 2.5.0 to 2.15.0)" in made.evidence()
    for version in ("2.5.0", "2.13.0+cpu", "2.15.0"):
        assert "last checked against 2.15.0" in replace(made, version=version).evidence()
    assert "NOT checked" in replace(made, version="2.16.0.dev20261101").evidence()
    assert tables[0].evidence().endswith("checked against libtorch_cpu.dylib")


def changed(**ops):
    """A dylib whose registrations of some keys are others."""
    return fakes.dylib({**fakes.REGISTERED, **ops})


@pytest.mark.parametrize(
    ("binary", "op", "how"),
    [
        (changed(MPS=["alpha", "alpha_", "alpha.out", "_slow_conv2d_forward"]), "beta", "not registered for MPS"),
        (changed(MPS=[*fakes.REGISTERED["MPS"], "gamma"]), "gamma", "CPU kernel by the YAML .* registered for MPS in"),
        (changed(MPS=[*fakes.REGISTERED["MPS"], "novel"]), "novel", "unknown to the YAML"),
        (changed(fallback=["embedding_renorm_", "linalg_svd.U"]), "linalg_svd", "explicit fallback .* not registered"),
        (changed(fallback=[*fakes.REGISTERED["fallback"], "eta"]), "eta", "registered as a CPU fallback in the binary"),
        (changed(MPS=["alpha", "alpha_", "alpha.out", "beta"]), "_slow_conv2d_forward", "not registered for MPS"),
        (changed(CompositeImplicitAutograd=["linalg_svd"]), "epsilon", "composite by the YAML, not in the binary"),
    ],
)
def test_a_binary_that_says_otherwise(tables, tmp_path, binary, op, how):
    path = tmp_path / "libtorch_cpu.dylib"
    path.write_bytes(binary)
    found = macho.registrations(macho.Image(path), ("MPS", *table.COMPOSITE_KEYS))
    wrong = table.disagreements(tables[0].entries, found)
    assert list(wrong) == [op]
    assert re.search(how, wrong[op])


def test_what_a_binary_contradicts_becomes_unknown(tmp_path):
    binary = changed(MPS=["alpha", "alpha_", "alpha.out", "_slow_conv2d_forward", "novel"])
    made = table.load(str(fakes.wheel(tmp_path, binary=binary)), binary=True)
    assert sorted(op for op, entry in made.entries.items() if entry.kind is Kind.UNKNOWN) == ["beta", "novel"]
    assert [line.split(": ")[0] for line in made.disagreements] == ["beta", "novel"]


def test_python_registrations_of_every_shape():
    source = """
lib = Library("aten", "IMPL", "MPS")
lib.impl("one", f)
keyword = Library("aten", "IMPL", dispatch_key="MPS")
keyword.impl("aten::two.out", f)
other = Library("aten", "IMPL")
other.impl("three", f, "MPS")
other.impl("four", f, "CPU")
unrelated("five", "MPS")
"""
    assert table.python_registrations(source) == {"one", "two.out", "three"}


def test_a_torch_without_mps_is_an_error_and_no_empty_table(tmp_path, cache):
    without = fakes.OPERATORS.replace("CPU, MPS:", "CPU:").replace("    MPS: beta_mps\n", "")
    path = fakes.wheel(tmp_path, operators=without)
    with pytest.raises(InputError, match=r"no operator of .*native_functions.yaml has an MPS kernel"):
        table.load(str(path))
    assert not list(cache.rglob("*.json"))


def test_a_binary_with_renamed_symbols_is_an_error_and_no_empty_table(tmp_path, cache):
    path = fakes.wheel(tmp_path, binary=fakes.dylib(impl="__ZN5torch7Library8register"))
    with pytest.raises(InputError, match=rf"^torch={path}: libtorch_cpu\.dylib: registers no MPS operator"):
        table.load(str(path), binary=True)
    assert not list(cache.rglob("*.json"))


def test_a_yaml_that_its_torchgen_cannot_read(tmp_path):
    path = fakes.wheel(tmp_path, operators="- func: alpha(Tensor self) -> Tensor\n  novelty: 1\n")
    with pytest.raises(InputError, match=r"its torchgen cannot read its .*native_functions.yaml: .*novelty"):
        table.load(str(path))


def test_each_torch_is_read_by_its_own_torchgen(tmp_path):
    """Nothing of the installed torchgen may leak in: here the wheel's is broken, and ours would do."""
    files = fakes.members()
    files["torchgen/gen.py"] = b"raise RuntimeError('the torchgen of this wheel')"
    with pytest.raises(InputError, match="RuntimeError: the torchgen of this wheel"):
        table.load(str(fakes.wheel(tmp_path, files=files)))


def test_a_second_look_reads_the_cache(wheels, cache, monkeypatch):
    first = table.load(str(wheels[0]))
    assert len(list((cache / "tables").iterdir())) == 1
    monkeypatch.setattr(child, "ask", lambda *_, **__: pytest.fail("torchgen was run again"))
    assert table.load(str(wheels[0])) == first


def test_a_damaged_cache_is_read_again(wheels, cache, capsys):
    first = table.load(str(wheels[0]))
    (kept,) = (cache / "tables").iterdir()
    whole = kept.read_text()
    for damage in (whole[: len(whole) // 2], "[]", "{}", '{"entries": {}}'):
        kept.write_text(damage)
        assert table.load(str(wheels[0])) == first
        assert kept.read_text() == whole
        assert f"{kept}: damaged" in capsys.readouterr().err


def test_the_cache_tells_torches_and_depths_apart(wheels, tmp_path, cache):
    table.load(str(wheels[0]))
    table.load(str(wheels[0]), binary=True)
    same_name = fakes.wheel(tmp_path, operators=fakes.OPERATORS.replace("    MPS: beta_mps\n", ""))
    assert same_name.name == wheels[0].name
    assert table.load(str(same_name)).entries["beta"].kind is Kind.MISSING_CPU
    assert len(list((cache / "tables").iterdir())) == 3


def test_two_at_once_leave_one_whole_table(wheels, cache):
    program = "import sys; from nanogpt_mac.operators import table; print(len(table.load(sys.argv[1]).entries))"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(wheels[0])], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == [f"{len(KINDS)}\n"] * 2
    (kept,) = (cache / "tables").iterdir()
    assert len(json.loads(kept.read_text())["entries"]) == len(KINDS)


def test_the_installed_torch_against_its_dispatcher():
    """The YAML's CPU kernels and composites are those that the live dispatcher has.

    `get_gradients` is registered by torch's distributed autograd, outside of the YAML's own registrations.
    """
    import torch

    made = table.load("installed")
    assert made.version == torch.__version__

    def live(key):
        names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        return {name.removeprefix("aten::") for name in names if name.startswith("aten::")} & made.entries.keys()

    composite = live("CompositeImplicitAutograd") | live("CompositeExplicitAutograd")
    missing_here = [op for op, e in made.entries.items() if e.kind is Kind.COMPOSITE and not e.facts.composite]
    kinds = {op: made.entries[op].kind for op in composite}
    assert not [op for op, kind in kinds.items() if kind in (Kind.MISSING, Kind.MISSING_CPU, Kind.UNKNOWN)]
    assert {op for op, e in made.entries.items() if e.facts.composite} - composite <= live(
        "CompositeExplicitAutogradNonFunctional"
    )
    assert len(missing_here) < 5
    cpu = {op for op, e in made.entries.items() if e.facts.cpu}
    assert len(cpu & live("CPU")) >= 0.999 * len(live("CPU") - composite)
    assert cpu <= live("CPU") | composite
