"""Comparison folders without training: what train.py and compare.py would have left, with times of our choosing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import yaml

from nanogpt_mac.config import Config
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.machine.chips import A100_BF16
from nanogpt_mac.records.run import Denominators, Ending, RunFacts
from nanogpt_mac.train.clock import Completion
from nanogpt_mac.train.recorder import Recorder, Work
from nanogpt_mac.train.sinks import Folder

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

MAC = {
    "os": "Darwin",
    "os_version": "24.6.0",
    "macos_version": "15.6",
    "machine": "arm64",
    "python": "3.12.4",
    "chip": "Apple M4 Pro",
    "cpu_cores": 14,
    "cpu_core_kinds": {"Performance": 10, "Efficiency": 4},
    "gpu": "Apple M4 Pro",
    "gpu_cores": 20,
    "gpu_driver": None,
    "memory_bytes": 24 * 2**30,
    "power_source": "ac",
    "low_power_mode": False,
    "thermal_state": "nominal",
    "versions": {"torch": "2.13.0", "mlx": "0.32.4", "numpy": "2.4.6", "nanogpt-mac": "0.1.0"},
    "git": {"commit": "0" * 40, "dirty": False},
    "problems": [],
}
LINUX = MAC | {
    "os": "Linux",
    "os_version": "6.18.0",
    "macos_version": None,
    "machine": "x86_64",
    "chip": "AMD EPYC",
    "cpu_cores": 2,
    "cpu_core_kinds": None,
    "gpu": None,
    "gpu_cores": None,
    "power_source": None,
    "low_power_mode": None,
    "thermal_state": None,
}

VARIANTS = [
    {"name": "mps", "label": "MPS eager", "backend": "mps", "device": "mps", "compile": False, "ms": 260.0},
    {"name": "mps-compile", "label": "MPS compiled", "backend": "mps", "device": "mps", "compile": True, "ms": 330.0},
    {"name": "cpu", "label": "CPU eager", "backend": "cpu", "device": "cpu", "compile": False, "ms": 2100.0},
    {"name": "mlx", "label": "MLX compiled", "backend": "mlx", "device": "metal", "compile": True, "ms": 190.0},
]
"""Four variants of a Mac, ready for write_comparison; the times are invented."""


def write_comparison(
    folder: Path, variants: list[dict], rounds: int, iters: int, noise: float, seed: int, **options
) -> Path:
    """Write a complete comparison folder and return it. Rounds count from 0, as plan.py's do.

    Each variant is a dict; only `name` is needed:
    - label, backend, device, compile, dtype, overrides, lever, ranks, alone: as in plan.json (guessed from the name)
    - ms: median iteration time (100); first_s, first_warm_s: first iteration, cold and warm
    - drift: slower by this share at the end of each run; creep: the same from the first round to the last
    - outliers: share of iterations that take 3 times as long
    - fail: {round: state} with "failed", "timeout", "oom", "missing_op", "skipped", or one state for all rounds
    - parity: "pass", "fail", "error", or None to leave it out; eval_s; peak_memory; energy (watts or None)
    - config: changes to the run's config (top level), model: changes to its sizes

    `noise`: log standard deviation of a round's level; iterations have 1 % of their own and a heavy tail.
    Options: machine (env.json, MAC), experiment (None), corpus ("shakespeare_char"), stand_in (False), gate (True),
    pilot (True), evaluations (2 a run), levers (any variant has one), stop_after (runs written),
    recipe (plan.json's, or None), measured_peak (FLOP/s or None), config and model (changes for all variants).
    """
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    variants = [_filled(variant) for variant in variants]
    order = [[r, variants[w]["name"]] for r in range(rounds) for w in rng.permutation(len(variants))]
    plan = {
        "schema": 2,
        "version": "0.1.0",
        "created": "2026-02-03T10:00:00",
        "variants": [
            {key: variant[key] for key in ("name", "label", "overrides", "lever", "ranks", "alone")}
            for variant in variants
        ],
        "rounds": rounds,
        **{
            key: {variant["name"]: value for variant in variants}
            for key, value in (("iters", iters), ("warmup", 5), ("share", 1.0))
        },
        "order": order,
        "asked": {"rounds": None, "iters": None},
        "missing": {},
        "cwd": str(folder),
        "stall_seconds": 600.0,
        "overrides": [],
        "experiment": options.get("experiment"),
        "seed": seed,
        "budget_minutes": 10.0,
        "levers": options.get("levers", any(variant["lever"] for variant in variants)),
        "gate": {"parity": options.get("gate", True), "time_wrong": True},
        "recipe": options.get("recipe", {"max_iters": 5000, "eval_interval": 250, "eval_iters": 200}),
    }
    _json(folder / "plan.json", plan)
    if options.get("gate", True):
        _parity(folder, variants)
    for variant in variants:
        if variant["device"] == "mps":
            _json(folder / "fallbacks" / f"{variant['name']}.json", {"schema": 1, "fallbacks": [], "exit_state": "ok"})
    by_name = {variant["name"]: variant for variant in variants}
    if options.get("pilot", True):
        for variant in variants:
            if variant["fail"].get(0) != "skipped":
                _run(folder / "rounds" / f"pilot-{variant['name']}", variant, 12, 0.0, rng, options | {"cold": True})
                _outcome(folder / "rounds" / f"pilot-{variant['name']}", variant, None, "done", 0)
    level = {variant["name"]: rng.normal(0, noise, rounds) for variant in variants}
    for position, (r, name) in enumerate(order[: options.get("stop_after")]):
        variant, run = by_name[name], folder / "rounds" / f"{r}-{name}"
        run.mkdir(parents=True, exist_ok=True)
        state = variant["fail"].get(r, "done")
        if state == "done":
            creep = variant["creep"] * r / max(rounds - 1, 1)
            _run(run, variant, iters, level[name][r] + np.log1p(creep), rng, options)
        (run / "log.txt").write_text("a log\n" if state == "done" else f"Traceback\nRuntimeError: {state}\n")
        _outcome(run, variant, r, state, position)
    return folder


def _filled(variant: dict) -> dict:
    name = variant["name"]
    backend = variant.get("backend", name.split("-")[0])
    backend = backend if backend in ("cpu", "mps", "mlx", "cuda") else "cpu"
    compiled = variant.get("compile", "compile" in name)
    device = variant.get("device", {"mlx": "metal"}.get(backend, backend))
    overrides = [f"backend={backend}", f"compile={str(compiled).lower()}"]
    fail = variant.get("fail", {})
    defaults = {
        "label": name,
        "backend": backend,
        "device": device,
        "compile": compiled,
        "dtype": "float32",
        "overrides": overrides,
        "lever": None,
        "ranks": 1,
        "alone": None,
        "ms": 100.0,
        "first_s": 4.0 if compiled else 0.5,
        "first_warm_s": 1.5 if compiled else 0.3,
        "drift": 0.0,
        "creep": 0.0,
        "outliers": 0.0,
        "parity": "pass",
        "eval_s": 0.8,
        "peak_memory": 1_500_000_000,
        "energy": None,
        "config": {},
        "model": {},
    }
    return defaults | variant | {"fail": fail if isinstance(fail, dict) else dict.fromkeys(range(1000), fail)}


def _config(variant: dict, iters: int, options: dict) -> Config:
    config = Config(max_iters=iters, dtype=variant["dtype"], compile=variant["compile"], gemm_seconds=0.0)
    config.backend.name = variant["backend"]
    config.model.vocab_size = 65
    config.data.name = options.get("corpus", "shakespeare_char")
    config.eval_interval = max(iters // max(options.get("evaluations", 2) - 1, 1), 1)
    if options.get("evaluations", 2) == 0:
        config.eval_interval = 0
    for key, value in {**options.get("config", {}), **variant["config"]}.items():
        setattr(config, key, value)
    for key, value in {**options.get("model", {}), **variant["model"]}.items():
        setattr(config.model, key, value)
    return config


def _run(folder: Path, variant: dict, iters: int, level: float, rng: np.random.Generator, options: dict) -> None:
    """One run folder, written by the recorder itself, so that it has the format of the day."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(variant, iters, options)
    spec = GPTSpec(**dataclasses.asdict(config.model))
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(
        yaml.dump(dataclasses.asdict(config), Dumper=DUMPER, sort_keys=False)
    )
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.dump(variant["overrides"], Dumper=DUMPER))
    stand_in = options.get("stand_in", False)
    corpus = "stand-in" if stand_in else config.data.name
    facts = {
        "backend": variant["backend"],
        "device": variant["device"],
        "compile": variant["compile"],
        "dtype": config.dtype,
        "matmul_precision": config.matmul_precision,
        "sync": config.sync,
        "seed": config.seed,
        "details": {"fused_adamw": True, "resident_data": ["train", "val"]},
        "model": dataclasses.asdict(spec),
        "parameters": spec.n_params(),
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_iters": config.max_iters,
        "corpus": corpus,
        "corpus_facts": {"name": corpus, "label": corpus, "sha256": "86c4e6aa" * 8, "stand_in": stand_in},
        "init_from": "scratch",
    }
    _json(folder / "env.json", options.get("machine", MAC) | {"backend": facts})

    tokens = config.batch_size * config.gradient_accumulation_steps * spec.block_size
    simulated = variant["device"] == "simulated-mps"
    peaks: dict = dict.fromkeys(("mfu", "mfu_measured", "mfu_a100"))
    if not simulated:
        best = 1.6e3 * spec.flops_per_token() * tokens / variant["ms"]  # an MFU of about 60 %
        measured = options.get("measured_peak", best) if options.get("cold") else None
        peaks = {"mfu": None, "mfu_measured": measured, "mfu_a100": A100_BF16}
        if variant["device"] in ("mps", "metal") and options.get("machine", MAC)["gpu"] == "Apple M4 Pro":
            peaks["mfu"] = 8.08e12
    recorder = Recorder(Work(float(spec.flops_per_token() * tokens), tokens, Denominators(**peaks)), [Folder(folder)])
    memory = {"current": variant["peak_memory"] // 2, "peak": variant["peak_memory"]}
    jitter = 0.01 * rng.standard_t(4, iters) / np.sqrt(2)
    slower = np.log1p(variant["drift"] * np.arange(iters) / max(iters - 1, 1))
    times = variant["ms"] * np.exp(level + jitter + slower)
    times[rng.random(iters) < variant["outliers"]] *= 3
    first = 1e3 * (variant["first_s"] if options.get("cold") else variant["first_warm_s"])
    count = 0
    for i in range(iters + 1):
        if (config.eval_interval and i % config.eval_interval == 0) or (config.eval_interval and i == iters):
            loss = 4.28 * np.exp(-i / 700)
            recorder.evaluation(i, float(loss), float(loss + 0.01), variant["eval_s"] * (1.4 if count == 0 else 1.0))
            recorder.event("pause", i, power_source="ac", thermal_state="nominal", gpu_utilisation=None)
            count += 1
        if i == iters:
            break
        left_out = "first" if i == 0 else "warmup" if i <= 5 else None
        done = Completion(
            i,
            float(4.28 * np.exp(-i / 700) + 0.01 * rng.normal()),
            1.0 + 0.1 * rng.random(),
            first if i == 0 else float(times[i]),
            float(0.1 * times[i]),
            left_out,
        )
        recorder.iteration(done, 1e-3, memory)
    seconds = (first + times[1:].sum()) / 1e3
    energy = None
    if variant["energy"] is not None:
        energy = {"joules": variant["energy"] * seconds, "gpu_joules": None, "cpu_joules": None}
        energy |= {"source": "zeus-apple-silicon", "seconds": seconds}
    ending = {"exit_state": "finished", "signal": None, "error": None, "resumed_at": None}
    process = {"wall": seconds + 3, "user": 2.0, "system": 1.0, "max_rss_bytes": 600_000_000}
    recorder.summary(RunFacts(**facts), Ending(**ending, process=process, energy=energy))
    recorder.close()


def _outcome(folder: Path, variant: dict, r: int | None, state: str, position: int) -> None:
    reasons = {"timeout": "no end within 60 s", "oom": "out of memory", "missing_op": "aten::foo is not there"}
    document = {
        "schema": 2,
        "variant": variant["name"],
        "round": "pilot" if r is None else r,
        "state": state,
        "code": {"done": 0, "timeout": None, "skipped": None}.get(state, 1),
        "reason": None if state == "done" else reasons.get(state, f"RuntimeError: {state}"),
        "seconds": 5.0,
        "started": f"2026-02-03T{10 + position // 60:02d}:{position % 60:02d}:00",
        "heat": None,
    }
    _json(folder / "outcome.json", document)


def _parity(folder: Path, variants: list[dict]) -> None:
    shape = {"full": {"batch": 4, "block_size": 256, "accumulation": 1}}
    limits = {"logits": 1e-4, "loss": 1e-5, "gradients": 1e-3, "weights after 3 steps": 1e-3, "causality": 0.0}
    entries = {}
    for variant in variants:
        state = variant["parity"]
        if state is None:
            continue
        checks = [
            {
                "quantity": quantity,
                "value": limit * (30 if state == "fail" and quantity == "gradients" else 0.1),
                "limit": limit,
                "pass": not (state == "fail" and quantity == "gradients"),
                "worst": "transformer.h.0.attn.c_attn.weight" if quantity == "gradients" else "largest",
            }
            for quantity, limit in limits.items()
        ]
        reason = {"fail": "gradients: 0.03, allowed 0.001", "error": "RuntimeError: the check crashed"}.get(state)
        entry = {"state": state, "reason": reason, "device": variant["device"], "seconds": 3.0}
        entries[variant["name"]] = entry | {"checks": [] if state == "error" else checks}
    document = {
        "schema": 2,
        "reference": "torch float64, CPU",
        "shape": shape,
        "seconds": 12.0,
        "tolerances": [
            {"dtype": "float32", "quantity": q, "limit": limit, "reason": "rounding"} for q, limit in limits.items()
        ],
        "variants": entries,
    }
    _json(folder / "parity.json", document)


def _json(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def outcomes(runner):
    """Folder of a run -> (state, reason), of a comparison under way."""
    found = {path.parent.name: json.loads(path.read_text()) for path in runner.folder.glob("rounds/*/outcome.json")}
    return {name: (o["state"], o["reason"]) for name, o in found.items()}


def started(runner):
    """The runs that the fake scripts were started for, in order."""
    file = runner.folder.parent / "starts.txt"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
