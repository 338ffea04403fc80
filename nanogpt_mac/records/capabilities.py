"""What a back end says of itself. No pydantic here: the fallback detector runs where only torch and numpy are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """A back end on the device that it has here. Reports read this and never a back end's name."""

    device: str  # "cpu", "mps", "cuda", "metal", "simulated-mps"
    framework: str = ""  # whose version is recorded: "torch", "mlx"
    accelerator: bool = False  # the device is a GPU, whose peak the chip table has
    runs_ahead: bool = False  # `step` returns while the device still works
    simulated: bool = False  # its times mean nothing
    compiles: bool = True  # `compile=true` is something else than `compile=false`
    compiles_evaluation: bool = False  # evaluation is one more graph to compile
    dtypes: tuple[str, ...] = ("float32",)  # with products that are worth their while: float16 on a CPU is only slow
    tf32: bool = False  # matmul_precision=high changes float32 products
    detector: bool = False  # there is a fallback detector for it
    memory: str = ""  # what its memory figures count, for the report's note
    note: str = ""  # what a label says beside the back end's name: "CPU" where it usually has a GPU, "simulated"
