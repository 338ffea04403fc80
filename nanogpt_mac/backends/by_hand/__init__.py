"""The classifier of suite=mlp by kernels of our own: three ways of submitting them, on Metal and on CUDA."""
