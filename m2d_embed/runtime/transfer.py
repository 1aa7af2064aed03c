"""Host memory <-> the device of a model, without stopping for it where the device can do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Link(Protocol):
    """The way to a device and back.

    ``max_in_flight`` is how many batches may be in flight before the outputs of the oldest are waited for.
    """

    max_in_flight: int

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor in host memory, to fill and upload."""

    def upload(self, host: Tensor) -> Tensor:
        """A tensor of the host on the device; the host's may be discarded at once."""

    def download(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to bring back a tensor; the function returned waits for it."""


def link_to(device: torch.device) -> Link:
    """The link to a device."""
    return CudaLink(device) if device.type == "cuda" else PlainLink(device)


class PlainLink:
    """Copies and waits; on the CPU there is nothing to copy."""

    max_in_flight = 0

    def __init__(self, device: torch.device):
        self._device = device

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    def upload(self, host: Tensor) -> Tensor:
        return host.to(self._device)

    def download(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = tensor.cpu()
        return lambda: host


class CudaLink:
    """Copies through pinned memory, in streams of their own beside the model's.

    PyTorch keeps pinned memory for later use, and gives it away again only when the copies from it are done.
    """

    max_in_flight = 2

    def __init__(self, device: torch.device):
        self._device = device
        # One each way: a download waits for the model, and no upload should wait with it.
        self._up = torch.cuda.Stream(device)
        self._down = torch.cuda.Stream(device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def upload(self, host: Tensor) -> Tensor:
        with torch.cuda.stream(self._up):
            tensor = host.to(self._device, non_blocking=True)
        model = torch.cuda.current_stream(self._device)
        model.wait_stream(self._up)
        tensor.record_stream(model)  # its memory is the other stream's: not to be reused before the model has read it
        return tensor

    def download(self, tensor: Tensor) -> Callable[[], Tensor]:
        host = self.host_buffer(tuple(tensor.shape), tensor.dtype)
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            host.copy_(tensor, non_blocking=True)
            # Sleeps while it waits: decoding needs the core.
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(self._down)
        tensor.record_stream(self._down)

        def wait() -> Tensor:
            arrived.synchronize()
            return host

        return wait
