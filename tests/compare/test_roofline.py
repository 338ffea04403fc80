"""The floor of an iteration, against a count by hand and the peers' arithmetic."""

import dataclasses

import pytest

from nanogpt_mac import cli
from nanogpt_mac.compare import roofline
from nanogpt_mac.config import Config
from nanogpt_mac.errors import InputError
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.machine import chips
from nanogpt_mac.records.comparison import Work


@pytest.mark.parametrize(("chip", "milliseconds"), [("m1", 444), ("m1-pro", 219), ("m1-max", 110)])
def test_full_recipe_on_chips_whose_peak_nobody_disputes(chip, milliseconds):
    """research: the floor at 100 % of the fp32 peak."""
    found = roofline.predict(Config(), chip)
    assert found.floor.floor_ms == pytest.approx(milliseconds, abs=0.6)
    assert found.floor.bound == "compute"
    assert found.floor.flops == pytest.approx(1162.6e9, rel=1e-4)
    assert found.recipe_seconds == pytest.approx(5 * found.floor.floor_ms)


def test_disputed_chip_spans_its_claims():
    found = roofline.predict(Config(), "m4-max")
    assert found.chip.disputed
    low, high = found.range_ms
    assert low == pytest.approx(63, abs=0.6)  # at the highest claim, 18.4 TFLOP/s
    assert low < found.floor.floor_ms <= high


def test_bytes_against_a_count_by_hand():
    """1 layer, 2 heads, 4 wide, block 8, 10 symbols; batch 3, accumulated twice, bfloat16."""
    spec = GPTSpec(n_layer=1, n_head=2, n_embd=4, block_size=8, vocab_size=10)
    parameters = 10 * 4 + 8 * 4 + (4 + 12 * 4 + 4 * 4 + 4 + 16 * 4 + 4 * 16) + 4
    found = roofline.bytes_per_iter(spec, 3, 2, "bfloat16")
    assert found["weights"] == 4 * parameters * 4  # forward, backward, twice
    assert found["gradients"] == 4 * parameters * (1 + 2 + 1)  # written; read and written; read by AdamW
    assert found["adamw"] == 4 * parameters * (3 + 3)
    tokens = 2 * 3 * 8
    half = (12 + 4 + 16) * 2  # q, k, v; the attention's output; the hidden layer
    single = (4 + 4 + 4) * 4  # residual stream: at both norms and the last
    logits = 10 * 2
    assert found["activations"] == 2 * tokens * (half + single + logits)
    assert found["total"] == sum(found[key] for key in ("weights", "gradients", "adamw", "activations"))
    assert sum(array.size for array in spec.init_weights(0).values()) == parameters
    with pytest.raises(InputError, match="dtype=int8"):
        roofline.bytes_per_iter(spec, 3, 2, "int8")


def test_floor_is_the_larger_part():
    assert roofline.floor(1e12, 1e9, 1e12, "a", 1e9, "b").floor_ms == 1000
    memory = roofline.floor(1e9, 8e9, 1e12, "a", 1e9, "b")
    assert (memory.bound, memory.floor_ms, memory.compute_ms) == ("memory", 8000, 1)
    compute = roofline.floor(1e9, 8e9, 1e12, "a", None, None)
    assert (compute.bound, compute.floor_ms, compute.memory_ms) == ("compute", 1, None)
    assert roofline.floor(1e9, 8e9, None, None, None, None) is None


def test_chip_names():
    assert (roofline.find_chip("m4-max").name, roofline.find_chip("m4-max").gpu_cores) == ("Apple M4 Max", 40)
    smaller = roofline.find_chip("M4-Max-32")
    assert (smaller.gpu_cores, smaller.bandwidth) == (32, 410e9)
    assert roofline.find_chip("m3-ultra").gpu_cores == 80
    assert roofline.find_chip("h200").name == "NVIDIA H200"
    assert roofline.find_chip("geforce-rtx-3090").name == "NVIDIA GeForce RTX 3090"
    for name in roofline.NAMES:
        assert roofline.find_chip(name).name == roofline.NAMES[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m9", "use one of m1, m1-pro"),
        ("", "use one of"),
        ("m4-max-41", "at most 40 GPU cores; use m4-max-1 to m4-max-40"),
        ("m4-max-0", "at most 40"),
        ("h200-12", "use one of"),
    ],
)
def test_unknown_chip_is_one_line(name, words):
    with pytest.raises(InputError, match=words) as refused:
        roofline.find_chip(name)
    assert str(refused.value).startswith(f"chip={name}: ")
    assert "\n" not in str(refused.value)


def test_dtype_without_a_peak_is_not_guessed():
    found = roofline.predict(Config(dtype="bfloat16"), "m1")
    assert found.floor is None
    assert "bfloat16" in found.note
    half = roofline.predict(Config(dtype="float16"), "m1").floor
    assert half.compute_ms == pytest.approx(444, abs=0.6)
    assert half.memory_ms < roofline.predict(Config(), "m1").floor.memory_ms
    tf32 = roofline.predict(Config(matmul_precision="high"), "h200").floor
    assert tf32.peak == 494.5e12


def test_vocabulary_that_the_corpus_decides():
    config = cli.compose(["experiment=gpt2"])
    assert roofline.predict(config, "m4-pro").floor.flops > 1e14
    config.data.name, config.data.tokenizer = "text", "char"
    with pytest.raises(InputError, match=r"model\.vocab_size=null"):
        roofline.predict(config, "m4-pro")


def work(**changes):
    spec = GPTSpec(6, 6, 384, 256, 65, 0.2)
    facts = {"model": dataclasses.asdict(spec), "batch_size": 64, "gradient_accumulation_steps": 1, "dtype": "float32"}
    return Work(**facts | {"tokens_per_iter": 16384, "flops_per_iter": None} | changes)


def test_floor_of_a_recorded_run():
    chip = chips.find("Apple M4 Pro", 20)
    gpu = roofline.of_run(work(), chip, True, 6e12)
    assert gpu.peak_source == "Apple M4 Pro's peak, disputed"
    assert gpu.floor_ms == pytest.approx(roofline.predict(Config(), "m4-pro").floor.floor_ms)
    bf16 = roofline.of_run(work(dtype="bfloat16"), chip, True, 6e12)
    assert (bf16.peak, bf16.peak_source) == (6e12, "best matmul measured here")
    cpu = roofline.of_run(work(), chip, False, 1e12)  # an Apple CPU reads the same memory
    assert (cpu.peak, cpu.bandwidth) == (1e12, 273e9)
    elsewhere = roofline.of_run(
        work(), chips.find("NVIDIA H200", None), False, 1e11
    )  # this CPU's memory is not the H200's
    assert (elsewhere.bandwidth, elsewhere.memory_ms) == (None, None)
    assert roofline.of_run(work(), None, True, None) is None
    assert roofline.of_run(work(model=None), chip, True, None) is None
    assert roofline.of_run(work(model={**work().sizes(), "of_the_future": 2}), chip, True, None) is None


def test_table_says_that_it_is_arithmetic(capsys):
    roofline.show(Config(), ["m1", "m4-max-32"])
    text = capsys.readouterr().out
    assert text.startswith("ARITHMETIC, not a measurement")
    assert "444.2" in text
    assert "Apple M4 Max (disputed)" in text
    assert "1162.6 GFLOP" in text
    roofline.show(Config(dtype="bfloat16"))
    text = capsys.readouterr().out
    assert text.count("Apple") >= len(chips.APPLE)
    assert "Apple M1: no trustworthy bfloat16 peak" in text
