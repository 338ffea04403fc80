"""The levers: settings of each back end, changed one at a time, to see what each is worth.

Those of every back end are here; what a back end has of its own it says itself (Backend.LEVERS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanogpt_mac.backends.base import Lever as Setting
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.compare.variants import Machine, known
from nanogpt_mac.config import Config, spelt
from nanogpt_mac.overrides import merged, slug
from nanogpt_mac.records.plan import Lever, Variant

WITHOUT = "no dropout, which learns something else"
WITH = "dropout of 0.2, which learns something else"


def variants(machine: Machine, backends: Sequence[str], compose: Callable[[Variant], Config]) -> list[Variant]:
    """For each back end its default variant, its other compilation, and one for each lever that has an effect on it."""
    chosen: list[Variant] = []
    for backend in backends:
        kind, names = KINDS[backend], KINDS[backend].variants
        base = known(names[kind.compiled_by_default], machine)
        chosen.append(base)
        if kind.compiler:
            compiled = not kind.compiled_by_default
            lever = Setting("compile", compiled, f"{'' if compiled else 'no '}{kind.compiler}")
            chosen.append(_changed(machine, base, lever, known(names[compiled], machine)))
        config, capabilities = compose(base), machine.has[backend]
        own = kind.load().LEVERS
        theirs = {(lever.key, lever.value) for lever in own}
        everybodys = (lever for lever in _common(config) if (lever.key, lever.value) not in theirs)
        settings = [lever for lever in (*everybodys, *own) if lever.when(capabilities, config)]
        chosen += [_changed(machine, base, lever) for lever in settings]
    return chosen


def _common(base: Config) -> list[Setting]:
    """Levers of any back end. Those that change nothing are left out: how to wait where nothing runs ahead, TF32."""
    waits = {
        "completion": "waits one iteration behind",
        "iteration": "waits for each iteration before the next",
        "interval": f"waits once every {base.log_interval} iterations",
    }
    dtypes = {
        "float32": "float32 matrix products",
        "bfloat16": "bfloat16 matrix products",
        "float16": "float16 products, with loss scaling",
    }
    settings = [
        Setting("sync", policy, f"the host {how}", lambda c, _: c.runs_ahead)
        for policy, how in waits.items()
        if policy != base.sync
    ]
    settings += [
        Setting("dtype", dtype, what, lambda c, _, dtype=dtype: dtype in c.dtypes)  # type: ignore[misc]
        for dtype, what in dtypes.items()
        if dtype != base.dtype
    ]
    if base.dtype == "float32" and base.matmul_precision == "highest":
        what = "TF32 matrix products, where the GPU has them"
        settings.append(Setting("matmul_precision", "high", what, lambda c, _: c.tf32))
    elif base.dtype == "float32":
        settings.append(Setting("matmul_precision", "highest", "float32 products in full"))
    if not base.checkpointing:
        settings.append(Setting("checkpointing", True, "activations computed anew in the backward pass"))
    dropout = Setting("model.dropout", 0.0, WITHOUT) if base.model.dropout > 0 else Setting("model.dropout", 0.2, WITH)
    return [*settings, dropout]


def _changed(machine: Machine, base: Variant, lever: Setting, named: Variant | None = None) -> Variant:
    short = f"{lever.key.rpartition('.')[2]}={spelt(lever.value)}"
    changed = named or known(base.name, machine)
    return Variant(
        name=named.name if named else slug(f"{base.name}-{short}"),
        label=named.label if named else f"{base.label}, {short}",
        note=changed.note,
        overrides=tuple(merged(base.overrides, named.overrides if named else [f"{lever.key}={spelt(lever.value)}"])),
        lever=Lever(base=base.name, key=lever.key, value=lever.value, what=lever.what),
    )
