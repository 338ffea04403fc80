"""What tests of Triton kernels share: a GPU, or the CPU on which Triton's interpreter runs them, numbers, closeness."""

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def close(found, expected, tolerance):
    scale = expected.abs().max()
    assert scale > 0
    assert ((found.double() - expected).abs().max() / scale).item() < tolerance
