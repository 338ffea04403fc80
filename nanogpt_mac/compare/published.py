"""Times that others have published for nanoGPT's character recipe: facts to stand beside a user's own, never ranked.

None of these was measured by this project, none has passed its parity gate, and none says all that one needs to know.
"""

from __future__ import annotations

from nanogpt_mac.records.comparison import Published, Work

# nanoGPT's config/train_shakespeare_char.py off CUDA: what every row below says that it ran.
MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "dropout": 0.2}
WORK = "nanoGPT shakespeare_char: 6 layers x 6 heads x 384, batch 64 x block 256, dropout 0.2, float32"

_STATE = "State of training on Metal", "https://vglazer.github.io/training-on-metal"
_RB = "nanogpt-rb", "https://github.com/khasinski/nanogpt-rb"
_MACBOOK = "MacBook, chip not stated"


def _row(source: tuple[str, str], date: str | None, machine: str, variant: str, ms: float, note: str) -> Published:
    return Published(source=source[0], url=source[1], date=date, machine=machine, variant=variant, ms_per_iter=ms,
                     note=note, work=WORK)  # fmt: skip


ROWS = (
    _row(
        _STATE, "2025-09", _MACBOOK, "MPS eager", 221.0,
        "276 ms late in the run, cause not given; PyTorch nightly; 3589 s for the whole run, validation loss 1.7099; "
        "its MFU of 1.69 % is against an A100; one run, no spread",
    ),
    _row(
        _STATE, "2025-09", _MACBOOK, "MPS compiled", 306.0,
        "330 ms late in the run; PyTorch nightly; first iteration 85 s; last evaluation 1256 s against 33 s eager, "
        "cause unknown; one run, no spread",
    ),
    _row(_STATE, "2025-09", _MACBOOK, "CPU", 1986.0, "50 iterations only; threads and compilation not stated"),
    _row(
        _RB, None, "M1 Max", "MPS", 500.0, "a Ruby port; rounded, no spread; date, versions and GPU cores not stated"
    ),
    _row(_RB, None, "M1 Max", "CPU", 8500.0, "a Ruby port; rounded, no spread; date, versions and threads not stated"),
)  # fmt: skip


def beside(work: Work) -> tuple[Published, ...]:
    """The rows that did the same work as `work`, else none.

    The text does not count, only its 65 symbols: the stand-in's times are of the same work.
    """
    sizes = work.sizes()
    same = all(sizes.get(key) == value for key, value in MODEL.items())
    same = same and (work.batch_size, work.gradient_accumulation_steps, work.dtype) == (64, 1, "float32")
    return ROWS if same and work.matmul_precision in (None, "highest") and not sizes.get("bias") else ()
