"""How much goes through the GPU at once, what is kept and what is computed again: chosen from the memory at hand.

The mathematics does not depend on any of it. In order of what a byte buys, memory is spent on
  1. more tokens at once, up to a whole optimizer step: each pass dequantises every weight anew;
  2. keeping the activations of the MLP halves, then of the attention halves, which are otherwise recomputed;
  3. keeping the weights dequantised.
Where even the inputs of the half layers do not fit, they wait in host memory.

B bytes a number, C hidden size, V vocabulary, T tokens at once.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from chatglm import ChatGLMConfig
from chatglm.loss import ROWS_AT_ONCE
from glm_kernels import kernels_supported
from qlora.layers.activation_offload import ActivationOffload
from qlora.layers.nf4 import cache_dequantized
from qlora.loading import GIB

logger = logging.getLogger(__name__)

RESERVE = GIB // 2  # of the free memory, for libraries' workspaces
CPU_TOKENS = 1024  # at once without a GPU
FLOPS_PER_BYTE = 250  # of current GPUs' matrix units and memory; only relative costs matter here
PASS_TOKENS = 300  # a pass costs as much as this many tokens, for launching its kernels
HOST_TOKENS = 2000  # for which an H100 needs as long as its host for a pass; twice as many if all is recomputed
MARGIN = 0.03  # of the budget, for what fragmentation wastes


@dataclass(frozen=True)
class Sizes:
    """What the plan needs to know about the model and the run."""

    config: ChatGLMConfig
    bytes_per_number: int
    resident: int  # bytes on the GPU before the first step: weights, adapter
    trainable: int  # parameters of the adapter
    targets: frozenset[str] = frozenset()  # layers with an adapter, which keeps their input
    fused_attention: bool = True  # by the kernel; otherwise queries and keys are kept before and after rotation

    @property
    def layers(self) -> int:
        return self.config.num_layers

    @property
    def half_input(self) -> int:
        """Bytes a token of the input of half a layer."""
        return self.bytes_per_number * self.config.hidden_size

    @property
    def attention(self) -> int:
        """Bytes a token that the attention half keeps beside its input: norm, projection, output, statistics."""
        return (5 if self.fused_attention else 8) * self.half_input + 4 * self.config.num_attention_heads + 16

    @property
    def mlp(self) -> int:
        """Bytes a token that the MLP half keeps beside its input: what goes into the GELU, statistics."""
        inner = self.bytes_per_number * self.config.inner_hidden_size
        adapters = self.half_input * ("dense_h_to_4h" in self.targets) + inner * ("dense_4h_to_h" in self.targets)
        return inner + adapters + 16

    @property
    def working(self) -> int:
        """Bytes a token of what comes and goes in the backward pass of half a layer."""
        return 2 * self.bytes_per_number * self.config.inner_hidden_size + 4 * self.half_input


@dataclass(frozen=True)
class MemoryPlan:
    """The choice, and the peak of allocated memory it should lead to."""

    max_tokens: int
    kept_mlp: int = 0  # layers whose MLP half keeps its activations
    kept_attention: int = 0
    dense: int = 0  # layers whose weights stay dequantised
    offload: bool = False
    predicted_peak: int = 0  # bytes

    def table(self, step_tokens: int, layers: int) -> str:
        """A few lines for the user."""
        passes = math.ceil(step_tokens / self.max_tokens)
        rows = [
            (
                "tokens at once",
                f"{self.max_tokens:,} ({passes} pass{'es' if passes > 1 else ''} for the longest step)",
            ),
            ("activations kept", f"MLP {self.kept_mlp}, attention {self.kept_attention} of {layers} layers"),
            ("weights kept dequantised", f"{self.dense} of {layers} layers"),
            ("inputs of recomputed layers", "in host memory" if self.offload else "on the GPU"),
            ("predicted peak memory", f"{self.predicted_peak / GIB:.2f} GiB"),
        ]
        return "\n".join(f"  {name:<28} {value}" for name, value in rows)


def predict_peak(sizes: Sizes, plan: MemoryPlan) -> int:
    """Bytes allocated at the worst moment of a step."""
    T, layers = plan.max_tokens, sizes.layers
    optimizer = 12 * sizes.trainable  # gradient and two moments, fp32
    dense = plan.dense * sizes.config.weights_per_layer * sizes.bytes_per_number
    kept = plan.kept_mlp * sizes.mlp + plan.kept_attention * sizes.attention
    recomputed_halves = 2 * layers - plan.kept_mlp - plan.kept_attention
    inputs = 2 * layers - (recomputed_halves if plan.offload else 0) + (3 if plan.offload else 0)
    kept += inputs * sizes.half_input
    logits = ROWS_AT_ONCE * sizes.config.vocab_size * sizes.bytes_per_number + 3 * T * sizes.half_input
    recomputed = max(
        sizes.mlp if plan.kept_mlp < layers else 0, sizes.attention if plan.kept_attention < layers else 0
    )
    largest = sizes.config.hidden_size * sizes.config.inner_hidden_size * sizes.bytes_per_number
    layer = T * (sizes.working + recomputed) + (largest if plan.dense < layers else 0)
    return sizes.resident + optimizer + dense + T * kept + max(logits, layer)


def relative_cost(sizes: Sizes, plan: MemoryPlan, step_tokens: int) -> float:
    """Time of a step in units of one operation."""
    config, layers = sizes.config, sizes.layers
    weights = config.weights_per_layer
    passes = math.ceil(step_tokens / plan.max_tokens)
    first_mlp = config.hidden_size * config.inner_hidden_size  # the second MLP matrix need not be applied again
    recomputed = (layers - plan.kept_mlp) * first_mlp + (layers - plan.kept_attention) * 3 * config.hidden_size**2
    arithmetic = step_tokens * (4 * config.multiplied_weights + 2 * recomputed)
    reads = (layers - plan.dense) * weights * 2 + recomputed * (1 - plan.dense / layers)
    dequantising = passes * reads * (sizes.bytes_per_number + 0.5) * FLOPS_PER_BYTE
    launching = passes * PASS_TOKENS * 4 * weights * layers
    recomputed_halves = 1 - (plan.kept_mlp + plan.kept_attention) / (2 * layers)
    host = passes * HOST_TOKENS * (1 + recomputed_halves) * 4 * weights * layers
    return max(arithmetic + dequantising + launching, host) * (1.1 if plan.offload else 1.0)


def fill(sizes: Sizes, max_tokens: int, offload: bool, budget: int, fixed: dict[str, int]) -> MemoryPlan | None:
    """The plan for this many tokens at once that spends what is left of the budget best; None if it does not fit."""
    plan = dataclasses.replace(MemoryPlan(max_tokens, offload=offload), **fixed)
    if predict_peak(sizes, plan) > budget:
        return None
    for name in ("kept_mlp", "kept_attention", "dense"):
        for count in [] if name in fixed else range(sizes.layers, 0, -1):
            larger = dataclasses.replace(plan, **{name: count})
            if predict_peak(sizes, larger) <= budget:
                plan = larger
                break
    return dataclasses.replace(plan, predicted_peak=predict_peak(sizes, plan))


def choose_plan(
    sizes: Sizes, step_tokens: int, longest_sample: int, budget: int, fixed: dict[str, int] | None = None
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
    for passes in range(1, 65):
        max_tokens = max(math.ceil(step_tokens / passes), longest_sample)
        plans = [fill(sizes, max_tokens, offload, usable, fixed) for offload in (False, True)]
        candidates += [plan for plan in plans if plan is not None]
    if not candidates:
        least = predict_peak(sizes, dataclasses.replace(MemoryPlan(longest_sample, offload=True), **fixed))
        raise ValueError(
            f"{budget / GIB:.2f} GiB of GPU memory are too little: the longest sample, {longest_sample} tokens, needs "
            f"{least / (1 - MARGIN) / GIB:.2f} GiB{' with what was fixed by flags' if fixed else ''}. Lower "
            "--max_input_length and --max_output_length, or use a larger GPU."
        )
    return min(candidates, key=lambda plan: relative_cost(sizes, plan, step_tokens))


def longest_step(lengths: list[int], samples_per_step: int) -> int:
    """Tokens that a step of randomly drawn samples will hardly exceed: the mean and three standard deviations."""
    values = torch.tensor(lengths, dtype=torch.float32)
    likely = samples_per_step * values.mean() + 3 * math.sqrt(samples_per_step) * values.std(correction=0)
    return min(math.ceil(likely), sum(sorted(lengths)[-samples_per_step:]))


def parse_size(text: str) -> int:
    """`8GiB`, `7.5GB`, `6000MiB` -> bytes.

    Raises:
        ValueError: it is not a number with one of these units.
    """
    units = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
    for unit, factor in units.items():
        number = text.strip().removesuffix(unit)
        if number != text.strip() and number.replace(".", "", 1).strip().isdigit():
            return int(float(number) * factor)
    raise ValueError(f"--memory_budget {text}: expected a number with a unit, such as 8GiB, 7.5GB or 6000MiB.")


def memory_budget(requested: str | None) -> int:
    """Bytes that this process may allocate on the GPU.

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


def plan_and_table(
    sizes: Sizes, lengths: list[int], samples_per_step: int, budget: int, fixed: dict[str, int]
) -> tuple[MemoryPlan, str]:
    """The plan for samples of these lengths, and its table; arguments and errors as for `choose_plan`."""
    step_tokens = longest_step(lengths, samples_per_step)
    plan = choose_plan(sizes, step_tokens, max(lengths), budget, fixed)
    return plan, plan.table(step_tokens, sizes.layers)


def plan_memory(
    model: PeftModel, lengths: list[int], samples_per_step: int, budget: str | None, fixed: dict[str, int]
) -> int:
    """Chooses a plan, shows it, and sets up the model's layers; `replace_layers` comes before.

    A requested budget is enforced on the process.

    Args:
        model: on its device.
        lengths: tokens of every training sample.
        samples_per_step: of one optimizer step on this GPU.
        budget: as the user wrote it; None for the free memory.
        fixed: fields of the plan that the user has chosen.
    Returns:
        The most tokens to put through the model at once.
    """
    config = model.config
    if not torch.cuda.is_available():
        every = config.num_layers
        plan = dataclasses.replace(MemoryPlan(CPU_TOKENS, every, every), **fixed | {"offload": False})
        apply_plan(model, plan)
        return plan.max_tokens
    sizes = Sizes(
        config,
        model.get_base_model().dtype.itemsize,
        torch.cuda.memory_allocated(),
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        frozenset(model.peft_config["default"].target_modules),
        kernels_supported(model.get_base_model().transformer.word_embeddings.weight),
    )
    available = memory_budget(budget)
    plan, table = plan_and_table(sizes, lengths, samples_per_step, available, fixed)
    if budget is not None:
        torch.cuda.set_per_process_memory_fraction(available / torch.cuda.mem_get_info()[1])
    logger.info("Memory plan for %s\n%s", torch.cuda.get_device_name(), table)
    apply_plan(model, plan)
    torch.cuda.reset_peak_memory_stats()
    return plan.max_tokens


def keep_or_recompute(model: PeftModel, keep: bool):
    """Keeps all activations, or computes all of them again."""
    layers = model.config.num_layers if keep else 0
    apply_plan(model, MemoryPlan(0, layers, layers))


def apply_plan(model: PeftModel, plan: MemoryPlan):
    """Sets the layers up as planned."""
    offload = ActivationOffload() if plan.offload else None
    for number, block in enumerate(model.get_base_model().transformer.layers):
        block.recompute_mlp, block.recompute_attention = number >= plan.kept_mlp, number >= plan.kept_attention
        block.offload = offload
        if number < plan.dense:
            for layer in block.modules():
                if isinstance(layer, Linear4bit):
                    cache_dequantized(layer)
