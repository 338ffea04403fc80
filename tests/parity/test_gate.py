"""The parity gate: its reference against transformers and torch.optim, and planted faults are caught."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.parity_mutants import MUTANTS
from fakes.support import FRAMEWORKS

from nanogpt_mac import child
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.cli import compose
from nanogpt_mac.files import plain
from nanogpt_mac.gpt.pretrained import TRANSPOSED
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.parity import gate as parity
from nanogpt_mac.parity import reference, tolerances
from nanogpt_mac.parity.cases import drawn_weights
from nanogpt_mac.parity.check import LOSS_SCALE, Task, check_variant, make_reference
from nanogpt_mac.records.plan import Parity
from nanogpt_mac.simulator import VARIABLE

pytestmark = pytest.mark.xdist_group("parity")  # what its fixtures make is expensive: one worker makes it

PLANTING = (sys.executable, str(Path(__file__).parents[1] / "fakes" / "parity_mutants.py"))
linux = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400)))
    return path


@pytest.fixture
def variant(text):
    def build(*overrides, plant=None):
        corpus = ("data=text", f"data.path={text}", f"data.dir={text.parent / 'data'}")
        config = compose(["experiment=smoke", *corpus, "compile=false", *overrides])
        config.wandb.name = plant
        return config

    return build


# -- the reference ----------------------------------------------------------------------------------------------------


def hugging_face(spec, weights):
    """transformers' own GPT-2 in float64, with these weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": spec.n_layer, "n_head": spec.n_head, "n_embd": spec.n_embd, "n_positions": spec.block_size}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gelu = {"exact": "gelu", "tanh": "gelu_new"}[spec.gelu]
    config = GPT2Config(**sizes, vocab_size=spec.vocab_size, activation_function=gelu, **dropouts)
    model = GPT2LMHeadModel(config).double()
    state = {n: torch.from_numpy(w.T.copy() if n.endswith(TRANSPOSED) else w) for n, w in weights.items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    return model


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_the_reference_is_transformers_gpt2(gelu):
    spec = GPTSpec(2, 4, 32, 24, 50, bias=True, gelu=gelu)
    weights = drawn_weights(spec, 1)
    window = np.random.default_rng(0).integers(0, 50, (3, 25))
    model, idx = hugging_face(spec, weights), torch.from_numpy(window)
    logits = reference.logits(reference.tensors(weights), spec, idx[:, :-1])
    torch.testing.assert_close(logits, model(idx[:, :-1]).logits, rtol=1e-12, atol=1e-12)

    loss, grads = reference.gradients(reference.tensors(weights), spec, window[:, :-1], window[:, 1:])
    theirs = torch.nn.functional.cross_entropy(model(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten())
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-13)
    for name, p in model.named_parameters():
        expected = p.grad.T if name.endswith(TRANSPOSED) else p.grad
        torch.testing.assert_close(grads[name], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("clip", [0.5, 4.0, None])
def test_the_references_steps_are_torchs_adamw(clip):
    spec = GPTSpec(1, 2, 16, 12, 20)
    start = reference.tensors(drawn_weights(spec, 2))
    rng, rates = np.random.default_rng(0), [1e-2, 3e-3, 2e-2]
    batches = [rng.integers(0, 20, (2, 3, 13)) for _ in rates]
    ours = reference.train(start, spec, reference.Recipe(0.1, 0.9, 0.99, clip), batches, rates)

    p = {name: w.detach().clone().requires_grad_() for name, w in start.items()}
    groups = [{"params": [w for w in p.values() if w.dim() >= 2], "weight_decay": 0.1}]
    groups += [{"params": [w for w in p.values() if w.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for step, (windows, lr) in enumerate(zip(batches, rates, strict=True)):
        optimizer.zero_grad()
        for window in windows:
            idx = torch.from_numpy(window)
            scores = reference.logits(p, spec, idx[:, :-1])
            (torch.nn.functional.cross_entropy(scores.flatten(0, 1), idx[:, 1:].flatten()) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(p.values(), ours.grad_clip or math.inf)
        assert ours.norms[step] == pytest.approx(norm.item(), rel=1e-10)
        assert clip is None or (clip * ours.norms[0] < norm.item()) == (clip < 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, w in p.items():
        torch.testing.assert_close(ours.weights[name], w.detach(), rtol=1e-9, atol=1e-12)


# -- the gate ---------------------------------------------------------------------------------------------------------


def test_variants_pass_fail_or_end_each_as_a_row(variant, tmp_path):
    """One comparison: a clean variant, a wrong one, and one for each variant to break; one reference for all."""
    configs = {
        "mlx": variant("backend=mlx", "compile=true"),
        "wrong": variant("backend=mlx", plant="mlx: AdamW eps 1e-6"),
        **{name: variant("backend=cpu", plant=name) for name in ("crash", "killed", "raise")},
    }
    found = parity.check(configs, tmp_path / "new", child=PLANTING)
    assert found == Parity.load(tmp_path / "new" / "parity.json").model_copy(update={"schema_": found.schema_})
    variants = found.variants
    states = {name: result.state for name, result in variants.items()}
    expected = {"mlx": "pass", "wrong": "fail", **dict.fromkeys(("crash", "killed", "raise"), "error")}
    assert states == expected, {name: result.reason for name, result in variants.items()}
    assert variants["wrong"].reason.startswith("update rule: transformer.h.")
    assert ", at most 0.0002 is expected, and" in variants["wrong"].reason
    assert variants["crash"].reason == "killed by SIGABRT"
    assert variants["killed"].reason == "killed by SIGKILL: out of memory?"
    assert variants["raise"].reason == "RuntimeError: two lines"
    quantities = list(tolerances.limits("float32", "highest"))
    assert [c.quantity for c in variants["mlx"].checks] == quantities
    assert [t.quantity for t in found.tolerances] == quantities
    assert found.shape["full"].model_dump() == {"batch": 4, "block_size": 32, "accumulation": 1, "windows": 4}
    assert found.unchecked == ()
    assert variants["mlx"].deterministic is True
    kept = {p.name for p in (tmp_path / "new").iterdir()}  # no reference, and logs of what ended badly alone
    assert kept == {"parity.json", *(f"parity-{name}.log" for name in ("crash", "killed", "raise"))}


@pytest.mark.parametrize("cores", [2, 8])
def test_back_ends_are_checked_side_by_side_where_there_are_cores(variant, tmp_path, monkeypatch, cores):
    monkeypatch.setattr("nanogpt_mac.parity.gate.usable", lambda: cores)
    program = "import json, time; begun = time.time(); time.sleep(0.3); span = f'{begun} {time.time()}'"
    program += "; print(json.dumps({'shape': {}, 'device': span, 'checks': []}))"
    configs = {name: variant(f"backend={name.split('-')[0]}") for name in ("mlx", "mlx-eager", "cpu", "cpu-compile")}
    found = parity.check(configs, tmp_path, child=(sys.executable, "-c", program))
    mlx, eager, cpu, both = ([float(time) for time in found.variants[name].device.split()] for name in configs)
    assert mlx[1] <= eager[0]  # both may write the same compiled kernel
    assert (cpu[0] < mlx[1]) == (both[0] < cpu[1]) == (cores == 8)


def test_a_hang_ends_and_a_reference_that_cannot_be_made_says_why(variant, tmp_path):
    waits = "time.sleep(600 * (json.load(sys.stdin)['role'] == 'variant'))"
    program = f"import json, sys, time; {waits}; print('{{\"shape\": {{}}}}')"
    hung = parity.check({"cpu": variant("backend=cpu")}, tmp_path, 3.0, child=(sys.executable, "-c", program))
    assert hung.variants["cpu"].reason == "no answer within 3 s"
    missing = dataclasses.replace(variant("backend=cpu"), init_from=str(tmp_path / "no.pt"))
    found = parity.check({"cpu": missing}, tmp_path)
    assert found.variants["cpu"].state == "error"
    assert found.variants["cpu"].reason.startswith(
        f"no reference: init_from={tmp_path / 'no.pt'}: not a known name, file or folder"
    )


def task(config, folder, role="variant"):
    return plain({"role": role, "config": dataclasses.asdict(config), "folder": str(folder)})


def mutants(config, folder, names, **environment):
    """The checks of each planted fault: one reference, unless `folder` has it, and one child for all."""
    roles = [("reference", ""), ("variant", "all:" + ",".join(names))]
    for role, plant in roles[folder.exists() :]:
        folder.mkdir(exist_ok=True)
        config.wandb.name = plant
        answer = child.ask(PLANTING, task(config, folder, role), environment=os.environ | environment)
    return answer


def caught(checks):
    return [c["quantity"] for c in checks if not c["pass"]]


def survivors(found):
    """Names of planted faults that nothing noticed; the clean variant must pass."""
    assert caught(found.pop("clean")) == []
    alive = {name for name, checks in found.items() if not caught(checks)}
    print(f"\n{len(found) - len(alive)} of {len(found)} caught; not: {sorted(alive)}")
    return alive


def test_faults_of_every_framework_are_caught(variant, tmp_path):
    """A few of the table, those that are hardest to see; the whole table is below."""
    for backend, names in {
        "cpu": ["AdamW eps 1e-6", "clip 1 % off", "evaluates in training mode"],
        "mlx": ["no causal mask with dropout", "update 0.1 % off"],
    }.items():
        if backend not in FRAMEWORKS:
            continue
        planted = [f"{'torch' if backend == 'cpu' else backend}: {name}" for name in names]
        config = variant(f"backend={backend}", "model.dropout=0.1", "batch_size=2")
        assert survivors(mutants(config, tmp_path / "x", ["clean", *planted])) == set()


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_shortest_windows_pass(variant, tmp_path, block_size):
    config = variant("backend=cpu", f"model.block_size={block_size}", "model.n_layer=1")
    make_reference(config, tmp_path)
    checks = check_variant(config, tmp_path).checks
    assert [c.quantity for c in checks if not c.passed] == []
    assert ("causality" in [c.quantity for c in checks]) == (block_size > 1)


def test_a_task_survives_the_way_to_a_child(variant, tmp_path):
    config = variant("model.bias=true", "data.val_fraction=0.2")
    asked = Task(role="variant", config=config, folder=tmp_path)
    assert Task.model_validate(json.loads(json.dumps(task(config, tmp_path)))) == asked


def test_every_precision_has_every_limit():
    for dtype, precision in (("float32", "highest"), ("float32", "high"), ("float32", "medium"), ("bfloat16", "high")):
        assert list(tolerances.limits(dtype, precision)) == list(tolerances.limits("float32", "highest"))
    strict, loose = (tolerances.limits(dtype, "highest") for dtype in ("float32", "bfloat16"))
    assert all(strict[q] <= loose[q] for q in strict)
    assert tolerances.limits("bfloat16", "high") == loose  # matmul_precision is about float32 alone
    assert LOSS_SCALE < 65504  # float16's largest


# -- the whole table --------------------------------------------------------------------------------------------------

# What 16 bits hide: smaller than their rounding, and harmless at their precision.
BENEATH = {
    # float16 alone has a loss scale, and torch's attention evaluates in float32.
    "float32": {"mlx: loss scale left in", "jax: loss scale left in", "packed: dropout in evaluation"},
    "bfloat16": {"mlx: loss scale left in", "jax: loss scale left in"},  # none there is
    "float16": {"torch: gradients kept"},  # they are unscaled, so a thousandth of the next ones
}
BENEATH["bfloat16"].add("torch: lower precision unasked")  # it is asked for
for _dtype in ("bfloat16", "float16"):
    BENEATH[_dtype] |= {"mlx: other gelu", "jax: other gelu", "torch: other gelu", "torch: label smoothing"}
for _hidden in BENEATH.values():
    _hidden.add("packed: masks not scaled")  # the gate drops nothing; tests/gpt/test_packed.py holds the masks


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_changes_what_the_source_says(name):
    """Here, because only slow tests plant all of them."""
    module, old, new = MUTANTS[name]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert old in Path(str(spec.origin)).read_text(encoding="utf-8")
    assert old != new


TORCHS_ATTENTION = {"torch: no causal mask", "torch: mask one token late", "torch: attention scale"}
TORCHS_ATTENTION |= {"torch: attention dropout left on", "torch: attention dropout in evaluation"}
TORCHS_ATTENTION |= {"torch: q and k swapped", "torch: heads mixed"}

# Operators of a step, an evaluation and the logits whose floating-point result matters.
OPERATORS = ["_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "gelu"]
OPERATORS += ["gelu_backward", "native_layer_norm", "native_layer_norm_backward", "linear", "linear_backward", "bmm"]
OPERATORS += ["embedding_dense_backward", "index_select", "nll_loss_forward", "nll_loss_backward", "add.Tensor"]
OPERATORS += ["mul.Tensor", "div.Tensor", "cat", "clamp", "reciprocal", "linalg_vector_norm", "_fused_adamw_"]
OPERATORS += ["mul_.Tensor", "add_.Tensor", "copy_", "fill_.Scalar", "sum.dim_IntList"]
OPERATORS += ["_scaled_dot_product_attention_math_for_mps", "baddbmm", "baddbmm.out", "bmm.out", "cat.out"]
UNFUSED = ["lerp_.Scalar", "addcmul_", "addcdiv_", "sqrt", "linalg_vector_norm"]
COMPILED = ["mm", "bmm", "_fused_adamw_", "linalg_vector_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_every_fault_of_every_framework_is_caught(variant, tmp_path, backend, dtype):
    framework = KINDS[backend].framework
    names = [name for name in MUTANTS if name.startswith((f"{framework}:", *["packed:"][: framework == "torch"]))]
    if dtype != "float32":  # then torch's own attention is not taken
        names = [name for name in names if name not in TORCHS_ATTENTION]
    config = variant(f"backend={backend}", f"dtype={dtype}", "model.dropout=0.1", "model.bias=true")
    assert survivors(mutants(config, tmp_path / "x", ["clean", *names])) <= BENEATH[dtype]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_operator_that_is_1_percent_off_is_caught(variant, tmp_path, dtype):
    config = variant("backend=mps", f"dtype={dtype}", "model.bias=true")
    names = [f"op:{name}" for name in OPERATORS]
    alive = survivors(mutants(config, tmp_path / "x", ["clean", *names], **{VARIABLE: "1"}))
    # bfloat16: an operator of evaluation alone, whose 1 % is less than its logits' rounding.
    # float16: the back end tries the fused AdamW first, finds it at fault and does without it.
    hidden = {"bfloat16": {"op:_scaled_dot_product_attention_math_for_mps"}, "float16": {"op:_fused_adamw_"}}
    assert alive <= hidden.get(dtype, set())


@linux
@pytest.mark.slow
def test_operators_of_the_unfused_adamw_are_caught(variant, tmp_path):
    config = variant("backend=mps", "backend.fused_adamw=false")
    names = [f"op:{name}" for name in UNFUSED]
    assert survivors(mutants(config, tmp_path / "x", ["clean", *names], **{VARIABLE: "1"})) == set()


@linux
@pytest.mark.slow
def test_operators_in_compiled_code_are_caught(variant, tmp_path):
    """Only what Inductor leaves to operators can be planted.

    torch 2.13's Inductor adds each position's gradient once for every row of a batch above 8 (an atomic add that all
    threads of a reduction make): case odd shows it unplanted. Case full, 4 rows, is sound.
    """
    config = variant("backend=mps", "compile=true")
    found = mutants(config, tmp_path / "x", ["clean", *(f"op:{name}" for name in COMPILED)], **{VARIABLE: "1"})
    clean = {c["quantity"]: c for c in found.pop("clean") if not c["pass"]}
    assert not clean or clean["gradients"]["worst"] == "transformer.wpe.weight (odd)"
    for name, checks in found.items():
        assert set(caught(checks)) - set(clean), name
