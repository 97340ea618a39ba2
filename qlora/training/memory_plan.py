"""The memory plan: how an optimizer step is split into micro-batches, and what is recomputed, cached or offloaded.

The result of a step does not depend on the plan. Memory is spent in this order, by the time that a byte saves:
  1. larger micro-batches, up to a whole step, since each micro-batch dequantizes every weight again;
  2. saving the activations of the MLP sub-layers, then of the attention sub-layers, instead of recomputing them;
  3. caching the dequantized weights.
Where even the inputs of the sub-layers do not fit, they are offloaded to host memory.

`predict_peak` says what is counted. What the layers save for the backward pass is counted in `Sizes`, so that a change
of a layer in qlora/layers/, glm_shared/ or the packages of the models may need one here.
Units: bytes, tokens of a micro-batch, and floating-point operations.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from glm_kernels import kernels_supported
from glm_shared.description import ModelDescription
from glm_shared.loss import ROWS_AT_ONCE
from qlora.arguments import LoraSettings
from qlora.data.batching import filled_tokens
from qlora.layers.activation_offload import ActivationOffload
from qlora.layers.linear import NF4Linear
from qlora.loading import BITS_PER_QUANTIZED_WEIGHT
from qlora.units import GIB, parse_size

RESERVE = GIB // 2  # bytes of the free memory, for what is not PyTorch's: the CUDA context, and other libraries
CPU_TOKENS = 1024  # tokens of a micro-batch without a GPU
FLOPS_PER_BYTE = 250  # operations in the time of one byte of memory traffic; only relative costs matter here
MICRO_BATCH_TOKENS = 300  # launching the kernels of a micro-batch takes the GPU as long as this many tokens
HOST_TOKENS = 2000  # tokens that an H100 computes while its host launches the kernels of one micro-batch without a
# CUDA graph; twice that if recomputed
WORKSPACES = 64 * 2**20  # bytes of cuBLAS, for two threads, on Hopper; less on other GPUs
MOST_PARTS, MOST_ROWS = 8, 64  # of the sums for the gradients of A and B: MOST_SPLITS and MOST_R of glm_kernels.lora
MARGIN = 0.06  # share of the budget for what PyTorch reserves beyond the prediction; up to 0.05 was measured
MOST_MICRO_BATCHES = 64  # that a step is split into


@dataclass(frozen=True)
class Sizes:
    """What the plan needs to know about the model and the run.

    Attributes:
        config: the model's.
        bytes_per_number: of the compute dtype.
        resident: bytes on the GPU before the first step: weights and adapter.
        trainable: parameters of the adapter.
        targets: layers with an adapter, which save their input for the gradient of A.
        rank: of the adapter.
        processes: that train together, each with a copy of the gradients in the buckets of DDP.
        has_kernels: whether the kernels of attention and adapter run; otherwise queries and keys are saved before and
            after the rotation, and the gradients of A and B are computed from copies in fp32.
        fp8: whether the products with the frozen weights take 8-bit operands; the dequantized weights are then W and
            W.T in e4m3, together as large as W in a 16-bit type.
    """

    config: ModelDescription
    bytes_per_number: int
    resident: int
    trainable: int
    targets: frozenset[str] = frozenset()
    rank: int = 0
    processes: int = 1
    has_kernels: bool = True
    fp8: bool = False

    @property
    def has_graphs(self) -> bool:
        """Whether the passes over a micro-batch are CUDA graphs."""
        return self.has_kernels and self.processes == 1

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    @property
    def input_bytes(self) -> int:
        """Bytes a token of the input of a sub-layer."""
        return self.bytes_per_number * self.config.hidden_size

    @property
    def attention_bytes(self) -> int:
        """Bytes a token that an attention sub-layer saves beside its input.

        With the kernel the norm's output, the projection, and the input of the second linear layer; the log-sum-exp of
        each head in fp32, and the statistics of the norm. Without it also the rotated queries and keys, and the values
        as SDPA saves them, for every head. `dropout(x) @ A.T` of the linear layers that have an adapter.
        """
        (projection, hidden), (_, output) = self.config.attention_shapes.values()
        saved = hidden + projection + output + (0 if self.has_kernels else 3 * output)
        statistics = 4 * self.config.num_attention_heads + 16
        return self.bytes_per_number * saved + statistics + self.low_rank_bytes(*self.config.attention_shapes)

    @property
    def mlp_bytes(self) -> int:
        """Bytes a token that an MLP sub-layer saves beside its input.

        The input of the activation function, the statistics of the norm, and the inputs x and `dropout(x) @ A.T` of
        the linear layers that have an adapter.
        """
        shapes = self.config.mlp_shapes
        activation_input, _ = next(iter(shapes.values()))
        saved = activation_input + sum(inputs for name, (_, inputs) in shapes.items() if name in self.targets)
        return self.bytes_per_number * saved + self.low_rank_bytes(*shapes) + 16

    def low_rank_bytes(self, *names: str) -> int:
        """Bytes a token of `dropout(x) @ A.T` in those of the named layers that have an adapter."""
        return self.bytes_per_number * self.rank * len(self.targets & {*names})

    @property
    def copied_bytes(self) -> int:
        """Bytes a token of what only GPUs without the kernels have in a backward pass.

        Two gradients of the hidden width more, since norm and residual are computed one after the other; and the
        copies from which the widest adapter's gradients are computed: `dropout(x)`, and x or the output's gradient in
        fp32.
        """
        if self.has_kernels:
            return 0
        shapes = self.config.linear_shapes.items()
        adapted = [shape for name, shape in shapes if name in self.targets and self.bytes_per_number < 4]
        copies = [max((self.bytes_per_number + 4) * inputs, 4 * outputs) for outputs, inputs in adapted]
        return 2 * self.input_bytes + max(copies, default=0)

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of a dequantized weight where it is used."""
        return 1 if self.fp8 else self.bytes_per_number

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of all weights in e4m3, for the rows of W and of W.T, in fp32."""
        return 4 * self.layers * sum(map(sum, self.config.linear_shapes.values())) if self.fp8 else 0

    @property
    def adapter_gradient_bytes(self) -> int:
        """Bytes of the gradients of the largest adapter, fp32, and of the parts that the larger one is a sum of."""
        adapted = [self.config.linear_shapes[name] for name in self.targets]
        parts = max(MOST_PARTS // max(math.ceil(self.rank / MOST_ROWS), 1), 1)
        return 4 * self.rank * max((sum(shape) + parts * max(shape) for shape in adapted), default=0)

    def mlp_working_bytes(self, T: int, dequantizes: bool) -> int:
        """Bytes of the temporary tensors in the backward pass of an MLP sub-layer of T tokens.

        The gradients of its output and of its norm; the wider one of the gradients of the activation function's output
        and input; and beside it the other one, or a dequantized weight. With fp8 the wider one in e4m3, too.
        """
        shapes = list(self.config.mlp_shapes.values())
        (activation_input, _), (_, activation_output) = shapes
        narrow, wide = sorted((self.bytes_per_number * activation_input, self.bytes_per_number * activation_output))
        weight = self.bytes_per_weight * max(map(math.prod, shapes)) if dequantizes else 0
        operand = max(activation_input, activation_output) if self.fp8 else 0  # a number in e4m3 has one byte
        return T * (2 * self.input_bytes + wide + operand + self.copied_bytes) + max(T * narrow, weight)

    def attention_working_bytes(self, T: int, dequantizes: bool) -> int:
        """The same of an attention sub-layer.

        The gradients of its output, its norm and its projection, and that of the attention's output or a weight.
        """
        (projection, hidden), (_, output) = self.config.attention_shapes.values()
        wide, weight = self.bytes_per_number * projection, self.bytes_per_weight * projection * hidden * dequantizes
        wide += projection if self.fp8 else 0  # the same in e4m3
        return T * (2 * self.input_bytes + wide + self.copied_bytes) + max(T * self.bytes_per_number * output, weight)


def model_sizes(model: PeftModel, lora: LoraSettings, processes: int, fp8: bool) -> Sizes:
    """What the plan needs to know of a model whose linear layers will be quantized.

    Args:
        model: in its compute dtype, with the adapter; it needs no values.
        lora: the settings of the adapter.
        processes, fp8: see `Sizes`.
    """
    config, dtype = model.config, model.dtype
    quantized_weights = config.num_hidden_layers * config.weights_per_layer
    unquantized = sum(parameter.nbytes for parameter in model.parameters())
    resident = int(unquantized - quantized_weights * (dtype.itemsize - BITS_PER_QUANTIZED_WEIGHT / 8))
    trainable, _ = model.get_nb_trainable_parameters()
    targets, has_kernels = frozenset(lora.target_modules), gpu_has_kernels(dtype)
    return Sizes(config, dtype.itemsize, resident, trainable, targets, lora.rank, processes, has_kernels, fp8)


def gpu_has_kernels(dtype: torch.dtype) -> bool:
    """Whether the kernels of attention and adapter are used on the GPU in this dtype."""
    return kernels_supported(torch.empty(0, dtype=dtype, device="cuda"))


@dataclass(frozen=True)
class MemoryPlan:
    """The choice, and the peak of allocated memory that is predicted for it.

    Attributes:
        max_tokens: most tokens of a micro-batch.
        recompute_mlp: number of layers whose MLP activations are recomputed in the backward pass.
        recompute_attention: the same for the attention activations.
        dequantized_layers: number of layers whose dequantized weights are cached.
        offload: whether the inputs of recomputed sub-layers are in host memory until the backward pass.
        predicted_peak: bytes; 0 where memory is not planned, on a CPU.
        step_tokens: tokens of the longest optimizer step to expect; 0 on a CPU.
        budget: bytes that the process is held to; None for no limit.
    """

    max_tokens: int
    recompute_mlp: int
    recompute_attention: int
    dequantized_layers: int = 0
    offload: bool = False
    predicted_peak: int = 0
    step_tokens: int = 0
    budget: int | None = None

    def table(self, layers: int) -> str:
        """A few lines for the user; `layers` is the number of the model's layers."""
        count = math.ceil(self.step_tokens / self.max_tokens)
        micro_batches = "micro-batch" if count == 1 else "micro-batches"
        recomputed = f"MLP {self.recompute_mlp}, attention {self.recompute_attention} of {layers} layers"
        rows = [
            ("tokens per micro-batch", f"{self.max_tokens:,} ({count} {micro_batches} for the longest step)"),
            ("recomputed activations", recomputed),
            ("cached dequantized weights", f"{self.dequantized_layers} of {layers} layers"),
            ("inputs of recomputed layers", "in host memory" if self.offload else "on the GPU"),
            ("predicted peak memory", f"{self.predicted_peak / GIB:.2f} GiB"),
        ]
        return "\n".join(f"  {name:<28} {value}" for name, value in rows)


def predict_peak(sizes: Sizes, plan: MemoryPlan) -> int:
    """Bytes that are allocated at the worst moment of a step; with CUDA graphs, those that PyTorch reserves."""
    T, layers = filled_tokens(plan.max_tokens), sizes.layers
    copies = 3 if sizes.processes == 1 else 4  # gradient, two moments, and the buckets in which DDP sums gradients
    optimizer = 4 * copies * sizes.trainable  # all of them fp32
    update = 4 * sizes.trainable  # AdamW's temporary tensors, fp32
    dequantized = plan.dequantized_layers * sizes.config.weights_per_layer * sizes.bytes_per_number
    saved = (layers - plan.recompute_mlp) * sizes.mlp_bytes + (
        layers - plan.recompute_attention
    ) * sizes.attention_bytes
    # Of the offloaded inputs three are on the GPU: one in use, one on its way there, one on its way to the host.
    offloaded_inputs = plan.recompute_mlp + plan.recompute_attention - 3 if plan.offload else 0
    saved += (2 * layers - offloaded_inputs) * sizes.input_bytes
    # A slice of logits; the last hidden states, their norm, and its gradient.
    loss = ROWS_AT_ONCE * sizes.config.vocab_size * sizes.bytes_per_number + 3 * T * sizes.input_bytes
    dequantizes = plan.dequantized_layers < layers
    mlp = sizes.mlp_working_bytes(T, dequantizes) + T * sizes.mlp_bytes * (plan.recompute_mlp > 0)
    attention = sizes.attention_working_bytes(T, dequantizes) + T * sizes.attention_bytes * (
        plan.recompute_attention > 0
    )
    passes = T * saved + max(loss, max(mlp, attention) + sizes.adapter_gradient_bytes)
    # The memory of graphs is theirs alone; what passes without graphs freed serves the optimizer.
    most = passes + update if sizes.has_graphs else max(passes, update)
    return sizes.resident + sizes.scale_bytes + optimizer + dequantized + WORKSPACES + most


def relative_cost(sizes: Sizes, plan: MemoryPlan, step_tokens: int) -> float:
    """Time of a step in units of one floating-point operation: that of the GPU.

    Without CUDA graphs it is that of the host if the host is slower.
    """
    config, layers = sizes.config, sizes.layers
    weights = config.weights_per_layer
    micro_batches = math.ceil(step_tokens / plan.max_tokens)
    first_mlp, *_ = map(math.prod, config.mlp_shapes.values())  # recomputing needs no product with the second matrix
    first_attention, *_ = map(math.prod, config.attention_shapes.values())
    recomputed_weights = plan.recompute_mlp * first_mlp + plan.recompute_attention * first_attention
    products = 4 * layers * weights + 2 * recomputed_weights
    arithmetic = step_tokens * (4 * config.head_weights + products / (2 if sizes.fp8 else 1))
    reads = (layers - plan.dequantized_layers) * weights * 2 + recomputed_weights * (
        1 - plan.dequantized_layers / layers
    )
    dequantizing = micro_batches * reads * (sizes.bytes_per_weight + 0.5) * FLOPS_PER_BYTE
    launching = micro_batches * MICRO_BATCH_TOKENS * 4 * weights * layers
    recomputed_share = (plan.recompute_mlp + plan.recompute_attention) / (2 * layers)
    host = 0.0 if sizes.has_graphs else micro_batches * HOST_TOKENS * (1 + recomputed_share) * 4 * weights * layers
    return max(arithmetic + dequantizing + launching, host) * (1.1 if plan.offload else 1.0)


def fill(sizes: Sizes, max_tokens: int, offload: bool, budget: int, fixed: dict[str, Any]) -> MemoryPlan | None:
    """The plan for this size of micro-batches that spends the rest of the budget best; None if it does not fit."""
    every = sizes.layers
    plan = dataclasses.replace(MemoryPlan(max_tokens, every, every, offload=offload), **fixed)
    if predict_peak(sizes, plan) > budget:
        return None
    fewest_first, most_first = range(every), range(every, 0, -1)
    counts = {"recompute_mlp": fewest_first, "recompute_attention": fewest_first, "dequantized_layers": most_first}
    for name in [name for name in counts if name not in fixed]:
        for count in counts[name]:
            changed: dict[str, Any] = {name: count}
            larger = dataclasses.replace(plan, **changed)
            if predict_peak(sizes, larger) <= budget:
                plan = larger
                break
    return dataclasses.replace(plan, predicted_peak=predict_peak(sizes, plan))


def choose_plan(
    sizes: Sizes, step_tokens: int, longest_sample: int, budget: int, fixed: dict[str, Any] | None = None
) -> MemoryPlan:
    """The plan that should be fastest within a budget.

    Args:
        sizes: of model and run.
        step_tokens: tokens of the longest optimizer step to expect.
        longest_sample: tokens of the longest sample, which cannot be split.
        budget: bytes that may be allocated.
        fixed: fields of the plan that the user has chosen.
    Raises:
        ValueError: even the longest sample alone does not fit.
    """
    usable, fixed = int(budget * (1 - MARGIN)), dict(fixed or {})
    if "max_tokens" in fixed:
        fixed["max_tokens"] = max(fixed["max_tokens"], longest_sample)
    candidates = []
    for micro_batches in range(1, MOST_MICRO_BATCHES + 1):
        max_tokens = max(math.ceil(step_tokens / micro_batches), longest_sample)
        plans = [fill(sizes, max_tokens, offload, usable, fixed) for offload in (False, True)]
        candidates += [plan for plan in plans if plan is not None]
    if not candidates:
        smallest = MemoryPlan(longest_sample, sizes.layers, sizes.layers, offload=True)
        least = predict_peak(sizes, dataclasses.replace(smallest, **fixed))
        raise ValueError(
            f"{budget / GIB:.2f} GiB of GPU memory are too little: the longest sample, {longest_sample} tokens, needs "
            f"{least / (1 - MARGIN) / GIB:.2f} GiB{' with what was fixed by flags' if fixed else ''}. Lower "
            "--max_input_length and --max_output_length, or use a larger GPU."
        )
    fastest = min(candidates, key=lambda plan: relative_cost(sizes, plan, step_tokens))
    return dataclasses.replace(fastest, step_tokens=step_tokens)


def plan_without_gpu(fixed: dict[str, Any]) -> MemoryPlan:
    """The plan on a CPU: everything is saved unless the user has chosen otherwise."""
    return dataclasses.replace(MemoryPlan(CPU_TOKENS, 0, 0), **fixed | {"offload": False})


def longest_step(lengths: list[int], samples_per_step: int) -> int:
    """Tokens that a step of randomly drawn samples hardly exceeds: the mean and three standard deviations."""
    values = torch.tensor(lengths, dtype=torch.float32)
    likely = samples_per_step * values.mean() + 3 * math.sqrt(samples_per_step) * values.std(correction=0)
    return min(math.ceil(likely), sum(sorted(lengths)[-samples_per_step:]))


def memory_budget(requested: str | None) -> int:
    """Bytes that this process may allocate on the GPU.

    Args:
        requested: as the user wrote it; None for the free memory.
    Raises:
        ValueError: more was requested than is free, or there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--memory_budget plans the memory of a GPU; there is none.")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    available = free + torch.cuda.memory_reserved()
    if requested is None:
        return available - RESERVE
    budget = parse_size(requested)
    if budget > available:
        raise ValueError(f"--memory_budget {requested}: only {available / GIB:.2f} GiB are free on this GPU.")
    return budget


def apply_plan(model: PeftModel, plan: MemoryPlan):
    """Sets a model's blocks up as planned, and holds the process to the budget; `replace_layers` comes before."""
    layers = model.get_base_model().blocks
    offload = None
    if plan.offload:
        numel = filled_tokens(plan.max_tokens) * model.config.hidden_size
        offload = ActivationOffload(plan.recompute_mlp + plan.recompute_attention, numel, model.dtype)
    for number, block in enumerate(layers):
        block.recompute_mlp = number >= len(layers) - plan.recompute_mlp
        block.recompute_attention = number >= len(layers) - plan.recompute_attention
        block.offload = offload
        for layer in block.modules():
            if isinstance(layer, NF4Linear):
                layer.cache_dequantized(number < plan.dequantized_layers)
    if torch.cuda.is_available():
        if plan.budget is not None:
            torch.cuda.set_per_process_memory_fraction(plan.budget / torch.cuda.mem_get_info()[1])
        torch.cuda.reset_peak_memory_stats()


def set_activation_checkpointing(model: PeftModel, enabled: bool):
    """Recomputes the activations of all layers in the backward pass, or of none."""
    layers = model.config.num_hidden_layers if enabled else 0
    apply_plan(model, MemoryPlan(0, layers, layers))
