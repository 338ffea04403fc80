"""Reads `native_functions.yaml`, in which PyTorch lists its operators, with the torchgen of the same torch.

    python -I native_yaml.py FOLDER      (FOLDER holds `torchgen/`, as site-packages or an unpacked wheel does)

prints the facts as JSON: each torch reads its own file, because the format changes with it, in a process of its own,
because torchgen of another version must never be imported into this one. So nothing of this project is imported here.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "torchgen/packaged/ATen/native"


@dataclass(frozen=True)
class Facts:
    """What the file says of one overload."""

    kernel: str | None  # the MPS kernel's C++ name
    delegate: str | None  # the out= form whose kernel it has
    cpu: bool  # whether a CPU kernel exists, its own or its delegate's
    composite: bool
    no_device_check: bool  # accepts tensors of several devices


def read(root: Path) -> dict[str, Facts]:
    """The facts of every overload, by name without `aten::`; `root` holds the torchgen that is imported."""
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DeviceCheckType, DispatchKey

    folder = root / FOLDER
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    mps, cpu = parsed.backend_indices[DispatchKey.MPS], parsed.backend_indices[DispatchKey.CPU]
    by_name = {f.func.name: f for f in parsed.native_functions}
    facts = {}
    for f in parsed.native_functions:
        delegate = None if f.structured_delegate is None else by_name[f.structured_delegate]
        own = mps.get_kernel(f)
        facts[str(f.func.name)] = Facts(
            own.kernel if own else None,
            None if delegate is None else str(delegate.func.name),
            cpu.has_kernel(f) or (delegate is not None and cpu.has_kernel(delegate)),
            f.has_composite_kernel,
            f.device_check is DeviceCheckType.NoCheck,
        )
    return facts


def native(facts: dict[str, Facts]) -> set[str]:
    """The overloads that have an MPS kernel, their own or their out= form's."""
    return {op for op, f in facts.items() if f.kernel or (f.delegate is not None and facts[f.delegate].kernel)}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import torchgen

    if Path(torchgen.__file__).parent.resolve() != (Path(sys.argv[1]) / "torchgen").resolve():
        sys.exit(f"another torchgen was imported: {torchgen.__file__}")
    print(json.dumps({op: asdict(fact) for op, fact in read(Path(sys.argv[1])).items()}))
