"""What several test modules need: the official numbers, the genuine files where they are, tiny models and data."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which other libraries do

import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import datasets
import huggingface_hub.constants
import numpy as np
import pytest

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from qlora.export import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_CHECKPOINT = GOLDEN / "tiny" / "checkpoint"
GOLDEN_ADAPTER = GOLDEN / "tiny" / "adapter"
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")


def import_script(path: Path) -> ModuleType:
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as a jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No network, and a cache of its own for the datasets library, here and in the processes that tests start."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield cache


@pytest.fixture(scope="session")
def cases() -> dict:
    """Inputs, losses and greedy tokens of the official code (fp32, transformers 4.30.2, peft 0.4.0)."""
    return json.loads((GOLDEN / "tiny" / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def arrays() -> dict[str, torch.Tensor]:
    """Logits and LoRA gradients of the official code for `cases`."""
    with np.load(GOLDEN / "tiny" / "arrays.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.fixture(scope="session")
def genuine_tokenizer() -> ChatGLMTokenizer:
    """The tokenizer of THUDM/chatglm-6b, if its files are here."""
    for folder in (ROOT / "THUDM" / "chatglm-6b", ROOT / "../shared/chatglm-6b"):
        if (folder / "ice_text.model").is_file():
            return ChatGLMTokenizer.from_pretrained(folder)
    pytest.skip("no genuine ice_text.model in THUDM/chatglm-6b or ../shared/chatglm-6b")


@pytest.fixture(scope="session")
def tiny_script() -> ModuleType:
    """scripts/make_tiny_checkpoint.py."""
    return import_script(ROOT / "scripts" / "make_tiny_checkpoint.py")


@pytest.fixture(scope="session")
def sample_rows() -> list[dict]:
    """The first sample rows that the repository ships."""
    with open(ROOT / "data" / "train.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, 60)]


@pytest.fixture(scope="session")
def tokenizer(
    tiny_script: ModuleType, sample_rows: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> ChatGLMTokenizer:
    """A tokenizer of 1,100 pieces with the official layout of special tokens, trained on the sample rows."""
    rows = [{"query": row["instruction"], "answer": row["output"]} for row in sample_rows]
    return tiny_script.make_tokenizer(rows, 1100, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_config(tokenizer: ChatGLMTokenizer) -> ChatGLMConfig:
    """Two layers of width 64 for `tokenizer`."""
    names = ("bos", "eos", "pad", "mask", "gmask")
    return ChatGLMConfig(
        vocab_size=1152,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=128,
        initializer_range=0.3,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names},
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tokenizer: ChatGLMTokenizer, tiny_config: ChatGLMConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A complete folder in the official format with random weights and `tokenizer`. Do not change it."""
    folder = tmp_path_factory.mktemp("chatglm") / "tiny"
    torch.manual_seed(0)
    state = ChatGLMForConditionalGeneration(tiny_config).state_dict()
    write_checkpoint(folder, tiny_config, lambda name, shape: state[name])
    copy_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def tiny_model(tiny_checkpoint: Path) -> ChatGLMForConditionalGeneration:
    """The model of `tiny_checkpoint` in fp32, ready to generate."""
    return ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def golden_folder(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that may be changed, completed by (other) tokenizer files."""
    folder = shutil.copytree(GOLDEN_CHECKPOINT, tmp_path / "golden")
    copy_tokenizer(tokenizer, folder)
    return folder


def copy_tokenizer(tokenizer: ChatGLMTokenizer, folder: Path):
    """Puts the two tokenizer files of the official folder beside the weights."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(Path(tokenizer.vocab_file).parent / name, folder / name)
