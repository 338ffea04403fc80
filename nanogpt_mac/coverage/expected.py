"""What PyTorch itself expects to fail on MPS: the lists in torch/testing/_internal/common_mps.py.

The file is read and not imported: away from a Mac its functions are stubs. Its tests run the operator database forward
under `mps_ops_modifier`, and forward and backward under `mps_ops_grad_modifier` as well.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt_mac.errors import InputError

FILE = "torch/testing/_internal/common_mps.py"
COMPLEX = ("complex32", "complex64")
_FUNCTIONS = {"mps_ops_modifier": "forward", "mps_ops_grad_modifier": "gradient"}
_OTHER_NAMES = {"double": "float64", "cdouble": "complex128", "half": "float16", "float": "float32", "long": "int64"}
_OLD_MACOS = re.compile(r"MACOS_BEFORE_(\d+)(?:_(\d+))?_")

Listed = dict[str, list[str] | None]  # operator to its dtypes, None for all


@dataclass
class Expected:
    """The lists of one torch."""

    # Leg (`forward` or `gradient`) to list to operators. Names ending in SKIPLIST are not run at all.
    lists: dict[str, dict[str, Listed]] = field(default_factory=dict)
    complex: set[str] | None = None  # operators that should work on complex numbers; any other should fail there

    def of(self, name: str, dtype: str, gradient: bool, macos: tuple[int, ...] | None = None) -> str:
        """What is expected of an operator (`op.name + op.variant_test_name`): empty, or the lists that it is in.

        `gradient` asks about the backward pass; what fails forward fails there too. `macos` is the version at hand,
        None away from a Mac; lists for macOS before a version need one.
        """
        found = []
        for leg in ("forward", "gradient") if gradient else ("forward",):
            for title, listed in self.lists.get(leg, {}).items():
                before = _OLD_MACOS.match(title)
                if before and (macos is None or macos >= (int(before[1]), int(before[2] or 0))):
                    continue
                if name in listed and ((dtypes := listed[name]) is None or dtype in dtypes):
                    found.append(title)
        if dtype in COMPLEX and self.complex is not None and name not in self.complex:
            found.append("not in SUPPORTED_COMPLEX_OPS")
        return ", ".join(found)


def read(root: Path) -> Expected:
    """The lists of the torch that lies in `root`. InputError where the file is absent or has none that is known."""
    path = root / FILE
    if not path.is_file():
        raise InputError(f"scope=opinfo: this torch has no {FILE}")
    return parse(path.read_text())


def parse(source: str) -> Expected:
    """The lists in the text of common_mps.py; those for sparse tensors are left out."""
    expected = Expected()
    for function in ast.walk(ast.parse(source)):
        if not (isinstance(function, ast.FunctionDef) and function.name in _FUNCTIONS):
            continue
        lists = expected.lists.setdefault(_FUNCTIONS[function.name], {})
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(targets[0], ast.Name):
                continue
            title = targets[0].id
            if title == "SUPPORTED_COMPLEX_OPS" and isinstance(node.value, ast.Set):
                expected.complex = {name for e in node.value.elts if (name := _text(e))}
            elif re.search(r"(XFAILLIST|SKIPLIST)(_GRAD)?$", title) and isinstance(node.value, ast.Dict):
                lists[title] = _listed(node.value)
    if not any(expected.lists.get("forward", {}).values()):
        raise InputError(f"scope=opinfo: {FILE} of this torch has no list of expected failures that is known here")
    return expected


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _listed(node: ast.Dict) -> Listed:
    made: Listed = {}
    for key, value in zip(node.keys, node.values, strict=True):
        name = _text(key)
        if name is not None:
            names = [e.attr for e in ast.walk(value) if isinstance(e, ast.Attribute)]
            made[name] = [_OTHER_NAMES.get(n, n) for n in names] or None
    return made
