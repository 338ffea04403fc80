"""Does the package name only what torch.mps, MLX and zeus have on a Mac? Checked anywhere, against the macOS wheels.

`python tools/mac_api.py` lets pip download the macOS arm64 wheels that a set-up on a Mac would install, and looks up
every name that nanogpt_mac uses of them in their Python files and stubs; it runs nothing of theirs. Exit code 0: all
are there, 1: some are not, 2: there are no wheels to look in.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOOKED_AT = ("torch.mps", "torch.backends.mps", "mlx", "zeus_apple_silicon")
WHEELS = ("torch", "mlx", "zeus-apple-silicon")
# Documented, and made when the extension is loaded, so that the stubs do not have it.
UNLISTED = ("mlx.core.random.state",)
MAC = {"sys_platform": "darwin", "platform_machine": "arm64"}


# -- what the package names -------------------------------------------------------------------------------------------


def used(folder: Path) -> dict[str, str]:
    """Every name looked at, dotted and with its module's own path, to the first place that has it."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for name, line in names_in(path.read_text(encoding="utf-8")):
            found.setdefault(name, f"{path.relative_to(folder.parent)}:{line}")
    return found


def names_in(source: str) -> Iterator[tuple[str, int]]:
    """The names in one file, through its import aliases; `X()` in a name stands for what calling X gives.

    An alias counts in the whole file. `getattr(torch, name)` with a name that is not constant may be torch.mps, so what
    is asked of it has to be there. Programs inside strings (for `python -c`) are read too.
    """
    tree = ast.parse(source)
    aliases = dict(_imports(tree))
    yield from ((name, line) for name, line in _imported(tree) if _looked_at(name))
    for _ in range(3):  # an alias of an alias of an alias
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    aliases |= _assigned(target, node.value, aliases)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, aliases)) and _looked_at(name):
            yield name, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                yield from ((name, node.lineno) for name, _ in names_in(node.value))
            except SyntaxError:
                continue  # a sentence


def _looked_at(name: str) -> bool:
    return name.startswith(tuple(f"{module}." for module in LOOKED_AT))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _assigned(target: ast.expr, value: ast.expr, aliases: dict[str, str]) -> dict[str, str]:
    """Aliases that an assignment makes of what is looked at."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        pairs = zip(target.elts, value.elts, strict=True)
        return {k: v for one, other in pairs for k, v in _assigned(one, other, aliases).items()}
    if not isinstance(target, ast.Name | ast.Attribute):
        return {}
    if any(_any_device(node) for node in ast.walk(value)):
        return {ast.unparse(target): "torch.mps"}
    name = _dotted(value, aliases)
    return {ast.unparse(target): name} if name and _looked_at(name) else {}


def _any_device(node: ast.AST) -> bool:
    """`getattr(torch, name)`."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "getattr":
        return False
    return ast.unparse(node.args[0]) == "torch" and not isinstance(node.args[1], ast.Constant)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    if isinstance(node, ast.Call):
        name = _dotted(node.func, aliases)
        return f"{name}()" if name else None
    if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in aliases:
        return aliases[ast.unparse(node)]
    if isinstance(node, ast.Attribute):
        name = _dotted(node.value, aliases)
        return f"{name}.{node.attr}" if name else None
    return None


# -- what the wheels have ---------------------------------------------------------------------------------------------


class Wheels:
    """The Python files, stubs and extension modules of some wheels, read where they lie."""

    def __init__(self, paths: Iterable[Path]) -> None:
        archives = [zipfile.ZipFile(path) for path in paths]
        self.archives = {name: archive for archive in archives for name in archive.namelist()}
        self.folders = {name.rpartition("/")[0] for name in self.archives}
        self.trees: dict[str, ast.Module] = {}

    def has(self, name: str) -> bool | None:
        """Whether a dotted name is there; None where what it is asked of has no known type (a function's result)."""
        module, rest = self._split(name)
        return self._in_module(module, rest) if module else False

    def _split(self, name: str) -> tuple[str, list[str]]:
        """The longest module that the name starts with, and the rest."""
        parts = name.split(".")
        lengths = range(len(parts), 0, -1)
        length = next((n for n in lengths if self._file(".".join(parts[:n]))), 0)
        return ".".join(parts[:length]), parts[length:]

    def _file(self, module: str) -> str | None:
        """The stub or, without one, the source of a module, or a folder that is a namespace package."""
        path = module.replace(".", "/")
        candidates = (f"{path}/__init__.pyi", f"{path}.pyi", f"{path}/__init__.py", f"{path}.py")
        found = next((candidate for candidate in candidates if candidate in self.archives), None)
        return found or (f"{path}/" if path in self.folders else None)

    def _tree(self, module: str) -> ast.Module:
        file = self._file(module)
        assert file is not None
        if file not in self.trees:
            source = "" if file.endswith("/") else self.archives[file].read(file).decode()
            self.trees[file] = ast.parse(source)
        return self.trees[file]

    def _in_module(self, module: str, rest: list[str]) -> bool | None:
        if not rest:
            return True
        first, *more = rest
        node = self._bound(self._tree(module), first.removesuffix("()"))
        if node is None:
            return self._through_star(module, rest)
        return self._in_node(module, node, first, more)

    def _through_star(self, module: str, rest: list[str]) -> bool | None:
        for node in ast.walk(self._tree(module)):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                source = self._absolute(module, node)
                if self._file(source) and (has := self._in_module(source, rest)) is not False:
                    return has
        return False

    def _in_node(self, module: str, node: ast.AST, first: str, more: list[str]) -> bool | None:
        """Whether the rest can be asked of what `first` is bound to in the module."""
        called = first.endswith("()")
        if isinstance(node, ast.ImportFrom | ast.Import):
            target = self._imported(module, node, first.removesuffix("()"))
            if not self._split(target)[0]:
                return None if more else True  # of another package
            if not self._split(target)[1] or self._compiled(target) is None:
                return self.has(".".join([target + "()" * called, *more]))
            words = (word.removesuffix("()") for word in [target.rpartition(".")[2], *more])
            return all(self._compiled(f"{target.rpartition('.')[0]}.{word}") for word in words)
        if not more:
            return True
        if isinstance(node, ast.ClassDef):
            return self._in_class(module, node, more[0].removesuffix("()")) and (len(more) == 1 or None)
        return None

    def _compiled(self, target: str) -> bool | None:
        """Whether an extension module without a stub has a word among its strings; None where it is no such module."""
        module, _, word = target.rpartition(".")
        start = module.replace(".", "/") + "."
        extension = next((name for name in self.archives if name.startswith(start) and name.endswith(".so")), None)
        if extension is None or self._file(module):
            return None
        return b"\0" + word.encode() + b"\0" in self.archives[extension].read(extension)

    def _in_class(self, module: str, node: ast.ClassDef, name: str) -> bool | None:
        if self._bound(node, name) or any(
            isinstance(inner, ast.Attribute) and ast.unparse(inner) == f"self.{name}" for inner in ast.walk(node)
        ):
            return True
        bases = [ast.unparse(base) for base in node.bases]
        answers = [self._in_module(module, [*f"{base}".split("."), name]) for base in bases]
        return True if True in answers else None if None in answers else False

    def _imported(self, module: str, node: ast.Import | ast.ImportFrom, name: str) -> str:
        if isinstance(node, ast.Import):
            return next(alias.name for alias in node.names if name in (alias.asname, alias.name.split(".")[0]))
        original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        return f"{self._absolute(module, node)}.{original}"

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file = self._file(module) or ""
        package = module.split(".") if "/__init__.py" in file or file.endswith("/") else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _bound(self, scope: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
        """What binds a name in a module or class, inside its `if` and `try` too, not inside its functions."""
        waiting: list[ast.AST] = list(scope.body)
        while waiting:
            node = waiting.pop(0)
            if name in _binds(node):
                return node
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                waiting += ast.iter_child_nodes(node)
        return None


def _binds(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names} - {"*"}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return set()


# -- the two together -------------------------------------------------------------------------------------------------


def compare(names: dict[str, str], wheels: Wheels) -> tuple[list[str], list[str]]:
    """Lines for the names that are not there, and the names that cannot be judged."""
    answers = {name: name in UNLISTED or wheels.has(name) for name in names}
    wrong = [f"{names[name]}: {name} is not in the macOS wheel" for name, has in answers.items() if has is False]
    return wrong, [name for name, has in answers.items() if has is None]


def requirements(project: Path = ROOT / "pyproject.toml") -> list[str]:
    """What a Mac installs of the packages looked at, as pyproject.toml has it."""
    listed = map(Requirement, tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    wanted = [one for one in listed if one.name in WHEELS and (one.marker is None or one.marker.evaluate(MAC))]
    return [f"{one.name}{one.specifier}" for one in wanted]


def download(folder: Path, python: str) -> list[Path]:
    """The wheels in `folder`, downloaded by pip with the versions of requirements.lock."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    argv += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    argv += ["--platform=macosx_15_0_arm64", "--constraint", str(ROOT / "requirements.lock"), "--dest", str(folder)]
    if subprocess.run([*argv, *requirements()], stdout=sys.stderr, check=False).returncode:
        return []
    return sorted(folder.glob("*.whl"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--python", default="3.12", help="the Python whose wheels are looked at (default 3.12)")
    with tempfile.TemporaryDirectory() as folder:
        paths = download(Path(folder), parser.parse_args().python)
        if len(paths) < len(WHEELS):
            print("mac_api.py: pip could not download the macOS wheels: see above", file=sys.stderr)
            return 2
        names = used(ROOT / "nanogpt_mac")
        wrong, unknown = compare(names, Wheels(paths))
    for line in wrong:
        print(line)
    print(f"{len(names)} names of {', '.join(path.name for path in paths)}: {len(wrong)} are not there")
    if unknown:
        print(f"asked of a value whose type these files do not give, not judged: {', '.join(sorted(unknown))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
