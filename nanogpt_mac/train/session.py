"""One run of train.py: check, build, train, record. Nothing is left behind by a run that could not start."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Backend, Tokens
from nanogpt_mac.backends.generate import generate
from nanogpt_mac.config import Config, backend_options, validate
from nanogpt_mac.corpus import Corpus
from nanogpt_mac.fallbacks import detect as fallbacks
from nanogpt_mac.fallbacks import report
from nanogpt_mac.files import run_folder, write_json
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.machine import chips, energy, gemm, probe
from nanogpt_mac.records.fallbacks import Fallbacks
from nanogpt_mac.records.run import (
    CorpusFacts,
    Denominators,
    Ending,
    Environment,
    ExitState,
    ModelFacts,
    ProcessTimes,
    RunFacts,
)
from nanogpt_mac.train import checkpoint, display
from nanogpt_mac.train.loop import Loop
from nanogpt_mac.train.recorder import Recorder, Work
from nanogpt_mac.train.sinks import Folder, open_wandb
from nanogpt_mac.train.source import Source, corpus_of, open_source

REFUSED = 3  # under fallbacks=error


def run(config: Config) -> int:
    """Train as `config` says; the process's exit code.

    0; 1 diverged; 3 under fallbacks=error, where work leaves the GPU; 130/143 after SIGINT/SIGTERM.
    """
    # What can be wrong is found out before anything is written.
    validate(config)
    name = kinds.resolve(config.backend.name)
    options = backend_options(config, name, kinds.resolve_compile(config.compile, name))
    corpus = corpus_of(config)
    source = open_source(config, corpus)
    config = replace(config, model=ModelConfig(**asdict(source.spec)))  # what is recorded is what runs
    tokens = Tokens({"train": corpus.train, "val": corpus.val}, source.spec.block_size)
    backend = kinds.create(source.spec, options, tokens)
    backend.restore(source.state)

    # What leaves the GPU is looked for before training, and may forbid it.
    label = f"{name}-compile" if options.compile else name
    found = _look_for_fallbacks(config, source.spec, backend)
    if found and config.fallbacks == "error" and (found.findings or not found.complete):
        path = run_folder(config.run_dir, label) / "fallbacks.json"
        write_json(path, found.document())
        display.say(f"stopped: operators leave the GPU (fallbacks=error); see {path}")
        return REFUSED

    # The measured peak and the machine's facts belong to the run, but not to its clock.
    work = _work(config, source.spec, backend)
    environment = probe.environment(kinds.frameworks())
    folder = run_folder(config.run_dir, label)
    facts = _facts(config, corpus, source, backend)
    session = Session(config, corpus, tokens, source, backend, work, folder, facts, found)
    with _signals() as stop, probe.awake():
        code = session.train(environment, stop)
    if code == 0 and config.sample_tokens:
        session.sample()
    display.say(f"{('finished', 'diverged')[code] if code < 2 else 'stopped'}: {folder}")
    return code


@dataclass(frozen=True)
class Session:
    """Everything that one run is made of, ready to train; `config` has the sizes of `source`'s model."""

    config: Config
    corpus: Corpus
    tokens: Tokens
    source: Source
    backend: Backend
    work: Work
    folder: Path
    facts: RunFacts
    fallbacks: Fallbacks | None

    def train(self, environment: Mapping[str, object], stop: list[int]) -> int:
        """Train and record; the exit code. `stop` receives the signal that asks for the end."""
        config, start = self.config, self.source.state.iteration
        wandb = open_wandb(config, self.folder, self.facts)  # may refuse, and then nothing has been written yet
        screen = display.make(config.max_iters, config.log_interval, start)
        recorder = Recorder(self.work, [Folder(self.folder), wandb, screen])
        self._write_inputs(environment)
        if self.fallbacks is not None:
            recorder.fallbacks(self.fallbacks, start)
        self._announce(screen)
        loop = Loop(
            config,
            self.backend,
            self.tokens,
            recorder,
            save=self.save if config.checkpoint else None,
            stop=lambda: stop[0] if stop else None,
            best=self.source.best,
        )
        meter = energy.EnergyMeter()
        meter.start()
        state, error = ExitState.FAILED, None
        try:
            state = loop.train(start)
        except BaseException as raised:
            error = "".join(traceback.format_exception_only(raised)).strip()
            raise
        finally:
            screen.close()
            ending = Ending(
                exit_state=state,
                signal=signal.Signals(stop[0]).name if stop else None,
                error=error,
                resumed_at=start or None,
                process=ProcessTimes.model_validate(probe.process_times()),
                energy=meter.stop(),
                fallbacks=self.fallbacks.counts() if self.fallbacks else None,
            )
            recorder.summary(self.facts, ending)
            recorder.close()
        return 128 + stop[0] if stop else int(state is not ExitState.FINISHED)

    def save(self, best: float, is_best: bool) -> None:
        """Write a checkpoint of the back end's state; `best` is the lowest validation loss so far."""
        meta = {
            "spec": asdict(self.source.spec),
            "config": asdict(self.config),
            "corpus": self.facts.corpus_facts.model_dump(),
            "encoder": self.corpus.encoder.to_json(),
            "best_val_loss": best if np.isfinite(best) else None,
            "cwd": str(Path.cwd()),
            "written_by": {key: getattr(self.facts, key) for key in ("backend", "device", "compile", "dtype")},
        }
        checkpoint.save(self.folder / "ckpt", self.backend.state(), meta, is_best)

    def sample(self) -> None:
        """Text drawn from the model as it is now, on the console and in sample.txt."""
        encoder, prompt = self.corpus.encoder, [int(self.corpus.val[0])]
        length, seed = self.config.sample_tokens, self.config.seed
        drawn = generate(self.backend, self.source.spec, prompt, length, 0.8, 200, seed, encoder.vocab_size)
        text = encoder.decode(list(drawn))
        (self.folder / "sample.txt").write_text(text, encoding="utf-8")
        display.say(f"--- a sample (temperature 0.8)\n{text}\n---")

    def _write_inputs(self, environment: Mapping[str, object]) -> None:
        """.hydra/ as Hydra would leave it, and env.json."""
        self.config.write_hydra(self.folder)
        # As an `Environment`, but not checked: whatever a machine answers, its run goes on.
        made = {"schema": Environment.SCHEMA, **environment, "backend": self.facts.model_dump()}
        write_json(self.folder / "env.json", made)

    def _announce(self, screen: display.Lines) -> None:
        facts, work, source = self.facts, self.work, self.source
        how = "compiled" if facts.compile else "not compiled"
        screen.say(f"{facts.backend} ({facts.device}), {how}, {facts.dtype}, corpus: {facts.corpus} -> {self.folder}")
        screen.say(
            f"{facts.parameters / 1e6:.2f} M parameters, {work.tokens} tokens and {work.flops / 1e9:.3g} GFLOP per "
            f"iteration, from {source.description} at iteration {source.state.iteration}"
        )
        if chip := work.peaks.mfu:
            screen.say(f"mfu: share of this chip's {chip / 1e12:.2f} TFLOP/s")
        elif measured := work.peaks.mfu_measured:
            screen.say(f"mfu: share of the best matmul measured here, {measured / 1e9:.0f} GFLOP/s")


def _look_for_fallbacks(config: Config, spec: GPTSpec, backend: Backend) -> Fallbacks | None:
    """What leaves the GPU in this run's iterations, looked for in a child process; None where there is no detector."""
    if not backend.capabilities.detector:
        if "fallbacks" in config.named:  # in a sweep over back ends, say
            display.say(f"fallbacks= applies to MPS only; ignored on {backend.options.name}")
        return None
    if config.fallbacks == "off":
        return None
    if sys.stdout.isatty():
        display.say("looking for fallbacks in a child process (fallbacks=off skips it)")
    found = fallbacks.check(config, spec, "train" in backend.details["resident_data"])
    display.say(report.text(found))
    return found


def _work(config: Config, spec: GPTSpec, backend: Backend) -> Work:
    """What an iteration computes, and its three denominators; the measured one is measured here, off the clock."""
    tokens = config.gradient_accumulation_steps * config.batch_size * spec.block_size
    flops = float(spec.flops_per_token() * tokens)
    chip, measured = probe.chip(), None
    if backend.capabilities.simulated:  # its speed says nothing about any Mac
        return Work(flops, tokens, Denominators())
    if config.gemm_seconds > 0:
        shapes = spec.matmul_shapes(config.batch_size)
        measured = gemm.measure(backend, config.dtype, shapes, config.gemm_seconds).flops_per_s
        backend.reset_peak_memory()
    on_chip = chip is not None and backend.capabilities.accelerator
    peak = chips.peak(chip, config.dtype, config.matmul_precision) if chip is not None and on_chip else None
    return Work(flops, tokens, Denominators(mfu=peak, mfu_measured=measured, mfu_a100=chips.A100_BF16))


def _facts(config: Config, corpus: Corpus, source: Source, backend: Backend) -> RunFacts:
    """What identifies this run's work and how it is computed: in every record."""
    return RunFacts(
        backend=backend.options.name,
        device=backend.device_name,
        compile=backend.options.compile,
        dtype=config.dtype,
        matmul_precision=config.matmul_precision,
        sync=config.sync,
        seed=config.seed,
        details=backend.details,
        capabilities=backend.capabilities,
        model=ModelFacts(**asdict(source.spec)),
        parameters=source.spec.n_params(),
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_iters=config.max_iters,
        corpus=corpus.label,
        corpus_facts=CorpusFacts(name=corpus.name, label=corpus.label, sha256=corpus.sha256, stand_in=corpus.stand_in),
        init_from=source.description,
    )


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
