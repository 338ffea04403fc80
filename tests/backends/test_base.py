"""What every back end shares: seeds, draws, defaults, memory, against references of their own."""

import resource
from itertools import islice

import numpy as np
import psutil
import pytest
import torch
from fakes.support import options

from nanogpt_mac.backends import base
from nanogpt_mac.backends.base import step_seed
from nanogpt_mac.backends.generate import draw, generate
from nanogpt_mac.config import Config
from nanogpt_mac.records.capabilities import Capabilities

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state):
    """Steele, Lea and Flood's generator (OOPSLA 2014), as Vigna writes it, with a state that moves."""
    while True:
        state = (state + GOLDEN) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def test_step_seeds_are_splitmix64s():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]  # of seed 0
    assert list(islice(splitmix64(0), 4)) == published
    assert [step_seed(0, i) for i in range(4)] == [z >> 1 for z in published]
    for seed in (1, 1337, 2**40 + 3):
        stream = splitmix64(seed * GOLDEN * GOLDEN & MASK)
        assert [step_seed(seed, i) for i in range(8)] == [z >> 1 for z in islice(stream, 8)]


def test_defaults_are_nanogpts():
    config = Config()
    assert (config.weight_decay, config.beta1, config.beta2, config.grad_clip) == (0.1, 0.9, 0.99, 1.0)
    assert config.seed == 1337


def test_the_loss_scale_moves_as_torchs_does():
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_growth_factor() == base.SCALE_GROWTH
    assert scaler.get_backoff_factor() == base.SCALE_BACKOFF
    assert scaler.get_growth_interval() == base.GROWTH_INTERVAL


def test_a_gibibyte_of_tokens_lives_on_the_device():
    assert np.dtype(np.int64).itemsize * options("cpu").resident_tokens == 2**30


def test_draws_do_not_overflow_and_keep_the_k_likeliest():
    large = np.array([1000.0, 1001.0, 999.0])
    uniforms = np.linspace(0, 1, 100, endpoint=False)
    assert [draw(large, 1.0, None, u) for u in uniforms] == [draw(large - 1000, 1.0, None, u) for u in uniforms]
    scores = np.random.default_rng(0).permutation(np.linspace(0.0, 3.0, 300))
    for k in (1, 3, 100, 299, 300, 301):
        drawn = {draw(scores, 10.0, k, u) for u in np.linspace(0, 1, 3000, endpoint=False)}
        assert drawn == set(np.argsort(scores)[-k:].tolist())


def test_generation_draws_from_the_softmax_with_nanogpts_seed(make, spec):
    text = list(generate(make("cpu"), spec, [1], 20))
    assert text == list(generate(make("cpu"), spec, [1], 20, 1.0, None, 1337))
    assert len(set(text)) > 5


def test_resident_memory_is_what_the_system_says(monkeypatch):
    """getrusage counts KiB on Linux and bytes on macOS."""
    memory = base.resident_memory()
    assert memory["current"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    units = {"darwin": 1, "linux": 1024}
    for platform, unit in units.items():
        monkeypatch.setattr(base.sys, "platform", platform)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = base.resident_memory()["peak"]
        assert before * unit <= peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_a_back_end_must_answer_what_only_it_knows():
    """The rest has an answer that is right for most; these have none."""
    own = {"__init__", "step", "wait", "evaluate", "logits", "gradients", "state", "restore"}
    assert base.Backend.__abstractmethods__ == own | {"decode", "matmul"}
    assert base.Lever("key", 1, "what").when(None, None) is True


def test_a_kind_answers_for_a_device_that_it_does_not_know():
    known = Capabilities("abacus", "beads")
    kind = base.Kind("x", "m:C", "X", "numpy", (known,))
    assert kind.on("abacus") is known
    assert kind.on("slide rule") == Capabilities("slide rule", "numpy")
    assert kind.eager_by_name
    assert kind.missing() is None
    assert "not installed" in base.Kind("x", "m:C", "X", "no_such_package", ()).missing()
