"""Reads a macOS arm64 `libtorch_cpu.dylib`: the registrations that its initialisers make, and what kernels call.

The file is never loaded, so this works on any machine. `TORCH_LIBRARY_IMPL(aten, MPS, m)` leaves a function named
`TORCH_LIBRARY_IMPL_init_aten_MPS_<n>`, whose machine code is one call of `Library::_impl(name, kernel)` after another.
Addresses are built by ADRP and ADD, calls are BL, so a walk that follows those few instructions recovers the name (in
x1) and the kernel's symbols of every call. Formats: Apple's `mach-o/loader.h` and `mach-o/nlist.h`; instructions: the
Arm A64 instruction set.
"""

from __future__ import annotations

import mmap
import re
import struct
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt_mac.errors import InputError

_MAGIC_64, _CPU_ARM64 = 0xFEEDFACF, 0x0100000C
_LC_SEGMENT_64, _LC_SYMTAB = 0x19, 0x2
_N_STAB, _N_TYPE, _N_SECT = 0xE0, 0x0E, 0x0E
_INITIALISER = re.compile(r"TORCH_LIBRARY_IMPL_init_(\w+)_([A-Za-z0-9]+)_\d+E?RN5torch7LibraryE$")
_IMPL, _FALLBACK = "5torch7Library5_implE", "5torch7Library9_fallbackE"
_OPERATOR = re.compile(r"__ZN2at4_ops(\d+)")  # at::_ops::<operator>::call and ::redispatch
_IN_AT = re.compile(r"__ZZ?NK?2at(\d+)")  # something in namespace at, or a lambda in it


@dataclass(frozen=True)
class Registration:
    """One `m.impl(op, kernel)`."""

    namespace: str  # `aten`, or `_` for a library of all namespaces
    key: str  # the dispatch key, such as `MPS`
    op: str | None  # name with overload and without `aten::`; None for the fallback of the whole key
    kernel: tuple[str, ...]  # mangled names of the symbols that the kernel was made from

    @property
    def falls_back(self) -> bool:
        """Whether the kernel is MPSFallback.mm's, which runs the operator on the CPU."""
        return any("mps_fallback" in symbol for symbol in self.kernel)


@dataclass(frozen=True)
class _Section:
    name: str
    address: int
    end: int
    offset: int


class Image:
    """A Mach-O file, mapped. InputError where it is something else, is not for arm64, or lacks its symbols."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with path.open("rb") as file:
            try:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise self._error("is empty") from None
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._error(f"is cut short or damaged ({error})") from error

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.name}: {what}; use the whole libtorch_cpu.dylib of a macOS arm64 wheel")

    def _read_header(self) -> None:
        magic, cpu, _, _, n_commands = struct.unpack_from("<5I", self.data)
        if magic != _MAGIC_64:
            raise self._error("is not a 64-bit Mach-O file")
        if cpu != _CPU_ARM64:
            raise self._error(f"is a Mach-O file for CPU type {cpu:#x}, not arm64")
        sections: list[_Section] = []
        symbol_table: tuple[int, int, int, int] | None = None
        position = 32
        for _ in range(n_commands):
            command, size = struct.unpack_from("<2I", self.data, position)
            if command == _LC_SEGMENT_64:
                (n_sections,) = struct.unpack_from("<I", self.data, position + 64)
                for i in range(n_sections):
                    start = position + 72 + 80 * i
                    name, _, address, length, offset = struct.unpack_from("<16s16sQQI", self.data, start)
                    sections.append(_Section(name.rstrip(b"\0").decode(), address, address + length, offset))
            elif command == _LC_SYMTAB:
                symbol_table = struct.unpack_from("<4I", self.data, position + 8)
            position += size
        names = [section.name for section in sections]
        if symbol_table is None or "__text" not in names:
            raise self._error("has no code or no symbol table")
        self.text = sections[names.index("__text")]
        # Most names are in __cstring; a constexpr array of characters lies in __const.
        self.strings = [section for section in sections if section.name in ("__cstring", "__const")]
        if max(s.offset + s.end - s.address for s in (self.text, *self.strings)) > len(self.data):
            raise self._error("is cut short")
        self._read_symbols(*symbol_table, names.index("__text") + 1)

    def _read_symbols(self, offset: int, count: int, names_offset: int, names_size: int, text: int) -> None:
        """Fills `symbols` (address to name), `functions` (sorted addresses in __text) and `addresses` (their names)."""
        if max(offset + 16 * count, names_offset + names_size) > len(self.data):
            raise self._error("is cut short: its symbols are missing")
        names = self.data[names_offset : names_offset + names_size]
        self.symbols: dict[int, str] = {}
        functions = set()
        for name, kind, section, _, value in struct.iter_unpack("<IBBHQ", self.data[offset : offset + 16 * count]):
            if kind & _N_STAB or kind & _N_TYPE != _N_SECT:
                continue
            self.symbols.setdefault(value, names[name : names.index(b"\0", name)].decode())
            if section == text:
                functions.add(value)
        self.functions = sorted(functions)
        self.addresses = {self.symbols[address]: address for address in self.functions}

    def code(self, address: int) -> Iterator[tuple[int, int]]:
        """(address, instruction) of the function there, up to the next function's start."""
        after = bisect_right(self.functions, address)
        end = self.functions[after] if after < len(self.functions) else self.text.end
        offset = self.text.offset + address - self.text.address
        instructions = self.data[offset : offset + end - address]
        for i, (word,) in enumerate(struct.iter_unpack("<I", instructions)):
            yield address + 4 * i, word

    def string(self, address: int) -> str | None:
        """The C string of ASCII there, None where none lies."""
        section = next((s for s in self.strings if s.address <= address < s.end), None)
        if section is None:
            return None
        start = section.offset + address - section.address
        text = self.data[start : self.data.find(b"\0", start)]
        return text.decode() if text.isascii() else None

    def calls(self, address: int) -> list[int]:
        """Where the function there branches to, outside itself, by B or BL."""
        body = list(self.code(address))
        targets = {pc + 4 * _signed(word & 0x3FFFFFF, 26) for pc, word in body if word & 0x7C000000 == 0x14000000}
        return sorted(t for t in targets if not body[0][0] <= t <= body[-1][0]) if body else []


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _walk(image: Image, function: int) -> Iterator[tuple[str, int, dict[int, int]]]:
    """Yields ("address", A, registers) for every address that is built, ("call", target, registers) for every BL.

    `registers` holds the known addresses by register number at that moment.
    """
    pages: dict[int, int] = {}  # register to what ADRP put there: a page, not yet an address
    known: dict[int, int] = {}
    for pc, word in image.code(function):
        rd, rn = word & 31, (word >> 5) & 31
        if word & 0x1F000000 == 0x10000000:  # ADR, ADRP
            offset = _signed((word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3, 21)
            known.pop(rd, None)
            if word >> 31:
                pages[rd] = (pc & ~0xFFF) + (offset << 12)
            else:
                pages[rd] = known[rd] = pc + offset
                yield "address", known[rd], known
        elif word & 0xFF800000 == 0x91000000:  # ADD Xd, Xn, #immediate
            immediate = (word >> 10 & 0xFFF) << (12 if word >> 22 & 1 else 0)
            if rn in pages:
                pages[rd] = known[rd] = pages[rn] + immediate
                yield "address", known[rd], known
            else:
                pages.pop(rd, None)
                known.pop(rd, None)
        elif word & 0xFC000000 == 0x94000000:  # BL
            yield "call", pc + 4 * _signed(word & 0x3FFFFFF, 26), known
            for register in range(19):  # x0 to x18 do not survive a call
                pages.pop(register, None)
                known.pop(register, None)
        elif word & 0xFFE0FFE0 == 0xAA0003E0:  # MOV Xd, Xm
            for values in (pages, known):
                source = values.get(word >> 16 & 31)
                if source is None:
                    values.pop(rd, None)
                else:
                    values[rd] = source
        elif word & 0x0A000000 == 0x08000000:  # loads and stores; bit 26 marks those of vectors
            pair = word & 0x38000000 == 0x28000000
            moved = (rd, word >> 10 & 31) if pair else (rd,)
            loads = word & 0x00400000 or (word & 0x00800000 and not pair)
            for register in () if word & 0x04000000 else moved:
                if loads:
                    pages.pop(register, None)
                    known.pop(register, None)
                elif register in known:  # an address that is kept becomes part of a kernel object
                    yield "address", known[register], known
        elif word & 0x1C000000 != 0x14000000 and word & 0x0E000000 != 0x0E000000:  # neither a branch nor vectors
            pages.pop(rd, None)
            known.pop(rd, None)


def registrations(image: Image, keys: Collection[str] | None = None) -> list[Registration]:
    """Every registration made in the dispatch keys `keys`, by default in all of them, in the order of the file.

    Raises InputError, and returns nothing, where the symbols are not those of torch or a name cannot be read.
    """
    found: list[Registration] = []
    for address in image.functions:
        match = _INITIALISER.search(image.symbols[address])
        if not match or (keys is not None and match[2] not in keys):
            continue
        kernel: list[str] = []
        for event, target, known in _walk(image, address):
            symbol = image.symbols.get(target, "")
            if event == "address":
                if symbol and symbol not in kernel:
                    kernel.append(symbol)
            elif _IMPL in symbol or _FALLBACK in symbol:
                op = image.string(known[1]) if _IMPL in symbol and 1 in known else None
                if not op and _IMPL in symbol and match[1] in ("aten", "_"):
                    raise image._error(f"registers an operator without a readable name in {match[1]}::{match[2]}")
                found.append(Registration(match[1], match[2], op and op.removeprefix("aten::"), tuple(kernel)))
                kernel = []
            elif "CppFunction" in symbol:
                kernel.append(symbol)
    for key in keys or ("MPS",):
        if not any(r.key == key for r in found):
            raise image._error(f"registers no {key} operator (symbols renamed or stripped?)")
    return found


def _is_kernel_code(symbol: str) -> bool:
    """Whether a function can be part of a kernel: at::native::, Tensor's methods, or a free function of at::."""
    if not (match := _IN_AT.match(symbol)):
        return False
    end = match.end() + int(match[1])
    return symbol[match.end() : end] in ("native", "_GLOBAL__N_1", "Tensor") or symbol[end : end + 1] == "E"


def operators_called(image: Image, registration: Registration) -> set[str] | None:
    """The operators that a kernel's code can call, in any branch, by the names that C++ has for them (`add__Tensor`).

    None where the kernel's code is not found. Calls through pointers are not seen.
    """
    names = [s for s in registration.kernel if "wrap_kernel_functor_unboxed" in s] or list(registration.kernel)
    start = next((a for a in (image.addresses.get(name) for name in names) if a is not None), None)
    if start is None:
        return None
    operators: set[str] = set()
    todo, seen = [start], {start}
    while todo:
        caller = todo.pop()
        for target in image.calls(caller):
            symbol = image.symbols.get(target, "")
            if match := _OPERATOR.match(symbol):
                end = match.end() + int(match[1])
                if symbol[end:].startswith(("4call", "10redispatch")):
                    operators.add(symbol[match.end() : end])
            elif target not in seen and (caller == start or _is_kernel_code(symbol)):
                seen.add(target)
                todo.append(target)
    return operators
