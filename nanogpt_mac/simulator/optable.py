"""Which operators MPS has: native, falling back, or missing, for one torch.

The source is the `native_functions.yaml` that every torch wheel ships inside `torchgen`. Read back from the binaries of
the macOS wheels 2.9 to 2.15, MPS has exactly its entries there, and the few registered by hand that are named below.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt_mac.simulator.build import build_once, cache_folder

# What sim.h calls flags.
NO_DEVICE_CHECK, MIXED_DEVICES = 1, 2

# Registered by hand in MPSFallback.mm: the CPU fallback with its warning, whatever the environment says. svd left that
# list when `_linalg_svd` got a kernel of its own (2.14).
_HAND_FALLBACKS = ("embedding_renorm_", "linalg_svd", "linalg_svd.U")

# Native on a Mac without an entry: special cases inside composite kernels, compiled only with USE_MPS.
_HAND_NATIVE = {
    "copy_": MIXED_DEVICES,
    "convolution": 0,
    "convolution_backward": 0,
    "convolution_overrideable": 0,
}

_TAKES_BOTH_DEVICES = {
    "copy_",
    "_copy_from",
    "_copy_from_and_resize",
    "index.Tensor",
    "index.Tensor_out",
    "_index_put_impl_",
    "is_set_to",
}


@dataclass(frozen=True)
class OpTable:
    """The operators of one torch as its MPS device sees them; composite ones are in none of the lists.

    Args:
        native: names such as `add.Tensor` (without `aten::`) that have an MPS kernel, with the flags of `sim.h`.
        fallback: names that always run on the CPU, with the warning.
        missing: names that raise NotImplementedError unless PYTORCH_ENABLE_MPS_FALLBACK is set.
        groups: structured operators and their in-place forms, to the `out` form that carries their kernel.
    """

    native: dict[str, int]
    fallback: list[str]
    missing: list[str]
    groups: dict[str, str]

    def variants(self, op: str) -> list[str]:
        """Every name that has the same kernel as `op`: `gelu` gives gelu, gelu_ and gelu.out.

        A name without overload that is no operator itself, such as `add`, stands for all its overloads.
        """
        known = [*self.native, *self.fallback, *self.missing]
        op = op.removeprefix("aten::")
        named = [op] if op in known else [n for n in known if n.split(".")[0] == op]
        kernels = {self.groups.get(n, n) for n in named}
        return sorted({n for n in known if self.groups.get(n, n) in kernels} | set(named))


def installed_table() -> OpTable:
    """The table of the installed torch, read once per torch version and kept in the cache folder."""
    import torch
    import torchgen

    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    cached = cache_folder() / f"optable-{torch.__version__}-{torch.version.git_version}-1.json"

    def build(work: Path) -> Path:
        made = work / cached.name
        made.write_text(json.dumps(asdict(read_table(folder / "native_functions.yaml", folder / "tags.yaml"))))
        return made

    try:
        return OpTable(**json.loads(build_once(cached, build).read_text()))
    except (ValueError, TypeError):  # damaged since it was put there
        cached.unlink()
        return OpTable(**json.loads(build_once(cached, build).read_text()))


def read_table(functions: Path, tags: Path) -> OpTable:
    """Reads a `native_functions.yaml` and its `tags.yaml`, those of the installed torchgen's version."""
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DeviceCheckType, DispatchKey

    parsed = parse_native_yaml(str(functions), str(tags))
    mps = parsed.backend_indices[DispatchKey.MPS]
    by_name = {f.func.name: f for f in parsed.native_functions}
    native: dict[str, int] = {}
    absent: list[str] = []
    groups: dict[str, str] = {}
    for f in parsed.native_functions:
        name = str(f.func.name)
        kernel = f if f.structured_delegate is None else by_name[f.structured_delegate]
        if f.structured_delegate is not None:
            groups[name] = str(f.structured_delegate)
        if mps.has_kernel(f) or mps.has_kernel(kernel):
            flags = NO_DEVICE_CHECK if f.device_check is DeviceCheckType.NoCheck else 0
            native[name] = flags | (MIXED_DEVICES if name in _TAKES_BOTH_DEVICES else 0)
        elif not f.has_composite_kernel:
            absent.append(name)
    native |= _HAND_NATIVE
    fallback = [n for n in _HAND_FALLBACKS if n not in native and f"_{n.split('.')[0]}" not in native]
    missing = [n for n in absent if n not in native and n not in fallback]
    return OpTable(native, fallback, missing, groups)
