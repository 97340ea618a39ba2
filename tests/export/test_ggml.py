"""qlora/export/ggml.py: files for chatglm.cpp are read back by a reader of the test's own, and run by the package.

The tests that run chatglm-cpp are skipped where it is not installed.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import GOLDEN_ADAPTER, ROOT, copy_tokenizer, import_script, run_main
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm import ChatGLMForConditionalGeneration
from chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from qlora.checkpoint import read_config
from qlora.export import ggml
from qlora.export.ggml import encode_q4_0, encode_q8_0, hyperparameters, write_ggml
from qlora.export.merging import WeightReader, merged_tensors
from qlora.export.official_folder import parameter_shapes, quantize_rows, write_checkpoint

HYPERPARAMETERS = (
    *("type", "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_layers"),
    *("inner_hidden_size", "layernorm_epsilon", "prefix_length", "rope_theta", "max_sequence_length"),
    *("eos_token_id", "pad_token_id"),
)
CODES = {"fp16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type
PROMPTS = ("类型#裙*颜色#白色", "类型#裤\n版型#宽松  风格#简约", "hello, 世界!", "<|user|>sop")
every_type = pytest.mark.parametrize("dtype", CODES)


class Stored(NamedTuple):
    """A tensor of a file: its type, its values, and the distance of two neighbouring values at each of them."""

    code: int
    values: np.ndarray
    step: np.ndarray | None


class GGMLFile(NamedTuple):
    """What a file holds."""

    head: tuple[bytes, int, int]  # magic, model type, version
    hyperparameters: dict[str, float]
    tokenizer: bytes
    tensors: dict[str, Stored]


def read_ggml(path: Path) -> GGMLFile:
    data = path.read_bytes()
    magic, *head = struct.unpack_from("<4sii", data)
    hyperparameters = struct.unpack_from("<7i f i f 3i", data, 12)
    (length,) = struct.unpack_from("<i", data, 64)
    tokenizer = data[68 : 68 + length]
    tensors = dict(read_tensors(data, 68 + length))
    return GGMLFile((magic, *head), dict(zip(HYPERPARAMETERS, hyperparameters, strict=True)), tokenizer, tensors)


def read_tensors(data: bytes, start: int) -> Iterator[tuple[str, Stored]]:
    while start < len(data):
        (length,) = struct.unpack_from("<i", data, start)
        name = data[start + 4 : start + 4 + length].decode()
        start += 4 + length
        (ndim,) = struct.unpack_from("<i", data, start)
        *shape, code = struct.unpack_from(f"<{ndim + 1}i", data, start + 4)
        start += 4 * (ndim + 2)
        start += -start % 16
        count = int(np.prod(shape))
        block, size, decode = FORMATS[code]
        size *= count // block
        values, step = decode(np.frombuffer(data, np.uint8, size, start), code)
        yield name, Stored(code, values.reshape(shape), None if step is None else step.reshape(shape))
        start += size


def floats(data: np.ndarray, code: int) -> tuple[np.ndarray, None]:
    return data.view(np.float32 if code == 0 else np.float16).astype(np.float32), None


def q8_0(data: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return blocks[:, 2:].view(np.int8) * scale, np.repeat(abs(scale), 32, axis=1)


def q4_0(data: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = data.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    numbers = np.concatenate([blocks[:, 2:] % 16, blocks[:, 2:] // 16], axis=1).astype(np.int8) - 8
    return numbers * scale, np.repeat(abs(scale), 32, axis=1)


FORMATS = {0: (1, 4, floats), 1: (1, 2, floats), 2: (32, 18, q4_0), 8: (32, 34, q8_0)}


@pytest.fixture(scope="session")
def merge_lora():
    return import_script(ROOT / "scripts" / "merge_lora.py")


def export(merge_lora, base: Path, output: Path, dtype: str, adapter: Path | str = GOLDEN_ADAPTER) -> Path:
    """Runs scripts/merge_lora.py; returns the file that it wrote."""
    flags = {"model_name_or_path": base, "adapter_path": adapter, "output_dir": output, "dtype": dtype}
    flags |= {"format": "chatglm.cpp", "onto": "original"}
    run_main(merge_lora, *(word for flag, value in flags.items() for word in (f"--{flag}", value)))
    return output / "chatglm-ggml.bin"


@pytest.fixture(scope="module", params=[2, 3])
def later_checkpoint(request, tiny_script, sample_rows, tmp_path_factory) -> Path:
    """A folder with random weights of ChatGLM2-6B or ChatGLM3-6B, two layers, and a tokenizer of 1,100 pieces."""
    rows = [{"query": row["instruction"], "answer": row["output"]} for row in sample_rows]
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_script.make_tokenizer(rows, 1100, folder, f"chatglm{request.param}")
    sizes = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96}
    # Without rows of padding: for the id of one, which only random models generate, chatglm.cpp ends the process.
    sizes |= {"padded_vocab_size": tokenizer.vocab_size, "seq_length": 256}
    config = ChatGLM2Config(initializer_range=0.3, chatglm_version=request.param, **sizes)
    torch.manual_seed(0)
    state = ChatGLM2ForConditionalGeneration(config).state_dict()
    for name, tensor in state.items():
        if name.endswith("query_key_value.bias"):
            torch.nn.init.normal_(tensor)
    write_checkpoint(folder / "checkpoint", config, lambda name, shape: state[name])
    copy_tokenizer(tokenizer, folder / "checkpoint")
    return folder / "checkpoint"


# The file.


@every_type
def test_file_holds_tokenizer_hyperparameters_and_merged_weights(golden_folder, tmp_path, merge_lora, dtype):
    (golden_folder / "MODEL_LICENSE").touch()
    file = read_ggml(export(merge_lora, golden_folder, tmp_path / "out", dtype))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"chatglm-ggml.bin", "MODEL_LICENSE"}
    config, tensor = merged_tensors(str(golden_folder), str(GOLDEN_ADAPTER), "original", torch.float32)
    assert file.head == (b"ggml", 1, 2)
    assert file.tokenizer == (golden_folder / "ice_text.model").read_bytes()
    expected = {name: getattr(config, name, None) for name in HYPERPARAMETERS}
    expected |= {"type": CODES[dtype], "num_key_value_heads": 4, "prefix_length": 0, "rope_theta": 10000.0}
    assert file.hyperparameters == pytest.approx(expected)

    names = {name for name, _ in ChatGLMForConditionalGeneration(config).named_parameters()}
    assert file.tensors.keys() == names  # without the head, which is the embedding
    for name, (code, values, step) in file.tensors.items():
        weight = tensor(name, values.shape).float().numpy()
        assert values.shape == weight.shape and code == (0 if weight.ndim == 1 else CODES[dtype]), name
        if code == 0:
            assert np.array_equal(values, weight), name
        elif code == 1:
            assert np.array_equal(values, weight.astype(np.float16)), name
        else:
            assert_rounded(weight, values, step, whole_step_at_end=dtype == "q4_0")


def test_file_of_a_later_model(later_checkpoint, tmp_path, merge_lora):
    file = read_ggml(export(merge_lora, later_checkpoint, tmp_path / "out", "fp16", adapter="none"))
    config, stored = read_config(later_checkpoint), WeightReader(str(later_checkpoint))
    assert file.head == (b"ggml", config.chatglm_version, 2)
    assert file.tokenizer == (later_checkpoint / "tokenizer.model").read_bytes()
    expected = {name: getattr(config, name, None) for name in HYPERPARAMETERS}
    expected |= {"type": 1, "num_key_value_heads": 2, "inner_hidden_size": 96, "max_sequence_length": 256}
    assert file.hyperparameters == pytest.approx(expected | {"prefix_length": 0, "rope_theta": 10000.0})
    assert list(file.tensors) == list(parameter_shapes(config))  # with the head, which is no other tensor
    for name, (code, values, _) in file.tensors.items():
        assert np.array_equal(values, stored(name).float().numpy()) and code == (values.ndim == 2), name


def assert_rounded(weight: np.ndarray, values: np.ndarray, step: np.ndarray, whole_step_at_end: bool):
    """The error of a value is at most half a step; in q4_0 a whole one at the end of the range that has 7 steps."""
    error = abs(weight - values) / step
    inner = abs(weight) < 7.5 * step if whole_step_at_end else np.full(weight.shape, True)
    assert error[inner].max() < 0.501 and error.max() < 1.01
    assert inner.mean() > 0.9


def test_bytes_of_blocks():
    # By the definitions in ggml: q4_0 is fp16 d, then nibbles of (number - 8) * d; q8_0 is fp16 d, then int8 * d.
    rising = torch.arange(-8.0, 8.0)
    blocks = torch.stack([torch.cat([rising, rising.flip(0)]), torch.zeros(32), -2 * torch.cat([rising, rising])])
    scale = {1: "003c", 0: "0080", -2: "00c0"}
    nibbles = {1: bytes(i | (15 - i) << 4 for i in range(16)), 0: b"\x88" * 16, -2: bytes(17 * i for i in range(16))}
    assert [bytes(row) for row in encode_q4_0(blocks).tolist()] == [
        bytes.fromhex(scale[d]) + nibbles[d] for d in scale
    ]
    expected = struct.pack("<e", 0.25) + np.arange(-127, 129, 8, dtype=np.int8).tobytes()
    assert bytes(encode_q8_0(torch.arange(-127.0, 129.0, 8)[None] / 4)[0].tolist()) == expected
    assert bytes(encode_q8_0(torch.zeros(1, 32))[0].tolist()) == bytes(34)


# What is refused.


def values_of(golden_folder: Path, changes: dict[str, float]):
    """The golden model's configuration, and a function that reads its weights with their first value changed."""
    stored = WeightReader(str(golden_folder))

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        weight = stored(name).float()
        weight.view(-1)[0] = changes.get(name, weight.view(-1)[0])
        return weight

    return read_config(golden_folder), tensor


@pytest.mark.parametrize(
    ("dtype", "name", "value"),
    [
        ("fp16", "transformer.word_embeddings.weight", 1e5),
        ("q4_0", "transformer.layers.1.mlp.dense_4h_to_h.weight", float("nan")),
        ("q8_0", "transformer.layers.2.attention.dense.bias", float("-inf")),
        ("q8_0", "transformer.layers.2.attention.dense.weight", 1e7),
        ("q4_0", "transformer.layers.2.attention.dense.weight", 1e6),
    ],
)
def test_weights_that_the_type_cannot_hold_are_refused_by_name(golden_folder, tokenizer, tmp_path, dtype, name, value):
    config, tensor = values_of(golden_folder, {name: value})
    with pytest.raises(ValueError, match=rf"^{name} is not written: it has values from \S+ to \S+, and its type "):
        write_ggml(tmp_path / "file", config, tokenizer, tensor, dtype)


def test_scales_extend_the_range_of_fp16(golden_folder, tokenizer, tmp_path):
    name = "transformer.word_embeddings.weight"
    config, tensor = values_of(golden_folder, {name: 1e5})
    write_ggml(tmp_path / "file", config, tokenizer, tensor, "q8_0")
    assert read_ggml(tmp_path / "file").tensors[name].values[0, 0] == pytest.approx(1e5, rel=2**-11)


@pytest.mark.parametrize("dtype", ["fp16", "q4_0"])
def test_room_is_asked_for_the_whole_file(golden_folder, tokenizer, tmp_path, monkeypatch, dtype):
    asked, (config, tensor) = [], values_of(golden_folder, {})
    monkeypatch.setattr(ggml, "check_room", lambda what, folder, size, advice: asked.append(size))
    write_ggml(tmp_path / "file", config, tokenizer, tensor, dtype)
    others = (tmp_path / "file").stat().st_size - asked[0]
    assert 0 < others < 120 * len(parameter_shapes(config))  # names and shapes of tensors


def test_rows_that_are_not_divisible_into_blocks_are_refused(golden_folder, tokenizer, tmp_path):
    config = read_config(golden_folder)
    config.hidden_size = 48
    flags = (config, tokenizer, lambda name, shape: torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"word_embeddings\.weight has rows of 48 .* blocks of 32\. Write --dtype fp16"
    ):
        write_ggml(tmp_path / "file", *flags, "q8_0")
    write_ggml(tmp_path / "file", *flags, "fp16")


# The package itself.


@pytest.fixture(scope="session")
def chatglm_cpp() -> ModuleType:
    return pytest.importorskip("chatglm_cpp", reason="chatglm-cpp is not installed")


@every_type
def test_package_answers_as_this_model_with_the_weights_of_the_file(
    chatglm_cpp, varied_checkpoint, tmp_path, merge_lora, dtype
):
    assert_same_answers(chatglm_cpp, merge_lora, varied_checkpoint, tmp_path, dtype)


@every_type
def test_package_answers_as_a_later_model(chatglm_cpp, later_checkpoint, tmp_path, merge_lora, dtype):
    assert_same_answers(chatglm_cpp, merge_lora, later_checkpoint, tmp_path, dtype)


def assert_same_answers(chatglm_cpp: ModuleType, merge_lora: ModuleType, checkpoint: Path, folder: Path, dtype: str):
    """The package writes the tokens that the model of a folder, with the weights of the file, finds most likely."""
    path = export(merge_lora, checkpoint, folder / "out", dtype, adapter="none")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    weights = {name: torch.from_numpy(tensor.values) for name, tensor in read_ggml(path).tensors.items()}
    model.load_state_dict(weights, strict=False)
    tokenizer, pipeline = AutoTokenizer.from_pretrained(checkpoint), chatglm_cpp.Pipeline(str(path))
    below: list[float] = []
    for prompt in PROMPTS:
        prompt_ids, messages = tokenizer.build_prompt_ids(prompt), [chatglm_cpp.ChatMessage("user", prompt)]
        assert pipeline.tokenizer.apply_chat_template(messages, 512) == prompt_ids
        chunks = pipeline.chat(messages, max_new_tokens=24, do_sample=False, stream=True)
        answer = [token for chunk in chunks for token in chunk.token_ids]
        assert len(answer) == 24 or answer[-1] in tokenizer.stop_token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + answer])).logits[0, len(prompt_ids) - 1 : -1]
        below += (logits.amax(dim=1) - logits[range(len(answer)), answer]).tolist()
    # How far the chosen token's logit is below the highest one; the standard deviation of the logits is 2.3.
    # chatglm.cpp rounds the inputs of products to the type of the weights, so that the two highest may change places.
    most, share = (0.01, 0.02) if dtype == "fp16" else (1, 0.2)
    assert max(below) < most and sum(map(bool, below)) < share * len(below)


@pytest.mark.parametrize("bits", [8, 4])
def test_package_reads_the_official_int8_and_int4_weights(tmp_path, bits):
    convert = pytest.importorskip("chatglm_cpp.convert", reason="chatglm-cpp or tabulate is not installed")
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    numbers, scale = quantize_rows(weight, bits)
    with (tmp_path / "file").open("wb") as file:
        meta = convert.WeightMeta("weight", convert.GGMLType.F32)
        convert.dump_state_dict(file, [meta], {"weight": numbers, "weight_scale": scale}, bits)
    ((_, read),) = read_tensors((tmp_path / "file").read_bytes(), 0)
    assert (weight - torch.from_numpy(read.values)).abs().max() <= 0.501 * scale.max()


def test_heads_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"divides hidden_size 4096 by 32 heads; those of this model have 64 features"
    ):
        hyperparameters(ChatGLM2Config(kv_channels=64))
