"""Run by table.py in a process of its own: reads one torch's operators with that torch's own torchgen.

    python -I torchgen_child.py FOLDER      (FOLDER holds `torchgen/`, as site-packages or an unpacked wheel does)

Prints JSON: operator name to what `native_functions.yaml` says of it. Each torch reads its own file, because the format
changes with it; that is also why nothing of this project is imported here.
"""

import json
import sys
from pathlib import Path


def read(root: Path) -> dict[str, dict[str, object]]:
    """Facts by operator name; the keys are the fields of table.Facts."""
    sys.path.insert(0, str(root))
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DeviceCheckType, DispatchKey

    if Path(torchgen.__file__).parent.resolve() != (root / "torchgen").resolve():
        sys.exit(f"another torchgen was imported: {torchgen.__file__}")
    folder = root / "torchgen/packaged/ATen/native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    mps, cpu = parsed.backend_indices[DispatchKey.MPS], parsed.backend_indices[DispatchKey.CPU]
    by_name = {f.func.name: f for f in parsed.native_functions}
    facts = {}
    for f in parsed.native_functions:
        delegate = None if f.structured_delegate is None else by_name[f.structured_delegate]
        own = mps.get_kernel(f)
        facts[str(f.func.name)] = {
            "kernel": own.kernel if own else None,
            "delegate": None if delegate is None else str(delegate.func.name),
            "cpu": cpu.has_kernel(f) or (delegate is not None and cpu.has_kernel(delegate)),
            "composite": f.has_composite_kernel,
            "no_device_check": f.device_check is DeviceCheckType.NoCheck,
        }
    return facts


if __name__ == "__main__":
    json.dump(read(Path(sys.argv[1])), sys.stdout)
