"""The compiled forward and backward pass on a CPU: one graph, whose numbers are the eager step's."""

import dataclasses

import numpy as np
import pytest
import torch


@pytest.fixture
def small(spec):
    return dataclasses.replace(spec, n_layer=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_accumulated_iteration_is_eagers_in_one_graph(make, starts, small, dtype):
    from torch._dynamo.utils import counters  # and Triton, which other tests must import as an interpreter

    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (make("cpu", spec=small, dtype=dtype, compile=c) for c in (False, True))
    close = 1e-5 if dtype == "float32" else 2e-2
    for i in range(3):
        found, expected = (b.wait(b.step(starts(i, 2), 1e-3)) for b in (compiled, eager))
        assert found == pytest.approx(expected, rel=close)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_masks_are_of_the_iteration(make, starts, small):
    def losses(first, count):
        backend = make("cpu", spec=dataclasses.replace(small, dropout=0.3), compile=True)
        backend.iteration = first
        return [backend.wait(backend.step(starts(0), 0.0))[0] for _ in range(count)]

    found = losses(0, 4)
    assert len(set(found)) == 4  # the same windows and weights
    assert losses(2, 2) == found[2:]
    plain = make("cpu", spec=small)
    assert np.mean(found) == pytest.approx(plain.wait(plain.step(starts(0), 0.0))[0], rel=0.05)


def test_with_checkpointing_the_passes_stay_apart(make, small):
    assert make("cpu", spec=small, compile=True, checkpointing=True).joint is None
    assert make("cpu", spec=small).joint is None
