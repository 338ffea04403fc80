"""Metal source to C++ that g++ compiles through the headers under shim/.

Metal is C++ with address spaces and attributes. The spaces are macros without content; the attributes are read here and
taken out, and each kernel gets a C function that binds its arguments and starts its lanes.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanogpt_mac.simulator.build import first_error, run_compiler

# What an attribute gives a parameter: a Metal value of the parameter's own type, from the lane that runs.
_POSITIONS = {
    "thread_position_in_grid": "sim::group.lane->in_grid",
    "thread_position_in_threadgroup": "sim::group.lane->in_group",
    "threadgroup_position_in_grid": "sim::group.position",
    "threads_per_grid": "sim::group.grid",
    "grid_size": "sim::group.grid",
    "threads_per_threadgroup": "sim::group.size",
    "dispatch_threads_per_threadgroup": "sim::group.nominal",
    "threadgroups_per_grid": "sim::group.groups",
}
_INDICES = {
    "thread_index_in_threadgroup": "sim::group.lane->index",
    "thread_index_in_simdgroup": "(sim::group.lane->index % sim::kSimdWidth)",
    "simdgroup_index_in_threadgroup": "(sim::group.lane->index / sim::kSimdWidth)",
    "simdgroups_per_threadgroup": "((sim::group.size.count() + sim::kSimdWidth - 1) / sim::kSimdWidth)",
    "threads_per_simdgroup": "sim::kSimdWidth",
    "thread_execution_width": "sim::kSimdWidth",
}

_ATTRIBUTE = re.compile(r"\[\[\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*\]\]")
_KERNEL = re.compile(r"(?:\bkernel|\[\[\s*kernel\s*\]\])\s+void\s+(\w+)\s*(<[^;{}()]*>)?\s*\(")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# A declaration of threadgroup memory; a pointer to some, or a parameter, has * or & in its type.
_SHARED = re.compile(r"\bthreadgroup\s+(?=[\w:<>, ]+?\s+\w+\s*(?:\[[^\]]*\]\s*)*[;,])")
FUNCTION_CONSTANT = re.compile(
    r"\bconstant\s+(?:const\s+)?(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\s*(\d+)\s*\)\s*\]\]\s*;"
)
_IS_DEFINED = re.compile(r"\bis_function_constant_defined\(\s*(\w+)\s*\)")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*(?:include|pragma)\b.*$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(\w+)(.*)$", re.MULTILINE)
_LINE_MARK = re.compile(r'^# (\d+) "[^"]*".*$')
_CONST_TWICE = re.compile(r"\bconstant\s+const\b|\bconst\s+constant\b")
_MAX_THREADS = "max_total_threads_per_threadgroup"

_BINDING = """
namespace sim {
template <class T> struct Bound {
  static T from(void* buffer) {
    static_assert(std::is_pointer_v<T>, "a kernel takes buffers as pointers or references");
    return static_cast<T>(buffer);
  }
};
template <class T> struct Bound<T&> { static T& from(void* buffer) { return *static_cast<T*>(buffer); } };
template <class T> T position(Size s) {
  if constexpr (lanes_of<T>::value == 3) return T(s.x, s.y, s.z);
  else if constexpr (lanes_of<T>::value == 2) return T(s.x, s.y);
  else return T(s.x);
}
} // namespace sim
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a library. `symbol` is the C function that launches it; `buffers` its number of arguments.

    Behind them come `shared` addresses of threadgroup memory, whose sizes the host decides: `[[threadgroup(n)]]`.
    """

    name: str
    symbol: str
    buffers: int
    shared: int
    max_threads: int
    first_line: int
    last_line: int


class UnsupportedKernelError(Exception):
    """A kernel that uses what the shim does not know; the text names it."""


def translate(source: str, constants: Mapping[int, bool | int | float] | None = None) -> tuple[str, list[Kernel]]:
    """Returns C++ with as many lines before the added part as `source` has, and the kernels in it.

    `constants` are the values of function constants by index. As Metal does it, a library is compiled anew for them; a
    source that has function constants cannot be compiled without (None).
    """
    code = _COMMENT.sub(lambda m: "\n" * m.group().count("\n") or " ", source)
    code = _specialised(_expanded(code), constants)
    code = _CONST_TWICE.sub("constant", code)  # which becomes const
    templates: dict[str, list[str]] = {}
    kernels: list[Kernel] = []
    launchers: list[str] = []
    for match in _KERNEL.finditer(code):
        name, arguments = match.group(1), match.group(2) or ""
        end = _closing(code, match.end() - 1)
        parameters = _split(code[match.end() : end])
        head = code[max(code.rfind(c, 0, match.start()) for c in ";}") + 1 : match.start()]
        attributes = dict(_ATTRIBUTE.findall(head))
        if re.search(r"\btemplate\s*<", head):  # the template itself: kept for its instantiations
            templates[name] = parameters
            continue
        host_name = attributes.get("host_name", "").strip('" ') or name
        bodies = templates.get(name, parameters) if arguments else parameters
        symbol = f"sim_launch_{len(kernels)}"
        bound, buffers, shared = _bind(host_name, parameters, bodies)
        launchers.append(
            f"static void sim_lane_{len(kernels)}(void** sim_buffers) {{ {name}{arguments}({', '.join(bound)}); }}\n"
            f'extern "C" int {symbol}(void** b, const unsigned* g, const unsigned* s, char* e) '
            f"{{ return sim::launch(sim_lane_{len(kernels)}, b, g, s, e); }}"
        )
        body_end = _closing(code, code.index("{", end)) if not arguments else end
        first, last = (code.count("\n", 0, at) + 1 for at in (match.start(), body_end))
        limit = int(attributes.get(_MAX_THREADS) or 1024)
        kernels.append(Kernel(host_name, symbol, buffers, shared, limit, first, last))
    code = _SHARED.sub("static threadgroup ", code)
    code = _ATTRIBUTE.sub("", code)
    return code + _BINDING + "\n".join(launchers) + "\n", kernels


def _expanded(code: str) -> str:
    """`code` with its own macros expanded, where these may make kernels; otherwise as it is.

    What it includes is not looked into, so a condition on a macro of theirs cannot be decided here.
    """
    directives = _DIRECTIVE.findall(code.replace("\\\n", " "))
    if not any(word == "define" and re.search(r"\bkernel\b", text) for word, text in directives):
        return code
    known = {"defined", "__METAL__", "__METAL_VERSION__"}
    known |= {name[1] for word, text in directives if word == "define" and (name := re.match(r"\s+(\w+)", text))}
    asked = {name for word, text in directives if word in ("if", "ifdef", "ifndef", "elif")
             for name in re.findall(r"\b[A-Za-z_]\w*", text)}  # fmt: skip
    if unknown := asked - known:
        raise UnsupportedKernelError(f"kernels made by macros under a condition on {', '.join(sorted(unknown))}")
    held: list[str] = []

    def hold(line: re.Match[str]) -> str:
        held.append(line.group())
        return f"sim_held_{len(held) - 1}_"

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.metal"
        file.write_text(_INCLUDE.sub(hold, code), encoding="utf-8")
        done = run_compiler(["-E", "-x", "c++", "-D__METAL__=1", "-D__METAL_VERSION__=310", file])
    if done.returncode:
        raise UnsupportedKernelError(first_error(done.stderr))
    lines: list[str] = []
    for line in done.stdout.splitlines():
        if mark := _LINE_MARK.match(line):
            if "<" not in line:  # of the file itself: what follows is its line of that number
                lines += [""] * (int(mark[1]) - 1 - len(lines))
        else:
            lines.append(line)
    return re.sub(r"\bsim_held_(\d+)_", lambda m: held[int(m[1])], "\n".join(lines)) + "\n"


def _specialised(code: str, constants: Mapping[int, bool | int | float] | None) -> str:
    """`code` with its function constants as what their values make of them."""
    declared = {name: int(index) for _, name, index in FUNCTION_CONSTANT.findall(code)}
    if declared and constants is None:
        raise UnsupportedKernelError(f"function constants without values: {', '.join(declared)}")
    given = constants or {}

    def value(match: re.Match[str]) -> str:
        kind, name, index = match.groups()
        if int(index) not in given:
            return ""  # its use is then an error that names the kernel
        found = given[int(index)]
        return f"constexpr {kind} {name} = {str(found).lower() if isinstance(found, bool) else repr(found)};"

    code = FUNCTION_CONSTANT.sub(value, code)
    return _IS_DEFINED.sub(lambda m: str(declared.get(m[1], -1) in given).lower(), code)


def _closing(code: str, opening: int) -> int:
    """The index of the bracket that closes the one at `opening`."""
    pairs = {"(": ")", "{": "}"}
    close, depth = pairs[code[opening]], 0
    for i in range(opening, len(code)):
        depth += (code[i] == code[opening]) - (code[i] == close)
        if depth == 0:
            return i
    raise UnsupportedKernelError("unbalanced brackets")


def _split(parameters: str) -> list[str]:
    """A parameter list at its outer commas."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(parameters):
        depth += (c in "(<[{") - (c in ")>]}")
        if c == "," and depth == 0:
            parts.append(parameters[start:i])
            start = i + 1
    return [p for p in (part.strip() for part in [*parts, parameters[start:]]) if p]


def _bind(kernel: str, parameters: list[str], declared: list[str]) -> tuple[list[str], int, int]:
    """The arguments of a call of the kernel, how many buffers it takes, and how many pieces of threadgroup memory.

    `declared` has the attributes; `parameters` the types, which differ from it in a template's instantiation.
    """
    bound: list[str] = []
    buffers = shared = 0
    for parameter, declaration in zip(parameters, declared, strict=True):
        attributes = dict(_ATTRIBUTE.findall(declaration)) | dict(_ATTRIBUTE.findall(parameter))
        kind = _type(parameter, named=parameter is declaration)
        position = next((a for a in attributes if a in _POSITIONS), None)
        index = next((a for a in attributes if a in _INDICES), None)
        if position:
            bound.append(f"sim::position<{kind}>({_POSITIONS[position]})")
        elif index:
            bound.append(f"{kind}({_INDICES[index]})")
        elif "threadgroup" in attributes:
            slot = int(attributes["threadgroup"] or shared)
            shared = max(shared, slot + 1)
            bound.append(f"sim::Bound<{kind}>::from(sim_buffers[sim_shared + {slot}])")
        elif (not attributes and "[[" not in declaration) or "buffer" in attributes:
            slot = int(attributes.get("buffer") or buffers)
            buffers = max(buffers, slot + 1)
            bound.append(f"sim::Bound<{kind}>::from(sim_buffers[{slot}])")
        else:
            raise UnsupportedKernelError(f"kernel {kernel}: parameter {' '.join(parameter.split())!r}")
    return [one.replace("sim_shared", str(buffers)) for one in bound], buffers, shared


def _type(parameter: str, named: bool) -> str:
    """The type in a parameter; in an instantiation the name may be absent."""
    text = _ATTRIBUTE.sub("", parameter).strip()
    match = re.fullmatch(r"(.*[\s*&>])(\w+)", text, re.DOTALL)
    if match and (named or not re.fullmatch(r"[\w:]+", text)) and match.group(1).split():
        spaces = {"device", "constant", "thread", "threadgroup", "const", "volatile"}
        if not set(match.group(1).split()) <= spaces:
            return " ".join(match.group(1).split())
    return " ".join(text.split())
