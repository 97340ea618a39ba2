"""Merges an adapter into the base model's weights, one tensor at a time: the complete model is never in memory.

merged = W + scaling * B @ A, computed in fp32; W is the 16-bit weight, or its NF4 form, dequantized.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from glm_shared.description import ModelDescription
from qlora.adapter import adapter_weights, digest_of, load_adapter
from qlora.checkpoint import check_checkpoint, check_finite, empty_model, is_quantized, linear_layers, weight_files

PACKED = ".quant_state.bitsandbytes__nf4"  # suffix of the entry with shape, dtype and block size of a 4-bit weight


def merged_tensors(
    base_path: str, adapter_path: str | None, onto: str, compute_dtype: torch.dtype
) -> tuple[ModelDescription, Callable[[str, torch.Size], torch.Tensor]]:
    """The merged model, to be written by `write_checkpoint` or `write_ggml`.

    Args:
        base_path: of a checkpoint folder with 16-bit weights, or with 4-bit weights that `write_quantized` wrote.
        adapter_path: of the folder of a LoRA adapter; None for the base model alone.
        onto: "original" to merge into the 16-bit weights; "nf4" to merge into the weights that training used,
            quantized to NF4 and dequantized.
        compute_dtype: of training; the weights are converted to it before they are quantized.
    Returns:
        The configuration, and a function (name, shape) -> weight, merged if the adapter changes it.
    Raises:
        FileNotFoundError, ValueError: base model or adapter is incomplete, they do not fit each other, or the adapter
            is not plain LoRA.
    """
    config = check_checkpoint(base_path)
    if onto == "original" and is_quantized(config):
        raise ValueError(
            f"{base_path} holds 4-bit weights, from which the original ones cannot be had: name the 16-bit folder "
            "with --model_name_or_path, or merge --onto nf4."
        )
    stored, delta = WeightReader(base_path), weight_deltas(config, adapter_path) if adapter_path else {}
    if adapter_path:
        config.merged_adapter = digest_of(adapter_weights(adapter_path))
    linear = {f"{name}.weight" for name in linear_layers(config)}
    to_quantize = linear if onto == "nf4" and not is_quantized(config) else set()

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        weight = stored(name)
        if name in to_quantize:
            weight = through_nf4(weight.to(compute_dtype))
        return weight.float() + delta[name]() if name in delta else weight

    return config, tensor


def without_storage(config: ModelDescription) -> PreTrainedModel:
    """The model on the CPU, so that peft can add an adapter; each weight is one zero, expanded to the shape."""
    model = empty_model(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def weight_deltas(config: ModelDescription, adapter_path: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Name of a weight -> a function that computes the adapter's addition to it, [out_features, in_features], fp32."""
    model = load_adapter(without_storage(config), adapter_path)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {f"{name}.weight": functools.partial(delta_weight, layer) for name, layer in layers.items()}


def delta_weight(layer: LoraLayer) -> torch.Tensor:
    """The adapter's addition to a layer's weight, [out_features, in_features], fp32, as peft computes it."""
    return layer.get_delta_weight(layer.active_adapters[0]).float()


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight quantized to NF4 and dequantized, in the dtype that it had."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return bitsandbytes.functional.dequantize_4bit(packed, state)


def check_finite_weights(path: str, dtype: torch.dtype):
    """Reads every weight of a checkpoint and checks that it is finite in a dtype; ValueError if one is not."""
    stored = WeightReader(path)
    for name in stored.file_of:
        check_finite(path, name, [stored.read(name).to(dtype)], dtype)


class WeightReader:
    """Reads a checkpoint one tensor at a time and dequantizes 4-bit weights; one file is memory-mapped at a time.

    Args:
        path: of the checkpoint folder.
    """

    def __init__(self, path: str):
        self.path = path
        self.mapped: Path | None = None
        self.tensors: dict[str, Callable[[], torch.Tensor]] = {}
        self.file_of = {name: file for file in weight_files(Path(path)) for name in self.map(file)}

    def map(self, file: Path) -> dict[str, Callable[[], torch.Tensor]]:
        """For all tensors of a file: name -> a function that reads it. Maps the file into memory."""
        if file != self.mapped:
            if file.suffix == ".safetensors":
                opened = safe_open(file, "pt")
                self.tensors = {name: functools.partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
            else:
                stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self.tensors = {name: functools.partial(stored.get, name) for name in stored}
            self.mapped = file
        return self.tensors

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored; ValueError if it is in none of the files."""
        if name not in self.file_of:
            raise ValueError(f"{self.path}: {name} is in none of its weight files.")
        return self.map(self.file_of[name])[name]()

    def __call__(self, name: str) -> torch.Tensor:
        """A weight in 16 bits or, of a 4-bit checkpoint, dequantized; errors as for `read`."""
        if name + PACKED not in self.file_of:
            return self.read(name)
        names = [other for other in self.file_of if other.startswith(f"{name}.")]
        state = QuantState.from_dict({other.removeprefix(f"{name}."): self.read(other) for other in names}, "cpu")
        return bitsandbytes.functional.dequantize_4bit(self.read(name), state)
