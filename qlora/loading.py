"""Loads the tokenizer, the base model in 4 bits, and adapters; checks the hardware."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import bitsandbytes
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizer

from chatglm import ChatGLMConfig
from qlora.checkpoint import HOW_TO_GET, check_checkpoint
from qlora.units import GIB

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORKING_MEMORY = 1.5 * GIB  # bytes that loading needs in addition to the loaded model
LARGEST_CPU_MODEL = 1e9  # parameters; larger models need a GPU
BITS_PER_QUANTIZED_WEIGHT = 4.127  # 4 bits, 8 per block of 64 for its scale, 32 per 256 blocks for their second scale


def choose_compute_dtype(name: str | None) -> torch.dtype:
    """The dtype of a name (fp32, fp16, bf16); for None bf16 if the GPU supports it, else fp16, or fp32 on a CPU."""
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


def load_tokenizer(path: str) -> PreTrainedTokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        path: of the folder, which `check_checkpoint` has checked.
    Raises:
        ValueError: its SentencePiece model is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except RuntimeError as error:
        raise ValueError(f"{path}/ice_text.model is damaged or incomplete: download it again ({error}).") from error


def load_quantized_model(
    path: str, compute_dtype: torch.dtype, config: ChatGLMConfig | None = None
) -> PreTrainedModel:
    """Loads the base model with its linear layers in 4 bits, on the GPU if there is one.

    Args:
        path: of a checkpoint folder in the official format, whose weights are quantized while they are read; or of one
            that `write_quantized` wrote, whose packed weights are loaded without quantizing again.
        compute_dtype: of the arithmetic, and of embedding, head, norms and biases.
        config: as `check_checkpoint` returned it; None to check folder and hardware here.
    Raises:
        FileNotFoundError, ValueError: see `check_checkpoint` and `check_hardware`; a weight is in none of the files.
    """
    if config is None:
        config = check_checkpoint(path)
        check_hardware(config, compute_dtype)
    quantization = quantization_config(compute_dtype)
    if is_quantized(config):
        config.quantization_config, quantization = quantization.to_dict(), None
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=compute_dtype,
        quantization_config=quantization,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        output_loading_info=True,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{path}: {len(missing)} weights are in none of its files, such as {missing[0]}. {HOW_TO_GET}"
        )
    use_compute_dtype(model, compute_dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes would repack the weights in evaluation mode, and could not train
            # with them afterwards.
            module.support_avx512bf16_for_cpu = False
    return model


def check_hardware(config: ChatGLMConfig, compute_dtype: torch.dtype):
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


def is_quantized(config: ChatGLMConfig) -> bool:
    """Whether the weights in the folder of this configuration are in 4 bits."""
    return getattr(config, "quantization_config", None) is not None


def use_compute_dtype(model: PreTrainedModel, compute_dtype: torch.dtype):
    """Sets the dtype that 4-bit weights are dequantized to, and converts all other parameters to it."""
    for parameter in model.parameters():
        if isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.quant_state.dtype = compute_dtype
        else:
            parameter.data = parameter.to(compute_dtype)


def check_device(config: ChatGLMConfig, compute_dtype: torch.dtype):
    """ValueError unless a GPU has enough free memory for the model, or there is none and the model is small."""
    if not torch.cuda.is_available():
        weights = config.multiplied_weights
        if weights > LARGEST_CPU_MODEL:
            raise ValueError(
                f"no CUDA GPU was found (torch {torch.__version__}), and {weights / 1e9:.1f} billion parameters need "
                "one. Check `nvidia-smi` and that torch is a CUDA build, or try `bash train.sh --demo`, which runs on "
                "a CPU."
            )
        return
    quantized = config.num_layers * config.weights_per_layer * BITS_PER_QUANTIZED_WEIGHT / 8
    needed = quantized + config.embedding_weights * compute_dtype.itemsize + WORKING_MEMORY
    free, total = torch.cuda.mem_get_info()
    if free < needed:
        raise ValueError(
            f"{torch.cuda.get_device_name()} has {free / GIB:.1f} of {total / GIB:.1f} GiB free; the model needs at "
            f"least {needed / GIB:.1f} GiB. Stop other programs on this GPU (`nvidia-smi`), or choose another one "
            "with CUDA_VISIBLE_DEVICES."
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
        works, reason = False, str(error).strip().splitlines()[0]
    if not works:
        major, minor = torch.cuda.get_device_capability()
        raise ValueError(
            f"bitsandbytes {bitsandbytes.__version__} does not work on {torch.cuda.get_device_name()} (compute "
            f"capability {major}.{minor}) with torch {torch.__version__}: {reason}. Install a bitsandbytes built for "
            f"CUDA {torch.version.cuda}; `python -m bitsandbytes` says more."
        )


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, target_modules: list[str]) -> PeftModel:
    """Adds a new LoRA adapter to the model; its weights are fp32 and trained, all others are frozen.

    Args:
        model: without an adapter.
        rank: of the matrices A and B.
        alpha: their product is scaled by alpha / rank.
        dropout: probability by which an input of A is dropped.
        target_modules: names of the linear layers that get an adapter, such as `query_key_value`.
    Raises:
        ValueError: a target module that the model does not have.
    """
    layers = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = sorted({name.rsplit(".", 1)[-1] for name in layers})
    unknown = [name for name in target_modules if name not in linear]
    if unknown:
        raise ValueError(f"--lora_target_modules: the model has no {', '.join(unknown)}; it has {', '.join(linear)}.")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules
    )
    return get_peft_model(model, config)


def adapter_config(path: str) -> PeftConfig:
    """The configuration of a trained adapter, with the path of its base model.

    Args:
        path: of the adapter's folder.
    Raises:
        FileNotFoundError: there is no adapter.
    """
    if not (Path(path) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"there is no adapter in {path} (no adapter_config.json). Train one with `bash train.sh`, or say where "
            "it is with --adapter_path."
        )
    return PeftConfig.from_pretrained(path)


def base_model_path(adapter_path: str) -> str:
    """The path of the base model in an adapter's configuration; errors as for `adapter_config`."""
    return adapter_config(adapter_path).base_model_name_or_path


def load_adapters(model: PreTrainedModel, paths: list[str]) -> PreTrainedModel | PeftModel:
    """Adds trained adapters to the model, in this order; errors as for `load_adapter`."""
    for number, path in enumerate(paths):
        model = load_adapter(model, path, f"adapter_{number}")
    return model


def load_adapter(model: PreTrainedModel | PeftModel, path: str, name: str = "default") -> PeftModel:
    """Adds a trained adapter to the model.

    Args:
        model: the base model, or one with other adapters, of which the first stays the active one.
        path: of the adapter's folder.
        name: by which peft knows the adapter.
    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, does not fit the model's shapes, or is merged into the model already.
    """
    adapter_config(path)
    try:
        weights = load_peft_weights(path, device="cpu")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"the adapter's weights in {path} are damaged: {error}") from error
    merged = getattr(model.config, "merged_adapter", None)
    if merged and digest_of(weights) == merged:
        raise ValueError(
            f"the adapter in {path} is already merged into {model.name_or_path}; with it once more, it would count "
            "twice. Give the model it was trained on with --model_name_or_path."
        )
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(path, name)
        else:
            model = PeftModel.from_pretrained(model, path, name)
        fits = shapes(get_peft_model_state_dict(model, adapter_name=name)) == shapes(weights)
    except (RuntimeError, ValueError):
        fits = False
    if not fits:
        name, tensor = next(iter(weights.items()), ("nothing", torch.empty(0)))
        raise ValueError(
            f"the adapter in {path} does not fit the base model {model.name_or_path}: it has {len(weights)} tensors, "
            f"the first is {name} {list(tensor.shape)}. Give the base model it was trained on with "
            "--model_name_or_path."
        )
    return model


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """A hash of an adapter's weights; the configuration of a merged model has that of its adapter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
