"""Losses held against each other: recorded curves of correct and of faulty variants, and every rule by hand.

tests/fixtures/losses.npz was recorded on an H100 and 16 cores of its host with torch 2.11, on the stand-in: `loss/NAME`
has the training losses of 250 iterations in float32, `evaluations/NAME` rows of iteration, train and val loss. NAME is
SIZE_DTYPE_DROPOUT_DEVICE_COMPILED_FAULT; F is the full recipe's model, Q the quick one's.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.comparisons import write_comparison
from fakes.support import ROOT

from nanogpt_mac.compare import contents, losses
from nanogpt_mac.compare.collect import collect
from nanogpt_mac.compare.leaderboard import Entry
from nanogpt_mac.compare.runs import Run, Settings
from nanogpt_mac.config import Config
from nanogpt_mac.records.comparison import Comparison, VariantResult
from nanogpt_mac.records.run import Environment, EvaluationRow, IterationRow, Outcome, RunFacts
from nanogpt_mac.report import show

CONFIG = Settings(weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0)


def rates(count, peak=1e-3, warmup=100):
    """nanoGPT's warm-up."""
    return [peak * min(1.0, (i + 1) / (warmup + 1)) for i in range(count)]


def made(values, dropout=0.0, dtype="float32", lr=None, evaluations=(), skipped=(), config=CONFIG, **changes):
    """A run with these training losses."""
    lr = rates(len(values)) if lr is None else lr
    rest = {"dispatch_ms": 1.0, "tokens_per_s": 1.0, "memory": 0, "iter_ms": 10.0}
    rows = [
        IterationRow(iter=i, loss=loss, lr=lr[i], grad_norm=math.inf if i in skipped else 1.0, **rest)
        for i, loss in enumerate(values)
    ]
    rows += [EvaluationRow(iter=i, train_loss=t, val_loss=v, seconds=0.1) for i, t, v in evaluations]
    model = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 65, "dropout": dropout}
    facts = RunFacts(
        **{
            "backend": "cpu", "device": "cpu", "compile": False, "dtype": dtype, "matmul_precision": "highest",
            "sync": "completion", "seed": 1337, "model": model, "parameters": 1, "batch_size": 4,
            "gradient_accumulation_steps": 1, "max_iters": 500, "corpus": "text",
            "corpus_facts": {"name": "text", "label": "text", "sha256": "0" * 64}, "init_from": "fresh weights",
        }
        | changes
    )  # fmt: skip
    outcome = Outcome(variant="a", round=0, state="done")
    return Run(Path("run"), env=Environment(backend=facts), outcome=outcome, config=config, rows=tuple(rows))


def held(parity=None, **rounds):
    """name -> its Agreement and state; each variant is a run, or a list of one a round."""
    variants = [
        VariantResult(name=name, label=name.upper(), state="ok", parity=(parity or {}).get(name, "pass"))
        for name in rounds
    ]
    runs = {n: dict(enumerate(some if isinstance(some, list) else [some])) for n, some in rounds.items()}
    return {variant.name: variant for variant in losses.hold(variants, runs)}


def compared(ours, theirs):
    return losses.compared({0: losses.Curve(ours)}, {0: losses.Curve(theirs)})


def states(**rounds):
    return {name: variant.losses.state.value for name, variant in held(**rounds).items()}


# -- recorded curves --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    """(size, dropout) -> name -> run"""
    found = {}
    with np.load(ROOT / "tests/fixtures/losses.npz") as arrays:
        for key in arrays:
            kind, name = key.split("/")
            if kind == "loss":
                size, dtype, dropout, *_ = name.split("_")
                evaluations = [(int(i), t, v) for i, t, v in arrays[f"evaluations/{name}"]]
                run = made(arrays[key].tolist(), float(dropout), dtype, evaluations=evaluations)
                found.setdefault((size, dropout), {})[name.removeprefix(f"{size}_")] = run
    return found


def correct(runs):
    return {name: run for name, run in runs.items() if name.endswith("_")}


def test_correct_variants_stay_within_the_limits(recorded):
    """111 comparisons of eager and compiled, CPU and CUDA, three dtypes, two sizes, with and without dropout."""
    shares = {}
    for work, runs in recorded.items():
        for (a, ours), (b, theirs) in itertools.combinations(correct(runs).items(), 2):
            pair = compared(ours, theirs)
            assert pair.wrong is None, (work, a, b, pair.wrong)
            assert pair.iterations == 250
            shares[(*work, a, b)] = pair.share
    assert len(shares) == 111
    assert 0.3 < max(shares.values()) < 0.6  # neither near the limits nor so far below that these say nothing


@pytest.mark.parametrize(
    ("fault", "comparisons"),
    [
        ("lr1.1", 2 + 4 + 4 + 4 + 4 + 2 + 2),  # a learning rate 10 % too high
        ("stop20", 2 + 4 + 4),  # no update after iteration 20
        ("nodrop", 2 + 4),  # no dropout in training
    ],
)
def test_late_faults_are_found_in_every_size_and_dtype(recorded, fault, comparisons):
    count = 0
    for runs in recorded.values():
        for name, run in runs.items():
            if not name.endswith(f"_{fault}"):
                continue
            dtype = name.split("_")[0]
            for other in (run for clean, run in correct(runs).items() if clean.startswith(dtype)):
                count += 1
                assert compared(run, other).wrong is not None, name
    assert count == comparisons


def test_the_smallest_faults_are_found_in_float32_without_dropout_alone(recorded):
    """1 % of the learning rate; what is not found is in docs/method.md too."""

    def share(dropout, fault):
        runs = recorded["Q", dropout]
        return compared(runs[f"float32_{dropout}_cuda_False_{fault}"], runs[f"float32_{dropout}_cpu_False_"]).share

    assert share("0.0", "lr1.01") > 5
    assert share("0.2", "lr1.01") < 1
    assert share("0.0", "zeroh.2.mlp.c_fc") < 1  # one matrix that no longer moves after iteration 30


# -- the limits, by hand ----------------------------------------------------------------------------------------------


def falling(count, start=4.0):
    return [start * math.exp(-i / 400) for i in range(count)]


def test_the_first_loss_and_evaluation_have_the_gates_tolerance():
    base = falling(30)
    for quantity, off, state in (("loss", 3.9e-5, "agree"), ("loss", 4.2e-5, "in doubt")):
        other = [base[0] + off, *base[1:]]
        assert states(a=made(base), b=made(other)) == {"a": state, "b": state}, quantity
    for off, state in ((3.9e-5, "agree"), (4.2e-5, "in doubt")):
        one, other = ((0, 4.0, 4.0),), ((0, 4.0, 4.0 + off),)
        assert states(a=made(base, evaluations=one), b=made(base, evaluations=other))["a"] == state
    masks = [base[0] + 0.02, *base[1:]]  # with dropout a single batch says nothing
    assert states(a=made(base, 0.2), b=made(masks, 0.2))["a"] == "agree"
    half = held(a=made(base, dtype="float16"), b=made([base[0] + 0.007, *base[1:]], dtype="float32"))
    assert half["a"].losses.state == "agree"  # the coarser of the two dtypes counts


@pytest.mark.parametrize(
    ("count", "sums", "share"),
    [
        (20, 0.00208, 1e-5 * 2 ** (0.00208 / 0.0014)),  # rounding, doubled
        (50, 0.01262, 0.005),
        (80, 0.03208, 0.005 * 2 ** (0.01708 / 0.025)),
        (140, 0.0900, 0.005 * 2**3),
        (400, 0.35, 0.08),
    ],
)
def test_a_window_may_be_off_by_a_share_that_grows_as_the_weights_may_have_moved(count, sums, share):
    """`sums` of the learning rates, (1 + ... + n) / 101 thousandths up to 100."""
    first = count - 20
    moved = sum(rates(count))
    assert moved == pytest.approx(sums, rel=0.01)
    flat = [2.0] * count
    for factor, state in ((0.97, "agree"), (1.06, "in doubt")):
        off = 2.0 * (1 - factor * share)
        other = [*flat[:first], *[off] * 20]
        if first:  # of windows before the last, the half that is off is within the limit of its own
            other[first : first + 10] = [2.0] * 10
            other[-10:] = [2.0 - 2 * (2.0 - off)] * 10
        else:
            other[0], other[1:] = 2.0, [2.0 - (2.0 - off) * 20 / 19] * 19
        assert states(a=made(flat), b=made(other))["a"] == state, (first, factor)


def test_masks_may_add_four_standard_errors():
    rng = np.random.default_rng(3)
    base = np.full(20, 4.0)
    noise = rng.normal(0, 0.1, 20)
    noise -= noise.mean()
    spread = 1.4826 * np.median(np.abs(noise[2:] - 2 * noise[1:-1] + noise[:-2])) / math.sqrt(6)
    limit = 0.005 * 4.0 + 4 * spread / math.sqrt(20)
    for factor, state in ((0.95, "agree"), (1.05, "in doubt")):
        off = (base + noise + factor * limit).tolist()
        assert states(a=made(base.tolist(), 0.2), b=made(off, 0.2))["a"] == state


# -- who is wrong -----------------------------------------------------------------------------------------------------

GOOD = falling(60)
BAD = [*GOOD[:30], *[GOOD[30]] * 30]  # it learns nothing from iteration 30 on


def test_one_against_two_is_wrong_and_the_reason_names_what_and_where():
    found = held(a=made(GOOD), b=made(GOOD), c=made(BAD))
    assert {n: v.state.value for n, v in found.items()} == {"a": "ok", "b": "ok", "c": "wrong"}
    ours, theirs = np.mean(BAD[20:40]), np.mean(GOOD[20:40])
    assert found["c"].losses.reason.startswith(
        f"the training loss at iterations 20 to 39 of round 0 is {ours:.5g}, of A {theirs:.5g}: "
        f"off by {ours - theirs:.2g}, at most "
    )
    assert found["c"].reason == f"its losses are not those of the others: {found['c'].losses.reason}"
    assert found["c"].losses.against == ("a", "b")
    assert (found["a"].losses.iterations, found["a"].losses.state) == (60, "agree")
    assert not found["c"].harmless


def test_of_two_nothing_shows_which_is_wrong():
    found = held(a=made(GOOD), b=made(BAD))
    assert {v.state.value for v in found.values()} == {"in doubt"}
    assert found["a"].reason.startswith("one of the two is wrong, and nothing here shows which: the training loss at")
    assert not any(v.harmless for v in found.values())
    assert set(states(a=made(GOOD), b=made(BAD), c=made(GOOD), d=made(BAD)).values()) == {"in doubt"}


def test_the_gate_decides_where_it_can():
    unchecked = {"parity": {"a": "pass", "b": "error", "c": "error"}}
    assert states(a=made(GOOD), b=made(BAD), **unchecked) == {"a": "agree", "b": "wrong"}
    assert states(a=made(GOOD), b=made(BAD), c=made(BAD), **unchecked)["b"] == "wrong"
    failed = {"parity": {"b": "fail", "c": "fail"}}
    assert states(a=made(GOOD), b=made(BAD), c=made(BAD), **failed) == {"a": "not compared", "b": "wrong", "c": "wrong"}


def test_a_loss_that_is_no_number_is_wrong_where_another_has_one():
    broken = [*GOOD[:12], math.nan]
    found = held(a=made(GOOD), b=made(broken))
    assert (found["a"].state, found["b"].state) == ("ok", "wrong")
    reason = f"the training loss at iteration 12 of round 0 is nan, of A {GOOD[12]:.5g}"
    assert found["b"].losses.reason == reason
    assert states(a=made(broken), b=made(broken)) == {"a": "not compared", "b": "not compared"}  # it is the recipe
    evaluated = made(GOOD, evaluations=((60, math.inf, 3.0),))
    assert "is inf, of" in held(a=made(GOOD, evaluations=((60, 3.0, 3.0),)), b=evaluated)["b"].losses.reason


def test_every_round_is_held_against_the_same_round_of_the_others():
    found = held(a=[made(GOOD)] * 3, b=[made(GOOD)] * 3, c=[made(GOOD), made(GOOD), made(BAD)])
    assert found["c"].losses.state == "wrong"
    assert " of round 2 is " in found["c"].losses.reason
    alone = losses.compared(
        {0: losses.Curve(made(GOOD))}, {4: losses.Curve(made(BAD))}
    )  # a slow variant takes part in few
    assert alone.wrong is not None


def test_a_run_that_was_cut_is_compared_as_far_as_it_goes():
    found = held(a=made(GOOD), b=made(GOOD[:25]), c=made(GOOD))
    assert {v.losses.state.value for v in found.values()} == {"agree"}
    assert (found["b"].losses.iterations, found["a"].losses.iterations) == (25, 60)
    assert states(a=made(GOOD), b=made(BAD[:25])) == {"a": "agree", "b": "agree"}  # nothing is known of the rest
    short = [*GOOD[:1], *(x + 0.2 for x in GOOD[1:7])]
    assert states(a=made(GOOD), b=made(short))["b"] == "in doubt"  # less than one window is one


@pytest.mark.parametrize(
    "other",
    [
        {"dropout": 0.2},
        {"batch_size": 8},
        {"seed": 1},
        {"init_from": "gpt2"},
        {"corpus_facts": {"name": "x", "label": "x", "sha256": "1" * 64}},
        {"config": CONFIG.model_copy(update={"beta2": 0.95})},
        {"config": Settings()},
        {"dtype": "float8"},
        {"lr": rates(60, peak=2e-3)},
    ],
)
def test_other_work_is_not_compared(other):
    assert states(a=made(GOOD), b=made(BAD, **other)) == {"a": "not compared", "b": "not compared"}


def test_only_what_came_before_an_uncommon_step_is_compared():
    """float16 may skip a step in one variant that fits in the other; a schedule may differ from some iteration on."""
    half = {"dtype": "float16"}
    assert states(a=made(GOOD, **half), b=made(BAD, skipped={30}, **half))["a"] == "agree"
    assert states(a=made(GOOD, skipped={30}, **half), b=made(BAD, skipped={30}, **half))["a"] == "in doubt"
    lr = [*rates(30), *[0.0] * 30]
    found = held(a=made(GOOD), b=made(BAD, lr=lr))
    assert found["a"].losses.state == "agree"


def test_nothing_recorded_is_not_compared():
    run = made(GOOD)
    assert states(a=run, b=replace(run, env=None)) == {"a": "not compared", "b": "not compared"}
    assert states(a=run) == {"a": "not compared"}
    assert losses.hold([], {}) == []


# -- in a comparison --------------------------------------------------------------------------------------------------

CPU = {"name": "cpu", "label": "CPU eager", "ms": 100.0}
MLX = {"name": "mlx", "label": "MLX compiled", "compile": True, "ms": 80.0}
MPS = {"name": "mps", "label": "MPS eager", "ms": 90.0}


def collected(folder, variants, wrong, change=lambda i, loss: loss + 0.5 * (i >= 12)):
    """A comparison in which the losses of `wrong` are changed in every round."""
    write_comparison(folder, variants, 5, 30, 0.004, 1, evaluations=0)
    for path in folder.glob(f"rounds/[0-9]-{wrong}/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"loss": change(row["iter"], row["loss"])} if row["kind"] == "iteration" else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return collect(folder)


def test_a_variant_that_goes_wrong_in_the_rounds_is_wrong_everywhere(tmp_path):
    found = collected(tmp_path / "c", [CPU, MLX, MPS], "mlx")
    mlx = found.named("mlx")
    assert (mlx.state, mlx.parity, mlx.losses.state) == ("wrong", "pass", "wrong")
    assert found.verdict.fastest == "mps"
    assert mlx.ratio.value < 1  # shown all the same
    reason = "MLX compiled is WRONG: its losses are not those of the others: the training loss at iterations "
    assert reason in found.verdict.sentence
    markdown = show.markdown(contents.report(found))
    assert "MLX compiled (WRONG): its losses are not those of the others" in markdown
    assert "Its times do not count." in markdown
    assert "2 others, 30 iterations, at most" in markdown
    again = Comparison.parse(json.loads(json.dumps(found.document())), "comparison.json")
    assert (again.named("mlx").state, again.named("mlx").losses) == (mlx.state, mlx.losses)


def test_two_that_disagree_are_in_doubt_and_none_is_fastest(tmp_path):
    found = collected(tmp_path / "c", [CPU, MLX], "mlx")
    assert {variant.state.value for variant in found.variants} == {"in doubt"}
    assert found.verdict.fastest is None
    assert "CPU eager is not ranked: one of the two is wrong, and nothing here shows which" in found.verdict.sentence
    assert "No configuration can be called fastest" in found.verdict.sentence
    assert "CPU eager (in doubt)" in show.markdown(contents.report(found))
    board = [Entry(v, found.work, found.machine, None, tmp_path, None) for v in found.variants]
    assert all(entry.unranked().startswith("in doubt: one of the two is wrong") for entry in board)


def test_variants_that_agree_are_ranked_and_other_work_is_left_alone(tmp_path):
    lever = {"base": "mps", "key": "model.dropout", "value": 0.0, "what": "no dropout"}
    dry = MPS | {"name": "dry", "label": "dry", "lever": lever, "model": {"dropout": 0.0}}
    peer = MLX | {"name": "peer", "label": "a peer"}
    found = collected(tmp_path / "c", [CPU, MLX, MPS, dry], "dry")
    assert {v.name: v.losses.state.value for v in found.variants} == {
        "cpu": "agree", "mlx": "agree", "mps": "agree", "dry": "not compared",
    }  # fmt: skip
    assert found.verdict.fastest == "mlx"
    assert 0 < found.named("cpu").losses.share < 1
    folder = tmp_path / "peer"
    collected(folder, [CPU, MPS, peer], "peer")
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    plan["variants"][2]["script"] = "a/peers/train.py"  # which draws batches of its own
    path.write_text(json.dumps(plan))
    assert collect(folder).named("peer").losses.state == "not compared"


def test_a_run_that_diverged_alone_is_wrong_not_failed(tmp_path):
    folder = write_comparison(tmp_path / "c", [CPU, MLX], 1, 30, 0.004, 1, evaluations=0)
    path = folder / "rounds/0-mlx/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if '"iteration"' in line][:9]
    path.write_text("".join(json.dumps(row | {"loss": "nan"} if row["iter"] == 8 else row) + "\n" for row in rows))
    for name, change in (
        ("summary", {"exit_state": "diverged"}),
        ("outcome", {"state": "failed", "reason": "iter 8: loss is nan"}),
    ):
        path = folder / f"rounds/0-mlx/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = collect(folder)
    assert (found.named("cpu").state, found.named("mlx").state) == ("ok", "wrong")
    assert "the training loss at iteration 8 of round 0 is nan, of CPU eager 4." in found.named("mlx").reason


# -- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_faults_planted_in_real_runs(tmp_path_factory, monkeypatch):
    """A tiny model's 150 iterations at a constant rate, on a CPU in torch and, where it is there, in MLX."""
    from nanogpt_mac.backends import kinds
    from nanogpt_mac.backends.torch_backend import TorchBackend
    from nanogpt_mac.compare import runs
    from nanogpt_mac.gpt.torch_gpt import GPT
    from nanogpt_mac.train import session

    step, wait = TorchBackend.step, TorchBackend.wait
    data = tmp_path_factory.mktemp("data")

    def run(dropout, dtype, name="cpu"):
        config = Config(max_iters=150, batch_size=4, eval_interval=150, eval_iters=5, decay_lr=False, dtype=dtype)
        config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size = 2, 2, 32, 32
        config.model.dropout, config.backend.name, config.compile, config.gemm_seconds = dropout, name, False, 0.0
        config.data.name, config.data.dir, config.wandb.mode = "stand_in", str(data), "disabled"
        config.checkpoint, config.sample_tokens = False, 0
        config.run_dir = str(tmp_path_factory.mktemp("run") / "r")
        assert session.run(config) == 0
        return replace(runs.read(Path(config.run_dir)), outcome=Outcome(variant=name, round=0, state="done"))

    def late_rate(self, starts, lr):  # from the 30th on
        self.count = getattr(self, "count", 0) + 1
        return step(self, starts, lr if self.count < 30 else 0.0)

    faults = {
        "a rate 10 % too high": (TorchBackend, "step", lambda self, starts, lr: step(self, starts, 1.1 * lr)),
        "no update after 30": (TorchBackend, "step", late_rate),
        "weights frozen": (TorchBackend, "step", lambda self, starts, lr: step(self, starts, 0.0)),
        "loss 1 % too high": (TorchBackend, "wait", lambda self, h: (lambda loss, n: (1.01 * loss, n))(*wait(self, h))),
        "evaluates in training mode": (GPT, "eval", lambda self: self.train()),
        "no dropout": (GPT, "train", lambda self, mode=True: torch.nn.Module.train(self, False)),
    }
    shares = {}
    for dropout, dtype in ((0.0, "float32"), (0.2, "float32"), (0.2, "bfloat16")):
        clean = {name: run(dropout, dtype, name) for name in ("cpu", "mlx") if kinds.missing(name) is None}
        if len(clean) == 2:
            assert states(**clean) == {"cpu": "agree", "mlx": "agree"}
        other = clean.get("mlx", clean["cpu"])
        for what, (place, name, changed) in faults.items():
            if dropout == 0 and place is GPT:  # where there is no dropout, its faults compute the same
                continue
            with monkeypatch.context() as patch:
                patch.setattr(place, name, changed)
                faulty = run(dropout, dtype)
            shares[what, dropout, dtype] = compared(faulty, other).share
    print("\n".join(f"{key}: {share:.3g} of the limit" for key, share in shares.items()))
    missed = {key for key, share in shares.items() if share <= 1}
    assert missed <= {  # a model so small learns so slowly that masks hide what the larger ones show
        ("a rate 10 % too high", 0.2, "float32"),
        ("a rate 10 % too high", 0.2, "bfloat16"),
        ("no dropout", 0.2, "float32"),
        ("no dropout", 0.2, "bfloat16"),
        ("evaluates in training mode", 0.2, "bfloat16"),
    }
