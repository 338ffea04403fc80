"""Plants one fault after another under the fallback detector, in one process, and prints what it found as JSON.

    python runtime_cases.py eager|compiled quick|all

`eager quick` also runs what only compiled runs reach, with a stand-in for Inductor's code, which takes long to make.

The reference for what must be found is independent of the detector: the simulated device's own counts of what reached
it in each phase of the clean model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nanogpt_mac import simulator

simulator.install()

import torch  # noqa: E402

from nanogpt_mac.config import Config, backend_options  # noqa: E402
from nanogpt_mac.fallbacks import detect as runtime  # noqa: E402
from nanogpt_mac.fallbacks import watch  # noqa: E402
from nanogpt_mac.fallbacks.observed import Task  # noqa: E402
from nanogpt_mac.gpt.spec import GPTSpec  # noqa: E402
from nanogpt_mac.records.fallbacks import Fallbacks, FindingKind  # noqa: E402

KINDS = {
    "missing": FindingKind.MISSING_CPU,
    "nowhere": FindingKind.MISSING,
    "fallback": FindingKind.EXPLICIT,
    "hidden": FindingKind.HIDDEN,
    "announced": FindingKind.HIDDEN,
    "dtype_limit": FindingKind.LIMIT,
    "shape_limit": FindingKind.LIMIT,
}
REFUSING = ("nowhere", "dtype_limit", "shape_limit")
ONLY_MPS = ("linear_backward", "_scaled_dot_product_attention_math_for_mps")  # a fallback of theirs finds no CPU kernel
CALLERS = {"index_select": "embedding"}  # an error is theirs who were called
ORDER = ("forward", "backward", "clip", "optimizer", "result")  # in time, as far as operators of one phase go

# Operators of the eager model, each of another phase or layer, and the faults planted in them. Those that are composite
# elsewhere (linear) cannot be missing: they would decompose.
EAGER = {
    "linear": ("fallback", "hidden", "announced", "dtype_limit", "shape_limit"),
    "native_layer_norm": ("fallback", "hidden", "dtype_limit"),
    "gelu": ("missing", "fallback", "announced", "dtype_limit"),
    "index_select": ("missing", "hidden", "shape_limit"),
    "_softmax": ("missing", "hidden", "nowhere"),
    "_log_softmax": ("fallback", "dtype_limit"),
    "nll_loss_forward": ("missing", "hidden"),
    "bernoulli_.float": ("missing", "hidden"),
    "linear_backward": ("fallback", "hidden", "shape_limit"),
    "gelu_backward": ("missing", "announced", "nowhere"),
    "native_layer_norm_backward": ("missing", "hidden"),
    "embedding_dense_backward": ("missing", "hidden", "dtype_limit"),
    "_softmax_backward_data": ("missing", "hidden"),
    "nll_loss_backward": ("fallback", "nowhere"),
    "linalg_vector_norm": ("missing", "hidden", "announced", "dtype_limit"),
    "reciprocal": ("missing", "hidden"),
    "_fused_adamw_": ("missing", "fallback", "nowhere", "dtype_limit"),
    "_scaled_dot_product_attention_math_for_mps": ("missing", "hidden", "announced", "shape_limit"),
    "cat": ("missing", "fallback", "hidden"),
    "mul.Tensor": ("missing", "hidden"),
    "add.Tensor": ("missing", "hidden"),
}
# What torch.compile leaves: matrix products inside the generated code, and whatever is not compiled.
COMPILED = {
    "mm": ("missing", "fallback", "hidden", "announced", "nowhere", "dtype_limit"),
    "bmm": ("missing", "fallback", "hidden", "nowhere", "shape_limit"),
    "addmm": ("missing", "hidden", "announced", "dtype_limit"),
    "linalg_vector_norm": ("missing", "hidden", "announced", "dtype_limit"),
    "reciprocal": ("missing", "hidden"),
    "_fused_adamw_": ("missing", "fallback", "nowhere", "dtype_limit"),
    "linear": ("fallback", "hidden", "announced"),
    "native_layer_norm": ("fallback", "dtype_limit"),
    "_scaled_dot_product_attention_math_for_mps": ("missing", "hidden"),
    "cat": ("missing", "hidden"),
    "index.Tensor": ("missing", "hidden"),
}
QUICK = {
    "eager": [
        ("gelu", "missing"),
        ("linear", "announced"),
        ("_softmax", "nowhere"),
        ("linear_backward", "dtype_limit"),
        ("linear_backward", "fallback"),
        ("add.Tensor", "hidden"),
        ("_scaled_dot_product_attention_math_for_mps", "shape_limit"),
    ],
    "compiled": [],
}


def task(compiled: bool, layers: int, **changes: object) -> Task:
    spec = {
        "n_layer": layers,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "vocab_size": 65,
        "dropout": 0.2,
        "bias": True,
    }
    options = backend_options(Config(dtype=changes.pop("dtype", "float32")), "mps", compiled)
    return Task(options, GPTSpec(**{**spec, "gelu": "exact", **changes}), 4)


# -- syncs that a phase's own code makes ------------------------------------------------------------------------------


@contextmanager
def _after(owner: object, name: str, look):
    """`look` at the result of a method, each time it is called."""
    function, own = getattr(owner, name), name in vars(owner)

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        look(result)
        return result

    setattr(owner, name, wrapped)
    yield
    if own:
        setattr(owner, name, function)
    else:
        delattr(owner, name)


@contextmanager
def _hook(handle):
    yield
    handle.remove()


def syncs(backend) -> dict[str, tuple]:
    """Name to (operator, phase, context that plants it)."""
    weight = backend.parameters["transformer.ln_f.weight"]
    last = backend.model.transformer["ln_f"]

    def item(t):
        return (t[0] if isinstance(t, tuple) else t).sum().item()

    return {
        "item in forward": ("_local_scalar_dense", "forward", lambda: _after(backend, "windows", item)),
        "cpu in forward": ("copy_", "forward", lambda: _after(backend, "windows", lambda t: t[0].cpu())),
        "nonzero in forward": ("nonzero", "forward", lambda: _after(backend, "windows", lambda t: t[0].nonzero())),
        "to the device in forward": (
            "copy_",
            "forward",
            lambda: _after(backend, "windows", lambda t: torch.ones(3).to("mps")),
        ),
        "item in backward": (
            "_local_scalar_dense",
            "backward",
            lambda: _hook(weight.register_hook(lambda grad: print(grad.sum().item(), file=sys.stderr))),
        ),
        "item in clip": ("_local_scalar_dense", "clip", lambda: _after(backend.optimizer, "clip", item)),
        "tolist in clip": ("copy_", "clip", lambda: _after(backend.optimizer, "clip", lambda t: t.tolist())),
        "item in optimizer": (
            "_local_scalar_dense",
            "optimizer",
            lambda: _after(backend.optimizer, "step", lambda _: weight.sum().item()),
        ),
        "cpu in result": ("copy_", "result", lambda: _after(backend, "_handle", lambda h: weight.detach().cpu())),
        "item in evaluation": ("_local_scalar_dense", "evaluation", lambda: _after(backend, "loss", evaluated)),
        "cpu in sampling": (
            "copy_",
            "sampling",
            lambda: _hook(last.register_forward_hook(lambda m, i, out: sampled(m, out))),
        ),
    }


def evaluated(loss):
    if not torch.is_grad_enabled():
        loss.item()


def sampled(module, out):
    if not module.training and out.shape[0] == 1:
        out.cpu()


# -- the reference ----------------------------------------------------------------------------------------------------


class Counted(watch.Phases):
    """Phases in which the device itself counts what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter] = {}

    def _take(self, phase: str) -> None:
        for kind in ("native", "fallback", "refused"):
            for op, calls in simulator.operators(kind).items():
                self.counts.setdefault(phase, Counter())[op.removeprefix("aten::")] += calls
        simulator.reset_counts()

    @contextmanager
    def phase(self, name):
        self._take(self.current)
        with super().phase(name):
            try:
                yield
            finally:
                self._take(name)


def reference(session) -> dict[str, Counter]:
    """Phase to operator to calls of the clean model."""
    simulator.reset_counts()
    plain, session.phases = session.phases, Counted()
    try:
        with session.hooked():
            session.run()
        return session.phases.counts
    finally:
        session.phases = plain


def expected(counts: dict[str, Counter], names: list[str], fault: str) -> dict[str, int]:
    """Phase to calls that a fault in `names` must be found with; a refusal ends the phases after it."""
    calls = {phase: sum(counts[phase][n] for n in names) for phase in counts if phase}
    calls = {phase: n for phase, n in calls.items() if n}
    if fault in REFUSING:
        first = next((p for p in ORDER if p in calls), None)
        return {phase: 1 for phase in calls if phase == first or phase not in ORDER}
    return calls


# -- what Inductor's code would do -----------------------------------------------------------------------------------


def stand_ins(session, look, counts) -> None:
    """A file in Inductor's folder that calls an operator, and an error that comes out of code that is compiled."""
    file = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "generated.py"
    file.write_text("import torch\n\ndef call(x):\n    return torch.mm(x, x)\n")
    spec = importlib.util.spec_from_file_location("generated", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    square = torch.ones(3, 3, device="mps")
    for fault in ("missing", "hidden"):
        with _after(session.backend, "windows", lambda _: module.call(square)), simulator.planted("mm", fault) as names:
            document = look()
        judged = judge(f"mm {fault}, generated", names, KINDS[fault], {"forward": 1, "evaluation": 1}, document)
        says = "called from Inductor's generated code: return torch.mm(x, x)"
        if any(f.where is not None or says not in f.evidence for f in document.findings):
            judged["why"].append(str(document.findings))
        print(json.dumps(judged))
    session.compiled = True
    with simulator.planted("gelu", "shape_limit") as names:
        print(
            json.dumps(
                judge("gelu, compiled", names, FindingKind.LIMIT, expected(counts, names, "shape_limit"), look())
            )
        )
    session.compiled = False


def operators_of_others(session, look) -> None:
    """Operators from outside of torch that use the CPU inside, and one that only takes a number from it."""
    library = torch.library.Library("others", "FRAGMENT")

    def number(x):
        return x * torch.tensor(2.0).to("mps")

    def copies(x):
        return x.cpu().sin().to("mps")

    def both(x):
        return (x.sum().item() * x.cpu()).to("mps")

    def waits(x):
        return x * x.sum().item()

    kinds = {number: None, copies: FindingKind.HIDDEN, both: FindingKind.HIDDEN, waits: FindingKind.SYNC}
    square = torch.ones(3, 3, device="mps")
    for function, kind in kinds.items():
        name = function.__name__
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, function, "MPS")
        call = getattr(torch.ops.others, name)
        with _after(session.backend, "windows", lambda _, call=call: call(square)):
            document = look()
        if kind is None:
            print(json.dumps(told("number", document)))
        else:
            want = {"forward": 1, "evaluation": 1}
            print(json.dumps(judge(f"others::{name}", [f"others::{name}"], kind, want, document)))


def older_profiler(look, counts) -> None:
    """A profiler that knows no overload names: the warnings' stand."""
    module = torch._C._profiler
    config = module._ExperimentalConfig

    def older(verbose):
        return config(verbose=verbose)

    module._ExperimentalConfig = older
    with simulator.planted("gelu", "missing") as names:
        document = look()
    module._ExperimentalConfig = config
    judged = judge(
        "gelu missing, older profiler", names, FindingKind.MISSING_CPU, expected(counts, names, ""), document
    )
    judged["why"] += [] if document.passes.profiler.overloads is False else ["the profiler was not older"]
    print(json.dumps(judged))


def compiled_child() -> None:
    """What the child does of a compiled run, with the fastest of torch's compilers; and of a corpus on the host."""
    compile_ = torch.compile
    torch.compile = lambda function, dynamic, mode: compile_(function, dynamic=dynamic, backend="aot_eager")
    made = task(True, 1, dropout=0.0, dtype="float16")
    made = replace(made, options=replace(made.options, resident_tokens=0))
    document = runtime.document(made, watch.watch(made))
    print(
        json.dumps(
            {**told("compiled child", document), "compile_report": sorted(document.document()["compile_report"])}
        )
    )


# -- the run ----------------------------------------------------------------------------------------------------------


def told(case: str, document: Fallbacks) -> dict:
    return {"case": case, "findings": [f.op for f in document.findings], "why": document.why_incomplete}


def judge(case: str, names: list[str], kind: str, want: dict[str, int], document: Fallbacks) -> dict:
    """Found: operator, kind, phase and calls are right in every phase. False: whatever else is there."""
    got = {}
    for f in document.findings:
        if f.op in names and f.kind == kind:
            got[f.phase] = got.get(f.phase, 0) + f.calls_per_iteration
    extra = [[f.op, f.kind, f.phase] for f in document.findings if f.op not in names or f.kind != kind]
    unexplained = [w for w in document.why_incomplete if not w.startswith("not reached")]
    return {"case": case, "want": want, "got": got, "extra": extra, "why": unexplained}


def main(how: str, which: str) -> None:
    torch.set_num_threads(1)
    compiled = how == "compiled"
    made = task(compiled, 2 if which == "all" else 1)
    session = watch.Session(made)
    session.warm_up()

    def look() -> Fallbacks:
        return runtime.document(made, watch.examine(session))

    clean = look()
    print(json.dumps(told("clean", clean)))
    counts = reference(session)
    table = COMPILED if compiled else EAGER
    cases = [(op, f) for op, faults in table.items() for f in faults] if which == "all" else QUICK[how]
    for op, fault in cases:
        with simulator.planted(op, fault) as names:
            document = look()
        as_if = "nowhere" if op in ONLY_MPS and fault in ("missing", "fallback") else fault
        want = expected(counts, names, as_if)
        names = [*names, CALLERS.get(op, op)] if as_if in REFUSING else names
        print(json.dumps(judge(f"{op} {fault}", names, KINDS[as_if], want, document)))
    for name, (op, phase, plant) in syncs(session.backend).items():
        if which == "all" or name in ("item in evaluation", "nonzero in forward"):
            with plant():
                document = look()
            steps = {"sampling": 2, "evaluation": 1}.get(phase, 1)
            want = {phase: steps}
            if phase == "forward":  # a batch is made for an evaluation too
                want["evaluation"] = 1
            print(json.dumps(judge(name, [op], FindingKind.SYNC, want, document)))
    if which == "quick":
        operators_of_others(session, look)
        older_profiler(look, counts)
        stand_ins(session, look, counts)
        compiled_child()
    assert watch.dispatch_of("no_such_operator") == "unknown"
    controls, watch._controls = watch._controls, dict
    untried = look()  # where everything runs on MPS there is nothing to try the detector with
    assert untried.complete
    assert untried.passes.control is None
    watch._controls = controls
    again = look()
    print(json.dumps(told("clean", again)))


if __name__ == "__main__":
    main(*sys.argv[1:])
