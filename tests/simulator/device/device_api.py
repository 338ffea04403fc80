"""The device as a user of torch sees it: availability, memory, random numbers, views, storage, save and load."""

from __future__ import annotations

import copy
import gc
import io
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanogpt_mac import simulator

simulator.install()
DEVICE = "mps"


def test_availability() -> None:
    assert torch.backends.mps.is_available()
    assert torch.backends.mps.is_built()
    assert torch.mps.is_available()
    assert torch.mps.device_count() == 1
    assert torch.backends.mps.is_macos_or_newer(14, 0)
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("mps")
    assert torch.backends.mps.get_name() == simulator.DEVICE_NAME == "simulated-mps"
    assert not torch.cuda.is_available()
    simulator.install()  # a second time: nothing
    assert torch.ones(2, device=DEVICE).device == torch.device("mps:0")


def test_memory_is_accounted() -> None:
    gc.collect()
    before = torch.mps.current_allocated_memory()
    x = torch.empty(1024, 1024, device=DEVICE)
    y = x + 1  # made by a CPU kernel and adopted
    assert torch.mps.current_allocated_memory() - before == 8 << 20
    assert torch.accelerator.memory_allocated() == torch.mps.current_allocated_memory()
    del x, y
    assert torch.mps.current_allocated_memory() == before
    torch.mps.empty_cache()
    assert torch.mps.driver_allocated_memory() >= before
    assert torch.mps.recommended_max_memory() == 16 << 30


def test_out_of_memory_text() -> None:
    simulator.set_max_memory(1 << 20)
    torch.mps.set_per_process_memory_fraction(1.0)
    try:
        with pytest.raises(RuntimeError, match=r"MPS backend out of memory \(MPS allocated: \d+ bytes"):
            torch.empty(1 << 20, device=DEVICE)
        x = torch.empty(150_000, device=DEVICE)
        with pytest.raises(RuntimeError, match="Tried to allocate 600000 bytes"):
            x + 1
    finally:
        simulator.set_max_memory(16 << 30)
        torch.mps.set_per_process_memory_fraction(1.7)


def test_seeds() -> None:
    torch.manual_seed(3)
    a = torch.randn(5, device=DEVICE)
    torch.mps.manual_seed(3)
    assert torch.equal(torch.randn(5, device=DEVICE), a)
    generator = torch.Generator(device=DEVICE).manual_seed(3)
    assert generator.device.type == "mps"
    assert torch.equal(torch.randn(5, device=DEVICE, generator=generator), a)
    state = torch.mps.get_rng_state()
    b = torch.rand(3, device=DEVICE)
    torch.mps.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=DEVICE), b)
    assert not torch.equal(torch.rand(3, device=DEVICE), b)


def test_drawing_on_the_device_leaves_the_cpu_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    torch.rand(7, device=DEVICE)
    F.dropout(torch.ones(9, device=DEVICE))
    assert torch.equal(torch.rand(2), expected)


def test_fork_rng() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[0], device_type="mps"):
        torch.rand(3, device=DEVICE)
    assert torch.equal(torch.rand(3, device=DEVICE), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        lambda: torch.ones(2, device=DEVICE).double(),
        lambda: torch.empty_strided((2,), (1,), dtype=torch.float64, device=DEVICE),
    ],
)
def test_float64_is_refused(make) -> None:
    with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64 dtype as the MPS framework"):
        make()


def test_numpy_is_refused() -> None:
    with pytest.raises(TypeError, match="can't convert mps:0 device type tensor to numpy"):
        torch.ones(2, device=DEVICE).numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda: torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2),
        lambda: torch.ones(2, device=DEVICE) + torch.ones(2),
        lambda: F.embedding(torch.tensor([0]), torch.ones(2, 2, device=DEVICE)),
        lambda: F.linear(torch.ones(2, 2), torch.ones(2, 2, device=DEVICE)),
    ],
)
def test_mixed_devices_are_refused(mix) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)expected all tensors to be on the same device|same device"):
        mix()


def test_cpu_scalars_mix() -> None:
    assert (torch.ones(2, device=DEVICE) * torch.tensor(3.0)).tolist() == [3, 3]
    assert (torch.ones(2, device=DEVICE) * 2 + 1).dtype == torch.float32


def _views(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.zeros(4, 6, device=device)
    view = x[1:3].t()[2:4]
    view.add_(5)
    x.view(-1)[0] = 7
    x.reshape(24)[23] = 9
    x.unfold(1, 2, 2)[0, 0].mul_(2)
    return x, view


def test_views_share_storage() -> None:
    x, view = _views(DEVICE)
    expected, expected_view = _views("cpu")
    assert torch.equal(x.cpu(), expected)
    assert view._base is x
    assert x._version == expected._version
    assert view.stride() == expected_view.stride()
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_out_and_resize() -> None:
    out = torch.empty(0, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty out is resized without a warning
        torch.add(torch.ones(3, 4, device=DEVICE), 1, out=out)
    assert out.shape == (3, 4)
    assert out.sum().item() == 24
    out.resize_(5, 5).fill_(1)
    out.unsqueeze_(0).squeeze_().t_()
    assert out.shape == (5, 5)
    window = torch.empty(0, device=DEVICE).set_(out.untyped_storage(), 1, (2, 2), (1, 2))
    window.zero_()
    assert out.sum().item() == 21
    values, indices = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE)
    torch.sort(torch.tensor([3.0, 1, 2], device=DEVICE), out=(values, indices))
    assert (values.tolist(), indices.tolist()) == ([1, 2, 3], [1, 2, 0])


def test_untyped_storage() -> None:
    x = torch.ones(8, device=DEVICE)
    storage = x.untyped_storage()
    storage.resize_(0)
    storage.resize_(32)
    assert x.fill_(2).sum().item() == 16
    assert torch.UntypedStorage(16, device=DEVICE).device.type == "mps"
    assert torch.UntypedStorage([1, 2], device=DEVICE).cpu().tolist() == [1, 2]
    assert torch.UntypedStorage(4).device.type == "cpu"
    assert x.untyped_storage().cpu().device.type == "cpu"


@pytest.mark.parametrize("map_location", [None, "cpu", "mps"])
def test_save_and_load(map_location: str | None, tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, device=DEVICE), "view": torch.arange(6.0, device=DEVICE)[::2]}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location=map_location, weights_only=True)
    assert loaded["w"].device.type == (map_location or "mps")
    assert torch.equal(loaded["w"].cpu(), weights["w"].cpu())
    assert loaded["view"].tolist() == [0, 2, 4]


def test_safetensors_and_numpy(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    x = torch.randn(3, 4, device=DEVICE)
    save_file({"x": x}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors", device="mps")["x"].cpu(), x.cpu())
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(torch.from_numpy(array).to(DEVICE).cpu().numpy(), array)


def test_modules_move_and_copy() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(DEVICE)
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin[0].weight.cpu(), module[0].weight.cpu())
    assert module.bfloat16()[0].weight.dtype == torch.bfloat16


def test_events() -> None:
    start, end = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
    start.record()
    time.sleep(0.01)
    end.record()
    end.synchronize()
    assert end.query()
    assert 10 <= start.elapsed_time(end) < 200
    a, b = torch.Event("mps", enable_timing=True), torch.Event("mps", enable_timing=True)
    a.record()
    b.record()
    assert a.elapsed_time(b) >= 0
    untimed = torch.mps.Event()
    untimed.record()
    with pytest.raises(RuntimeError, match="Events were not created with argument 'enable_timing=True'"):
        untimed.elapsed_time(end)
    never = torch.mps.Event(enable_timing=True)
    with pytest.raises(RuntimeError, match="Both events must be recorded before calculating elapsed time"):
        start.elapsed_time(never)
    with pytest.raises(RuntimeError, match="End event was not recorded after start event"):
        end.elapsed_time(start)


def test_values_of_many_operators() -> None:
    x = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    m = x.to(DEVICE)
    for f in (
        lambda t: t.topk(3)[0],
        lambda t: torch.cat([t, t.t()]),
        lambda t: t[t > 0],
        lambda t: t[[0, 1], [2, 3]],
        torch.tril,
        lambda t: F.cross_entropy(t, torch.arange(10, device=t.device)),
        lambda t: t.argmax(1),
        lambda t: torch.where(t > 0, t, 0.0),
        torch.nonzero,
        lambda t: t.std(0),
        lambda t: F.layer_norm(t, (10,)),
        lambda t: F.gelu(t) @ t,
        lambda t: torch.view_as_complex(t.reshape(50, 2)).conj().imag,
        lambda t: torch.func.vmap(lambda a: a.softmax(0))(t),
        lambda t: torch.func.grad(lambda a: (a**2).sum())(t),
    ):
        got, expected = f(m), f(x)
        assert got.device.type == "mps"
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0)
    assert torch.randperm(5, device=DEVICE).sort()[0].tolist() == [0, 1, 2, 3, 4]


def test_profiler_is_harmless() -> None:
    with torch.mps.profiler.profile():
        assert torch.ones(1, device=DEVICE).item() == 1


def test_data_loader_batches() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(8.0).reshape(4, 2))
    batches = [b[0].to(DEVICE, non_blocking=True) for b in torch.utils.data.DataLoader(data, batch_size=2)]
    assert torch.cat(batches).tolist() == torch.arange(8.0).reshape(4, 2).tolist()


def test_sparse_is_refused() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), torch.ones(1, device=DEVICE), (2,))
