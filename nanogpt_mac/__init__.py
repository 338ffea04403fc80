"""nanoGPT trained four ways on a Mac: the same weights, the same batches, honest times."""

__version__ = "0.1.0"
