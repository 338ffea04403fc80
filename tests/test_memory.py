"""Memory that cannot be had is one line before anything is built; the bound is below what an iteration takes."""

import re

import pytest
from fakes.support import options

from nanogpt_mac import cli, memory
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec, ModelConfig

GB = 10**9


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["batch_size=100000000"], r"batch_size=100000000: .* at least 1\.89e\+06 GB .* 24 GB here; use at most 1257"),
        (["model.block_size=10000000"], r"model\.block_size=10000000: .*; use at most \d+"),
        (["model.n_layer=100000", "batch_size=12"], r"model\.n_layer=100000: .*; use at most \d+"),
        (["model.n_embd=600000"], r"model\.n_embd=600000: .*; use at most 3396"),
        (["eval_iters=100000000000"], r"eval_iters=100000000000: .*; use at most \d+"),
        (["model.n_embd=60000", "batch_size=12"], r"model\.n_embd=60000: .*; use at most \d+"),
        (["model.n_embd=6000000", "model.n_layer=100000000"], r".*; use (at most \d+|this and other sizes.*)"),
    ],
)
def test_what_cannot_fit_is_named_with_what_does(overrides, line):
    config = cli.compose(overrides)
    with pytest.raises(InputError) as error:
        memory.check(config, "cpu", 24 * GB)
    assert re.fullmatch(line, str(error.value)), error.value
    if match := re.search(r"^(\S+)=\d+: .*use at most (\d+)$", str(error.value)):
        others = [each for each in overrides if not each.startswith(f"{match[1]}=")]
        memory.check(cli.compose([*others, f"{match[1]}={match[2]}"]), "cpu", 24 * GB)
        if match[1] != "model.n_embd":  # of which only multiples of n_head can be had
            with pytest.raises(InputError):
                memory.check(cli.compose([*others, f"{match[1]}={int(match[2]) + 1}"]), "cpu", 24 * GB)


@pytest.mark.parametrize("experiment", ["smoke", "quick", "full", "gpt2"])
def test_what_people_run_fits(experiment):
    memory.check(cli.compose([f"experiment={experiment}"]), "cpu", 24 * GB)


def test_the_bound_is_below_what_torch_holds_at_once():
    """Weights, moments and gradients, and what autograd saved for the backward pass, counted tensor by tensor."""
    import torch

    from nanogpt_mac.backends.base import Tokens
    from nanogpt_mac.backends.torch_backend import TorchBackend

    model = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, dropout=0.0, vocab_size=40)
    spec = GPTSpec(**vars(model))
    backend = TorchBackend(spec, options("cpu"), Tokens(block_size=64))
    backend.load(spec.init_weights(0))
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(0, 40, (8, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(backend.model(tokens).view(-1, 40), tokens.view(-1))
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in backend.model.parameters()}
    activations = sum(size for place, size in saved.items() if place not in weights)
    assert loss.requires_grad
    sizes = memory.Sizes(8, 64, 2, 32, 1, 1, 40)
    held = 4 * sum(weights.values()) + activations
    assert 0.2 * held < sizes.bytes("float32") < held


def test_what_mlx_keeps_of_attention_counts_and_checkpointing_is_named():
    full = cli.compose(["experiment=full"])
    tokens, layers, heads, C = 64 * 256, 6, 6, 384
    whole = memory.Sizes(64, 256, layers, C, 200, 1, 65)
    kept = memory.Sizes(64, 256, layers, C, 200, 1, 65, kept_heads=heads)
    again = memory.Sizes(64, 256, layers, C, 200, 1, 65, checkpointing=True, kept_heads=heads)
    assert kept.bytes("float32") - whole.bytes("float32") == tokens * layers * (heads * 256 * 5 + 2 * C)
    saved = kept.bytes("float32") - again.bytes("float32")
    assert saved == tokens * ((layers - 1) * 4 * (8 * C + heads * 256) - layers * 4 * C)
    between = (again.bytes("float32") + kept.bytes("float32")) // 2
    with pytest.raises(InputError, match=r"batch_size=64: .*; use at most \d+, or checkpointing=true$"):
        memory.check(full, "mlx", between)
    memory.check(cli.compose(["experiment=full", "checkpointing=true"]), "mlx", between)
    memory.check(full, "cpu", between)


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMIT", limit)
    machine = memory.of("cpu")
    limit.write_text("max\n")
    assert memory.of("cpu") == machine
    limit.write_text("1000000\n")
    assert memory.of("mps") == 1_000_000
    with pytest.raises(InputError, match="batch_size=64"):
        memory.check(Config(), "cpu")
