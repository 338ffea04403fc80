"""What the simulated device needs changed in torch's Python layer.

A Linux wheel has the bindings `torch._C._mps_*` for events, memory, random numbers and synchronisation; they reach the
device through the hooks registered in C++. A few others exist only in a Mac's build and are put in place here.
"""

from __future__ import annotations

from typing import Any

DEVICE_NAME = "simulated-mps"
CORE_COUNT = 8


def patch_torch() -> None:
    """Makes `torch` take the device as present. The C++ part must be loaded; call once a process."""
    import torch

    from nanogpt_mac.simulator.metal import MetalLibrary

    torch._C._has_mps = True
    for answer in (torch.backends.mps.is_available, torch.backends.mps.is_macos_or_newer):
        answer.cache_clear()
    absent_bindings = {
        "_mps_get_name": lambda: DEVICE_NAME,
        "_mps_get_core_count": lambda: CORE_COUNT,
        "_mps_isCaptureEnabled": lambda: False,
        "_mps_isCapturing": lambda: False,
        "_mps_host_alias_storage": _host_alias_storage,
        "_mps_compileShader": MetalLibrary,
    }
    for name, function in absent_bindings.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, function)
    _patch_untyped_storage()
    if hasattr(torch.mps, "streams") and not hasattr(torch._C, "_mps_getCurrentStream"):
        _add_streams()


def _bytes_of(storage: Any) -> Any:
    """The storage as a uint8 tensor."""
    import torch

    return torch.empty(0, dtype=torch.uint8, device="mps").set_(storage)


def _host_alias_storage(storage: Any) -> Any:
    import torch

    return torch.ops.nanogpt_mps.cpu_alias(_bytes_of(storage)).untyped_storage()


def _patch_untyped_storage() -> None:
    """The storage's constructor and resize_ switch over devices in C++ and know MPS only in a Mac's build."""
    import torch

    storage: Any = torch.UntypedStorage
    original_new, original_resize = storage.__new__, storage.resize_

    def new(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return original_new(cls, *args, **kwargs)
        if torch.device(device).type != "mps":
            return original_new(cls, *args, device=device, **kwargs)
        content = args[0] if args else 0
        if isinstance(content, int):
            return torch.empty(content, dtype=torch.uint8, device="mps").untyped_storage()
        return torch.tensor(list(content), dtype=torch.uint8, device="mps").untyped_storage()

    def resize_(self: Any, size: int) -> Any:
        if self.device.type != "mps":
            return original_resize(self, size)
        torch.ops.nanogpt_mps.storage_resize(_bytes_of(self), size)
        return self

    storage.__new__ = new
    storage.resize_ = resize_


def _add_streams() -> None:
    """torch.mps.Stream came with 2.15; its base class is compiled only for a Mac. One queue here, whatever its name."""
    import torch

    class Stream:
        """A name for the device's only queue."""

        current = 0
        made = 0

        def __init__(self, stream_id: int | None = None) -> None:
            if stream_id is None:
                Stream.made += 1
                stream_id = Stream.made
            self.stream_id = stream_id

        def synchronize(self) -> None:
            torch.mps.synchronize()

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and other.stream_id == self.stream_id

        def __hash__(self) -> int:
            return hash(self.stream_id)

        def __repr__(self) -> str:
            return f"<torch.mps.Stream stream_id={self.stream_id}>"

    def set_stream(stream: Stream) -> None:
        Stream.current = stream.stream_id

    bindings: Any = torch._C
    bindings._mps_getCurrentStream = lambda: Stream(Stream.current)
    bindings._mps_setStream = set_stream
    module: Any = torch.mps
    module.Stream = module.streams.Stream = Stream
