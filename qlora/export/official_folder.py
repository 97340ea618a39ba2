"""Writes model folders: `.bin` shards in the official format, or 4-bit weights in the format of bitsandbytes."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizer

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.rotary import ChatGLMRotaryEmbedding
from qlora.atomic import write_json
from qlora.checkpoint import is_finite

# Keys of the configuration that are not written.
NOT_OFFICIAL = ("dtype", "transformers_version", "initializer_range", "tie_word_embeddings", "quantization_config")


def write_checkpoint(
    folder: str | Path,
    config: ChatGLMConfig,
    tensor: Callable[[str, torch.Size], torch.Tensor],
    shard_size: str = "1900MB",
    dtype: torch.dtype = torch.float16,
):
    """Writes weights and configuration in the official format, with one shard in memory at a time.

    Args:
        folder: created if it is missing. The tokenizer's files and the official code are not written; if
            modeling_chatglm.py is already in the folder, config.json refers to the official code.
        config: of the model.
        tensor: (name, shape) -> weight; called with the embedding's name for the head.
        shard_size: largest size of a file.
        dtype: of the weights.
    Raises:
        ValueError: a weight is not finite, or out of the range of `dtype`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    inv_freq = ChatGLMRotaryEmbedding(config).inv_freq
    sizes = parameter_sizes(config, inv_freq)
    plan = split_torch_state_dict_into_shards(
        sizes, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=shard_size
    )

    def stored(name: str) -> torch.Tensor:
        if name.endswith("inv_freq"):
            return inv_freq.half()
        source = "transformer.word_embeddings.weight" if name == "lm_head.weight" else name
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
    values = official_config(config, dtype)
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


def parameter_sizes(config: ChatGLMConfig, inv_freq: torch.Tensor) -> dict[str, torch.Tensor]:
    """The entries of an official checkpoint, in its order: name -> a tensor of the right shape without storage."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).half()
        sizes = {name: torch.empty_like(parameter) for name, parameter in model.state_dict().items()}
        for i in range(config.num_layers):
            sizes[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = torch.empty_like(
                inv_freq, dtype=torch.float16, device="meta"
            )
    return dict(sorted(sizes.items(), key=lambda item: item[0] == "lm_head.weight"))


def official_config(config: ChatGLMConfig, dtype: torch.dtype) -> dict:
    """The values of config.json, with the keys of the official file."""
    values = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_OFFICIAL}
    auto_map = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    }
    torch_dtype = str(dtype).removeprefix("torch.")
    return {"auto_map": auto_map} | values | {"architectures": ["ChatGLMModel"], "torch_dtype": torch_dtype}
