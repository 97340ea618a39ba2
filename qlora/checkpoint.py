"""Checks, before any weight is loaded, that a folder is a complete checkpoint of a model that is known here."""

import json
import math
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_pt_utils import safe_globals

import glm_models  # noqa: F401, makes the models known to the Auto classes
from glm_shared.description import ModelDescription, Shape
from glm_shared.registration import ARCHITECTURES, MODEL_TYPE, architecture_of, architecture_of_tokenizer

MODELS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b")  # of THUDM
HOW_TO_GET = (
    "Download the files of THUDM/chatglm-6b, chatglm2-6b or chatglm3-6b into it "
    '(README, "Weights"), or try `python train_qlora.py --demo`.'
)
NF4 = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LAYER = re.compile(r".*\.layers\.\d+\.")  # the name of a weight of a block, up to the number of the block
LFS_POINTER = b"version https://git-lfs"
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
LICENCES = ("LICENSE", "MODEL_LICENSE")


def check_checkpoint(path: str) -> ModelDescription:
    """Checks that a folder has the configuration, the tokenizer and all weight files, each complete and of its shape.

    Args:
        path: of a folder in the official format, with `.bin` or `.safetensors` weights, sharded or not.
    Returns:
        Its configuration.
    Raises:
        FileNotFoundError: the folder, a file, or a shard named by the index is missing.
        ValueError: the folder has an adapter, another architecture, a damaged file, a Git LFS pointer in place of a
            file, a file that would run code when it is loaded, or weights that do not fit its configuration.
    """
    folder = check_folder(path)
    check_no_adapter(folder)
    check_file(folder / "config.json")
    config = read_config(folder)
    for name in architecture_of(config).tokenizer_files:
        check_file(folder / name)
    shapes: dict[str, Shape] = {}
    for shard in weight_files(folder):
        check_file(shard)
        problem = file_problem(shard)
        if problem:
            raise ValueError(f"{shard} {problem}. Download it again, from a source that you trust.")
        shapes |= stored_shapes(shard)
    check_shapes(folder, config, shapes)
    return config


def check_tokenizer(path: str):
    """FileNotFoundError, ValueError: as `check_checkpoint`, for the files of the tokenizer alone."""
    folder = check_folder(path)
    for name in tokenizer_files(folder):
        check_file(folder / name)


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files, by the vocabulary file that a folder has."""
    return architecture_of_tokenizer(folder).tokenizer_files


def all_tokenizer_files() -> set[str]:
    """Names of the tokenizers' files of all models."""
    return {name for architecture in ARCHITECTURES for name in architecture.tokenizer_files}


def check_folder(path: str) -> Path:
    """The path of a folder; FileNotFoundError if there is none."""
    if not Path(path).is_dir():
        model = Path(path).as_posix().lower()
        advice = f"Did you mean THUDM/{model}?" if model in MODELS else HOW_TO_GET
        raise FileNotFoundError(f"there is no folder {path}. {advice}")
    return Path(path)


def check_no_adapter(folder: Path):
    """ValueError for a folder with an adapter, which transformers would load along with the base model."""
    if (folder / "adapter_config.json").exists():
        is_base = (folder / "config.json").exists()
        advice = "move adapter_config.json and adapter_model.* into another one" if is_base else "name that one"
        raise ValueError(f"{folder} holds an adapter; the base model belongs in a folder of its own: {advice}.")


def read_config(folder: Path) -> ModelDescription:
    """The configuration of a model in 16 bits, or in 4 bits as this project writes it; ValueError for others."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type, quantization = values.get("model_type"), values.get("quantization_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json is not a JSON object: {error}") from error
    if model_type != MODEL_TYPE:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, expected 'chatglm'. {HOW_TO_GET}")
    if quantization is not None and not (isinstance(quantization, dict) and NF4.items() <= quantization.items()):
        raise ValueError(
            f"{folder}/config.json has a quantization_config that is not bitsandbytes' NF4 with double quantization: "
            "these weights are already quantized, in another way. Use the model's 16-bit files."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # values of other kinds make transformers raise many types
        reason = str(error).strip().rpartition("\n")[2].strip().removeprefix("TypeError: ")
        raise ValueError(f"{folder}/config.json: {reason}") from error
    check_config_values(folder, config)
    return config


def check_config_values(folder: Path, config: ModelDescription):
    """ValueError for a size, a token id or another value of the configuration that no model has."""
    sizes = {name: getattr(config, name) for name in config.sizes}
    problems = [f"{name} is {size}, expected 1 or more" for name, size in sizes.items() if size < 1]
    problems = problems or config.problems()
    if not 0 < config.layernorm_epsilon < math.inf:
        problems.append(f"layernorm_epsilon is {config.layernorm_epsilon}, expected a positive number")
    for name in config.token_ids:
        value = getattr(config, name)
        if not (type(value) is int and 0 <= value < config.vocab_size):
            problems.append(f"{name} is {value!r}, expected a token id below vocab_size, {config.vocab_size}")
    if problems:
        raise ValueError(f"{folder}/config.json: {'; '.join(problems)}. Download it again.")


def is_quantized(config: ModelDescription) -> bool:
    """Whether the weights in the folder of this configuration are in 4 bits."""
    return getattr(config, "quantization_config", None) is not None


def needed_files(model: str, names: Iterable[str]) -> list[str]:
    """Of the files of a model on a hub, those that its folder needs: never code, and one kind of weights.

    Args:
        model: its name, for the message.
        names: of all its files.
    Returns:
        Names, config.json first and the weights last.
    Raises:
        ValueError: one is missing.
    """
    names = set(names)
    architecture = next((a for a in ARCHITECTURES if a.tokenizer_files[0] in names), ARCHITECTURES[0])
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    required = ["config.json", *architecture.tokenizer_files]
    missing = [name for name in required if name not in names] + ([] if weights else [" or ".join(WEIGHT_FILES)])
    if weights is None or missing:
        raise ValueError(f"{model} has no {', no '.join(missing)}: it is none of these models, or not all of one")
    stem, _, suffix = weights.removesuffix(".index.json").rpartition(".")
    shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)]
    licences = [name for name in LICENCES if name in names]
    return [*required, *licences, weights, *(sorted(shards) if weights.endswith(".json") else [])]


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights: those that an index names, or a single one.

    Raises:
        FileNotFoundError: there are no weights, or one of the files is missing.
        ValueError: the index is invalid, or names files outside the folder.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}. {HOW_TO_GET}")
    if found.suffix != ".json":
        return [found]
    check_file(found)
    try:
        index = json.loads(found.read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{found} is not a weight index (no JSON object with a weight_map). {HOW_TO_GET}") from error
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f'{found} has no object "metadata", which is read with it. {HOW_TO_GET}')
    if not names:
        raise ValueError(f"{found} names no weight files. {HOW_TO_GET}")
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{found} names files outside its folder: {outside[0]!r}. {HOW_TO_GET}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        first = f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
        raise FileNotFoundError(f"{folder}: {first}. {HOW_TO_GET}")
    return [folder / name for name in names]


def check_file(path: Path):
    """FileNotFoundError for a missing file, ValueError for a Git LFS pointer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {HOW_TO_GET}")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it.")


def file_problem(path: Path, check_sums: bool = False) -> str | None:
    """Why a JSON, safetensors or torch.save file must not be loaded.

    Code in a torch.save file is never run, since all files are loaded with `weights_only`. This check reports such a
    file before the run does any other work.

    Args:
        path: of the file.
        check_sums: whether the check sums in a torch.save file are verified; this takes long for a 6B model.
    Returns:
        The end of a sentence that begins with the file's name: the file is damaged, cannot be read, or would run code.
        None if it can be loaded.
    """
    complete, calls = False, []
    try:
        if path.suffix == ".json":
            complete = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                complete = len(file.keys()) > 0
        else:
            with zipfile.ZipFile(path) as archive:
                complete = not check_sums or archive.testzip() is None
            calls = functions_called(path)
    except PermissionError as error:
        return f"cannot be read ({error.strerror})"
    except Exception:  # damaged bytes make these readers raise many types: NotImplementedError, zlib.error, ...
        complete = False
    if not complete:
        return f"is damaged or incomplete ({path.stat().st_size:,} bytes)"
    return f"holds more than numbers: loading it would run {', '.join(calls[:3])}" if calls else None


def stored_shapes(path: Path) -> dict[str, Shape]:
    """Name -> shape of every tensor of a weight file, read from its header without the values.

    Args:
        path: of a safetensors or torch.save file in which `file_problem` found nothing.
    Raises:
        ValueError: the file is damaged, or holds anything else than tensors under their names.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        state_dict = torch.load(path, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    except Exception as error:  # as in `file_problem`
        raise ValueError(f"{path} is damaged or incomplete: it holds no dictionary of tensors.") from error


def check_shapes(folder: Path, config: ModelDescription, shapes: dict[str, Shape]):
    """Compares the names and shapes in the weight files with those of the model that the configuration describes.

    Args:
        folder: of the checkpoint, for the messages.
        config: of the model.
        shapes: name -> shape of all tensors in the files.
    Raises:
        ValueError: a weight is missing, has another shape, or is unknown to the model.
    """
    layers = {number.group() for number in map(LAYER.match, shapes) if number}
    expected_layers = config.num_hidden_layers
    if len(layers) != expected_layers:
        raise ValueError(
            f"{folder}: config.json has num_layers {expected_layers}, and the weight files hold {len(layers)} "
            f"layers: they do not belong together. {HOW_TO_GET}"
        )
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - shapes.keys() - tied_weights(config).keys())
    unknown = sorted(name for name in shapes.keys() - expected.keys() if not name.endswith(".inv_freq"))
    different = [name for name, shape in shapes.items() if expected.get(name) not in (None, shape)]
    problems = [f"{name} is in none of its weight files" for name in missing]
    problems += [f"{name} is not a weight of this model" for name in unknown]
    problems += [f"{name} has shape {shapes[name]}, expected {expected[name]}" for name in different]
    if problems:
        more = f" (and {len(problems) - 1} others)" if len(problems) > 1 else ""
        raise ValueError(f"{folder}: {problems[0]}{more}: config.json and weights do not fit. {HOW_TO_GET}")


def expected_shapes(config: ModelDescription) -> dict[str, Shape | None]:
    """Name -> shape of each tensor in the files of a model, in 16 or in 4 bits; None for any shape."""
    tensors = empty_model(config).state_dict()
    shapes: dict[str, Shape | None] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in linear_layers(config) if is_quantized(config) else []:
        shapes |= packed_shapes(f"{name}.weight", tensors[f"{name}.weight"].numel())
    return shapes


def empty_model(config: ModelDescription) -> PreTrainedModel:
    """The model without values, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(config: ModelDescription) -> list[str]:
    """Names of the linear layers except the head: these are quantized and can have an adapter."""
    model = empty_model(config)
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def tied_weights(config: ModelDescription) -> dict[str, str]:
    """Name of a weight -> that of the other weight that is the same tensor."""
    tied = architecture_of(config).model_class._tied_weights_keys
    return dict(tied or {}) if config.tie_word_embeddings else {}


def packed_shapes(name: str, numel: int) -> dict[str, Shape | None]:
    """Name -> shape of the tensors in which bitsandbytes stores a weight of `numel` values in NF4."""
    blocks = math.ceil(numel / 64)
    return {
        name: (math.ceil(numel / 2), 1),  # two 4-bit codes a byte
        f"{name}.absmax": (blocks,),
        f"{name}.nested_absmax": (math.ceil(blocks / 256),),
        f"{name}.quant_map": (16,),
        f"{name}.nested_quant_map": (256,),
        f"{name}.quant_state.bitsandbytes__nf4": None,  # the bytes of a JSON
    }


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity; one pass without a copy, unlike `tensor.isfinite().all()`."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def check_finite(path: str, name: str, tensors: list[torch.Tensor], dtype: torch.dtype):
    """ValueError if the tensors of the weight `name` in a folder, which were converted to a dtype, are not finite."""
    if not all(map(is_finite, tensors)):
        raise ValueError(
            f"{path}: {name} is not finite (NaN or infinity) in {dtype}. Download the weights again, or choose bf16 "
            "with --compute_dtype if they are beyond the range of fp16."
        )


def functions_called(path: Path) -> list[str]:
    """The functions that loading a torch.save file would call, except constructors of tensors and numpy arrays."""
    with safe_globals():  # allows numpy's constructors, since the Trainer saves the state of numpy's generator
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
