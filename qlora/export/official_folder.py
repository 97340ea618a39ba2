"""Writing a model folder: `.bin` shards in the official format, or the 4-bit weights as they are in memory."""

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

NOT_OFFICIAL = ("dtype", "transformers_version", "initializer_range", "tie_word_embeddings", "quantization_config")


def write_checkpoint(
    folder: str | Path,
    config: ChatGLMConfig,
    tensor: Callable[[str, torch.Size], torch.Tensor],
    shard_size: str = "1900MB",
    dtype: torch.dtype = torch.float16,
):
    """Writes weights and configuration; one shard is in memory at a time, so the model may be larger than the memory.

    Args:
        folder: created if it is missing. The tokenizer's files and the official code are not written; config.json
            points to the official code if it is in the folder already.
        config: the model's configuration.
        tensor: returns the weight of a name and shape; the head is asked for under the embedding's name.
        shard_size: largest size of a file.
        dtype: 16-bit type of the weights.
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
        return tensor(source, sizes[name].shape).to("cpu", dtype).contiguous()

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
    """Writes a 4-bit model with its scales, which `load_quantized_model` then loads without quantizing again.

    The packed weights and their scales are bit-equal when they are read back. Embedding and norms are stored in their
    present dtype; loaded for another `compute_dtype`, they are converted from it.

    Args:
        model: as `load_quantized_model` gives it, without an adapter.
        tokenizer: its tokenizer, whose files are written too.
        folder: created if need be.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("a model with an adapter in its layers cannot be written in 4 bits: write its base model.")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def parameter_sizes(config: ChatGLMConfig, inv_freq: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every entry of an official checkpoint, in its order, as a tensor without storage."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).half()
        sizes = {name: torch.empty_like(parameter) for name, parameter in model.state_dict().items()}
        for i in range(config.num_layers):
            sizes[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = torch.empty_like(
                inv_freq, dtype=torch.float16, device="meta"
            )
    return dict(sorted(sizes.items(), key=lambda item: item[0] == "lm_head.weight"))


def official_config(config: ChatGLMConfig, dtype: torch.dtype) -> dict:
    """config.json as the official files have it."""
    values = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_OFFICIAL}
    auto_map = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    }
    torch_dtype = str(dtype).removeprefix("torch.")
    return {"auto_map": auto_map} | values | {"architectures": ["ChatGLMModel"], "torch_dtype": torch_dtype}
