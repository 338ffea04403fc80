"""suite=gemm: matrix products, from pure Python to the fastest that this machine has."""
