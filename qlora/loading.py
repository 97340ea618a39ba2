"""Loads the tokenizer and the base model in 4 bits, from its 4-bit copy where there is one; checks the hardware."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from glm_shared.chat import ChatTokenizer
from glm_shared.description import ModelDescription
from glm_shared.registration import UnknownModel, architecture_of_tokenizer
from qlora.arguments import copy_folder
from qlora.checkpoint import check_checkpoint, check_finite, is_quantized, read_config, weight_files
from qlora.errors import first_line
from qlora.units import GIB

logger = logging.getLogger(__name__)

# With fp8 only matrix products of training have 8-bit operands, see qlora/layers/fp8.py.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
FP8_MULTIPLE = 16  # of which the widths of matrices of 8-bit operands are multiples
WORKING_MEMORY = 1.5 * GIB  # bytes that loading needs in addition to the loaded model
LARGEST_CPU_MODEL = 1e9  # parameters; larger models need a GPU
BITS_PER_QUANTIZED_WEIGHT = 4.127  # 4 bits, 8 per block of 64 for its scale, 32 per 256 blocks for their second scale
COPY_SOURCE = "quantized_from.json"  # in a 4-bit copy: which files it was made from


def choose_compute_dtype(name: str | None) -> torch.dtype:
    """The dtype of a name in `DTYPES`; for None bf16 if the GPU supports it, else fp16, or fp32 on a CPU."""
    if name:
        return DTYPES[name]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def quantization_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization, for training and inference.

    Args:
        compute_dtype: that the weights are dequantized to; embedding and head stay in it.
    Source: "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_tokenizer(path: str) -> ChatTokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        path: of the folder, which `check_checkpoint` has checked.
    Raises:
        ValueError: one of its files or config.json is damaged, or they do not say which model they belong to.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except UnknownModel:
        raise
    except Exception as error:  # damaged files make transformers and SentencePiece raise many types
        if (Path(path) / "config.json").is_file():
            read_config(Path(path))  # transformers reads it for a tokenizer, too
        files = " or ".join(reversed(architecture_of_tokenizer(path).tokenizer_files))
        files = f"{path}: {files} is damaged or incomplete"
        raise ValueError(f"{files}: download both again ({first_line(error)[:200]}).") from error


def load_quantized_model(
    path: str, compute_dtype: torch.dtype, config: ModelDescription | None = None
) -> PreTrainedModel:
    """Loads the base model with its linear layers in 4 bits, on the GPU if there is one.

    Args:
        path: of a checkpoint folder in the official format, whose weights are quantized while they are read, unless
            there is a 4-bit copy of them; or of one that `write_quantized` wrote, whose packed weights are loaded.
        compute_dtype: of the arithmetic, and of embedding, head, norms and biases.
        config: as `check_checkpoint` returned it; None to check folder and hardware here.
    Raises:
        FileNotFoundError, ValueError: see `check_checkpoint`, `check_hardware` and `check_values`.
    """
    if config is None:
        config = check_checkpoint(path)
        check_hardware(config, compute_dtype)
    source = path
    if copy := None if is_quantized(config) else find_copy(path, compute_dtype):
        source, config = str(copy), check_copy(copy)
    quantization = quantization_config(compute_dtype)
    if is_quantized(config):
        config.quantization_config, quantization = quantization.to_dict(), None
    model = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=compute_dtype,
        quantization_config=quantization,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        local_files_only=True,
    )
    model.name_or_path = model.config.name_or_path = path  # for an adapter's configuration
    use_compute_dtype(model, compute_dtype)
    check_values(model, source, compute_dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes would repack the weights in evaluation mode, and could not train
            # with them afterwards.
            module.support_avx512bf16_for_cpu = False
    return model


def copy_source(path: str, compute_dtype: torch.dtype) -> dict:
    """What a 4-bit copy is made from: the files by size and time, and the type that weights have before quantizing.

    Raises:
        FileNotFoundError, ValueError: the folder has no complete weights.
    """
    states = {file.name: file.stat() for file in (Path(path, "config.json"), *weight_files(Path(path)))}
    files = {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
    return {"files": files, "compute_dtype": str(compute_dtype).removeprefix("torch.")}


def is_copy_of(copy: Path, source: dict) -> bool:
    """Whether a folder is the 4-bit copy of what `copy_source` returned. Its name is given to it when it is whole."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((copy / COPY_SOURCE).read_text(encoding="utf-8")) == source
    return False


def find_copy(path: str, compute_dtype: torch.dtype) -> Path | None:
    """The 4-bit copy of a model's files for a compute dtype; None if there is none."""
    copy = copy_folder(path)
    if is_copy_of(copy, copy_source(path, compute_dtype)):
        return copy
    if (copy / COPY_SOURCE).is_file():
        logger.warning("%s was made from other files than %s, or for another type: it is not used.", copy, path)
    return None


def check_copy(copy: Path) -> ModelDescription:
    """The configuration of a 4-bit copy; ValueError if it is damaged."""
    logger.info("Loading the 4-bit copy %s", copy)
    try:
        return check_checkpoint(str(copy))
    except (OSError, ValueError) as error:
        raise ValueError(f"the 4-bit copy {copy} is damaged: delete it. ({error})") from error


def quantized_bytes(config: ModelDescription, compute_dtype: torch.dtype) -> int:
    """Bytes of a model in 4 bits, with its embedding and head in the compute dtype."""
    quantized = config.num_hidden_layers * config.weights_per_layer * BITS_PER_QUANTIZED_WEIGHT / 8
    return int(quantized + config.embedding_weights * compute_dtype.itemsize)


def check_hardware(config: ModelDescription, compute_dtype: torch.dtype):
    """Checks that this machine can run a model of this size in 4 bits.

    Args:
        config: of the model.
        compute_dtype: of the arithmetic, the embedding and the head.
    Raises:
        ValueError: the model needs a GPU and there is none, its free memory is too small, bitsandbytes does not work
            on it, or Triton finds no C compiler.
    """
    check_device(config, compute_dtype)
    if torch.cuda.is_available():
        check_bitsandbytes()
        check_compiler()


def use_compute_dtype(model: PreTrainedModel, compute_dtype: torch.dtype):
    """Sets the dtype that 4-bit weights are dequantized to, and converts all other parameters to it."""
    for parameter in model.parameters():
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.quant_state.dtype = compute_dtype
        else:
            parameter.data = parameter.to(compute_dtype)


def check_values(model: PreTrainedModel, path: str, compute_dtype: torch.dtype):
    """Checks that the loaded values are finite: of 4-bit weights the scales, of all others each value.

    Args:
        model: in 4 bits.
        path: of its folder, for the message.
        compute_dtype: that the other weights were converted to.
    Raises:
        ValueError: the files have a value that is not finite, or one that is out of the dtype's range.
    """
    for name, parameter in model.named_parameters():
        tensors = [parameter]
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            tensors = [parameter.quant_state.offset, parameter.quant_state.state2.absmax]
        check_finite(path, name, tensors, compute_dtype)


def check_device(config: ModelDescription, compute_dtype: torch.dtype):
    """ValueError unless a GPU has enough free memory for the model, or there is none and the model is small.

    Logs what is different on a GPU older than Ampere.
    """
    if not torch.cuda.is_available():
        weights = config.multiplied_weights
        if weights > LARGEST_CPU_MODEL:
            raise ValueError(
                f"no CUDA GPU was found (torch {torch.__version__}), and {weights / 1e9:.1f} billion parameters need "
                "one. Check `nvidia-smi` and that torch is a CUDA build, or try `python train_qlora.py --demo`, which "
                "runs on a CPU."
            )
        return
    needed = quantized_bytes(config, compute_dtype) + WORKING_MEMORY
    free, total = torch.cuda.mem_get_info()
    if free < needed:
        raise ValueError(
            f"{torch.cuda.get_device_name()} has {free / GIB:.1f} of {total / GIB:.1f} GiB free; the model needs at "
            f"least {needed / GIB:.1f} GiB. Stop other programs on this GPU (`nvidia-smi`), or choose another one "
            "with CUDA_VISIBLE_DEVICES."
        )
    name_what_older_gpus_lack(compute_dtype)


def name_what_older_gpus_lack(compute_dtype: torch.dtype):
    """Logs that a GPU older than Ampere runs fewer of the project's kernels, and warns if it is to compute in bf16."""
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 0):
        return
    gpu = "{}, compute capability {}.{}".format(torch.cuda.get_device_name(), *capability)
    if compute_dtype == torch.bfloat16:
        logger.warning("%s, has no bf16 and emulates it: choose fp16, its default, with --compute_dtype.", gpu)
    logger.info("%s: PyTorch's operations take the place of the kernels that are made for 8.0 and newer.", gpu)


def check_fp8(config: ModelDescription):
    """ValueError unless the GPU can multiply matrices of 8-bit operands, and those of the model."""
    if not torch.cuda.is_available():
        raise ValueError("--compute_dtype fp8 needs a GPU of compute capability 8.9 (Ada) or newer; there is none.")
    capability = torch.cuda.get_device_capability()
    if capability < FP8_CAPABILITY:
        gpu = "{} has compute capability {}.{}".format(torch.cuda.get_device_name(), *capability)
        raise ValueError(f"{gpu}; --compute_dtype fp8 needs 8.9 (Ada) or newer. Leave it out.")
    odd = [name for name, shape in config.linear_shapes.items() if any(width % FP8_MULTIPLE for width in shape)]
    if odd:
        raise ValueError(
            f"--compute_dtype fp8 needs layers whose widths are multiples of {FP8_MULTIPLE}; those of "
            f"{', '.join(odd)} are not. Leave it out."
        )


def check_compiler():
    """ValueError if there is no C compiler, which Triton needs when a kernel is launched for the first time."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        raise ValueError(
            "there is no C compiler, which Triton needs to build the GPU kernels: install gcc (`apt-get install gcc`, "
            "`conda install gcc`), or name one in the environment variable CC."
        )


def check_bitsandbytes():
    """ValueError unless bitsandbytes can quantize and dequantize on this GPU."""
    try:
        weight = torch.randn(64, 64, device="cuda")
        restored = bitsandbytes.functional.dequantize_4bit(*bitsandbytes.functional.quantize_4bit(weight))
        works = bool(((weight - restored).abs().mean() < 0.5).item())
        reason = "its result is wrong"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        works, reason = False, first_line(error)
    if not works:
        major, minor = torch.cuda.get_device_capability()
        raise ValueError(
            f"bitsandbytes {bitsandbytes.__version__} does not work on {torch.cuda.get_device_name()} (compute "
            f"capability {major}.{minor}) with torch {torch.__version__}: {reason}. Install a bitsandbytes built for "
            f"CUDA {torch.version.cuda}; `python -m bitsandbytes` says more."
        )


@contextlib.contextmanager
def advice_if_out_of_memory(advice: str) -> Iterator[None]:
    """Ends the program with the error's first sentence and what to do about it, where the GPU runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: {str(error).split('. ')[0].rstrip('.')}: {advice}.") from None
