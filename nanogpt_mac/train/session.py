"""One run of train.py: check, build, train, record. Nothing is left behind by a run that could not start."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from nanogpt_mac import memory, ranks, signals
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import Backend, BackendOptions, Tokens
from nanogpt_mac.backends.generate import generate
from nanogpt_mac.config import Config, backend_options, validate
from nanogpt_mac.corpus import Corpus
from nanogpt_mac.errors import InputError, reason
from nanogpt_mac.files import remove, run_folder, unfinished, write_aside, write_json
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig
from nanogpt_mac.machine import chips, energy, gemm, peaks, probe
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
    Times,
    WorldFacts,
)
from nanogpt_mac.train import checkpoint, chosen, display
from nanogpt_mac.train.loop import Loop
from nanogpt_mac.train.recorder import Recorder, Work
from nanogpt_mac.train.sinks import Folder, open_wandb
from nanogpt_mac.train.source import Source, corpus_of, open_source
from nanogpt_mac.train.together import LostError, Together, again, joined, note

REFUSED = 3  # under fallbacks=error


def run(config: Config) -> int:
    """Train as `config` says; the process's exit code.

    0; 1 diverged; 3 under fallbacks=error, where work leaves the GPU; 130/143 after SIGINT/SIGTERM.
    """
    # What can be wrong is found out before anything is written.
    launched = ranks.launched()
    config = again(config, launched)
    validate(config)
    config.wandb.mode_here()
    aside = ThreadPoolExecutor(1)  # the machine's facts come from commands, which run while a framework is imported
    asked = aside.submit(probe.environment, kinds.frameworks())
    aside.shutdown(wait=False)
    choice = chosen.choose(config, asked.result, launched.launcher if launched.size > 1 else "")
    name = choice.backend
    memory.check(config, name)
    options = backend_options(config, name, choice.compile)
    options = replace(options, settings={**options.settings, **choice.settings})
    if choice.why and launched.speaks:
        display.say(choice.why)
    with joined(launched, config, options) as together:
        together.code = _run(config, options, together, asked)
    return together.code


def _run(config: Config, options: BackendOptions, together: Together, asked: Future[dict[str, object]]) -> int:
    with together.agreed():
        corpus, tokens, source, backend, config = _built(config, options)
    backend.world = together.world
    together.same(config, options, asked.result(), corpus.sha256, source.state)

    # What leaves the GPU is looked for before training, and may forbid it.
    label = f"{options.name}-compile" if options.compile else options.name
    found = _look_for_fallbacks(config, source.spec, backend) if together.first else None
    if found and config.fallbacks == "error" and (found.findings or not found.complete):
        path = run_folder(config.run_dir, label) / "fallbacks.json"
        write_json(path, found.document())
        display.say(f"stopped: operators leave the GPU (fallbacks=error); see {path}")
        together.leave("operators leave the GPU (fallbacks=error)")
        return REFUSED

    # The measured peak and the machine's facts belong to the run, but not to its clock.
    environment = asked.result()
    peak = _peak(config, source.spec, backend, environment) if together.first else None
    work = _work(config, source.spec, backend, peak)
    with together.agreed():
        mine = run_folder(config.run_dir, label) if together.first else Path()
    folder = Path(together.spread(str(mine)))
    note(together.launched, folder)
    facts = _facts(config, corpus, source, backend)
    session = Session(config, corpus, tokens, source, backend, work, peak, folder, facts, found, together)
    with signals.watched("train.py"), probe.awake():
        code = session.train(environment)
    backend.close()
    if together.first:
        display.say(f"{('finished', 'diverged')[code] if code < 2 else 'stopped'}: {folder}")
    return code


def _built(config: Config, options: BackendOptions) -> tuple[Corpus, Tokens, Source, Backend, Config]:
    """What a run is made of; the config that comes back has the sizes of the model."""
    corpus = corpus_of(config)
    source = open_source(config, corpus)
    config = replace(config, model=ModelConfig(**asdict(source.spec)))  # what is recorded is what runs
    memory.check(config, options.name)
    tokens = Tokens({"train": corpus.train, "val": corpus.val}, source.spec.block_size)
    backend = kinds.create(source.spec, options, tokens)
    backend.restore(source.state)
    return corpus, tokens, source, backend, config


@dataclass(frozen=True)
class Session:
    """Everything that one run is made of, ready to train; `config` has the sizes of `source`'s model."""

    config: Config
    corpus: Corpus
    tokens: Tokens
    source: Source
    backend: Backend
    work: Work
    peak: peaks.Peak | None
    folder: Path
    facts: RunFacts
    fallbacks: Fallbacks | None
    together: Together

    def train(self, environment: Mapping[str, object]) -> int:
        """Train, record and draw a sample; the exit code. A signal asks for the end after the iteration under way."""
        config, start = self.config, self.source.state.iteration
        self.together.watched(self._hint)
        if not self.together.first:
            with signals.asked() as stop:
                return self._loop(Recorder(self.work, []), display.Silent(config.log_interval), stop)
        new = not any(self.folder.iterdir())  # a folder of the user's own may hold other things
        with unfinished(self.folder) if new else nullcontext():
            wandb = open_wandb(config, self.folder, self.facts, late=new)  # may refuse: nothing is written yet
            screen = display.make(config.max_iters, config.log_interval, start)
            recorder = Recorder(self.work, [Folder(self.folder), wandb, screen])
            self._write_inputs(environment)
            if self.fallbacks is not None:
                recorder.fallbacks(self.fallbacks, start)
            self._announce(screen)
        try:
            try:
                with signals.asked() as stop:
                    code = self._loop(recorder, screen, stop)
            except InputError:  # of wandb, after all: this run never was
                if new:
                    remove(self.folder)
                raise
            if code == 0 and config.sample_tokens:
                self.sample()
            return code
        finally:
            recorder.wait()

    def _loop(self, recorder: Recorder, screen: display.Lines, stop: list[int]) -> int:
        config, start = self.config, self.source.state.iteration
        loop = Loop(
            config,
            self.backend,
            self.tokens,
            recorder,
            saving=self.saving if config.checkpoint and self.together.first else None,
            stop=lambda: self.together.stop(stop),
            best=self.source.best,
        )
        meter = energy.EnergyMeter()
        meter.start()
        state, error, refused = ExitState.FAILED, None, False
        try:
            state = loop.train(start)
        except BaseException as raised:
            refused = isinstance(raised, InputError)
            error = f"{type(raised).__name__}: {reason(raised)}"
            if (lost := self.together.lost(raised)) is None:
                raise
            error = lost
            self._rescue(loop.best, start, screen)
            raise LostError(lost) from raised
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
            try:
                if state is ExitState.FINISHED and self.peak is not None:
                    self._measure_again(screen)
                    recorder.work = _work(config, self.source.spec, self.backend, self.peak)
                others = self._ranks if error is None else lambda times, memory: None
                summary = None if refused else recorder.summary(self.facts, ending, others)
            finally:
                recorder.close()
            for line in summary.warnings if summary else ():
                display.say(line)
        asked = self.together.stop(stop)
        return 128 + asked if asked is not None else int(state is not ExitState.FINISHED)

    def _ranks(self, times: Times, peak_memory: int) -> WorldFacts | None:
        return self.together.facts(times, peak_memory, sum(map(prod, self.source.spec.shapes().values())))

    def _rescue(self, best: float, start: int, screen: display.Lines) -> None:
        """Another rank is gone: save what this one knows, where that is whole."""
        if not (self.config.checkpoint and self.together.first and self.together.world.survives):
            return
        try:
            if self.backend.state().iteration > start:
                with self.saving() as complete:
                    complete(best, False)
        except Exception as error:
            screen.say(f"no checkpoint could be written: {type(error).__name__}: {reason(error)}")

    def _hint(self) -> str:
        if not checkpoint.is_ours(self.folder):
            return "there is no checkpoint yet: start again"
        return f"go on with init_from=resume run={self.folder}"

    def _measure_again(self, screen: display.Lines) -> None:
        """The matmul peak, beside the run's end. What it needs beyond the model may be too much; the run is done."""
        assert self.peak is not None
        try:
            self.peak.again()
        except Exception as error:
            screen.say(f"the matmul peak could not be measured at the end: {type(error).__name__}: {reason(error)}")

    @contextmanager
    def saving(self) -> Iterator[Callable[[float, bool], None]]:
        """Begin a checkpoint of the back end's state; the lowest validation loss so far completes it, and whether it
        is this state's."""
        meta = {
            "spec": asdict(self.source.spec),
            "config": asdict(self.config),
            "corpus": self.facts.corpus_facts.model_dump(),
            "encoder": self.corpus.encoder.to_json(),
            "cwd": str(Path.cwd()),
            "written_by": {key: getattr(self.facts, key) for key in ("backend", "device", "compile", "dtype")},
        }

        def complete(best: float, is_best: bool) -> None:
            with signals.patience(signals.CHECKPOINT_S):
                write(meta | {"best_val_loss": best if np.isfinite(best) else None}, is_best)

        with checkpoint.begun(self.folder / "ckpt", self.backend.state()) as write:
            yield complete

    def sample(self) -> None:
        """Text drawn from the model as it is now, on the console and in sample.txt."""
        encoder, prompt = self.corpus.encoder, [int(self.corpus.val[0])]
        length, seed = self.config.sample_tokens, self.config.seed
        drawn = generate(self.backend, self.source.spec, prompt, length, 0.8, 200, seed, encoder.vocab_size)
        text = encoder.decode(list(drawn))
        write_aside(self.folder / "sample.txt", text)
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
    from nanogpt_mac.fallbacks import detect, report  # nothing to import where there is no detector

    if sys.stdout.isatty():
        display.say("looking for fallbacks in a child process (fallbacks=off skips it)")
    found = detect.check(config, spec, "train" in backend.details["resident_data"])
    display.say(report.text(found))
    return found


def _peak(config: Config, spec: GPTSpec, backend: Backend, environment: Mapping[str, object]) -> peaks.Peak | None:
    """The measured peak, off the clock; None where it is not wanted, or where speed says nothing about any Mac."""
    if config.gemm_seconds == 0 or backend.capabilities.simulated:
        return None

    def measure() -> float:
        found = gemm.measure(backend, config.dtype, spec.matmul_shapes(config.batch_size), config.gemm_seconds)
        backend.reset_peak_memory()
        return found.flops_per_s

    able, own = backend.capabilities, backend.options.settings
    return peaks.Peak(peaks.of_run(environment, able, config.dtype, config.matmul_precision, own), measure)


def _work(config: Config, spec: GPTSpec, backend: Backend, measured: peaks.Peak | None) -> Work:
    """What an iteration computes, and its three denominators."""
    tokens = config.gradient_accumulation_steps * config.batch_size * spec.block_size
    flops = float(spec.flops_per_token() * tokens)
    if backend.capabilities.simulated:
        return Work(flops, tokens, Denominators(), backend.world.size)
    chip = probe.chip() if backend.capabilities.accelerator else None
    peak = chips.peak(chip, config.dtype, config.matmul_precision) if chip is not None else None
    best, own = (measured.best, measured.own) if measured else (None, None)
    denominators = Denominators(mfu=peak, mfu_measured=best, mfu_a100=chips.A100_BF16, measured_here=own)
    return Work(flops, tokens, denominators, backend.world.size)


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
        shared_machine=config.shared_machine,
        world_size=backend.world.size,
    )
