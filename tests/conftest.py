"""Fixtures and functions of several test modules: golden values, genuine files, tiny models, data rows, short runs."""

import os
import sys

if "PYTEST_XDIST_WORKER" not in os.environ and not any("gpu" in argument for argument in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only `pytest -m gpu` uses a GPU

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, by other libraries too

import contextlib
import gc
import importlib.util
import itertools
import json
import logging
import multiprocessing
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import datasets
import huggingface_hub.constants
import hypothesis
import numpy as np
import pytest
from peft import PeftModel
from peft.utils import load_peft_weights
from tqdm import tqdm
from transformers import PreTrainedModel

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer, ChatGLM3Tokenizer
from qlora.adapter import add_lora
from qlora.checkpoint import tokenizer_files
from qlora.data.dataset import SampleEncoder
from qlora.export.official_folder import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_CHECKPOINT = GOLDEN / "tiny" / "checkpoint"
GOLDEN_ADAPTER = GOLDEN / "tiny" / "adapter"
STEPS, SAVE_STEPS = 8, 4
GOOD = {"instruction": "类型#裙", "output": "白色的裙。"}
GOOD_LINE = json.dumps(GOOD).encode()
HOSTILE_SEED = os.environ.get("HOSTILE_SEED", "")  # of random rows, damage, kills; other ones for another seed
HOSTILE_TIMES = int(os.environ.get("HOSTILE_TIMES", "1"))  # how many times the usual number of them


def hostile_random(name: str) -> random.Random:
    """The random generator of a test."""
    return random.Random(name + HOSTILE_SEED)


def hostile_examples(count: int) -> Callable[[Callable], Callable]:
    """Decorates a test of hypothesis, which runs with `count` times HOSTILE_TIMES random inputs."""
    limits = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow], "database": None}
    settings = hypothesis.settings(max_examples=count * HOSTILE_TIMES, derandomize=not HOSTILE_SEED, **limits)
    seeded = hypothesis.seed(hostile_random("hypothesis").getrandbits(64)) if HOSTILE_SEED else lambda test: test
    return lambda test: settings(seeded(test))


def import_script(path: Path) -> ModuleType:
    """Imports a script as a module, without running its main."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the dataclasses module looks it up there
    spec.loader.exec_module(module)
    return module


def to_json(**fields) -> bytes:
    """A valid row as a line of JSON, with these fields added or replaced."""
    return json.dumps(GOOD | fields, ensure_ascii=False).encode()


def write_lines(path: Path, *lines: bytes, end: bytes = b"\n") -> str:
    """Writes lines of any bytes to a file; returns its path as a string."""
    path.write_bytes(end.join((*lines, b"")))
    return str(path)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows to a jsonl file; returns its path."""
    return Path(write_lines(path, *(json.dumps(row, ensure_ascii=False).encode() for row in rows)))


def pytest_collection_finish():
    """Imports leave millions of objects, which each collection of garbage, of which a run does one, would look at."""
    gc.freeze()


def pytest_sessionfinish():
    """Libraries report objects that are left at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No network, a new cache for the datasets library, one thread: here and in processes that tests start."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    torch.set_num_threads(1)  # pytest runs a process on every core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
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
    """The tokenizer of THUDM/chatglm-6b; skips the test if its files are missing."""
    folder = ROOT / "THUDM" / "chatglm-6b"
    if not (folder / "ice_text.model").is_file():
        pytest.skip("no genuine ice_text.model in THUDM/chatglm-6b")
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """A path for the rows of a test; the file does not exist yet."""
    return tmp_path / "rows.jsonl"


@pytest.fixture
def encoder(tokenizer: ChatGLMTokenizer) -> SampleEncoder:
    """An encoder with the tiny tokenizer, and with limits that few rows reach."""
    return SampleEncoder(tokenizer, "", 512, 512)


@pytest.fixture(scope="session")
def genuine_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 5,000 training rows of AdvertiseGen; skips the test if they were not converted as the README says."""
    source = ROOT / "data" / "adgen" / "train.jsonl"
    if not source.is_file():
        pytest.skip("no genuine ADGEN rows in data/adgen/train.jsonl")
    path = tmp_path_factory.mktemp("adgen") / "train.jsonl"
    with source.open("rb") as rows:
        path.write_bytes(b"".join(itertools.islice(rows, 5000)))
    return path


@pytest.fixture(scope="session")
def tiny_script() -> ModuleType:
    """scripts/make_tiny_checkpoint.py as a module."""
    return import_script(ROOT / "scripts" / "make_tiny_checkpoint.py")


@pytest.fixture(scope="session")
def sample_rows() -> list[dict]:
    """The first 60 rows of data/train.jsonl."""
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
def third(tiny_script: ModuleType, sample_rows: list[dict], tmp_path_factory) -> ChatGLM3Tokenizer:
    """The same for ChatGLM3-6B."""
    rows = [{"query": row["instruction"], "answer": row["output"]} for row in sample_rows]
    return tiny_script.make_tokenizer(rows, 1100, tmp_path_factory.mktemp("tokenizer"), "chatglm3")


@pytest.fixture(scope="session")
def tiny_config(tokenizer: ChatGLMTokenizer) -> ChatGLMConfig:
    """A model of two layers of width 64, for `tokenizer`."""
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
    return random_checkpoint(tmp_path_factory.mktemp("chatglm") / "tiny", tiny_config, tokenizer)


@pytest.fixture(scope="session")
def varied_checkpoint(
    tokenizer: ChatGLMTokenizer, tiny_config: ChatGLMConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Like `tiny_checkpoint`; its layers change a token so much that answers are varied, and some of them end."""

    def change(state: dict[str, torch.Tensor]):
        for name, tensor in state.items():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                tensor *= 20
        state["lm_head.weight"][tokenizer.eos_token_id] *= 2  # the embedding is the same tensor

    return random_checkpoint(tmp_path_factory.mktemp("chatglm") / "varied", tiny_config, tokenizer, change)


@pytest.fixture
def tiny_model(tiny_checkpoint: Path) -> ChatGLMForConditionalGeneration:
    """The model of `tiny_checkpoint` in fp32 and in evaluation mode."""
    return ChatGLMForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def golden_folder(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> Path:
    """A copy of the golden checkpoint with the files of `tokenizer`; a test may change it."""
    folder = shutil.copytree(GOLDEN_CHECKPOINT, tmp_path / "golden")
    copy_tokenizer(tokenizer, folder)
    return folder


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing a file of more bytes fails, as on a full disk; also the one of captured output, but for `capsys`."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def random_samples(config, *lengths: tuple[int, int]) -> list[dict]:
    """Random tokens of samples of (prompt, answer) tokens; the answer with <sop> and the prompt with [gMASK]."""
    samples = []
    for prompt, answer in lengths:
        ids = torch.randint(10, 400, (prompt + answer,))
        ids[prompt - 1], ids[prompt] = config.gmask_token_id, config.bos_token_id
        samples.append({"input_ids": ids, "labels": ids.where(torch.arange(len(ids)) > prompt, -100)})
    return samples


def random_checkpoint(
    folder: Path,
    config: ChatGLMConfig,
    tokenizer: ChatGLMTokenizer,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda state: None,
) -> Path:
    """Writes a complete folder in the official format with random weights, which `change` may edit in place."""
    torch.manual_seed(0)
    state = ChatGLMForConditionalGeneration(config).state_dict()
    change(state)
    write_checkpoint(folder, config, lambda name, shape: state[name])
    copy_tokenizer(tokenizer, folder)
    return folder


def random_chatglm2(folder: Path, tokenizer: ChatGLM2Tokenizer, version: int, seq_length: int) -> Path:
    """As `random_checkpoint`, for ChatGLM2-6B or ChatGLM3-6B with two layers."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96}
    sizes |= {"padded_vocab_size": 1152, "seq_length": seq_length}
    config = ChatGLM2Config(initializer_range=0.3, chatglm_version=version, **sizes)
    torch.manual_seed(0)
    state = ChatGLM2ForConditionalGeneration(config).state_dict()
    write_checkpoint(folder, config, lambda name, shape: state[name], shard_size="200kB")
    copy_tokenizer(tokenizer, folder)
    return folder


def copy_tokenizer(tokenizer: ChatGLMTokenizer | ChatGLM2Tokenizer, folder: Path):
    """Copies the tokenizer's two files into a folder with weights."""
    source = Path(tokenizer.vocab_file).parent
    for name in tokenizer_files(source):
        shutil.copyfile(source / name, folder / name)


# Short runs of training and inference, with `tiny_checkpoint` and a few rows.


@pytest.fixture(scope="session")
def train_file(sample_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", sample_rows[:48])


@pytest.fixture(scope="session")
def dev_file(sample_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "dev.jsonl", sample_rows[48:59])


def write_json(path: Path, output_dir: Path, **values) -> Path:
    """Writes the JSON of a short run, with the keys of the shipped JSON; returns its path."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "evaluation_strategy": "steps",
        "eval_steps": SAVE_STEPS,
        "optim": "adamw_torch",
        "fp16": False,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "seed": 42,
    }
    if values.get("lr_scheduler_type") == "constant":  # it has no warm-up
        del defaults["warmup_ratio"]
    path.write_text(json.dumps(defaults | values), encoding="utf-8")
    return path


def flags_of(args_json: Path, model: Path, train: Path, dev: Path | str, *flags: object) -> list[str]:
    paths = {"train_args_json": args_json, "model_name_or_path": model, "train_data_path": train}
    paths |= {"eval_data_path": dev}
    return [*(str(part) for name, path in paths.items() for part in (f"--{name}", path)), *map(str, flags)]


def run_script(name: str, *flags: object) -> subprocess.CompletedProcess:
    """Runs a script in a new process."""
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, flags)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def add_random_lora(
    model: PreTrainedModel,
    target_modules: Sequence[str] = ("query_key_value",),
    std: float = 0.02,
    dropout: float = 0.0,
) -> PeftModel:
    """The model with a LoRA adapter whose B is random, so that it changes the outputs."""
    torch.manual_seed(0)
    model = add_lora(model, rank=4, alpha=32, dropout=dropout, target_modules=list(target_modules))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def run_main(module, *flags: object):
    """Runs a script's main in this process, which needs no time for imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        module.main()


def with_lock_of_its_own(function: Callable, *args: object):
    """Calls a function with another lock for progress bars than other processes have: who is killed may hold it."""
    tqdm.set_lock(threading.RLock())
    function(*args)


def fork(function: Callable, *args: object) -> BaseProcess:
    """Starts a function in a forked process, which needs no time for imports and can be killed."""
    process = multiprocessing.get_context("fork").Process(target=with_lock_of_its_own, args=(function, *args))
    process.start()
    return process


def write_output_to(log: Path):
    """Appends what this process prints and logs to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest has put its own in their place
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)


def error_of(module, *flags: object) -> str:
    """The error message with which a script ends."""
    with pytest.raises(SystemExit) as raised:
        run_main(module, *flags)
    # For a string Python prints it to stderr and exits with status 1.
    message = raised.value.code
    assert isinstance(message, str) and message.startswith("error: ")
    assert all(line.startswith("- ") for line in message.splitlines()[1:])  # a list of several problems
    return message


class StandInRecorder:
    """A recorder of graphs without a GPU: what is recorded is done again, with or without gradients as then."""

    def warm_up(self, work: Callable[[], None]):
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return torch.set_grad_enabled(torch.is_grad_enabled())(work)


def history(output_dir: Path, key: str) -> list[float]:
    """The values that a run logged under a key."""
    state = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry[key] for entry in state["log_history"] if key in entry]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_peft_weights(str(folder), device="cpu")


def assert_same_adapter(one: Path, other: Path, tolerance: float = 1e-6):
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
