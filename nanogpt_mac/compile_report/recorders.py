"""Recorders in place of what Inductor's generated code calls: Metal kernels, matrix products, ATen operators, buffers.

Generated modules and Metal libraries outlive the context in which they were made, so their recorders look for the one
`Recorder` that is open, and pass calls through where there is none.
"""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from nanogpt_mac.compile_report import dynamo

_KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(")
_REDUCES = re.compile(r"\bthreadgroup_\w+\s*\(|\br\d+_\w+")  # r0_index: Inductor's name for a reduced dimension
_INTEGERS = ("int", "long", "short", "char", "uchar", "bool")

_current: Recorder | None = None


Alike = tuple[str | None, str, tuple[tuple[int, ...], ...]]


class What(StrEnum):
    """What a compiled graph can do."""

    METAL = "metal"  # a launch of a generated kernel
    EXTERN = "extern"  # a matrix product, or another kernel with an out= form
    ATEN = "aten"
    BUFFER = "buffer"


@dataclass(frozen=True)
class Call:
    """One thing that a compiled graph did: a Metal launch, a matrix product, an ATen operator, a new buffer.

    `code` is the kernel's Metal source; `threads` and `group` as launched, None
    where torch chooses; `bytes` sums the sizes of its tensors; `line` is the model's line behind it, where known.
    """

    what: What
    name: str
    graph: str | None
    bytes: int
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    code: str = ""
    threads: tuple[int, ...] | None = None
    group: tuple[int, ...] | None = None
    line: str | None = None
    products: int = 0

    @property
    def alike(self) -> Alike:
        """What two calls must share to take the same time."""
        return self.graph, self.name, self.shapes

    @property
    def is_reduction(self) -> bool:
        return self.group is not None or _REDUCES.search(self.code) is not None


class Recorder(ABC):
    """What the recorders report to."""

    def __init__(self, execute: bool) -> None:
        self.execute = execute
        self.unknown: list[str] = []
        self.libraries: list[str] = []  # Metal sources
        self.shader_s = 0.0
        self.graphs: dict[str, int] = {}  # name to the kernels in its module
        self._graph: str | None = None

    @abstractmethod
    def record(self, call: Call, run: Callable[[], Any]) -> Any:
        """Takes note of a call and returns what it gives."""

    @abstractmethod
    def ran(self, graph: str) -> None:
        """Takes note that a graph runs."""

    def ask(self, what: str, question: Callable[[], Any]) -> Any:
        """The answer, or None and a line under `unknown` where this torch has nothing like it."""
        import torch

        try:
            return question()
        except (AttributeError, ImportError, KeyError, TypeError) as error:
            self.doubt(what, f"not known in torch {torch.__version__} ({type(error).__name__}: {error})")
            return None

    def doubt(self, what: str, why: str) -> None:
        """Says under `unknown` that `what` cannot be told."""
        line = f"{what}: {why}"
        if line not in self.unknown:
            self.unknown.append(line)

    def known(self, *what: str) -> bool:
        """Whether nothing among these is in doubt."""
        return not any(line.startswith(f"{name}: ") for line in self.unknown for name in what)

    def call(self, what: What, name: str, args: Any, kwargs: Any, frame: Any, **more: Any) -> Call:
        """A record of a call with these arguments, made by the generated code in `frame`."""
        import torch

        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        return Call(
            what,
            name,
            self._graph,
            sum(t.numel() * t.element_size() for t in tensors),
            tuple(tuple(t.shape) for t in tensors),
            tuple(str(t.dtype).removeprefix("torch.") for t in tensors),
            line=_model_line(frame.f_code.co_filename, frame.f_lineno),
            **more,
        )

    @contextmanager
    def inside(self, graph: str) -> Iterator[None]:
        """Puts calls down to a graph while it runs."""
        before, self._graph = self._graph, graph
        self.ran(graph)
        try:
            yield
        finally:
            self._graph = before


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Reports to `recorder` everything compiled inside. RuntimeError where another is open."""
    global _current
    if _current is not None:
        raise RuntimeError("compilation is being watched already: one watch() at a time")
    import torch

    compile_shader = torch.mps.compile_shader
    _current = recorder
    torch.mps.compile_shader = partial(_compile_shader, recorder, compile_shader)
    try:
        with _modules(recorder):
            yield
    finally:
        torch.mps.compile_shader = compile_shader
        _current = None


# -- Metal ------------------------------------------------------------------------------------------------------------


def _compile_shader(recorder: Recorder, compile_shader: Callable[[str], Any], source: str) -> Any:
    """Stands in for `torch.mps.compile_shader`: Inductor comes through here cold and on a cache hit."""
    recorder.libraries.append(source)
    started = time.perf_counter()
    library = compile_shader(source) if recorder.execute else None
    recorder.shader_s += time.perf_counter() - started
    return _Library(library, source, len(recorder.libraries) - 1)


class _Library:
    def __init__(self, library: Any, source: str, number: int) -> None:
        self._library, self._number = library, number
        starts = [(m.group(1), m.start()) for m in _KERNEL.finditer(source)]
        ends = [start for _, start in starts[1:]] + [len(source)]
        self._codes = {name: source[start:end] for (name, start), end in zip(starts, ends, strict=True)}

    def __getattr__(self, name: str) -> Any:
        codes = self.__dict__.get("_codes", {})
        if name not in codes:
            return getattr(self.__dict__.get("_library"), name)
        kernel = None if self._library is None else getattr(self._library, name)
        # Where each kernel has a library of its own, all have this one name.
        return _Kernel(f"{name}_{self._number}" if name == "generated_kernel" else name, codes[name], kernel)


class _Kernel:
    def __init__(self, name: str, code: str, kernel: Any) -> None:
        self._name, self._code, self._kernel = name, code, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_kernel"), name)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._kernel is not None:
            run = partial(self._kernel, *args, **kwargs)
        else:
            run = partial(_zero_integers, self._code, args)
        if _current is None:
            if self._kernel is None:
                raise RuntimeError(f"Metal kernel {self._name} was recorded in a dry run and never compiled")
            run()
            return
        sizes = {key: _sizes(kwargs.get(name)) for key, name in (("threads", "threads"), ("group", "group_size"))}
        more = {"code": self._code, **sizes}
        _current.record(_current.call(What.METAL, self._name, args, {}, sys._getframe(1), **more), run)


def _sizes(value: Any) -> tuple[int, ...] | None:
    return None if value is None else (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)


def _zero_integers(code: str, args: tuple[Any, ...]) -> None:
    """In place of a kernel: integers that it would write are set to zero, since they may index something later."""
    outputs = re.findall(r"^\s*device (\w+)\* (?:in_)?out_ptr\w+", code, re.MULTILINE)
    for kind, tensor in zip(outputs, args, strict=False):
        if kind in _INTEGERS:
            tensor.zero_()


# -- the modules that Inductor writes ---------------------------------------------------------------------------------


@contextmanager
def _modules(recorder: Recorder) -> Iterator[None]:
    """Sees every module that Inductor generates as it is loaded, from its cache or fresh."""

    def question() -> tuple[Any, Any]:
        from torch._inductor.codecache import PyCodeCache

        return PyCodeCache, vars(PyCodeCache)["load_by_key_path"]

    found = recorder.ask("graphs", question)
    if found is None:
        yield
        return
    cache, original = found
    load = cache.load_by_key_path

    def loaded(*args: Any, **kwargs: Any) -> Any:
        module = load(*args, **kwargs)
        if hasattr(module, "call") and hasattr(module, "__file__"):
            recorder.ask("graphs", lambda: _instrument(recorder, module))
        return module

    cache.load_by_key_path = loaded
    try:
        yield
    finally:
        cache.load_by_key_path = original


def _instrument(recorder: Recorder, module: Any) -> None:
    """Puts recorders in place of what a generated module calls."""
    source = Path(module.__file__).read_text()
    if not isinstance(module.call, _Graph):
        aot_id = re.search(r"^# AOT ID: \['([^']+)'\]", source, re.MULTILINE)
        name = aot_id.group(1) if aot_id else "graph"
        while name in recorder.graphs:  # one that came from the cache keeps the number that it had when it was made
            name += "'"
        _replace(module)
        module.call = _Graph(name, module.call)
    recorder.graphs[module.call.name] = len(_KERNEL.findall(source))
    if "extern_kernels." in source and not isinstance(getattr(module, "extern_kernels", None), _Externs):
        recorder.doubt("matmuls", "this torch's generated code has them under another name")
    if "empty_strided" not in vars(module):
        recorder.doubt("buffers", "this torch's generated code has no empty_strided")


def _replace(module: Any) -> None:
    namespace = type(module.torch.ops.aten)
    for key, value in list(vars(module).items()):
        if key == "torch":
            module.torch = _Torch(value)
        elif key == "extern_kernels":
            module.extern_kernels = _Externs(value)
        elif isinstance(value, namespace):
            setattr(module, key, _Operator(value, value.name))
        elif key.startswith("empty_strided"):
            setattr(module, key, partial(_buffer, value))


class _Graph:
    """The function `call` of a generated module."""

    def __init__(self, name: str, call: Callable[[Any], Any]) -> None:
        self.name, self._call = name, call

    def __call__(self, args: Any) -> Any:
        if _current is None:
            return self._call(args)
        with _current.inside(self.name):
            return self._call(args)


class _Externs:
    """`extern_kernels` of a generated module: matrix products and what else has an out= form."""

    def __init__(self, externs: Any) -> None:
        self._externs = externs

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.__dict__["_externs"], name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            run = partial(function, *args, **kwargs)
            if _current is None:
                return run()
            if not _current.execute and "out" in kwargs:
                run = partial(kwargs.get, "out")
            products = int(name in ("mm", "bmm", "addmm", "baddbmm"))
            return _current.record(
                _current.call(What.EXTERN, name, args, kwargs, sys._getframe(1), products=products), run
            )

        return recorded


class _Torch:
    """The name `torch` in a generated module, of which only `torch.ops` is looked at."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_torch"], name)
        return _Operator(value, "") if name == "ops" else value


class _Operator:
    """`torch.ops`, a namespace in it, an operator or an overload; the last two can be called."""

    def __init__(self, value: Any, path: str) -> None:
        self._value, self._path = value, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}" if self._path else name
        return _Operator(getattr(self.__dict__["_value"], name), path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(self._value, *args, **kwargs)
        if _current is None:
            return run()
        if not _current.execute:
            run = partial(_shapes_only, self._value, args, kwargs)
        name = self._path.removesuffix(".default")
        mask = args[-1] if name == "aten.linear_backward" and isinstance(args[-1], list) else []
        call = _current.call(What.ATEN, name, args, kwargs, sys._getframe(1), products=sum(map(bool, mask[:2])))
        return _current.record(call, run)


def _buffer(allocate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = partial(allocate, *args, **kwargs)
    if _current is None:
        return run()
    return _current.record(Call(What.BUFFER, str(kwargs.get("device", "")), _current._graph, 0), run)


def _shapes_only(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator's results, on the device and unwritten. One that works in place, or has no such form, is run."""
    import torch
    from torch.utils import _pytree

    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    schema = getattr(operator, "_schema", None)
    if schema is None or not tensors:
        return operator(*args, **kwargs)
    if any(value.alias_info is not None for value in (*schema.arguments, *schema.returns)):
        return operator(*args, **kwargs)
    device = tensors[0].device

    def like(tensor: Any, on: Any) -> Any:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=on)

    args, kwargs = _pytree.tree_map_only(torch.Tensor, partial(like, on="meta"), (args, kwargs))
    try:
        return _pytree.tree_map_only(torch.Tensor, partial(like, on=device), operator(*args, **kwargs))
    except NotImplementedError as error:
        raise NotImplementedError(f"{operator}: a dry run needs its shapes without running it: {error}") from error


def _model_line(file: str, number: int) -> str | None:
    """The model's line behind a line of generated code, as `gpt/torch_gpt.py:38`."""
    try:
        from torch._inductor.codecache import PyCodeCache

        frames = PyCodeCache.stack_frames_for_code(file, number)
    except (AttributeError, ImportError, TypeError):  # a convenience: absent lines are null in every row
        return None
    known = [f"{dynamo.short(frame['filename'])}:{frame['line']}" for frame in frames or []]
    return next((line for line in known if "/" in line), known[0] if known else None)  # this package's own first
