"""A small torch to look at: a wheel with the installed torchgen, our own operators, and a Mach-O file made here."""

import hashlib
import struct
import zipfile
from pathlib import Path

OPERATORS = """
- func: alpha(Tensor self) -> Tensor
  structured_delegate: alpha.out
- func: alpha_(Tensor(a!) self) -> Tensor(a!)
  structured_delegate: alpha.out
- func: alpha.out(Tensor self, *, Tensor(a!) out) -> Tensor(a!)
  structured: True
  structured_inherits: TensorIteratorBase
  dispatch:
    CPU, MPS: alpha_out
- func: beta(Tensor self) -> Tensor
  device_check: NoCheck
  dispatch:
    CPU: beta_cpu
    MPS: beta_mps
- func: gamma(Tensor self) -> Tensor
  dispatch:
    CPU: gamma_cpu
- func: delta(Tensor self) -> Tensor
  dispatch:
    CUDA: delta_cuda
- func: epsilon(Tensor self) -> Tensor
- func: zeta.Scalar(Tensor self) -> Tensor
  dispatch:
    CompositeExplicitAutograd: zeta
- func: eta(Tensor self) -> Tensor
  structured_delegate: eta.out
- func: eta.out(Tensor self, *, Tensor(a!) out) -> Tensor(a!)
  structured: True
  structured_inherits: TensorIteratorBase
  dispatch:
    CPU: eta_out
- func: theta(Tensor self) -> Tensor
  structured_delegate: theta.out
- func: theta.out(Tensor self, *, Tensor(a!) out) -> Tensor(a!)
  structured: True
  structured_inherits: TensorIteratorBase
  dispatch:
    CPU: theta_out
- func: embedding_renorm_(Tensor(a!) self) -> Tensor(a!)
  dispatch:
    CPU: embedding_renorm_cpu_
- func: _linalg_svd(Tensor A) -> Tensor
  structured_delegate: _linalg_svd.U
- func: _linalg_svd.U(Tensor A, *, Tensor(a!) U) -> Tensor(a!)
  structured: True
  dispatch:
    CPU: _linalg_svd_out
- func: linalg_svd(Tensor A) -> Tensor
- func: linalg_svd.U(Tensor A, *, Tensor(a!) U) -> Tensor(a!)
- func: _slow_conv2d_forward(Tensor self) -> Tensor
  dispatch:
    CPU: slow_conv2d_forward_cpu
"""
TAGS = "- tag: core\n  desc: one\n- tag: generated\n  desc: another\n"
PYTHON = """
from torch.library import Library

def install():
    mine = Library("aten", "IMPL", "MPS")
    mine.impl("aten::theta.out", theta)
    other = Library("aten", "IMPL")
    other.impl("gamma", gamma, "Meta")
"""
# What the compiled registrations of that torch are: key to operators.
REGISTERED = {
    "MPS": ["alpha", "alpha_", "alpha.out", "beta", "_slow_conv2d_forward"],
    "fallback": ["embedding_renorm_", "linalg_svd", "linalg_svd.U"],
    "CompositeImplicitAutograd": ["epsilon", "linalg_svd", "linalg_svd.U"],
    "CompositeExplicitAutograd": ["zeta.Scalar"],
    "CompositeExplicitAutogradNonFunctional": ["alpha", "alpha_", "eta", "theta", "_linalg_svd"],
}
CALLED = {
    "epsilon": ["gamma", "zeta_Scalar"],
    "zeta.Scalar": ["beta"],
    "linalg_svd": ["_linalg_svd"],
    "theta": ["theta_out"],
}
IMPL = "__ZNR5torch7Library5_implEPKcONS_11CppFunctionENS_17_RegisterOrVerifyE"

_TEXT, _CSTRING, _CONST = 0x4000, 0x400000, 0x500000


def initialiser(key, number=1, namespace="aten"):
    ident = f"TORCH_LIBRARY_IMPL_init_{namespace}_{key}_{number}"
    return f"__ZN2at12_GLOBAL__N_1L{len(ident)}{ident}ERN5torch7LibraryE"


def operator_call(name):
    return f"__ZN2at4_ops{len(name)}{name}4callERKNS_6TensorE"


def kernel(op, key):
    name = "mps_fallback" if key == "fallback" else "wrapper_" + op.replace(".", "_")
    return f"__ZN3c104impl28wrap_kernel_functor_unboxed_I{key}{len(name)}{name}E4callEv"


def assemble(functions, constants=(), cpu=0x0100000C):
    """A Mach-O file of `functions`: symbol to instructions.

    ("address", register, symbol or text), ("call", symbol), ("jump", symbol), ("store", register),
    ("move", to, from), ("load",) or ("return",). Texts in `constants` go to __const, the others to __cstring.
    """
    size = {"address": 8}
    place, position = {}, _TEXT
    for symbol, body in functions.items():
        place[symbol] = position
        position += sum(size.get(i[0], 4) for i in body)
    strings, const = b"", b""
    for body in functions.values():
        for target in (i[2] for i in body if i[0] == "address" and i[2] not in place):
            if target in constants:
                place[target], const = _CONST + len(const), const + target.encode() + b"\0"
            else:
                place[target], strings = _CSTRING + len(strings), strings + target.encode() + b"\0"
    code, pc = [], _TEXT
    for body in functions.values():
        for instruction in body:
            words = _encode(instruction, pc, place)
            code += words
            pc += 4 * len(words)
    text = struct.pack(f"<{len(code)}I", *code)
    return _mach_o(text, strings or b"\0", const or b"\0", {s: place[s] for s in functions}, cpu)


def _encode(instruction, pc, place):
    kind, *operands = instruction
    if kind == "address":  # ADRP, ADD
        register, target = operands[0], place[operands[1]]
        pages = ((target >> 12) - (pc >> 12)) & 0x1FFFFF
        adrp = 0x90000000 | (pages & 3) << 29 | pages >> 2 << 5 | register
        return [adrp, 0x91000000 | (target & 0xFFF) << 10 | register << 5 | register]
    if kind in ("call", "jump"):  # BL, B
        opcode = 0x94000000 if kind == "call" else 0x14000000
        return [opcode | (place[operands[0]] - pc) // 4 & 0x3FFFFFF]
    if kind == "move":
        return [0xAA0003E0 | operands[1] << 16 | operands[0]]
    if kind == "store":  # STR Xt, [SP]
        return [0xF90003E0 | operands[0]]
    return [{"load": 0xF94003E1, "return": 0xD65F03C0}[kind]]  # LDR X1, [SP]; RET


def _mach_o(text, strings, const, symbols, cpu):
    names, table = b"\0", b""
    for symbol, address in symbols.items():
        table += struct.pack("<IBBHQ", len(names), 0x0F, 1, 0, address)
        names += symbol.encode() + b"\0"
    contents = [(b"__text", _TEXT, text), (b"__cstring", _CSTRING, strings), (b"__const", _CONST, const)]
    position = 32 + 72 + 80 * len(contents) + 24
    sections = b""
    for name, address, content in contents:
        sections += struct.pack("<16s16sQQ8I", name, b"__TEXT", address, len(content), position, *[0] * 7)
        position += len(content)
    segment = struct.pack("<2I16s4Q4I", 0x19, 72 + len(sections), b"__TEXT", 0, _CONST, 0, position, 7, 7, 3, 0)
    symtab = struct.pack("<6I", 2, 24, position, len(symbols), position + len(table), len(names))
    header = struct.pack("<8I", 0xFEEDFACF, cpu, 0, 6, 2, len(segment) + len(sections) + len(symtab), 0, 0)
    return header + segment + sections + symtab + text + strings + const + table + names


def dylib(registered=REGISTERED, impl=IMPL, called=CALLED):
    """The Mach-O file of a torch with these registrations, whose composites call `called`."""
    functions = {impl: [("return",)]}
    for names in called.values():
        functions |= {operator_call(name): [("return",)] for name in names}
    for key, ops in registered.items():
        body = [("move", 19, 0)]
        for op in ops:
            symbol, inner = kernel(op, key), f"__ZN2at6native{len(op) + 2}k_{op}EE"
            calls = called.get(op, []) if key.startswith("Composite") else []
            functions[symbol] = [("call", inner), ("return",)]
            functions[inner] = [*(("call", operator_call(name)) for name in calls[1:]), ("return",)]
            if calls:  # the last call of a kernel is often a jump
                functions[inner][-1] = ("jump", operator_call(calls[0]))
            body += [("address", 8, symbol), ("store", 8), ("address", 1, op), ("move", 0, 19), ("call", impl)]
        functions[initialiser("MPS", 2) if key == "fallback" else initialiser(key)] = [*body, ("return",)]
    return assemble(functions)


def members(version="9.1.0", operators=OPERATORS, binary=None):
    """The files of a torch: name to content."""
    import torchgen

    root = Path(torchgen.__file__).parents[1]
    files = {str(p.relative_to(root)): p.read_bytes() for p in (root / "torchgen").rglob("*.py")}
    folder, info = "torchgen/packaged/ATen/native", f"torch-{version}.dist-info"
    files |= {f"{folder}/native_functions.yaml": operators.encode(), f"{folder}/tags.yaml": TAGS.encode()}
    files["torch/version.py"] = f"__version__ = '{version}'\ngit_version = '{'ab' * 20}'\n".encode()
    files["torch/backends/mps/__init__.py"] = PYTHON.encode()
    files["torch/lib/libtorch_cpu.dylib"] = dylib() if binary is None else binary
    files["torch/lib/padding.bin"] = hashlib.shake_128(version.encode()).digest(600_000)  # what nobody needs
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp312-cp312-macosx_14_0_arm64\n"
    return files


def wheel(folder, version="9.1.0", tag="cp312-cp312-macosx_14_0_arm64", files=None, **changes):
    """A wheel of those files in `folder`; its path."""
    path = Path(folder) / f"torch-{version}-{tag}.whl"
    files = dict(files or members(version, **changes))
    record = f"torch-{version}.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record]).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
