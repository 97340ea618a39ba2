"""Checks, before any weight is loaded, that a folder is a complete ChatGLM-6B checkpoint."""

import json
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.trainer_pt_utils import safe_globals

from chatglm import ChatGLMConfig

HOW_TO_GET = 'Download all files of THUDM/chatglm-6b into it (README, "Weights"), or try `bash train.sh --demo`.'
NF4 = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")
LFS_POINTER = b"version https://git-lfs"
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)


def check_checkpoint(path: str) -> ChatGLMConfig:
    """Checks that a folder has the configuration, the tokenizer and all weight files, each complete.

    Args:
        path: of a folder in the official format, with `.bin` or `.safetensors` weights, sharded or not.
    Returns:
        Its configuration.
    Raises:
        FileNotFoundError: the folder, a file, or a shard named by the index is missing.
        ValueError: the folder has an adapter, another architecture, a damaged file, a Git LFS pointer in place of a
            file, or a file that would run code when it is loaded.
    """
    folder = check_folder(path)
    check_no_adapter(folder)
    for name in ("config.json", *TOKENIZER_FILES):
        check_file(folder / name)
    config = read_config(folder)
    for shard in weight_files(folder):
        check_file(shard)
        problem = file_problem(shard)
        if problem:
            raise ValueError(f"{shard} {problem}. Download it again, from a source that you trust.")
    return config


def check_tokenizer(path: str):
    """FileNotFoundError, ValueError: as `check_checkpoint`, for the files of the tokenizer alone."""
    folder = check_folder(path)
    for name in TOKENIZER_FILES:
        check_file(folder / name)


def check_folder(path: str) -> Path:
    """The path of a folder; FileNotFoundError if there is none."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no folder {path}. {HOW_TO_GET}")
    return Path(path)


def check_no_adapter(folder: Path):
    """ValueError for a folder with an adapter, which transformers would load along with the base model."""
    if (folder / "adapter_config.json").exists():
        is_base = (folder / "config.json").exists()
        advice = "move adapter_config.json and adapter_model.* into another one" if is_base else "name that one"
        raise ValueError(f"{folder} holds an adapter; the base model belongs in a folder of its own: {advice}.")


def read_config(folder: Path) -> ChatGLMConfig:
    """The configuration of a ChatGLM-6B in 16 bits, or in 4 bits as this project writes it; ValueError for others."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type, quantization = values.get("model_type"), values.get("quantization_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}/config.json is not a JSON object: {error}") from error
    if model_type != ChatGLMConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, expected 'chatglm'. {HOW_TO_GET}")
    if quantization is not None and not (isinstance(quantization, dict) and NF4.items() <= quantization.items()):
        raise ValueError(
            f"{folder}/config.json has a quantization_config that is not bitsandbytes' NF4 with double quantisation: "
            "these weights are already quantised, in another way. Use the 16-bit files of THUDM/chatglm-6b."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # values of other kinds make transformers raise many types
        reason = str(error).strip().rpartition("\n")[2].strip().removeprefix("TypeError: ")
        raise ValueError(f"{folder}/config.json: {reason}") from error


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
        names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{found} is not a weight index (no JSON object with a weight_map). {HOW_TO_GET}") from error
    if not names:
        raise ValueError(f"{found} names no weight files. {HOW_TO_GET}")
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{found} names files outside its folder: {outside[0]!r}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(names)} weight files are missing: {missing[0]} ...")
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


def functions_called(path: Path) -> list[str]:
    """The functions that loading a torch.save file would call, except constructors of tensors and numpy arrays."""
    with safe_globals():  # allows numpy's constructors, since the Trainer saves the state of numpy's generator
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
