"""What the gate reads off a back end: a fault in each quantity moves that quantity and is named, in this process."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from fakes.support import options as options_of

from nanogpt_mac.backends import kinds
from nanogpt_mac.corpus import prepare
from nanogpt_mac.gpt.spec import GPTSpec, TrainState
from nanogpt_mac.parity import cases, check, reference, tolerances
from nanogpt_mac.parity import readings as parts

pytestmark = pytest.mark.xdist_group("parity")


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    made = tmp_path_factory.mktemp("reference")
    check.make_reference(config, made)
    return made


def readings(config, folder):
    found = check.check_variant(config, folder)
    assert found.device == "cpu"
    return {c.quantity: c for c in found.checks}


# -- the reference's files --------------------------------------------------------------------------------------------


def test_the_reference_is_written_as_the_formulas_have_it(config, folder):
    corpus = prepare(config.data)
    spec = GPTSpec(**json.loads((folder / "spec.json").read_text()))
    for case in cases.cases(config, spec):
        figures = json.loads((folder / f"{case.name}.json").read_text())
        draw = case.spec.init_weights if case.name == "full" else lambda seed, s=case.spec: cases.drawn_weights(s, seed)
        weights, tokens = draw(config.seed), cases.tokens_of(corpus, case)
        starts = [cases.windows(corpus, case, config, step) for step in range(3)]
        batches = [np.stack([tokens.windows("train", some) for some in step]) for step in starts]
        recipe = reference.Recipe(config.weight_decay, config.beta1, config.beta2, case.clip)
        start = reference.tensors(weights)
        trained = reference.train(start, case.spec, recipe, batches, [1e-3, 2e-3, 1.5e-3])
        assert (figures["losses"], figures["norms"]) == (trained.losses, trained.norms)
        assert figures["grad_clip"] == trained.grad_clip == case.clip * trained.norms[0]
        first = torch.from_numpy(np.unique(batches[0][0], axis=0).astype(np.int64))
        with np.load(folder / f"{case.name}.npz") as arrays:
            looked_at = reference.tensors(cases.drawn_weights(case.spec, config.seed))
            exact = reference.logits(looked_at, case.spec, first[:, :-1]).detach().numpy()
            np.testing.assert_allclose(arrays["logits"], exact, rtol=1e-6, atol=1e-6)
            asked = cases.probe(corpus, case, config)
            x, y = (torch.from_numpy(a.astype(np.int64)) for a in (asked.idx, asked.targets))
            loss = torch.nn.functional.cross_entropy(
                reference.logits(looked_at, case.spec, x).flatten(0, 1), y.flatten()
            )
            loss.backward()
            assert figures["probe_loss"] == pytest.approx(loss.item(), rel=1e-12)
            for name, p in looked_at.items():
                np.testing.assert_allclose(arrays[f"probe/{name}"], p.grad.numpy(), rtol=1e-5, atol=1e-9)
            for name, w in weights.items():
                np.testing.assert_array_equal(arrays[f"weights/{name}"], w)
                moved = (trained.weights[name] - start[name]).detach().numpy()
                np.testing.assert_allclose(arrays[f"change/{name}"], moved, rtol=1e-6)
                np.testing.assert_allclose(arrays[f"gradients/{name}"], trained.gradients[name].numpy(), rtol=1e-6)
                np.testing.assert_allclose(arrays[f"size/{name}"] ** 2, trained.exp_avg_sq[name].numpy(), 1e-5, 1e-30)
        w, losses = reference.tensors(cases.drawn_weights(case.spec, config.seed)), []
        for some in np.array(figures["val_starts"]):
            window = torch.from_numpy(tokens.windows("val", some).astype(np.int64))
            scores = reference.logits(w, case.spec, window[:, :-1])
            losses.append(torch.nn.functional.cross_entropy(scores.flatten(0, 1), window[:, 1:].flatten()).item())
        assert figures["val_loss"] == pytest.approx(np.mean(losses), rel=1e-12)


# -- readings ---------------------------------------------------------------------------------------------------------


def test_a_sound_back_end_is_read_in_every_quantity(config, folder):
    found = readings(config, folder)
    limits = tolerances.limits("float32", "highest")
    assert list(found) == list(limits)
    for quantity, one in found.items():
        assert one.passed
        assert one.limit >= limits[quantity]  # raised where there are few numbers to average over
        assert (one.value > 0) == ("causality" not in quantity), quantity  # rounding is seen, so it is looked at
        assert one.worst.endswith(("(full)", "(odd)"))


class Faulty:
    """A back end with something wrong: `fault` is a method's name and what to do with its result."""

    def __init__(self, backend, **faults):
        self._backend, self._faults = backend, faults

    def __getattr__(self, name):
        own = getattr(self._backend, name)
        fault = self._faults.get(name)
        return own if fault is None else lambda *given: fault(own(*given), *given)


def scaled(factor, part):
    """A state with one tensor of one kind off by a factor."""
    kind, name = part

    def change(state: TrainState):
        if state.iteration:
            getattr(state, kind)[name] = getattr(state, kind)[name] * np.float32(factor)
        return state

    return change


DRIFT = (1 + 3e-6 * i for i in itertools.count())
WTE, BIAS = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias"
FAULTS = {
    "logits 1 % off": ({"logits": lambda x, _: x * np.float32(1.01)}, {"logits", "logits, factor", "evaluation"}),
    "one logit off": (
        {"logits": lambda x, _: x + np.float32(1e-3) * (np.arange(x.size) == 5).reshape(x.shape)},
        {"logits"},
    ),
    "evaluation off": ({"evaluate": lambda x, *_: x * (1 + 1e-4)}, {"loss", "evaluation"}),
    "an evaluation that does not repeat": ({"evaluate": lambda x, *_: next(DRIFT) * x}, {"evaluation"}),
    "loss off": ({"wait": lambda x, _: (x[0] * (1 - 1e-4), x[1])}, {"loss"}),
    "moment off": ({"state": scaled(1.001, ("exp_avg", BIAS))}, {"gradients", "gradients, factor", "update rule"}),
    "second moment off": ({"state": scaled(1.01, ("exp_avg_sq", BIAS))}, {"update rule"}),
    "weights off": ({"state": scaled(1.001, ("weights", WTE))}, {"update rule", "weights after 3 steps"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen_in_its_own_quantity(config, folder, monkeypatch, name):
    faults, expected = FAULTS[name]
    create = kinds.create
    monkeypatch.setattr(kinds, "create", lambda *given: Faulty(create(*given), **faults))
    found = readings(config, folder)
    wrong = {quantity for quantity, one in found.items() if not one.passed}
    assert wrong >= expected
    assert wrong - expected <= {"causality"}  # which compares with what may have been changed
    for quantity in expected & {"update rule", "gradients", "weights after 3 steps"}:
        part = faults["state"].__closure__
        assert any(
            found[quantity].worst.startswith(cell.cell_contents) for cell in part if isinstance(cell.cell_contents, str)
        )


def test_norms_of_the_first_step_and_of_later_ones_are_two_quantities(config, folder, monkeypatch):
    create = kinds.create
    # Case full does its first step twice, to see whether its bits are the same: then steps 2 and 3 are calls 3 and 4.
    for wrong_step, quantity in ((0, "gradient norm"), (3, "gradient norm, later steps")):
        seen = []

        def wait(result, handle, seen=seen, wrong_step=wrong_step):
            seen.append(handle)
            return result[0], result[1] * (1.02 if len(seen) - 1 == wrong_step else 1)

        monkeypatch.setattr(kinds, "create", lambda *given, wait=wait: Faulty(create(*given), wait=wait))
        found = readings(config, folder)
        assert not found[quantity].passed
        assert found[quantity].value == pytest.approx(0.02, rel=0.05)
        if wrong_step:
            assert found[quantity].worst == "step 3 (full)"
            assert found["gradient norm"].passed


def test_a_figure_that_is_no_number_fails(config, folder, monkeypatch):
    create = kinds.create
    nan = {"evaluate": lambda *_: float("nan")}
    monkeypatch.setattr(kinds, "create", lambda *given: Faulty(create(*given), **nan))
    loss = readings(config, folder)["loss"]
    assert not loss.passed
    assert loss.worst == "evaluation (full)"


def test_dropout_is_the_runs_where_nothing_may_drop(config, folder, monkeypatch):
    """The steps take the path of dropout in case odd and drop nothing; logits and evaluations have the run's own."""
    made = []
    create = kinds.create

    def looking(spec, options, tokens):
        made.append((spec.dropout, options.grad_clip > 0))
        return create(spec, options, tokens)

    monkeypatch.setattr(kinds, "create", looking)
    dropping = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2))
    assert all(one.passed for one in readings(dropping, folder).values())
    assert made == [(1e-12, True), (0.2, True), (1e-12, True), (0.2, True)]


class Leaky:
    """Each token sees the next one, in one row of the batch only; `noise` differs from call to call."""

    def __init__(self, row, noise=0.0):
        self.row, self.noise, self.calls, self.rng = row, noise, [], np.random.default_rng(0)

    def logits(self, idx):
        self.calls.append(idx)
        out = np.zeros((*idx.shape, 2), np.float32) + self.noise * self.rng.random((*idx.shape, 2))
        out[self.row, :-1, 0] += idx[self.row, 1:]
        return out


IDX = np.array([[0, 5, 5, 3], [4, 4, 9, 0], [2, 2, 2, 1]])


@pytest.mark.parametrize("row", [0, 2])
def test_causality_is_the_largest_change_before_each_rows_own_token(row):
    leaky, at = Leaky(row), np.array([3, 1, 2])
    found = parts.causality(leaky, IDX, leaky.logits(IDX), at)
    assert (found.value, found.worst) == (1.0, f"before token {at[row]}")
    assert (leaky.calls[1] - IDX).tolist() == [[0, 0, 0, -1], [0, -1, 0, 0], [0, 0, -1, 0]]
    none = Leaky(slice(0, 0))
    assert parts.causality(none, IDX, none.logits(IDX), at).value == 0.0
    assert len(none.calls) == 2
    assert cases.changed(IDX, np.array([0, 3, 0]))[:, [0, 3]].tolist() == [[1, 3], [4, 1], [1, 1]]  # never below 0


def test_what_varies_by_itself_is_no_leak():
    for leaky, expected in ((Leaky(slice(0, 0), 1e-3), 0.0), (Leaky(1, 1e-3), 1.0)):
        found = parts.causality(leaky, IDX, leaky.logits(IDX), np.array([3, 2, 2]))
        assert found.value == pytest.approx(expected, abs=2e-3)
        assert len(leaky.calls) == 3


def test_a_step_that_differs_from_itself_is_not_deterministic(config, folder, monkeypatch):
    assert check.check_variant(config, folder).deterministic is True
    create, calls = kinds.create, []

    def state(result):
        calls.append(result)
        scaled(1 + 1e-6 * (len(calls) % 2), ("exp_avg", WTE))(result)
        return result

    monkeypatch.setattr(kinds, "create", lambda *given: Faulty(create(*given), state=state))
    found = check.check_variant(config, folder)
    assert (found.deterministic, found.varies) == (False, WTE)
    assert all(one.passed for one in found.checks)  # it is said, and nothing fails for it


def test_differences_and_factors_are_those_of_vectors():
    a, b = np.array([[3.0, 4.0]]), np.array([[3.0, 0.0]])
    assert parts.difference(a, b) == (pytest.approx(4 / 3), pytest.approx(0.0))
    assert parts.difference(1.01 * b, b) == (pytest.approx(0.01), pytest.approx(0.01))
    assert parts.difference(a, 0 * b) == (5.0, 0.0)
    assert parts.difference(a, b, least=8.0) == (pytest.approx(0.5), pytest.approx(0.0))
    assert parts.relative(0.9, -1.0) == pytest.approx(1.9)
    assert parts.relative(3.0, 2.0) == 0.5


def test_the_update_rule_is_adamws():
    """Against torch's own optimizer in float64, three steps of a matrix and a vector."""
    options = options_of("cpu", weight_decay=0.3, beta1=0.8, beta2=0.9)
    rng = np.random.default_rng(0)
    p = {n: torch.from_numpy(rng.standard_normal(s)).requires_grad_() for n, s in (("m", (3, 2)), ("v", (4,)))}
    groups = [{"params": [p["m"]], "weight_decay": 0.3}, {"params": [p["v"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))

    def state():
        moments = {n: optimizer.state.get(w, {"exp_avg": 0 * w, "exp_avg_sq": 0 * w}) for n, w in p.items()}
        trees = [{n: moments[n][k].detach().numpy().copy() for n in p} for k in ("exp_avg", "exp_avg_sq")]
        return TrainState({n: w.detach().numpy().copy() for n, w in p.items()}, *trees)

    before = state()
    for step in (1, 2, 3):
        for w in p.values():
            w.grad = torch.from_numpy(rng.standard_normal(w.shape))
        optimizer.step()
        after = state()
        found = list(parts.update_rule(options, before, after, 0.01, step))
        assert [r.worst for r in found] == [f"m, step {step}", f"v, step {step}"]
        assert all(r.value < 1e-12 for r in found)
        before = after


def test_queries_keys_and_values_are_read_apart():
    case = cases.Case("full", GPTSpec(2, 1, 2, 4, 3), 1, 1, 0.5)
    rng = np.random.default_rng(0)
    names = [f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)] + ["transformer.ln_f.weight"]
    exact = {n: rng.standard_normal((6, 2) if "attn" in n else (2,)) for n in names}
    off = np.repeat([1.0, 1.02, 1.0], 2)[:, None]  # the keys of layer 1
    ours = {n: g * (off if n == names[1] else 1.0) for n, g in exact.items()}
    arrays = {f"gradients/{n}": g for n, g in exact.items()}
    found = list(parts.gradients_off(case, ours, arrays, "gradients"))
    each = {r.worst: r.value for r in found if r.quantity == "gradients"}
    assert each[names[0]] == pytest.approx(0, abs=1e-12)
    keys = np.linalg.norm(0.02 * exact[names[1]][2:4]) / np.linalg.norm(exact[names[1]])
    assert each[names[1]] == pytest.approx(keys)
    factors = {r.worst: r.value for r in found if r.quantity == "gradients, factor"}
    kind = "transformer.h.*.attn.c_attn.weight"
    assert factors == pytest.approx({f"{kind} q": 0, f"{kind} k": 0.01, f"{kind} v": 0, names[2]: 0}, abs=1e-9)
    assert {r.of for r in found if r.quantity == "gradients, factor"} == {2, 8}
    odd = list(parts.gradients_off(dataclasses.replace(case, name="odd"), ours, arrays, "gradients"))
    assert {r.quantity for r in odd} == {"gradients"}


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_gradients_are_those_of_the_step_whatever_its_clip(config, tmp_path, clip):
    """The reference sets the clip by the gradient's norm, so here another one binds, or does not, or is off."""
    check.make_reference(config, tmp_path)
    for path in tmp_path.glob("[fo]*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"grad_clip": clip}))
    assert readings(config, tmp_path)["gradients"].passed


def test_every_reading_of_every_case(config, folder):
    """What is read, in order: three losses, one norm of the first step, a rule for each tensor a step."""
    corpus = prepare(config.data)
    spec = GPTSpec(**json.loads((folder / "spec.json").read_text()))
    names = list(spec.shapes())
    full, odd = cases.cases(config, spec)
    for case in (full, odd, dataclasses.replace(full, steps=1)):
        file = case.name
        figures = check.Figures.model_validate_json((folder / f"{file}.json").read_bytes())
        given = options_of("cpu", grad_clip=figures.grad_clip)
        backend = kinds.create(case.spec, given, cases.tokens_of(corpus, case))
        with np.load(folder / f"{file}.npz") as arrays:
            found = [
                (r.quantity, r.worst)
                for r in check.Held(config, corpus, case, backend, backend, arrays, figures).readings()
            ]

        def of(quantity, found=found):
            return [worst for q, worst in found if q == quantity]

        steps = [f"step {i + 1}" for i in range(case.steps)]
        is_full = case.name == "full"
        assert of("loss") == (["evaluation"] if is_full else []) + ["probe"] + steps
        assert of("gradient norm") == [None]
        assert of("gradient norm, later steps") == (steps[1:] if is_full else [])
        assert of("weights after 3 steps") == names
        assert of("gradients") == [f"{name}, probe" for name in names] + names
        assert len(of("gradients, factor")) == (
            12 + 2 + 4 if is_full else 0
        )  # a block's tensors, q k v apart, and others
        assert of("update rule") == [f"{name}, {step}" for step in steps for name in names]


def test_the_child_answers_for_a_reference_and_for_a_variant(config, tmp_path):
    task = {"config": dataclasses.asdict(config), "folder": str(tmp_path)}
    made = check.answer(task | {"role": "reference"})
    assert made["shape"]["full"] == {"batch": 3, "block_size": 16, "accumulation": 1, "windows": 3}
    checks = check.answer(task | {"role": "variant"})["checks"]
    assert [one["pass"] for one in checks] == [True] * len(tolerances.limits("float32", "highest"))


@pytest.mark.parametrize("clip", [0.5, None])
def test_the_references_losses_are_means_over_micro_batches(clip):
    spec = GPTSpec(1, 2, 16, 12, 20)
    start = reference.tensors(cases.drawn_weights(spec, 2))
    batches = [np.random.default_rng(i).integers(0, 20, (3, 2, 13)) for i in range(2)]
    batches[0][1] = batches[0][0]  # a row that is there twice counts twice
    trained = reference.train(start, spec, reference.Recipe(0.1, 0.9, 0.99, clip), batches, [1e-2, 1e-2])
    idx = torch.from_numpy(batches[0].reshape(6, 13))
    loss = torch.nn.functional.cross_entropy(
        reference.logits(start, spec, idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()
    )
    assert trained.losses[0] == pytest.approx(loss.item(), rel=1e-12)
    assert len(trained.losses) == 2
    assert trained.grad_clip == (0.5 * trained.norms[0] if clip else 0.0)
