"""Which operators MPS has: native, falling back, or missing, for one torch.

The source is the `native_functions.yaml` that every torch wheel ships inside `torchgen`. Read back from the binaries of
the macOS wheels, MPS has exactly its entries there, and the few that are registered by hand.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt_mac import files
from nanogpt_mac.operators import by_hand, native_yaml
from nanogpt_mac.operators.native_yaml import Facts

# What sim.h calls flags.
NO_DEVICE_CHECK, MIXED_DEVICES = 1, 2

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
    """The operators of one torch as its MPS device sees them; composite ones are in none of the lists."""

    native: dict[str, int]  # `add.Tensor` (without `aten::`) and the like that have an MPS kernel, to flags of `sim.h`
    fallback: list[str]  # those that always run on the CPU, with the warning
    missing: list[str]  # those that raise NotImplementedError unless PYTORCH_ENABLE_MPS_FALLBACK is set
    groups: dict[str, str]  # structured operators and their in-place forms, to the `out` form that has their kernel

    def variants(self, op: str) -> list[str]:
        """Every name that has the same kernel as `op`: `gelu` gives gelu, gelu_ and gelu.out.

        A name without overload that is not itself an operator, such as `add`, stands for all its overloads.
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

    name = f"optable-{torch.__version__}-{torch.version.git_version}-2.json"
    return files.kept(
        files.cache_folder("simulator", name),
        lambda text: OpTable(**json.loads(text)),
        lambda: json.dumps(asdict(table_of(native_yaml.read(Path(torchgen.__file__).parents[1])))),
    )


def table_of(facts: dict[str, Facts]) -> OpTable:
    """The table of a torch whose `native_functions.yaml` says `facts`."""
    kernels = native_yaml.native(facts)
    fallback = [op for op, row in by_hand.in_force(kernels).items() if not row.raises]
    checked = {op: 0 if not facts[op].no_device_check else NO_DEVICE_CHECK for op in facts if op in kernels}
    native = {op: flags | (MIXED_DEVICES if op in _TAKES_BOTH_DEVICES else 0) for op, flags in checked.items()}
    native |= {op: MIXED_DEVICES if op in _TAKES_BOTH_DEVICES else 0 for op in by_hand.IN_COMPOSITE}
    missing = [op for op, f in facts.items() if not (f.composite or op in native or op in fallback)]
    return OpTable(native, fallback, missing, {op: f.delegate for op, f in facts.items() if f.delegate})
