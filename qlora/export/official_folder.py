"""Writes model folders: `.bin` shards in the official format, or 4-bit weights in the format of bitsandbytes."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizer

from glm_shared.description import ModelDescription
from glm_shared.registration import architecture_of
from qlora.atomic import write_json
from qlora.checkpoint import empty_model, is_finite


def write_checkpoint(
    folder: str | Path,
    config: ModelDescription,
    tensor: Callable[[str, torch.Size], torch.Tensor],
    shard_size: str = "1900MB",
    dtype: torch.dtype = torch.float16,
):
    """Writes weights and configuration in the official format, with one shard in memory at a time.

    Args:
        folder: created if it is missing. The tokenizer's files and the official code are not written; if
            modeling_chatglm.py is already in the folder, config.json refers to the official code.
        config: of the model.
        tensor: (name, shape) -> weight; called with the embedding's name for a head that is the same tensor.
        shard_size: largest size of a file.
        dtype: of the weights.
    Raises:
        ValueError: a weight is not finite, or out of the range of `dtype`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    model_class = architecture_of(config).model_class
    buffers, tied = model_class.official_buffers(config), tied_weights(config)
    sizes = parameter_sizes(config, buffers)
    plan = split_torch_state_dict_into_shards(
        sizes, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=shard_size
    )

    def stored(name: str) -> torch.Tensor:
        if name in buffers:
            return buffers[name].half()
        source = tied.get(name, name)
        weight = tensor(source, sizes[name].shape).to("cpu", dtype).contiguous()
        if not is_finite(weight):
            raise ValueError(
                f"{source} is not finite (NaN or infinity) in {dtype}, and is not written. If it is beyond the range "
                "of fp16, write bf16 with --dtype."
            )
        return weight

    for filename, names in tqdm(plan.filename_to_tensors.items(), desc="Writing files", disable=not plan.is_sharded):
        torch.save({name: stored(name) for name in names}, target / filename)
    if plan.is_sharded:
        index = {"metadata": {"total_size": plan.metadata["total_size"]}, "weight_map": plan.tensor_to_filename}
        write_json(target / "pytorch_model.bin.index.json", index)
    values = config.official_values() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    if not (target / "modeling_chatglm.py").is_file():
        del values["auto_map"]
    write_json(target / "config.json", values)


def write_quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, folder: str | Path):
    """Writes a 4-bit model, which `load_quantized_model` then loads without quantizing again.

    Packed weights and scales are bit-equal when they are read back. The other weights are stored in their present
    dtype, and converted if they are loaded for another `compute_dtype`.

    Args:
        model: as `load_quantized_model` returns it, without an adapter.
        tokenizer: of the model; its files are written, too.
        folder: created if it is missing.
    Raises:
        ValueError: the model has an adapter.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("a model with an adapter in its layers cannot be written in 4 bits: write its base model.")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def tied_weights(config: ModelDescription) -> dict[str, str]:
    """Name of a weight -> that of the other weight that is the same tensor."""
    tied = architecture_of(config).model_class._tied_weights_keys
    return dict(tied or {}) if config.tie_word_embeddings else {}


def parameter_sizes(config: ModelDescription, buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of an official checkpoint, in its order: name -> a tensor of the right shape without storage."""
    model = empty_model(config).half()
    head = model.get_output_embeddings()
    (last,) = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    sizes = {name: torch.empty_like(parameter) for name, parameter in model.state_dict().items()}
    sizes |= {name: torch.empty_like(buffer, dtype=torch.float16, device="meta") for name, buffer in buffers.items()}
    return dict(sorted(sizes.items(), key=lambda item: item[0] == last))
