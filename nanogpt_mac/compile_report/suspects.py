"""What may make compiled MPS training slower than eager, looked for in the code that was generated in this run.

Each suspect comes from reading PyTorch's sources and generated code; none was timed on a Mac by this project. So a
suspect is `absent` where this run's launches do not have it, `suspect` where they do, and `confirmed` only where a
Mac's own clock gives it a tenth of the iteration or more.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt_mac.compile_report.recorders import Alike, Call, What
from nanogpt_mac.records.compiled import Judged, Status

SIMD = 32  # lanes that a Mac's GPU runs in step
CONFIRMED_SHARE = 0.1
_MOVE = re.compile(
    r"auto tmp\d+ = (in_(?:out_)?ptr\d+\[.*\]|static_cast<float>\(in_ptr\d+\[.*\]\)|[-\d.]+|tmp\d+ \* tmp\d+);"
)


@dataclass(frozen=True)
class Found:
    """What a rule found: how many calls show it, in words what they show, and the calls whose time is its price.

    `priced` is empty where no call's own time can tell: then only the A/B can.
    """

    count: int
    evidence: str
    priced: Sequence[Call] = ()


@dataclass(frozen=True)
class Suspect:
    """One hypothesis. `look` holds an iteration's calls against it; `needs` is what must be known for that."""

    name: str
    claim: str
    versions: str
    look: Callable[[Sequence[Call]], Found]
    needs: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """What a Mac's own clock gave, in ms: an iteration, and calls by what they share. Empty where there is no Mac."""

    iteration: float | None = None
    each: Mapping[Alike, float] = field(default_factory=dict)
    live: bool = False


def judge(calls: Sequence[Call], times: Times, known: Callable[..., bool]) -> list[Judged]:
    """Every suspect against the calls of a training iteration; `known` says whether its needs are beyond doubt."""
    return [_judged(suspect, calls, times, known(*suspect.needs)) for suspect in SUSPECTS]


def _judged(suspect: Suspect, calls: Sequence[Call], times: Times, known: bool) -> Judged:
    status, found, ms = Status.UNKNOWN, Found(0, "this torch does not show what the rule looks at"), None
    if known:
        found = suspect.look(calls)
        status = Status.SUSPECT if found.count else Status.ABSENT
    evidence, whole = found.evidence, times.iteration
    priced = [times.each.get(call.alike) for call in found.priced]
    if times.live and priced and whole and None not in priced:
        ms = sum(t for t in priced if t is not None)
        evidence += f"; timed on this Mac: {ms:.2f} of an iteration's {whole:.2f} ms"
        status = Status.CONFIRMED if ms >= CONFIRMED_SHARE * whole else status
    elif status is Status.SUSPECT:
        why = "" if times.live else ": no Mac"
        evidence += f"; not timed{why}" if found.priced else "; only the A/B can time it"
    return Judged(suspect.name, status, suspect.claim, suspect.versions, evidence, found.count, ms, suspect.commands)


# -- what the rules look at -------------------------------------------------------------------------------------------


def _metal(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.what is What.METAL]


def _lines(calls: Sequence[Call]) -> str:
    counts = Counter(call.line for call in calls if call.line)
    return f" ({', '.join(f'{n} x {line}' for line, n in counts.most_common(4))})" if counts else ""


def _megabytes(calls: Sequence[Call]) -> str:
    return f"{sum(call.bytes for call in calls) / 1e6:,.0f} MB of arguments"


def welford_is_serial(function: str) -> bool | None:
    """Whether this torch's Metal header reduces `threadgroup_welford_*` one element after the other; None: not there.

    The headers are part of every wheel and are what Inductor's kernels include.
    """
    import torch

    header = Path(torch.__file__).parent / "include" / "c10" / "metal" / "reduction_utils.h"
    if not header.exists():
        return None
    body = re.search(rf"\b{function}\s*\((?:[^{{]*)\{{(.*?)^\}}", header.read_text(), re.DOTALL | re.MULTILINE)
    return None if body is None else re.search(r"for \(unsigned \w+ = 1; \w+ < size; \+\+\w+\)", body[1]) is not None


def _serial_welford(calls: Sequence[Call]) -> Found:
    using = [(call, match[0]) for call in _metal(calls) if (match := re.search(r"threadgroup_welford_\w+", call.code))]
    if not using:
        return Found(0, "no launch holds threadgroup_welford_*")
    names = sorted({name for _, name in using})
    answers = {name: welford_is_serial(name) for name in names}
    serial = [call for call, name in using if answers[name] is not False]
    if not serial:
        return Found(0, f"{len(using)} launches hold {', '.join(names)}, which this torch's header computes as a tree")
    loops = sum(math.prod(call.threads or ()) * math.prod(call.group or ()) for call in serial)
    how = "serially in every lane" if None not in answers.values() else "in a way that its missing header cannot show"
    text = (
        f"{len(serial)} launches hold {', '.join(names)}, which this torch computes {how}: {loops:.2g} loop iterations"
    )
    return Found(len(serial), text + _lines(serial), serial)


def _odd_groups(calls: Sequence[Call]) -> Found:
    odd = [c for c in _metal(calls) if c.group and math.prod(c.group) > SIMD and math.prod(c.group) % SIMD]
    if not odd:
        return Found(0, f"every reduction's group is at most {SIMD} threads or a multiple of it")
    sizes = Counter(math.prod(c.group or ()) for c in odd)
    text = ", ".join(f"{n} x {size}" for size, n in sorted(sizes.items()))
    return Found(
        len(odd), f"{len(odd)} reductions in groups that are not a multiple of {SIMD} threads: {text}{_lines(odd)}", odd
    )


def _few_groups(calls: Sequence[Call]) -> Found:
    few = [c for c in _metal(calls) if c.group and c.threads and _groups(c) <= 2 and c.bytes > 1 << 15]
    if not few:
        return Found(0, "no reduction of more than 32 kB runs in one or two threadgroups")
    return Found(len(few), f"{len(few)} reductions in one or two threadgroups, {_megabytes(few)}{_lines(few)}", few)


def _groups(call: Call) -> int:
    return math.prod(math.ceil(t / g) for t, g in zip(call.threads or (), call.group or (), strict=True))


def is_copy(call: Call) -> bool:
    """Whether a launch only moves, casts or scales one tensor into another."""
    body = [line.strip() for line in call.code.splitlines() if line.strip().startswith(("auto tmp", "out_ptr"))]
    values = [line for line in body if line.startswith("auto tmp")]
    loads = [line for line in values if "ptr" in line]
    return (
        call.what is What.METAL
        and not call.is_reduction
        and len(loads) == 1
        and len(body) - len(values) == 1
        and all(_MOVE.fullmatch(line) for line in values)
    )


def _plain_attention(calls: Sequence[Call]) -> Found:
    fused = [c for c in calls if c.what is What.ATEN and "scaled_dot_product" in c.name]
    products = [c for c in calls if c.what is What.EXTERN and c.name in ("bmm", "baddbmm")]
    if not products:
        return Found(0, f"{len(fused)} calls of {fused[0].name}" if fused else "no batched matrix product")
    copies = [c for c in calls if is_copy(c) and any(len(shape) == 4 for shape in c.shapes)]
    text = (
        f"{len(products)} batched matrix products and {len(copies)} launches that only copy or scale four-dimensional "
        f"tensors, {_megabytes(copies)}; {len(fused)} calls of a fused attention"
    )
    return Found(len(products) + len(copies), text, copies)  # the products themselves a fused attention has as well


def _atomics(calls: Sequence[Call]) -> Found:
    atomic = [c for c in _metal(calls) if "atomic_add" in c.code]
    if not atomic:
        return Found(0, "no launch adds atomically")
    threads = sum(math.prod(c.threads or ()) for c in atomic)
    text = f"{len(atomic)} launches with atomic adds, from {threads:,} threads{_lines(atomic)}"
    return Found(len(atomic), text, atomic)


def _buffers(calls: Sequence[Call]) -> Found:
    made = sum(call.what is What.BUFFER for call in calls)
    return Found(made, f"{made} buffers made from Python in an iteration")


def _error_buffers(calls: Sequence[Call]) -> Found:
    metal = _metal(calls)
    bound = [c for c in metal if "ErrorMessages* error_buf" in c.code]
    idle = [c for c in bound if "TORCH_REPORT_ERROR" not in c.code]
    if not idle:
        return Found(0, f"{len(bound)} launches take an error buffer, and all of them can report an error")
    return Found(len(idle), f"{len(idle)} of {len(metal)} launches take an error buffer and can report no error")


# -- what to run on a Mac ---------------------------------------------------------------------------------------------

_RUN = "backend=mps compile=true max_iters=60 eval_iters=1 logger=none gemm_seconds=0"


def command(patch: str) -> str:
    """A shell command that trains for a moment after `patch`, with a compiler cache of its own.

    Inductor's cache does not know of such a patch, and would hand out the code from before it.
    """
    program = f'import runpy, torch; {patch}; runpy.run_path("train.py", run_name="__main__")'
    return f"TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python -c {shlex.quote(program)} {_RUN}"


def eager(function: str) -> str:
    """A patch that leaves one function of torch.nn.functional to eager mode, at the price of graph breaks around it."""
    name = f"torch.nn.functional.{function}"
    return f"{name} = torch.compiler.disable({name})"


AS_IT_IS = f"python train.py {_RUN}"
OTHER_TORCH = (
    "python -m venv /tmp/newer && /tmp/newer/bin/pip install -q -e . 'torch>=2.14' && "
    f"TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) /tmp/newer/bin/python train.py {_RUN}"
)
TWO_STEP = "import torch._inductor.lowering as lowering; lowering.use_two_step_variance = lambda *a, **k: True"
EAGER_ATTENTION = (  # the model's own, of torch's operators
    "import nanogpt_mac.gpt.torch_gpt as gpt; gpt.packed_attention = torch.compiler.disable(gpt.packed_attention)"
)
UNSPLIT = "import torch._inductor.config as config; config.split_reductions = False"
OWN_HEADERS = (
    "import torch._inductor.codegen.mps as mps; K = mps.MetalKernel; H = type(K.headers); init = K.__init__; "
    'K.__init__ = lambda self, *a, **k: (setattr(self, "headers", H(["utils"])), init(self, *a, **k))[1]'
)
SWEEP = "python train.py -m backend=mps compile=true,false max_iters=60 eval_iters=1 gemm_seconds=0"

SUSPECTS = (
    Suspect(
        "serial Welford",
        "layer norm's variance by a loop over the whole row in every lane",
        "torch up to 2.13; a tree since 2.14 (pytorch PR 188412: 182 to 1.96 ms for rows of 768)",
        _serial_welford,
        ("launches",),
        (AS_IT_IS, command(TWO_STEP), OTHER_TORCH, command(eager("layer_norm"))),
    ),
    Suspect(
        "odd reduction groups",
        f"threadgroups that are not a multiple of {SIMD} lanes, such as those of layer norm's weight gradients",
        "seen in 2.13 and 2.15",
        _odd_groups,
        ("launches",),
        (AS_IT_IS, command(UNSPLIT), command(eager("layer_norm"))),
    ),
    Suspect(
        "reduction in few threadgroups",
        "a large reduction, such as the loss, in one or two threadgroups while the rest of the GPU waits",
        "seen in 2.13 and 2.15",
        _few_groups,
        ("launches",),
        (AS_IT_IS, command(eager("cross_entropy"))),
    ),
    Suspect(
        "attention as plain math",
        "attention as matrix products with copies of Q, K and V, where no fused one is called",
        "seen in 2.13 and 2.15, in training",
        _plain_attention,
        ("launches", "graphs", "matmuls"),
        (AS_IT_IS, command(EAGER_ATTENTION)),
    ),
    Suspect(
        "atomic adds",
        "the embedding's backward by floating point atomics, which wait for each other where tokens repeat",
        "seen in 2.13 and 2.15",
        _atomics,
        ("launches",),
        (AS_IT_IS, command(eager("embedding"))),
    ),
    Suspect(
        "buffers from Python",
        "one empty_strided a buffer: compare dispatch_ms with iter_ms; below it, the host is not what limits",
        "seen in 2.13 and 2.15",
        _buffers,
        ("graphs", "buffers"),
        (SWEEP,),
    ),
    Suspect(
        "error buffers",
        "kernels bind an error buffer that they never use, because all share one set of headers",
        "seen in 2.13 and 2.15",
        _error_buffers,
        ("launches",),
        (AS_IT_IS, command(OWN_HEADERS)),
    ),
)
