"""Compiles the Triton kernels for compute capabilities and prints the shared memory of each in bytes; needs no GPU.

Without TRITON_INTERPRET:
    python tests/glm_kernels/compile_kernels.py 86 75 120    # all for compute capability 8.6, LoRA's for 7.5 and 12.0
"""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from glm_kernels import attention, cross_entropy, decode_attention, layer_norm, lora, nf4, rotary

HEAD = {"HEADS": 32, "HEAD_DIM": 128}
TYPES = {
    "*bf16": "projected cos sin output output_grad projected_grad keys values x weight low_rank logits bias x_grad"
    " branch_grad sum_grad",
    "*fp32": "lse delta losses nf4 scale_table scales_of_scales offset weight_grad",
    "*i32": "tiles",
    "*i64": "labels cache_position",
    "*u8": "packed scale_codes",
    "*i1": "visible",
    "fp32": "scale log2_scale eps residual_scale sign",
}
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
VARYING = {"tokens", "seed", "capacity"}  # integers that change between launches: kernels must not specialize on them


def shared_memory(kernel, capability: int, constants: dict, num_stages: int = 3, **types) -> int:
    """Compiles a kernel and returns the shared memory of a program in bytes.

    Args:
        kernel: with integers of 32 bits, and pointers that are multiples of 16, like those of PyTorch.
        capability: compute capability of the GPU, as an integer: 86 for 8.6.
        constants: name of a constexpr parameter -> value.
        num_stages: of the pipeline of loads.
        types: Triton types of parameters that differ from `TYPES`.
    Raises:
        ValueError: a parameter in `VARYING` is specialized.
    """
    for parameter in kernel.params:
        if parameter.name in VARYING and not parameter.do_not_specialize:
            raise ValueError(f"{kernel.__name__} is compiled anew when `{parameter.name}` becomes a multiple of 16.")
    types = TYPES | types
    if capability < 80:  # without bf16
        types = {name: kind.replace("bf16", "fp16") for name, kind in types.items()}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_stages": num_stages}).metadata.shared


def all_kernels(capability: int) -> dict[str, int]:
    """Name of each kernel -> shared memory in bytes, with the constants of a launch for the 6B model."""
    over_keys = HEAD | {"TILE": attention.TILE, "BLOCK_N": attention.BLOCK_N}
    over_queries = HEAD | {"TILE": attention.TILE, "BLOCK_M": attention.BLOCK_M}
    decode = {"PER_ROW": 1, "HEAD_DIM": 128, "BLOCK": decode_attention.BLOCK, "STAGES": decode_attention.STAGES}
    launches = {
        "rotate": (rotary.rotate_kernel, HEAD | {"PAIRS": 4096}, 3),
        "attention": (attention.forward_kernel, over_keys, 3),
        "query gradient": (attention.query_grad_kernel, over_keys, 2),
        "key and value gradient": (attention.key_value_grad_kernel, over_queries, 2),
        "decoding step": (decode_attention.decode_attention_kernel, decode, 3),
        "norm": (layer_norm.norm_kernel, {"BLOCK": 4096}, 3),
        "norm gradient": (layer_norm.norm_grad_kernel, {"BLOCK": 4096}, 3),
        "loss": (cross_entropy.cross_entropy_kernel, {"GRADIENT": True, "BLOCK": cross_entropy.BLOCK}, 3),
        "dequantize": (nf4.dequantize_kernel, {"BLOCKS": nf4.BLOCKS}, 3),
    }
    return {name: shared_memory(kernel, capability, *how) for name, (kernel, *how) in launches.items()}


def lora_kernels(capability: int) -> dict[str, int]:
    """The same for the LoRA kernels, with a small rank, the largest in one tile, and one of several tiles."""
    found = {}
    for rank in (16, lora.MOST_R, 256):
        R = min(rank, lora.MOST_R)
        constants = {"DROPOUT": True, "R": R, "TOKENS": lora.TOKENS}
        up = constants | {"TILES_R": rank // R, "FEATURES": lora.UP_FEATURES}
        found[f"up, rank {rank}"] = shared_memory(lora.lora_up_add_kernel, capability, up, weight="*fp32")
        if rank == R:  # with a larger rank only the grid of these two grows
            down = constants | {"FEATURES": lora.DOWN_TILE // R}
            grad = constants | {"FEATURES": lora.GRAD_FEATURES, "SPLITS": lora.SPLITS}
            found[f"down, rank {rank}"] = shared_memory(lora.lora_down_kernel, capability, down, 4, weight="*fp32")
            found[f"weight gradient, rank {rank}"] = shared_memory(lora.lora_weight_grad_kernel, capability, grad, 4)
    return found


if __name__ == "__main__":
    first, *others = map(int, sys.argv[1:])
    found = {first: all_kernels(first) | lora_kernels(first)}
    print(json.dumps(found | {capability: lora_kernels(capability) for capability in others}, indent=2))
