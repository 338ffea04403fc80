"""The Mach-O decoder on files that we assemble; tests/coverage/test_real.py has the real ones."""

import pytest
from fakes import fake_wheels as fakes

from nanogpt_mac.errors import InputError
from nanogpt_mac.operators import macho


@pytest.fixture
def image(tmp_path):
    def write(content):
        path = tmp_path / "libtorch_cpu.dylib"
        path.write_bytes(content)
        return macho.Image(path)

    return write


def test_every_registration_is_found(image):
    found = macho.registrations(image(fakes.dylib()))
    expected = [("MPS" if key == "fallback" else key, op) for key, ops in fakes.REGISTERED.items() for op in ops]
    assert sorted((r.key, r.op) for r in found) == sorted(expected)
    assert {r.namespace for r in found} == {"aten"}
    assert sorted(r.op for r in found if r.falls_back) == sorted(fakes.REGISTERED["fallback"])


def test_only_the_keys_asked_for(image):
    found = macho.registrations(image(fakes.dylib()), ["CompositeImplicitAutograd"])
    assert [r.op for r in found] == fakes.REGISTERED["CompositeImplicitAutograd"]


def test_what_a_composite_calls(image):
    """Through the function that holds its code, by calls and by a jump at its end."""
    i = image(fakes.dylib())
    called = {r.op: macho.operators_called(i, r) for r in macho.registrations(i, ["CompositeImplicitAutograd"])}
    assert called == {"epsilon": {"gamma", "zeta_Scalar"}, "linalg_svd": {"_linalg_svd"}, "linalg_svd.U": set()}


def test_calls_of_other_libraries_are_not_followed(image):
    """A kernel calls c10 for a thousand reasons; what c10 calls is not what the kernel is made of."""
    helper, inner, start = "__ZN3c106detail6helperEv", "__ZN2at6native4workEv", fakes.kernel("op", "MPS")
    functions = {
        fakes.IMPL: [("return",)],
        fakes.operator_call("stray"): [("return",)],
        fakes.operator_call("meant"): [("return",)],
        helper: [("call", fakes.operator_call("stray")), ("return",)],
        inner: [("call", helper), ("call", fakes.operator_call("meant")), ("return",)],
        start: [("call", inner), ("return",)],
        fakes.initialiser("MPS"): [
            ("address", 8, start), ("store", 8), ("address", 1, "op"), ("call", fakes.IMPL), ("return",)
        ],
    }  # fmt: skip
    i = image(fakes.assemble(functions))
    (registration,) = macho.registrations(i, ["MPS"])
    assert macho.operators_called(i, registration) == {"meant"}


def test_names_kept_in_a_register_or_outside_the_strings(image):
    """A name may be moved from another register, may lie in __const, and may carry its namespace."""
    functions = {
        fakes.IMPL: [("return",)],
        fakes.initialiser("MPS", namespace="_"): [
            ("address", 20, "aten::one"), ("call", fakes.IMPL.replace("_impl", "_ling")),  # x20 survives a call
            ("move", 1, 20), ("call", fakes.IMPL), ("address", 1, "two"), ("call", fakes.IMPL), ("return",),
        ],
        fakes.IMPL.replace("_impl", "_ling"): [("return",)],
    }  # fmt: skip
    found = macho.registrations(image(fakes.assemble(functions, constants=("two",))), ["MPS"])
    assert [(r.namespace, r.op) for r in found] == [("_", "one"), ("_", "two")]


@pytest.mark.parametrize("lost", [("call", fakes.IMPL.replace("_impl", "_ling")), ("load",)])
def test_a_name_that_cannot_be_read_is_an_error(image, lost):
    """x1 does not survive a call, and a load puts there what the decoder does not know: no stale name is taken."""
    functions = {
        fakes.IMPL: [("return",)],
        fakes.IMPL.replace("_impl", "_ling"): [("return",)],
        fakes.initialiser("MPS"): [("address", 1, "stale"), lost, ("call", fakes.IMPL), ("return",)],
    }
    with pytest.raises(InputError, match="without a readable name in aten::MPS"):
        macho.registrations(image(fakes.assemble(functions)), ["MPS"])


def test_renamed_symbols_are_an_error_and_no_empty_table(image):
    with pytest.raises(InputError, match=r"registers no MPS operator \(symbols renamed or stripped\?\)"):
        macho.registrations(image(fakes.dylib(impl="__ZN5torch7Library7_renameEPKc")), ["MPS"])
    content = fakes.dylib().replace(b"TORCH_LIBRARY_IMPL_init", b"TORCH_LIBRARY_IMPL_unit")
    with pytest.raises(InputError, match="registers no MPS operator"):
        macho.registrations(image(content))
    with pytest.raises(InputError, match="registers no SparseMPS operator"):
        macho.registrations(image(fakes.dylib()), ["MPS", "SparseMPS"])


def test_files_that_are_something_else(image):
    whole = fakes.dylib()
    for content, words in [
        (b"", "is empty"),
        (b"\x7fELF" + bytes(100), "is not a 64-bit Mach-O file"),
        (whole[:20], "is cut short or damaged"),
        (whole[:60], "is cut short or damaged"),
        (whole[:1000], "is cut short"),
        (whole[:-100], "symbols are missing"),
        (fakes.assemble({"_f": [("return",)]}, cpu=0x01000007), "CPU type 0x1000007, not arm64"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            image(content)
        assert str(caught.value).startswith("libtorch_cpu.dylib: ")
        assert "use the whole libtorch_cpu.dylib of a macOS arm64 wheel" in str(caught.value)
