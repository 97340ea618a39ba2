"""Activation offloading: the inputs that activation checkpointing saves wait in host memory for the backward pass.

Copies run on a stream of their own, so that they overlap with the computation. In the backward pass the copy of the
next sub-layer's input starts while the present sub-layer is computed. All of it can be recorded in a CUDA graph: the
host buffers are allocated before the first pass, and the same pass always takes the same ones.
"""

import contextlib
import weakref
from collections.abc import Callable

import torch


class OffloadedTensor:
    """A tensor that autograd saved, on its way to a host buffer and back.

    Args:
        tensor: that was saved.
        host_tensor: of its shape and dtype, in pinned memory.
        stream: of the copies.
        previous: the tensor that was saved before this one, so that the backward pass needs it after this one.
    """

    device_tensor: torch.Tensor | None = None  # None while the tensor is in host memory only

    def __init__(
        self,
        tensor: torch.Tensor,
        host_tensor: torch.Tensor,
        stream: torch.cuda.Stream,
        previous: "OffloadedTensor | None",
    ):
        self.previous, self.host_tensor = previous, host_tensor
        self.number: int = 0 if previous is None else previous.number + 1
        self.copied = self.copy(tensor, host_tensor, stream)
        self.device_tensor = tensor

    @staticmethod
    def copy(source: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Copies on `stream`, after the work that the current stream has now; the event marks the end of the copy."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def release(self):
        """Frees the device tensor; later work on the current stream waits for the copy, so memory is reused safely."""
        torch.cuda.current_stream().wait_event(self.copied)
        self.device_tensor = None

    def __del__(self):
        if self.device_tensor is not None:  # autograd dropped the graph before the copy was waited for
            self.release()

    def take(self) -> torch.Tensor:
        """The device tensor, which now belongs to the caller; `prefetch` comes before."""
        tensor, self.device_tensor = self.device_tensor, None
        assert tensor is not None
        return tensor

    def prefetch(self, stream: torch.cuda.Stream):
        """Starts the copy back to the device, unless the tensor is there already."""
        if self.device_tensor is None:
            self.device_tensor = torch.empty_like(self.host_tensor, device=stream.device)
            self.copied = self.copy(self.host_tensor, self.device_tensor, stream)


class ActivationOffload:
    """Saved-tensor hooks that offload what autograd saves within `with offload.context():`.

    Args:
        count: tensors that a pass offloads, at most.
        numel: elements of a tensor, at most.
        dtype: of the tensors.
    """

    def __init__(self, count: int, numel: int, dtype: torch.dtype):
        self.stream = torch.cuda.Stream()
        self.buffers = [torch.empty(numel, dtype=dtype, pin_memory=True) for _ in range(count)]
        # A weak reference: the graph owns its offloaded tensors, so they go with the graph of a failed attempt.
        self.last: Callable[[], OffloadedTensor | None] = lambda: None

    def context(self) -> contextlib.AbstractContextManager:
        """The context in which to call `torch.utils.checkpoint.checkpoint`."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> OffloadedTensor | torch.Tensor:
        """Starts the copy of a saved tensor to the host and frees the one saved before it."""
        if not tensor.is_cuda or tensor.numel() == 0:
            return tensor
        previous = self.last()
        if previous is not None:
            previous.release()
        buffer = self.buffers[0 if previous is None else previous.number + 1]
        host_tensor = buffer[: tensor.numel()].view(tensor.shape)
        offloaded = OffloadedTensor(tensor, host_tensor, self.stream, previous)
        self.last = weakref.ref(offloaded)
        return offloaded

    def unpack(self, offloaded: OffloadedTensor | torch.Tensor) -> torch.Tensor:
        """The tensor on the device; starts the copy of the tensor that is needed next."""
        if isinstance(offloaded, torch.Tensor):
            return offloaded
        offloaded.prefetch(self.stream)
        torch.cuda.current_stream().wait_event(offloaded.copied)
        if offloaded.previous is not None:
            offloaded.previous.prefetch(self.stream)
        return offloaded.take()
