"""Keeping what checkpointing keeps, the input of each half layer, in host memory.

The copies run on a stream of their own beside the computation, and on the way back one half ahead of it.
"""

import contextlib
import weakref
from collections.abc import Callable

import torch


class OffloadedTensor:
    """One tensor on its way to the host and back."""

    device_tensor: torch.Tensor | None = None  # while it is on the device

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream, before: "OffloadedTensor | None"):
        self.before = before
        self.host_tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.done = self.copy(tensor, self.host_tensor, stream)
        self.device_tensor = tensor

    @staticmethod
    def copy(source: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Copies once the current stream has come this far; the event says when it is done."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def leave(self):
        """Lets go of the tensor on the device; what the current stream does next waits for the copy."""
        torch.cuda.current_stream().wait_event(self.done)
        self.device_tensor = None

    def __del__(self):
        if self.device_tensor is not None:  # nobody took it, and its memory must not serve others before the copy ends
            self.leave()

    def come_back(self, stream: torch.cuda.Stream):
        """Starts the copy to the device, unless the tensor is there."""
        if self.device_tensor is None:
            self.device_tensor = torch.empty_like(self.host_tensor, device=stream.device)
            self.done = self.copy(self.host_tensor, self.device_tensor, stream)


class ActivationOffload:
    """Saved-tensor hooks that move what is saved within `with offload.saved():` to the host."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        # The graph of autograd keeps what was packed alive: what a failed attempt left is gone with its graph.
        self.last: Callable[[], OffloadedTensor | None] = lambda: None

    def saved(self) -> contextlib.AbstractContextManager:
        """The context in which to call `checkpoint`."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> OffloadedTensor | torch.Tensor:
        if not tensor.is_cuda or tensor.numel() == 0:
            return tensor
        before = self.last()
        if before is not None:
            before.leave()
        offloaded = OffloadedTensor(tensor, self.stream, before)
        self.last = weakref.ref(offloaded)
        return offloaded

    def unpack(self, offloaded: OffloadedTensor | torch.Tensor) -> torch.Tensor:
        if isinstance(offloaded, torch.Tensor):
            return offloaded
        offloaded.come_back(self.stream)
        torch.cuda.current_stream().wait_event(offloaded.done)
        if offloaded.before is not None:
            offloaded.before.come_back(self.stream)  # needed next
        tensor, offloaded.device_tensor = offloaded.device_tensor, None
        return tensor
