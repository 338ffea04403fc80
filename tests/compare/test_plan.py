"""What a comparison will do: variants as they are written, the work that all share, levers, rounds and their order."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest

from nanogpt_mac import cli, corpus
from nanogpt_mac.backends.kinds import KINDS
from nanogpt_mac.compare import plan as plans
from nanogpt_mac.compare.config import CompareConfig, entries, validate
from nanogpt_mac.compare.variants import KNOWN, Machine, parse, unique
from nanogpt_mac.errors import InputError
from nanogpt_mac.measure.rounds import COUNTED, FEWEST, MOST_ITERS, Cost, drawn_order, schedule
from nanogpt_mac.overrides import merged
from nanogpt_mac.records.plan import Plan, Variant
from nanogpt_mac.train import source

EXTRAS = {name: "not installed" for name in KINDS if name not in ("mps", "cuda", "mlx", "cpu")}


def machine(missing=(), **devices):
    """A machine with these back ends on these devices."""
    return Machine(dict(missing) | EXTRAS, {name: KINDS[name].on(device) for name, device in devices.items()})


NO_CUDA, NO_MPS = ("cuda", "no CUDA"), ("mps", "no MPS")
MAC = machine([NO_CUDA], mps="mps", mlx="metal", cpu="cpu")
LINUX = machine([NO_MPS, NO_CUDA], mlx="cpu", cpu="cpu")
SIMULATED = machine([NO_CUDA], mps="simulated-mps", mlx="cpu", cpu="cpu")
CUDA = machine([NO_MPS, ("mlx", "no MLX")], cuda="cuda", cpu="cpu")


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make("variants=[cpu]", ...) -> plan.json and configs, on a machine that is told; without any corpus."""

    def build(*overrides, machine=LINUX, stand_in=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(plans, "look_around", lambda: machine)
        monkeypatch.setattr(plans.kinds, "missing", machine.missing.get)
        monkeypatch.setattr(corpus, "prepare", lambda data: SimpleNamespace(stand_in=stand_in))
        monkeypatch.setattr(source, "open_source", lambda config, corpus: None)
        config = cli.compose(overrides, "compare")
        validate(config)
        return plans.make(config)

    return build


def names(made):
    return [variant.name for variant in made[0].variants]


# -- variants ----------------------------------------------------------------------------------------------------------


def test_every_variant_of_a_machine(make):
    assert names(make()) == ["mlx", "mlx-eager", "cpu", "cpu-compile"]
    everything = ["mps", "mps-compile", "mlx", "mlx-eager", "cpu", "cpu-compile"]
    assert names(make(machine=MAC)) == everything
    document, configs = make(machine=SIMULATED)
    assert [variant.label for variant in document.variants][:2] == [
        "MPS eager",
        "MPS compiled",
    ]
    notes = {variant.name: variant.note for variant in document.variants}
    assert (notes["mps"], notes["mlx"], notes["cpu"]) == ("simulated", "CPU", "")
    found = {name: (config.backend.name, config.compile, config.backend.blas) for name, config in configs.items()}
    assert found["mps-compile"] == ("mps", True, "auto")
    assert found["mlx-eager"] == ("mlx", False, "auto")
    assert document.missing == {"cuda": "no CUDA"} | EXTRAS
    written = Plan.parse(json.loads(json.dumps(document.document())), "plan.json")
    assert written.model_copy(update={"schema_": document.schema_}) == document
    assert plans.configs_of(document) == configs


def test_variants_are_narrowed_by_name_back_end_and_compilation(make):
    assert names(make("variants=[cpu,mlx]")) == ["cpu", "mlx"]
    assert names(make("variants=cpu")) == ["cpu"]
    assert names(make("variants=[cpu-eager,mlx-compile]")) == ["cpu", "mlx"]  # in full
    assert names(make("backend=cpu")) == ["cpu", "cpu-compile"]
    assert names(make("backend=mlx", "compile=true", machine=MAC)) == ["mlx"]
    assert names(make("compile=false", machine=MAC)) == ["mps", "mlx-eager", "cpu"]


def test_variants_with_overrides_of_their_own(make):
    texts = '["cpu","cpu backend.fused_adamw=false","mps compile=true dtype=bfloat16","cpu",mlx-eager]'
    document, configs = make(f"variants={texts}", "dtype=float16", machine=SIMULATED)
    assert names((document,)) == ["cpu", "cpu-fused_adamw-false", "mps-compile-dtype-bfloat16", "cpu-2", "mlx-eager"]
    labels = [variant.label for variant in document.variants]
    assert labels[1:4] == [
        "CPU eager, backend.fused_adamw=false",
        "MPS compiled, dtype=bfloat16",
        "CPU eager (2)",
    ]
    assert configs["cpu-fused_adamw-false"].backend.fused_adamw is False
    assert configs["mps-compile-dtype-bfloat16"].dtype == "bfloat16"  # its own before everybody's
    assert configs["mps-compile-dtype-bfloat16"].compile is True
    assert configs["cpu"].dtype == configs["mlx-eager"].dtype == "float16"
    assert configs["cpu"] == configs["cpu-2"]


def test_every_variant_by_several_processes_too(make):
    plan, configs = make("variants=[cpu,mlx]", "ranks=[1,2,4]", "gradient_accumulation_steps=8")
    assert [v.name for v in plan.variants] == ["cpu", "mlx", "cpu-x2", "mlx-x2", "cpu-x4", "mlx-x4"]
    assert [(v.ranks, v.alone) for v in plan.variants[2:]] == [(2, "cpu"), (2, "mlx"), (4, "cpu"), (4, "mlx")]
    assert plan.variants[2].label == "CPU eager, 2 processes"
    assert configs["cpu-x2"] == configs["cpu"]  # the same work, which the ranks share


def test_names_are_unique_whatever_is_written():
    variants = [
        parse(text, LINUX) for text in ("cpu", "cpu", "cpu", "mlx compile=false", "mlx-eager", "cpu compile=auto")
    ]
    named = [variant.name for variant in unique([*variants, Variant(name="cpu-2", label="x")])]
    assert named == ["cpu", "cpu-2", "cpu-3", "mlx-eager", "mlx-eager-2", "cpu-4", "cpu-2-2"]


def test_ranks_of_what_trains_in_one_process_are_refused(make, monkeypatch):
    monkeypatch.setitem(KINDS, "cpu", dataclasses.replace(KINDS["cpu"], world=""))
    with pytest.raises(InputError, match=r"^ranks=2: these variants train in one process; use some of "):
        make("variants=[cpu]", "ranks=2", "gradient_accumulation_steps=2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["variants=[gpu]"], r"variants=\[gpu\]: unknown variant gpu; use one of mlx, mlx-eager, cpu, cpu-compile"),
        (["variants=[mps]"], r"variants=\[mps\]: not available here: no MPS\. Available: mlx"),
        (["backend=cuda"], "backend=cuda: not available here: no CUDA"),
        (['variants=["cpu compile"]'], "compile: use settings of train.py after cpu, as key=value"),
        (['variants=["cpu max_iters=3"]'], "max_iters=3: use settings of train.py after cpu"),
        (['variants=["cpu nonsense=3"]'], "nonsense=3: there is no such key"),
        (['variants=["cpu dtype=int8"]'], "dtype=int8: use float32"),
        (['variants=["cpu compile=maybe"]'], "compile=maybe: use auto, true or false"),
        (
            ['variants=[cpu,"cpu batch_size=3"]'],
            "batch_size=3: all variants do the same work; use batch_size=3 for all of them",
        ),
        (['variants=["cpu model.n_layer=2",mlx]'], r"model\.n_layer=2: all variants do the same work"),
        (["variants=[]"], r"variants=\[\]: use a list such as"),
        (["variants=[1]"], r"variants=\[1\]: use a list"),
        (["variants=[cpu]", "backend=mlx"], "backend=mlx: leaves none of the variants cpu; leave it out"),
        (["max_iters=100"], "max_iters=100: a comparison decides this itself: use iters=N"),
        (["wandb.mode=online"], "wandb.mode=online: a comparison decides this itself"),
        (["init_from=resume"], "init_from=resume: a comparison starts its runs from the same weights"),
        (["run=somewhere", "rounds=3"], "rounds=3: run=somewhere goes on as it was planned; use run= alone"),
        (["rounds=0"], "rounds=0: must be at least 1"),
        (["iters=7"], "iters=7: must be at least 8"),
        (["budget_minutes=0"], "budget_minutes=0.0: must be more than 0"),
        (["budget_minutes=nan"], "budget_minutes=nan: must be more than 0"),
        (["iters=3", "timing_warmup=0"], "iters=3: must be at least 4"),
        (["cooldown_seconds=-1"], "cooldown_seconds=-1.0: must be at least 0 and finite"),
        (["stall_seconds=0"], "stall_seconds=0.0: must be at least 1"),
        (["levers=true", "variants=[cpu]"], r"variants=\['cpu'\]: levers=true chooses its own"),
        (["levers=true", "compile=true"], "compile=true: levers=true tries both; use backend=NAME to narrow them"),
        (["chip=[]"], r"chip=\[\]: use a name such as m4-max"),
        (["parity=false", "time_wrong=true"], "time_wrong=true: parity=false does not look"),
        (["ranks=[2,0]"], r"ranks=\[2, 0\]: use a number of processes"),
        (["ranks=two"], "ranks=two: use a number of processes"),
        (
            ["ranks=3", "gradient_accumulation_steps=4"],
            "ranks=3: 3 processes cannot share gradient_accumulation_steps=4",
        ),
        (["ronds=3"], "ronds=3: there is no such key; did you mean rounds"),
        (["batch_size=0"], "batch_size=0: must be at least 1"),
        (["rounds=many"], "rounds=many: "),
    ],
)
def test_bad_input_is_one_line(make, overrides, words):
    with pytest.raises(InputError, match=words) as caught:
        make(*overrides)
    assert "\n" not in str(caught.value)


# -- the work ---------------------------------------------------------------------------------------------------------


def test_what_a_newcomer_types_reaches_every_run(make):
    document, configs = make(
        "experiment=quick",
        "dtype=bfloat16",
        "variants=[cpu,mlx]",
        "batch_size=8",
        "data=text",
        "data.path=f.txt",
        "seed=5",
    )
    assert "variants=[cpu,mlx]" not in document.overrides
    assert document.experiment == "quick"
    assert not document.quick_by_default
    assert document.seed == 5
    for config in configs.values():
        assert (config.dtype, config.batch_size, config.model.n_layer, config.seed) == ("bfloat16", 8, 4, 5)
        assert (config.data.name, config.data.path) == ("text", "f.txt")
    assert document.recipe.model_dump() == {"max_iters": 2000, "eval_interval": 250, "eval_iters": 20}


def test_the_full_recipe_needs_an_accelerator(make):
    def layers(*overrides, machine):
        document, configs = make(*overrides, "variants=[cpu]", machine=machine)
        return document.experiment, document.quick_by_default, next(iter(configs.values())).model.n_layer

    assert layers(machine=LINUX) == ("quick", True, 4)
    assert layers(machine=SIMULATED) == ("quick", True, 4)
    assert layers(machine=MAC) == (None, False, 6)
    assert layers(machine=CUDA) == (None, False, 6)
    assert layers("experiment=full", machine=LINUX) == (None, False, 6)
    assert layers("model=gpt2", machine=LINUX) == (None, False, 12)  # quick would have overridden its sizes
    assert layers("model.n_layer=2", machine=LINUX) == ("quick", True, 2)


def test_without_a_network_all_runs_are_told_to_take_the_stand_in(make):
    document, configs = make("data.url=http://nowhere.invalid/x", "data_dir=elsewhere", stand_in=True)
    assert {config.data.name for config in configs.values()} == {"stand_in"}
    assert {config.data.dir for config in configs.values()} == {"elsewhere"}
    assert not any("url" in override for override in document.overrides)


def test_merged_keeps_the_last_of_each_key():
    assert merged(["a=1", "b=2"], ["a=3", "+c=1"], ["c=2"]) == ["b=2", "a=3", "c=2"]


def test_entries():
    assert entries(None) is None
    assert entries("cpu") == ["cpu"]


def test_a_comparisons_schema_has_every_key_of_a_run():
    from nanogpt_mac.config import Config

    assert {f.name for f in dataclasses.fields(Config)} <= {f.name for f in dataclasses.fields(CompareConfig)}


# -- levers -----------------------------------------------------------------------------------------------------------


def flat(config):
    found = {}
    for key, value in dataclasses.asdict(config).items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return found


@pytest.mark.parametrize(("machine", "overrides"), [(MAC, []), (CUDA, []), (LINUX, ["dtype=bfloat16"])])
def test_a_lever_changes_one_thing_on_its_base(make, machine, overrides):
    document, configs = make("levers=true", *overrides, machine=machine)
    assert len(configs) > 6
    for variant in document.variants:
        lever = variant.lever
        if lever is None:
            continue
        base, changed = flat(configs[lever.base]), flat(configs[variant.name])
        differ = {key for key in base if base[key] != changed[key] and key != "given"}
        assert differ == {lever.key}
        assert changed[lever.key] == lever.value
        assert lever.what
    bases = {variant.lever.base for variant in document.variants if variant.lever}
    assert bases == {variant.name for variant in document.variants if variant.lever is None}


def test_levers_are_those_with_an_effect(make):
    def of(machine, backend, *overrides):
        document, _ = make("levers=true", f"backend={backend}", *overrides, machine=machine)
        levers = [variant.lever for variant in document.variants if variant.lever]
        return {(lever.key, lever.value) for lever in levers if lever.key != "matmul_precision"}

    dropout, again = ("model.dropout", 0.0), ("checkpointing", True)
    waits = {("sync", "iteration"), ("sync", "interval")}
    halves, loop = {("dtype", "bfloat16"), ("dtype", "float16")}, ("backend.fused_adamw", False)
    assert of(MAC, "mps") == {("compile", True), loop, *waits, *halves, again, dropout}
    assert of(MAC, "mlx") == {("compile", False), *waits, *halves, again, dropout}
    assert of(MAC, "cpu") == {("compile", True), loop, ("dtype", "bfloat16"), again, dropout}
    assert of(LINUX, "mlx") == {("compile", False), ("backend.blas", "own"), again, ("model.dropout", 0.2)}
    modes = {("backend.compile_mode", "reduce-overhead")}
    modes |= {("backend.cuda_graph", False), ("backend.own_kernels", False)}
    assert of(CUDA, "cuda") == {("compile", False), loop, *waits, *halves, again, dropout, *modes}
    document, _ = make("levers=true", machine=MAC)
    assert {v.name for v in document.variants if v.lever and v.lever.key == "compile"} == {
        "mps-compile",
        "mlx-eager",
        "cpu-compile",
    }
    assert document.budget_minutes > 9  # so many variants take longer


def test_precision_is_a_lever_where_products_change(make, monkeypatch):
    from nanogpt_mac.backends import torch_choices

    def of(machine, backend, *overrides):
        document, _ = make("levers=true", f"backend={backend}", *overrides, machine=machine)
        levers = [variant.lever for variant in document.variants if variant.lever]
        return [lever.value for lever in levers if lever.key == "matmul_precision"]

    assert of(CUDA, "cuda") == of(MAC, "mlx") == ["high"]
    assert of(MAC, "mps") == of(LINUX, "mlx") == of(CUDA, "cuda", "dtype=bfloat16") == []
    assert of(MAC, "mps", "matmul_precision=high") == ["highest"]
    for changes in (True, False):
        monkeypatch.setattr(torch_choices, "products_round", lambda changes=changes: changes)
        assert of(LINUX, "cpu") == (["medium"] if changes else [])


# -- rounds and order -------------------------------------------------------------------------------------------------

LINUX_COSTS = {"cpu": Cost(4.5, 0.04, 1), "cpu-compile": Cost(8, 0.035, 8), "mlx": Cost(7, 0.11, 1)}
MAC_COSTS = {"mps": Cost(5, 0.3, 2), "mps-compile": Cost(15, 0.35, 20), "mlx": Cost(3, 0.25, 2), "cpu": Cost(5, 2, 13)}


def cost_of(made, costs, pause=0.0):
    """The schedule's own arithmetic, written the other way round: run by run."""
    seconds = 0.0
    for number in range(made.count):
        for name, rounds in made.rounds.items():
            if number in rounds:
                seconds += pause + costs[name].start_s + made.iters[name] * costs[name].iteration_s
                seconds += costs[name].evaluation_s if number == 0 else 0
    return seconds


@pytest.mark.parametrize("costs", [LINUX_COSTS, MAC_COSTS])
@pytest.mark.parametrize("budget", [400, 1000, 3600])
def test_a_schedule_fits_its_budget_and_uses_it(costs, budget):
    made = schedule(costs, budget, pause_s=1.0)
    assert made.seconds == pytest.approx(cost_of(made, costs, 1.0))
    assert 0.8 * budget < made.seconds <= budget
    assert all(rounds[0] == 0 and sorted(set(rounds)) == rounds for rounds in made.rounds.values())
    assert all(len(rounds) >= FEWEST for rounds in made.rounds.values())


def test_rounds_come_before_long_runs():
    counts = [schedule(LINUX_COSTS, budget).count for budget in (60, 200, 300, 400, 3600)]
    assert counts == sorted(counts)
    assert counts[0] == FEWEST
    assert 8 <= counts[3] <= 12


def test_slow_variants_take_part_in_fewer_rounds_and_have_fewer_iterations():
    costs = {"fast": Cost(2, 0.1), "slow": Cost(5, 8.0)}
    made = schedule(costs, 600)
    assert len(made.rounds["slow"]) < len(made.rounds["fast"])
    assert made.iters["slow"] < made.iters["fast"]
    assert made.warmup == {"fast": 5, "slow": 1}
    assert made.iters["fast"] >= 1 + 5 + COUNTED


def test_rounds_and_iterations_that_are_asked_for_are_obeyed_where_they_fit():
    made = schedule(MAC_COSTS, 10_000, rounds=4, iters=9)
    assert set(map(tuple, made.rounds.values())) == {(0, 1, 2, 3)}
    assert set(made.iters.values()) == {9}
    assert schedule(LINUX_COSTS, 10_000, rounds=7).count == 7
    assert set(schedule(LINUX_COSTS, 10_000, iters=30).iters.values()) == {30}
    assert schedule({"tiny": Cost(1, 1e-4)}, 10_000).iters["tiny"] == MOST_ITERS


def test_the_order_is_drawn_but_the_same_for_a_seed():
    rounds = {"a": list(range(20)), "b": list(range(20)), "c": [0, 10]}
    drawn = drawn_order(rounds, 1)
    assert drawn == drawn_order(rounds, 1) != drawn_order(rounds, 2)
    assert [number for number, _ in drawn] == sorted(number for number, _ in drawn)
    for number in range(20):
        assert sorted(name for n, name in drawn if n == number) == (
            ["a", "b", "c"] if number in (0, 10) else ["a", "b"]
        )
    firsts = [next(name for n, name in drawn if n == number) for number in range(20)]
    assert 3 < firsts.count("a") < 17
    state = random.getstate()
    drawn_order(rounds, 1)
    assert random.getstate() == state


def test_every_known_variant_has_a_label_and_a_back_end():
    assert {backend for backend, _, _ in KNOWN.values()} == set(KINDS)
    assert len({label for _, _, label in KNOWN.values()}) == len(KNOWN)


# -- the command ------------------------------------------------------------------------------------------------------


def test_bad_input_leaves_nothing_behind(command, tmp_path):
    done = command("compare.py", "dtype=int8", "data=stand_in", "variants=[cpu]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "compare.py: dtype=int8: use float32, bfloat16 or float16\n"
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_framework(command):
    done = command("compare.py", "--help")
    assert done.returncode == 0
    assert "variants=[cpu,mlx]" in done.stdout
    assert "cooldown_seconds: 1.0" in done.stdout


@pytest.mark.slow
def test_a_whole_comparison(command, tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(random.Random(1).choices("abcdefgh \n", k=20_000)))
    work = ["experiment=smoke", "data=text", f"data.path={corpus}"]
    done = command("compare.py", *work, "variants=[cpu,mlx]", "rounds=5", "iters=20", timeout=900)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*/*-compare")
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["complete"]
    assert comparison["verdict"]["sentence"]
    assert {
        variant["name"]: (variant["state"], variant["parity"], variant["runs"]) for variant in comparison["variants"]
    } == {
        "cpu": ("ok", "pass", 5),
        "mlx": ("ok", "pass", 5),
    }
    losses = {variant["name"]: {s["round"]: s["loss"] for s in variant["series"]} for variant in comparison["variants"]}
    assert losses["cpu"][0] == pytest.approx(losses["mlx"][0], abs=2e-3)  # the same weights and batches
    assert "CPU eager" in (folder / "report.md").read_text()
    assert "<html" in (folder / "report.html").read_text()
    (folder / "report.md").unlink()
    again = command("compare.py", f"run={folder}")
    assert again.returncode == 0
    assert (folder / "report.md").exists()


def test_the_floor_of_a_chip_that_is_not_here_runs_nothing(command, tmp_path):
    done = command("compare.py", "chip=[m1,m4-max]")
    assert done.returncode == 0, done.stderr
    assert "ARITHMETIC" in done.stdout
    assert "444.2" in done.stdout  # 1162.6 GFLOP at 2.617 TFLOP/s
    assert list(tmp_path.iterdir()) == []
    unknown = command("compare.py", "chip=m99")
    assert (unknown.returncode, unknown.stderr.startswith("compare.py: chip=m99: use one of m1, ")) == (2, True)
