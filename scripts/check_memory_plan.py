"""Compare the memory that the plan predicts with the peak of a step: for ranks, adapters, tokens and kinds of plans.

    python scripts/check_memory_plan.py --model_name_or_path THUDM/chatglm-6b

The model is loaded once, in bf16. A case is an adapter, a plan, and an optimizer step of one micro-batch after a small
one. Measured are the peak of the memory that PyTorch reserved, in which the memory of CUDA graphs counts all the time,
and that of the tensors that it allocated. The last column is the prediction divided by the former.
"""

import gc
import itertools
import os
from dataclasses import dataclass, field

from qlora.arguments import DEFAULT_MODEL, DownloadArguments, LoraSettings, in_repository
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train_qlora.py

with one_line_on_interrupt():  # these imports take seconds
    import bitsandbytes
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from qlora.adapter import add_lora
    from qlora.data.batching import Sample
    from qlora.data.collator import PaddingFreeCollator
    from qlora.layers.linear import NF4Linear
    from qlora.layers.replacement import replace_layers
    from qlora.loading import load_quantized_model
    from qlora.training.graphs import GraphedPasses
    from qlora.training.memory_plan import MemoryPlan, Sizes, apply_plan, model_sizes, predict_peak
    from qlora.units import GIB

SAMPLE_TOKENS, PROMPT_TOKENS = 100, 36  # about those of AdvertiseGen
ADAPTERS = ((4, 1), (16, 4), (64, 2), (256, 1), (128, 4), (256, 4))  # rank, number of adapted layers of a block
MOST_ID = 1_000  # of a random token
TOKENS = (400, 1_100, 3_300, 8_000, 16_000)


@dataclass
class CheckArguments(DownloadArguments):
    """What to check the plan with."""

    model_name_or_path: str = field(
        default_factory=lambda: in_repository(DEFAULT_MODEL), metadata={"help": "Folder with the weights."}
    )


@one_line_on_interrupt()
def main():
    with message_instead_of_traceback():
        args = parse_command_line(CheckArguments)
    model = load_quantized_model(args.model_name_or_path, torch.bfloat16)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    names = [*model.config.linear_shapes]
    print("rank layers tokens  recomputed MLP/attention  cached  offloaded  predicted  reserved  allocated GiB  ratio")
    for number, (rank, layers) in enumerate(ADAPTERS):
        lora = LoraSettings(rank, 32, 0.05, names[:layers])
        sizes = sizes_of(model, lora)
        adapted = add_lora(model, *lora)
        replace_layers(adapted.train(), for_training=True)
        for plan in plans(model.config.num_hidden_layers, number):
            predicted, (reserved, allocated) = predict_peak(sizes, plan), measure(adapted, plan)
            print(
                f"{rank:4} {layers:6} {plan.max_tokens:6}  {plan.recompute_mlp:14}/{plan.recompute_attention:<9}  "
                f"{plan.dequantized_layers:6}  {plan.offload!s:9}  {predicted / GIB:9.2f}  {reserved / GIB:8.2f}  "
                f"{allocated / GIB:13.2f}  {predicted / reserved:5.3f}",
                flush=True,
            )
        for name, module in linear.items():
            model.set_submodule(name, module)
        del adapted


def plans(layers: int, number: int) -> list[MemoryPlan]:
    """Plans of every kind, each with another number of tokens; with which, depends on `number`."""
    kinds = (
        {"recompute_mlp": 0, "recompute_attention": 0},
        {"recompute_mlp": layers, "recompute_attention": 0},
        {"recompute_mlp": layers, "recompute_attention": layers},
        {"recompute_mlp": layers, "recompute_attention": layers, "offload": True},
        {"recompute_mlp": layers // 2, "recompute_attention": layers // 3, "dequantized_layers": layers // 2},
    )
    tokens = itertools.cycle(TOKENS[number % len(TOKENS) :] + TOKENS[: number % len(TOKENS)])
    return [MemoryPlan(max_tokens=count, **kind) for count, kind in zip(tokens, kinds, strict=False)]


def sizes_of(model: PreTrainedModel, lora: LoraSettings) -> Sizes:
    """What the plan needs to know, as before a run: from a model without weights."""
    with torch.device("meta"):
        empty = add_lora(AutoModelForCausalLM.from_config(model.config, dtype=model.dtype), *lora)
    return model_sizes(empty, lora, processes=1, fp8=False)


def measure(model: PeftModel, plan: MemoryPlan) -> tuple[int, int]:
    """The peaks of reserved and of allocated memory, in bytes."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.cache_dequantized(False)  # before memory is given back
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    apply_plan(model, plan)  # forgets earlier peaks
    samples = random_samples(model, plan.max_tokens)
    passes = GraphedPasses(model, PaddingFreeCollator(model.config), len(samples))
    optimizer = torch.optim.AdamW(passes.parameters, lr=1e-5)
    for micro_batch in (samples[:1], samples):  # the optimizer's moments are there when the larger graph is recorded
        passes.forward_backward([micro_batch], divisor=plan.max_tokens)
        torch.nn.utils.clip_grad_norm_(passes.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()


def random_samples(model: PeftModel, tokens: int) -> list[Sample]:
    """Samples of random tokens, `tokens` altogether."""
    samples, control = [], torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    for first in range(0, tokens, SAMPLE_TOKENS):
        ids = torch.randint(10, MOST_ID, (min(SAMPLE_TOKENS, tokens - first),))
        ids[PROMPT_TOKENS - 1 : PROMPT_TOKENS + 1] = control
        samples.append({"input_ids": ids, "labels": ids.where(torch.arange(len(ids)) > PROMPT_TOKENS, -100)})
    return samples


if __name__ == "__main__":
    main()
