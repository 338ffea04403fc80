"""One run of train.py: check, build, train, record. Nothing is left behind by a run that could not start."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Backend, Tokens
from nanogpt_mac.backends.generate import generate
from nanogpt_mac.config import Config, backend_options, validate
from nanogpt_mac.corpus import Corpus, prepare
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.machine import chips, energy, gemm, probe
from nanogpt_mac.train import checkpoint, display
from nanogpt_mac.train.loop import Loop
from nanogpt_mac.train.recorder import Recorder, Work, make_folder, write_json
from nanogpt_mac.train.source import Source, open_source


def run(config: Config) -> int:
    """Train as `config` says; the process's exit code.

    0; 1 diverged; 3 under fallbacks=error, where work leaves the GPU; 130/143 after SIGINT/SIGTERM.
    """
    validate(config)
    name = kinds.resolve(config.backend.name)
    compiled = kinds.resolve_compile(config.compile, name)
    corpus = prepare(config.data)
    source = open_source(config, corpus)
    config.model = ModelConfig(**dataclasses.asdict(source.spec))  # what is recorded is what runs
    options = backend_options(config, name, compiled)
    tokens = Tokens({"train": corpus.train, "val": corpus.val}, source.spec.block_size)
    backend = kinds.create(source.spec, options, tokens)
    backend.restore(source.state)
    looked_for = backend.capabilities.detector and config.fallbacks != "off"
    fallbacks = _fallbacks(config, source.spec, backend) if looked_for else None
    if not backend.capabilities.detector and "fallbacks" in config.given:  # in a sweep over back ends, say
        display.say(f"fallbacks={config.fallbacks}: they are MPS's; there are none on {name}")
    label = f"{name}-compile" if compiled else name
    if fallbacks and config.fallbacks == "error" and (fallbacks["findings"] or not fallbacks["complete"]):
        folder = make_folder(config.run_dir, label)
        write_json(folder / "fallbacks.json", fallbacks)
        display.say(f"not trained, because of fallbacks=error: {folder / 'fallbacks.json'}")
        return 3
    work = _work(config, source.spec, backend)
    environment = probe.environment()
    folder = make_folder(config.run_dir, label)
    with _signals() as stop, probe.awake():
        code = _train(config, corpus, source, backend, work, environment, folder, stop, fallbacks)
    if code == 0 and config.sample_tokens:
        _sample(config, corpus, source.spec, backend, folder)
    display.say(f"{('finished', 'diverged')[code] if code < 2 else 'stopped'}: {folder}")
    return code


def _train(
    config: Config,
    corpus: Corpus,
    source: Source,
    backend: Backend,
    work: Work,
    environment: dict[str, Any],
    folder: Path,
    stop: list[int],
    fallbacks: dict[str, Any] | None,
) -> int:
    facts = _facts(config, corpus, source, backend)
    recorder = Recorder(folder, work, _wandb(config, folder, facts))
    _write_inputs(folder, config, environment | {"backend": facts})
    screen = display.make(config.max_iters, config.log_interval, source.state.iteration)
    start = source.state.iteration
    if fallbacks is not None:
        recorder.fallbacks(fallbacks, start)
    _announce(screen, folder, source, facts, work)

    def save(best: float, is_best: bool) -> None:
        meta = {
            "spec": dataclasses.asdict(source.spec),
            "config": dataclasses.asdict(config),
            "corpus": facts["corpus_facts"],
            "encoder": corpus.encoder.to_json(),
            "best_val_loss": best if np.isfinite(best) else None,
            "written_by": {key: facts[key] for key in ("backend", "device", "compile", "dtype")},
        }
        checkpoint.save(folder / "ckpt", backend.state(), meta, is_best)

    loop = Loop(
        config,
        backend,
        {"train": len(corpus.train), "val": len(corpus.val)},
        source.spec.block_size,
        recorder,
        screen,
        save if config.checkpoint else None,
        lambda: stop[0] if stop else None,
        _machine_facts,
        source.best,
    )
    meter = energy.EnergyMeter()
    meter.start()
    state, error = "failed", None
    try:
        state = loop.train(start)
    except BaseException as raised:
        error = "".join(traceback.format_exception_only(raised)).strip()
        raise
    finally:
        screen.close()
        signal_name = signal.Signals(stop[0]).name if stop else None
        ending = {"exit_state": state, "signal": signal_name, "error": error, "resumed_at": start or None}
        times = probe.process_times()
        left = {key: len(fallbacks[key]) for key in ("findings", "why_incomplete")} if fallbacks is not None else None
        recorder.summary({**facts, **ending, "process": times, "energy": meter.stop(), "fallbacks": left})
        recorder.close()
    if stop:
        return 128 + stop[0]
    return 0 if state == "finished" else 1


def _fallbacks(config: Config, spec: GPTSpec, backend: Backend) -> dict[str, Any]:
    """What leaves the GPU in this run's iterations, looked for in a child process and put on the console."""
    from nanogpt_mac.fallbacks import detect as runtime  # which imports this module's backend_options
    from nanogpt_mac.fallbacks import report

    if sys.stdout.isatty():
        display.say("looking for fallbacks in a child process (fallbacks=off leaves it out)")
    found = runtime.check(config, spec, "train" in backend.details["resident_data"])
    display.say(report.text(found))
    return found


def _work(config: Config, spec: GPTSpec, backend: Backend) -> Work:
    """What an iteration computes, and its three denominators; the measured one is measured here, off the clock."""
    tokens = config.gradient_accumulation_steps * config.batch_size * spec.block_size
    flops = float(spec.flops_per_token() * tokens)
    chip, measured = probe.chip(), None
    if backend.capabilities.simulated:  # its speed says nothing about any Mac
        return Work(flops, tokens, dict.fromkeys(("mfu", "mfu_measured", "mfu_a100")))
    if config.gemm_seconds > 0:
        shapes = spec.matmul_shapes(config.batch_size)
        measured = gemm.measure(backend, config.dtype, shapes, config.gemm_seconds).flops_per_s
        backend.reset_peak_memory()
    on_chip = chip is not None and backend.capabilities.accelerator
    peaks = {
        "mfu": chips.peak(chip, config.dtype, config.matmul_precision) if chip is not None and on_chip else None,
        "mfu_measured": measured,
        "mfu_a100": chips.A100_BF16,
    }
    return Work(flops, tokens, peaks)


def _facts(config: Config, corpus: Corpus, source: Source, backend: Backend) -> dict[str, Any]:
    """What identifies this run's work and how it is computed: in every record."""
    return {
        "backend": backend.options.name,
        "device": backend.device_name,
        "compile": backend.options.compile,
        "dtype": config.dtype,
        "matmul_precision": config.matmul_precision,
        "sync": config.sync,
        "seed": config.seed,
        "details": backend.details,
        "capabilities": dataclasses.asdict(backend.capabilities),
        "model": dataclasses.asdict(source.spec),
        "parameters": source.spec.n_params(),
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_iters": config.max_iters,
        "corpus": corpus.label,
        "corpus_facts": {
            "name": corpus.name,
            "label": corpus.label,
            "sha256": corpus.sha256,
            "stand_in": corpus.stand_in,
        },
        "init_from": source.description,
    }


def _write_inputs(folder: Path, config: Config, environment: dict[str, Any]) -> None:
    """.hydra/ as Hydra would leave it, and env.json."""
    from hydra.core.hydra_config import HydraConfig

    hydra_folder = folder / ".hydra"
    hydra_folder.mkdir(exist_ok=True)
    (hydra_folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    if HydraConfig.initialized():
        overrides = list(HydraConfig.get().overrides.task)
        (hydra_folder / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    write_json(folder / "env.json", environment)


def _wandb(config: Config, folder: Path, facts: dict[str, Any]) -> Any:
    if config.wandb.mode == "disabled":
        return None
    import wandb

    w = config.wandb
    try:
        return wandb.init(
            project=w.project,
            entity=w.entity,
            group=w.group,
            name=w.name or folder.name,
            tags=[*w.tags, facts["backend"], facts["corpus"]],
            mode=cast(Any, w.mode),  # validate() has checked it
            dir=folder,
            config=dataclasses.asdict(config) | {"facts": facts},
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
    except wandb.errors.Error as error:
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        with suppress(OSError):  # a folder of the user's own may hold other things
            folder.rmdir()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"wandb.mode={w.mode}: {reason}; allowed without an account are offline and disabled"
        ) from error


def _announce(screen: display.Lines, folder: Path, source: Source, facts: dict[str, Any], work: Work) -> None:
    how = "compiled" if facts["compile"] else "not compiled"
    screen.say(
        f"{facts['backend']} ({facts['device']}), {how}, {facts['dtype']}, corpus: {facts['corpus']} -> {folder}"
    )
    screen.say(
        f"{facts['parameters'] / 1e6:.2f} M parameters, {work.tokens} tokens and {work.flops / 1e9:.3g} GFLOP an "
        f"iteration, from {source.description} at iteration {source.state.iteration}"
    )
    measured, chip = work.peaks["mfu_measured"], work.peaks["mfu"]
    if chip:
        screen.say(f"mfu: share of this chip's {chip / 1e12:.2f} TFLOP/s")
    elif measured:
        screen.say(f"mfu: share of the best matmul measured here, {measured / 1e9:.0f} GFLOP/s")


def _machine_facts() -> dict[str, Any]:
    return {
        "power_source": probe.power_source(),
        "thermal_state": probe.thermal_state(),
        "gpu_utilisation": probe.gpu_utilisation(),
    }


def _sample(config: Config, corpus: Corpus, spec: GPTSpec, backend: Backend, folder: Path) -> None:
    prompt = [int(corpus.val[0])]
    symbols = corpus.encoder.vocab_size
    drawn = generate(backend, spec, prompt, config.sample_tokens, 0.8, 200, config.seed, symbols)
    text = corpus.encoder.decode(list(drawn))
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    display.say(f"--- a sample (temperature 0.8)\n{text}\n---")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask for the end after the iteration under way; a second one ends at once."""
    received: list[int] = []

    def handle(signum: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        print(f"\n{signal.Signals(signum).name}: finishing this iteration, then a checkpoint", flush=True)

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
