"""Writes model folders: `.bin` shards in the official format, in 16 bits or as int8 and int4."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from glm_shared.description import ModelDescription
from glm_shared.registration import architecture_of
from qlora.atomic import check_room, write_json
from qlora.checkpoint import empty_model, is_finite, linear_layers, tied_weights

DTYPES = {  # name -> dtype of the 16-bit entries, bits of the weights of the linear layers
    "fp16": (torch.float16, 16),
    "bf16": (torch.bfloat16, 16),
    "int8": (torch.float16, 8),
    "int4": (torch.float16, 4),
}
SCALE = "_scale"  # after the name of a weight: that of its scales


def write_checkpoint(
    folder: str | Path,
    config: ModelDescription,
    tensor: Callable[[str, torch.Size], torch.Tensor],
    shard_size: str = "1900MB",
    dtype: str = "fp16",
):
    """Writes weights and configuration in the official format, with one shard in memory at a time.

    Args:
        folder: created if it is missing. The tokenizer's files and the official code are not written; if
            modeling_chatglm.py is already in the folder, config.json refers to the official code.
        config: of the model.
        tensor: (name, shape) -> weight; called with the embedding's name for a head that is the same tensor.
        shard_size: largest size of a file.
        dtype: of the weights: fp16, bf16, or, with the linear layers of THUDM/chatglm-6b-int8 and -int4, int8 or int4.
    Raises:
        ValueError: a weight is not finite, or out of the range of its type.
        OSError: the disk has not enough room.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    entries = OfficialEntries(config, tensor, *DTYPES[dtype])
    plan = split_torch_state_dict_into_shards(
        entries.sizes, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=shard_size
    )
    check_room("--output_dir", target, plan.metadata["total_size"], "name a folder on another disk")
    for filename, names in tqdm(plan.filename_to_tensors.items(), desc="Writing files", disable=not plan.is_sharded):
        torch.save({name: entries(name) for name in names}, target / filename)
    if plan.is_sharded:
        index = {"metadata": {"total_size": plan.metadata["total_size"]}, "weight_map": plan.tensor_to_filename}
        write_json(target / "pytorch_model.bin.index.json", index)
    half, bits = DTYPES[dtype]
    values = config.official_values() | {"torch_dtype": str(half).removeprefix("torch.")}
    values |= {"quantization_bit": bits} if bits < 16 else {}
    if not (target / "modeling_chatglm.py").is_file():
        del values["auto_map"]
    write_json(target / "config.json", values)


class OfficialEntries:
    """The entries of an official checkpoint, computed one at a time: (name) -> tensor.

    Args:
        config: of the model.
        tensor: (name, shape) -> weight.
        dtype: of the 16-bit entries.
        bits: of the weights of the linear layers.
    Attributes:
        sizes: name -> a tensor of the entry's shape and dtype without storage, in the official order.
    """

    def __init__(
        self,
        config: ModelDescription,
        tensor: Callable[[str, torch.Size], torch.Tensor],
        dtype: torch.dtype,
        bits: int,
    ):
        self.buffers = architecture_of(config).model_class.official_buffers(config)
        self.sizes = parameter_sizes(config, self.buffers, bits)
        self.shapes, self.tied = parameter_shapes(config), tied_weights(config)
        self.tensor, self.dtype, self.bits = tensor, dtype, bits
        self.scales: dict[str, torch.Tensor] = {}  # of the last weight; in `sizes` they follow it

    def __call__(self, name: str) -> torch.Tensor:
        """An entry; ValueError if it is not finite in its dtype."""
        if name in self.buffers:
            return self.buffers[name].half()
        if name.endswith(SCALE):
            return self.finite(name, self.scales.pop(name))
        source = self.tied.get(name, name)
        weight = self.tensor(source, self.shapes[source])
        if self.sizes[name].dtype != torch.int8:
            return self.finite(source, weight.to("cpu", self.dtype).contiguous())
        numbers, self.scales[name + SCALE] = quantize_rows(
            self.finite(name, weight.to("cpu", torch.float32)), self.bits
        )
        return numbers

    def finite(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The values; ValueError if one is not finite."""
        if not is_finite(values):
            raise ValueError(
                f"{name} is not finite (NaN or infinity) in {values.dtype}, and is not written. If it is beyond the "
                "range of fp16, write bf16 with --dtype."
            )
        return values


def quantize_rows(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight to whole numbers of 8 or 4 bits, times a scale for each row.

    Args:
        weight: [out_features, in_features], fp32.
        bits: 8 or 4.
    Returns:
        The numbers, int8 [out_features, in_features * bits / 8], and the scales, fp16 [out_features]. With 4 bits a
        byte holds an even column in its upper half and the next one in its lower half, each in two's complement.
    Source: `QuantizedLinear` in quantization.py of THUDM/chatglm-6b, and the kernels that it calls:
        `int4WeightCompression` and `int4WeightExtractionHalf`, kernels/quantization.cu of THUDM/GLM-130B.
    """
    largest = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(dim=1) / largest).half()
    step = scale.float().where(scale > 0, 1.0)[:, None]
    numbers = (weight / step).round_().clamp_(-largest, largest).to(torch.int8)
    return (numbers if bits == 8 else (numbers[:, ::2] << 4) | (numbers[:, 1::2] & 15)), scale


def parameter_shapes(config: ModelDescription) -> dict[str, torch.Size]:
    """Name -> shape of the model's parameters, in the official order: the head is last."""
    model = empty_model(config)
    head = model.get_output_embeddings()
    (last,) = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    state = model.state_dict()
    return {name: state[name].shape for name in sorted(state, key=lambda name: name == last)}


def parameter_sizes(config: ModelDescription, buffers: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """The entries of an official checkpoint, in its order: name -> a tensor of the right shape without storage."""
    half = functools.partial(torch.empty, dtype=torch.float16, device="meta")
    quantized = {f"{name}.weight" for name in linear_layers(config)} if bits < 16 else set()
    sizes = {}
    for name, shape in parameter_shapes(config).items():
        sizes[name] = half(shape)
        if name in quantized:
            sizes[name] = torch.empty(shape[0], shape[1] * bits // 8, dtype=torch.int8, device="meta")
            sizes[name + SCALE] = half(shape[0])
    last = next(reversed(sizes))
    sizes |= {name: half(buffer.shape) for name, buffer in buffers.items()}
    return sizes | {last: sizes.pop(last)}
