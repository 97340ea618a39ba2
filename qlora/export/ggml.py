"""Writes the GGML file that chatglm.cpp runs, one tensor at a time.

The file: `ggml`, model type, version and hyperparameters; the tokenizer's file with its length; then each tensor with
its name, shape and type, and its values from the next multiple of 16 bytes on. Numbers are 32 bits, little-endian.

Source: `Pipeline::Pipeline` and `ModelLoader::read_state_dict` in chatglm.cpp of chatglm-cpp 0.4.2; `block_q4_0` and
`block_q8_0` in ggml.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from glm_shared.chat import ChatTokenizer
from glm_shared.description import ModelDescription
from qlora.atomic import check_room
from qlora.checkpoint import tied_weights
from qlora.export.official_folder import parameter_shapes

VERSION = 2  # of the hyperparameters
ALIGNMENT = 16  # bytes
BLOCK = 32  # values with a common scale
ROWS = 1024  # encoded at a time, to save memory


def hyperparameters(config: ModelDescription) -> bytes:
    """The model's sizes and token ids, without the type of the weights, which is before them.

    Raises:
        ValueError: for heads of a size that chatglm.cpp does not expect.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f"chatglm.cpp divides hidden_size {config.hidden_size} by {heads} heads; those of this model have "
            f"{config.head_dim} features. It cannot be written for chatglm.cpp."
        )
    sizes = (config.vocab_size, config.hidden_size, heads, groups, config.num_hidden_layers, config.intermediate_size)
    prefix_length, rope_theta = 0, 10000.0
    limits = (config.max_position_embeddings, config.eos_token_id, config.pad_token_id)
    return struct.pack("<6ifif3i", *sizes, config.layernorm_epsilon, prefix_length, rope_theta, *limits)


class Encoding(NamedTuple):
    """How values are stored: in blocks, each of neighbours in a row."""

    code: int  # in ggml's enum ggml_type
    block: int  # values
    size: int  # bytes of a block
    largest: float  # absolute value that can be stored
    encode: Callable[[torch.Tensor], torch.Tensor]  # [blocks, block], fp32 -> [blocks, size], uint8


def encode_fp32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.uint8)


def encode_fp16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.half().view(torch.uint8)


def encode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Per block a scale in fp16 and 32 signed bytes; the largest absolute value becomes 127."""
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    numbers = (blocks / divisor(scale)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1)


def encode_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Per block a scale in fp16 and 16 bytes; byte i has value i in its lower half and value i + 16 in its upper one.

    A value is (number - 8) * scale, and the scale has the sign by which the largest absolute value becomes number 0.
    """
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = (largest / -8).half()
    numbers = (blocks / divisor(scale) + 8).round_().clamp_(0, 15).to(torch.uint8)
    return torch.cat([scale.view(torch.uint8), numbers[:, :16] | numbers[:, 16:] << 4], dim=1)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """The scale as it is read back, in fp32; 1 in place of 0, of which every number is 0."""
    return scale.float().where(scale != 0, 1.0)


MAX_FP16 = torch.finfo(torch.float16).max
FP32 = Encoding(0, 1, 4, torch.finfo(torch.float32).max, encode_fp32)  # vectors: norms and biases
ENCODINGS = {  # of matrices
    "fp16": Encoding(1, 1, 2, MAX_FP16, encode_fp16),
    "q8_0": Encoding(8, BLOCK, 2 + BLOCK, MAX_FP16 * 127, encode_q8_0),
    "q4_0": Encoding(2, BLOCK, 2 + BLOCK // 2, MAX_FP16 * 8, encode_q4_0),
}


def write_ggml(
    path: Path,
    config: ModelDescription,
    tokenizer: ChatTokenizer,
    tensor: Callable[[str, torch.Size], torch.Tensor],
    dtype: str,
):
    """Writes a model as the file that chatglm.cpp runs.

    Args:
        path: of the file to write.
        config: of the model.
        tokenizer: of the model, whose SentencePiece file becomes a part of the file; the prompts go by its class.
        tensor: (name, shape) -> weight.
        dtype: of the matrices, a key of `ENCODINGS`; vectors are in fp32.
    Raises:
        ValueError: chatglm.cpp does not have the model; a weight is not finite, or out of the range of its type; rows
            are not divisible into blocks.
        OSError: the disk has not enough room.
    """
    head, vocabulary = hyperparameters(config), Path(tokenizer.vocab_file).read_bytes()
    shapes, tied = parameter_shapes(config), tied_weights(config)  # chatglm.cpp ties a missing head to the embedding
    encodings = {
        name: ENCODINGS[dtype] if len(shape) == 2 else FP32 for name, shape in shapes.items() if name not in tied
    }
    sizes = [stored_size(name, shapes[name], encoding) for name, encoding in encodings.items()]
    check_room("--output_dir", path.parent, len(vocabulary) + sum(sizes), "name a folder on another disk")
    with path.open("wb") as file:
        file.write(b"ggml" + struct.pack("<3i", tokenizer.ggml_type, VERSION, ENCODINGS[dtype].code))
        file.write(head + struct.pack("<i", len(vocabulary)) + vocabulary)
        for name, encoding in tqdm(encodings.items(), desc="Writing tensors"):
            write_tensor(file, name, tensor(name, shapes[name]), encoding)


def stored_size(name: str, shape: torch.Size, encoding: Encoding) -> int:
    """Bytes of a tensor's values; ValueError if its rows are not divisible into blocks."""
    if shape[-1] % encoding.block:
        raise ValueError(
            f"{name} has rows of {shape[-1]} values, which are not divisible into blocks of {encoding.block}. Write "
            "--dtype fp16."
        )
    return math.prod(shape) // encoding.block * encoding.size


def write_tensor(file: BinaryIO, name: str, weight: torch.Tensor, encoding: Encoding):
    """Writes one tensor; ValueError if a value is not finite, or out of the range of its type."""
    lowest, highest = (value.item() for value in weight.aminmax())
    if not -encoding.largest <= lowest <= highest <= encoding.largest:
        raise ValueError(
            f"{name} is not written: it has values from {lowest:g} to {highest:g}, and its type in the file holds "
            f"finite ones up to {encoding.largest:g}."
        )
    file.write(struct.pack("<i", len(name)) + name.encode())
    file.write(struct.pack(f"<{2 + weight.ndim}i", weight.ndim, *weight.shape, encoding.code))
    file.write(bytes(-file.tell() % ALIGNMENT))
    for rows in weight.split(ROWS):
        file.write(encoding.encode(rows.float().reshape(-1, encoding.block)).numpy().tobytes())
