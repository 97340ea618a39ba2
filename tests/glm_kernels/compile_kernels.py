"""Compiles the Triton kernels for compute capabilities and prints the shared memory of each in bytes; needs no GPU.

Without TRITON_INTERPRET:
    python tests/glm_kernels/compile_kernels.py 86 75 120    # all for compute capability 8.6, some for the others

For the others, these are the LoRA kernels, and the kernels for 8-bit operands where the GPU has these; for GPUs older
than Ampere, the kernels without matrix products.
"""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from glm_kernels import (
    attention,
    cross_entropy,
    decode_attention,
    fp8,
    fp8_reference,
    layer_norm,
    lora,
    nf4,
    rms_norm,
    rotary,
    swiglu,
)

HEAD = {"HEADS": 32, "HEAD_DIM": 128}
BY_HEAD = HEAD | {"GROUPS": 32, "BY_HEAD": 1}  # ChatGLM-6B
BY_KIND = HEAD | {"GROUPS": 2, "BY_HEAD": 0}  # ChatGLM2-6B
TYPES = {
    "*bf16": "projected cos sin output output_grad projected_grad keys values x weight low_rank logits bias x_grad"
    " branch_grad sum_grad y y_grad key_value_grad total",
    "*fp32": "lse delta losses nf4 scale_table scales_of_scales offset parts row_scales scales",
    "*fp8e4nv": "quantized e4m3_weight",
    "*i32": "tiles seed",
    "*i64": "labels cache_position",
    "*u8": "packed scale_codes",
    "*i1": "visible",
    "fp32": "scale log2_scale eps residual_scale sign",
}
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
# Integers that change between launches: kernels must not specialize on them.
VARYING = {"tokens", "layer", "capacity", "numbers"}


def shared_memory(kernel, capability: int, constants: dict, num_stages: int = 3, num_warps: int = 4, **types) -> int:
    """Compiles a kernel and returns the shared memory of a program in bytes.

    Args:
        kernel: with integers of 32 bits, and pointers that are multiples of 16, like those of PyTorch.
        capability: compute capability of the GPU, as an integer: 86 for 8.6.
        constants: name of a constexpr parameter -> value.
        num_stages: of the pipeline of loads.
        num_warps: of a program.
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
    options = {"num_stages": num_stages, "num_warps": num_warps}
    return triton.compile(source, target=target, options=options).metadata.shared


def all_kernels(capability: int) -> dict[str, int]:
    """Name of each kernel -> shared memory in bytes, with the constants of a launch for the 6B model."""
    over_keys = {"TILE": attention.TILE, "BLOCK_N": attention.BLOCK_N}
    over_queries = {"TILE": attention.TILE, "BLOCK_M": attention.BLOCK_M}
    decode = {"PER_ROW": 1, "BLOCK": decode_attention.BLOCK, "STAGES": decode_attention.STAGES}
    pairs = {"WIDTH": 36 * 128, "ROTATED": 34, "HEAD_DIM": 128, "PAIRS": 2048}
    launches = {
        "rotate": (rotary.rotate_kernel, HEAD | {"PAIRS": 4096}, 3),
        "rotate pairs": (rotary.rotate_pairs_kernel, pairs, 3),
        "norm": (layer_norm.norm_kernel, {"BLOCK": 4096}, 3),
        "norm gradient": (layer_norm.norm_grad_kernel, {"BLOCK": 4096}, 3),
        "RMS norm": (rms_norm.rms_norm_kernel, {"BLOCK": 4096}, 3),
        "RMS norm gradient": (rms_norm.rms_norm_grad_kernel, {"BLOCK": 4096}, 3),
        "gated activation": (swiglu.swiglu_kernel, {"BLOCK": swiglu.BLOCK}, 3),
        "gradient of the gated activation": (swiglu.swiglu_grad_kernel, {"BLOCK": swiglu.BLOCK}, 3),
    }
    for layout, heads, splits in (("by head", BY_HEAD, 1), ("by kind", BY_KIND, 4)):
        summed = heads | over_queries | {"SPLITS": splits}
        launches |= {
            f"attention {layout}": (attention.forward_kernel, heads | over_keys, 3),
            f"query gradient {layout}": (attention.query_grad_kernel, heads | over_keys, 2),
            f"key and value gradient {layout}": (attention.key_value_grad_kernel, summed, 2),
            f"decoding step {layout}": (decode_attention.decode_attention_kernel, heads | decode, 3),
        }
    found = {name: shared_memory(kernel, capability, *how) for name, (kernel, *how) in launches.items()}
    return found | kernels_of_older_gpus(capability) | lora_kernels(capability)


def kernels_of_older_gpus(capability: int) -> dict[str, int]:
    """The same for the kernels without matrix products, which also run where `kernels_supported` is false."""
    loss = {"GRADIENT": True, "BLOCK": cross_entropy.BLOCK}
    return {
        "loss": shared_memory(cross_entropy.cross_entropy_kernel, capability, loss),
        "dequantize": shared_memory(nf4.dequantize_kernel, capability, {"BLOCKS": nf4.BLOCKS}),
    }


def lora_kernels(capability: int) -> dict[str, int]:
    """The same for the LoRA kernels, with a small rank, the largest in one tile, and one of several tiles."""
    found = {}
    for rank in (16, lora.MOST_R, 256):
        R = min(rank, lora.MOST_R)
        constants = {"DROPOUT": True, "R": R, "TOKENS": lora.TOKENS}
        up = constants | {"TILES_R": rank // R, "FEATURES": lora.UP_FEATURES}
        found[f"up, rank {rank}"] = shared_memory(lora.lora_up_add_kernel, capability, up, weight="*fp32")
        if rank == R:  # with a larger rank only the grid of these two grows
            down = constants | {"FEATURES": lora.DOWN_TILE // R, "SPLITS": lora.MOST_SPLITS}
            grad = constants | {"FEATURES": lora.GRAD_FEATURES, "SPLITS": lora.MOST_SPLITS}
            found[f"down, rank {rank}"] = shared_memory(lora.lora_down_kernel, capability, down)
            found[f"weight gradient, rank {rank}"] = shared_memory(lora.lora_weight_grad_kernel, capability, grad, 4)
    total = {"SPLITS": lora.MOST_SPLITS, "BLOCK": lora.SUM_BLOCK}
    found["sum of parts"] = shared_memory(lora.sum_kernel, capability, total)
    return found


def fp8_kernels(capability: int) -> dict[str, int]:
    """The same for the kernels that make 8-bit operands."""
    limits = {"LARGEST": fp8_reference.LARGEST, "SMALLEST": fp8_reference.SMALLEST}
    found = {"rows": shared_memory(fp8.quantize_rows_kernel, capability, limits | {"BLOCK": 32768})}
    for name, constants in {
        "weight": {"TRANSPOSED": False, "column_stride": 1},
        "transposed weight": {"TRANSPOSED": True, "row_stride": 1},
    }.items():
        constants["ROWS"] = fp8.ROWS
        found[name] = shared_memory(fp8.quantize_weight_kernel, capability, constants)
    return found


if __name__ == "__main__":
    first, *others = map(int, sys.argv[1:])
    found = {first: all_kernels(first)}
    for capability in others:
        if capability >= 80:
            found[capability] = lora_kernels(capability)
        else:
            found[capability] = kernels_of_older_gpus(capability)
        if capability >= 89:
            found[capability] |= fp8_kernels(capability)
    print(json.dumps(found, indent=2))
