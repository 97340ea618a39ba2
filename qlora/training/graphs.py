"""The passes over a micro-batch as CUDA graphs: the host launches one graph instead of a thousand kernels.

A graph is recorded for fixed shapes. Rows are therefore filled up to one of a few sizes, and there is one graph for
each size, recorded when the first row of that size comes. Everything else that changes from row to row is read from
memory: tokens, positions, where the samples lie, the dropout seed, the divisor and the scale of the loss.

All graphs use one memory pool, which nothing else uses: a graph leaves nothing in it that another one would need,
since losses and gradients are added to tensors outside of it.
"""

import functools
import gc
from collections.abc import Callable
from typing import cast

import torch

from glm_kernels import TILE
from qlora.data.batching import LEAST_TOKENS, RowSize, Sample, size_of_row
from qlora.data.collator import PaddingFreeCollator
from qlora.layers.linear import draw_seed
from qlora.layers.replacement import dropout_seed


@functools.cache
def recording_stream() -> torch.cuda.Stream:
    """The stream of all recordings, one for the process: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


class GraphRecorder:
    """Records work on the GPU as CUDA graphs with a common memory pool."""

    def __init__(self):
        self.stream, self.pool = recording_stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]):
        """Does the work, which compiles and loads its kernels: that must not happen during a recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the work without doing it; the result does it.

        Raises:
            torch.OutOfMemoryError: there is too little memory for it.
        """
        graph, reason = torch.cuda.CUDAGraph(), None
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            try:
                work()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            if reason is not None:
                # What the work left is freed within the recording. Tensors on their way to the host then make this
                # stream wait for their copies; without that the recording cannot end, and no random number can be
                # drawn any more.
                gc.collect()
        if reason is not None:
            raise torch.OutOfMemoryError(reason)
        return graph.replay


class GraphedPasses:
    """The forward and backward passes over micro-batches, by CUDA graphs.

    Args:
        model: in layers for training, see `replace_layers`.
        collate: makes the row of a micro-batch.
        most_samples: of a micro-batch.
        recorder: makes a recorder of graphs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        collate: PaddingFreeCollator,
        most_samples: int,
        recorder: Callable[[], GraphRecorder] = GraphRecorder,
    ):
        self.model, self.collate, self.most_samples, self.make_recorder = model, collate, most_samples, recorder
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        # What the graphs read beside their rows, and what they add to.
        self.dropout_seed = cast(torch.Tensor, dropout_seed(model))
        self.divisor, self.loss_scale, self.loss_sum = (torch.ones((), device=self.device) for _ in range(3))
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.forget()

    def forget(self):
        """Drops all graphs and frees their memory."""
        self.graphs: dict[tuple[RowSize, bool], tuple[dict, Callable[[], None]]] = {}
        self.recorder = None
        self.warmed_up: set[bool] = set()  # with gradients, without
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forward_backward(
        self, micro_batches: list[list[Sample]], divisor: int | torch.Tensor, loss_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds to the gradients of the parameters.

        Args:
            micro_batches: of a step.
            divisor: of the summed loss.
            loss_scale: factor of the loss in the gradients; None for 1.
        Returns:
            The loss, a scalar in fp32.
        """
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:  # the graphs add to these tensors, wherever the gradients are
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient
        self.loss_scale.fill_(1.0 if loss_scale is None else loss_scale)
        return self.loss(micro_batches, divisor)

    def loss(self, micro_batches: list[list[Sample]], divisor: int | torch.Tensor) -> torch.Tensor:
        """The loss, a scalar in fp32; where gradients are enabled, their passes too."""
        self.loss_sum.zero_()
        self.divisor.fill_(divisor)
        for samples in micro_batches:
            if torch.is_grad_enabled():  # an evaluation has no dropout, and leaves the generator as it is
                draw_seed(self.dropout_seed)
            self.replay(samples)
        return self.loss_sum.clone()

    def replay(self, samples: list[Sample]):
        """The passes over a micro-batch, by the graph of its size, which is recorded if there is none."""
        size = size_of_row(samples, self.most_samples)
        inputs = self.collate(samples, size)
        key = size, torch.is_grad_enabled()
        if key not in self.graphs:
            self.graphs[key] = self.record(inputs)
        graph_inputs, replay = self.graphs[key]
        for name, value in inputs.items():
            pinned = value.pin_memory() if self.device.type == "cuda" else value
            graph_inputs[name].copy_(pinned, non_blocking=True)
        replay()

    def record(self, inputs: dict) -> tuple[dict, Callable[[], None]]:
        """A graph for rows of the size of these inputs: the inputs that it reads, and the function that replays it."""
        if self.recorder is None:
            self.recorder = self.make_recorder()
        if torch.is_grad_enabled() not in self.warmed_up:
            self.warmed_up.add(torch.is_grad_enabled())
            size = RowSize(LEAST_TOKENS, LEAST_TOKENS, LEAST_TOKENS // TILE + self.most_samples)
            padding = self.to_device(self.collate([], size))
            self.recorder.warm_up(lambda: self.passes(padding))
        inputs = self.to_device(inputs)
        return inputs, self.recorder.record(lambda: self.passes(inputs))

    def to_device(self, inputs: dict) -> dict:
        """The inputs on the device of the model."""
        return {name: value.to(self.device) for name, value in inputs.items()}

    def passes(self, inputs: dict):
        """The work of a graph."""
        loss = self.model(**inputs, num_items_in_batch=self.divisor).loss
        self.loss_sum += loss.detach()
        if torch.is_grad_enabled():
            (loss * self.loss_scale).backward()
