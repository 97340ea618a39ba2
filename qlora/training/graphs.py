"""The passes over a micro-batch as CUDA graphs: the host launches one graph instead of a thousand kernels.

A graph is recorded for fixed shapes. Rows are therefore filled up to one of a few sizes, and there is one graph for
each size, recorded when the first row of that size comes. Everything else that changes from row to row is read from
memory: tokens, positions, where the samples lie, the dropout seed, the divisor and the scale of the loss.

All graphs use one memory pool, which nothing else uses: a graph leaves nothing in it that another one would need,
since losses and gradients are added to tensors outside of it.
"""

import gc
from collections.abc import Callable
from typing import cast

import torch

from glm_kernels import TILE
from qlora.data.batching import LEAST_TOKENS, RowSize, Sample, size_of_row
from qlora.data.collator import PaddingFreeCollator
from qlora.layers.linear import draw_seed
from qlora.layers.replacement import dropout_seed


class GraphedPasses:
    """Records and replays the forward and backward passes over micro-batches.

    Args:
        model: in layers for training, see `replace_layers`, on a GPU on which the kernels run.
        collate: makes the row of a micro-batch.
        most_samples: of a micro-batch.
    """

    def __init__(self, model: torch.nn.Module, collate: PaddingFreeCollator, most_samples: int):
        self.model, self.collate, self.most_samples = model, collate, most_samples
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        # What the graphs read, beside their rows, and what they add to.
        self.dropout_seed = cast(torch.Tensor, dropout_seed(model))
        self.divisor, self.loss_scale, self.loss_sum = (torch.ones((), device=self.device) for _ in range(3))
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.stream = torch.cuda.Stream()
        self.forget()

    def forget(self):
        """Drops all graphs and their memory."""
        self.graphs: dict[tuple[RowSize, bool], tuple[dict, Callable[[], None]]] = {}
        self.pool, self.is_warm = torch.cuda.graph_pool_handle(), False
        gc.collect()
        torch.cuda.empty_cache()

    def forward_backward(
        self, micro_batches: list[list[Sample]], divisor: int | torch.Tensor, loss_scale: torch.Tensor | None
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
            if parameter.grad is None:
                gradient.zero_()
                parameter.grad = gradient
        self.loss_scale.fill_(1.0 if loss_scale is None else loss_scale)
        return self.loss(micro_batches, divisor)

    def loss(self, micro_batches: list[list[Sample]], divisor: int | torch.Tensor) -> torch.Tensor:
        """The loss, a scalar in fp32; where gradients are enabled they are added to as well."""
        self.loss_sum.zero_()
        self.divisor.fill_(divisor)
        for samples in micro_batches:
            draw_seed(self.dropout_seed)
            self.replay(samples)
        return self.loss_sum.clone()

    def replay(self, samples: list[Sample]):
        """The passes over a micro-batch, by the graph of its size."""
        size = size_of_row(samples, self.most_samples)
        inputs = {name: value.pin_memory() for name, value in self.collate(samples, size).items()}
        key = size, torch.is_grad_enabled()
        if key not in self.graphs:
            self.graphs[key] = self.record(inputs)
        graph_inputs, replay = self.graphs[key]
        for name, value in inputs.items():
            graph_inputs[name].copy_(value, non_blocking=True)
        replay()

    def record(self, inputs: dict) -> tuple[dict, Callable[[], None]]:
        """The graph for rows of the size of these inputs: its own inputs on the GPU, and the function that replays it.

        Raises:
            torch.OutOfMemoryError: there is too little memory for these rows.
        """
        if not self.is_warm:
            self.warm_up()
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            # The data loader and other threads may go on meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                self.passes(inputs)
        except RuntimeError as error:
            # The recording cannot be ended properly after an error, and this hides the first one.
            cause = error.__context__ if isinstance(error.__context__, torch.OutOfMemoryError) else error
            raise cause from None
        return inputs, graph.replay

    def warm_up(self):
        """Compiles and loads the kernels, which must not happen while a graph is recorded, with a row of padding."""
        size = RowSize(LEAST_TOKENS, LEAST_TOKENS, LEAST_TOKENS // TILE + self.most_samples)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.passes({name: value.to(self.device) for name, value in self.collate([], size).items()})
        torch.cuda.current_stream().wait_stream(self.stream)
        self.is_warm = True

    def passes(self, inputs: dict):
        """The work of a graph."""
        loss = self.model(**inputs, num_items_in_batch=self.divisor).loss
        self.loss_sum += loss.detach()
        if torch.is_grad_enabled():
            torch._foreach_add_(self.gradients, torch.autograd.grad(loss * self.loss_scale, self.parameters))
