"""Hostile rows and files: they are refused with a reason, or trained on as written; their code is not run."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN_ADAPTER, GOOD_LINE, hostile_examples, write_rows
from hypothesis import given
from hypothesis import strategies as st

import train_qlora
from chatglm import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.chat import build_prompt
from qlora.adapter import load_adapter
from qlora.checkpoint import check_checkpoint
from qlora.data.dataset import IGNORE_INDEX, SampleEncoder, load_samples
from qlora.data.rows import read_rows
from qlora.training.checkpoints import find_checkpoint

# Thousands of random lines.

FIELDS = ("instruction", "input", "output", "history", "content", "summary", "score")
CONTROL_WORDS = ("<sop>", "[gMASK]", "<eop>", "[MASK]", "<pad>", "<unk>", "</s>", "[Round 0]\n问：")

texts = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from((*CONTROL_WORDS, " ", "\n", "\t", "裙", "ab", "😀", "\u3000", "\u200b", "\x00")), max_size=8
    ).map("".join),
)
plain_texts = st.text(st.sampled_from("类型裙裤颜色白黑abc,*# 1"), min_size=1, max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
histories = st.lists(st.tuples(texts, texts).map(list), max_size=3)
valid_rows = st.fixed_dictionaries(
    {"instruction": plain_texts, "output": plain_texts}, optional={"input": texts, "history": histories}
)
any_rows = st.dictionaries(st.sampled_from(FIELDS), values | texts | histories, max_size=5)
json_lines = (valid_rows | any_rows | values).flatmap(
    lambda row: st.booleans().map(lambda ascii: json.dumps(row, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))
)


@st.composite
def damaged_lines(draw: st.DrawFn) -> bytes:
    """A line of JSON in which bytes are inserted, deleted or repeated."""
    line = draw(json_lines)
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(line))] * 2)))
    middle = draw(st.sampled_from((b"", line[start:end] * 2)) | st.binary(max_size=4))
    return (line[:start] + middle + line[end:]).replace(b"\n", b" ")


random_lines = json_lines | damaged_lines() | st.binary(max_size=40).map(lambda line: line.replace(b"\n", b""))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random") / "rows.jsonl"


@pytest.fixture(scope="module")
def encoder(tokenizer: ChatGLMTokenizer) -> SampleEncoder:
    """An encoder with limits that cut none of the generated rows."""
    return SampleEncoder(tokenizer, "", 10_000, 10_000)


BLANKS = r"<n>|<\|tab\|>|<\|blank_([2-9]|[1-7]\d|80)\|>"


def words(text: str) -> list[str]:
    """The words of a text; spaces are not compared, since the official tokenizer drops some of them.

    In a text, too, it takes the names of its pieces for line breaks, tabs and spaces for these.
    """
    return re.sub(BLANKS, " ", text).split()


def normalized_words(text: str, tokenizer: ChatGLMTokenizer) -> list[str]:
    """The words of a text after SentencePiece's normalization, which is part of the official tokenizer."""
    return words(tokenizer.sp_model.normalize(text).replace("\u2581", " "))


def assert_trained_on_as_written(line: bytes, row: dict, encoder: SampleEncoder):
    """Checks that the ids decode to prompt and answer, and that the labels are on the answer and <eop>."""
    fields, tokenizer = json.loads(line), encoder.tokenizer
    query = fields["instruction"] if "instruction" in fields else fields["content"]
    query += "\n" + fields["input"] if (fields.get("input") or "").strip() else ""
    answer = fields["output"] if "output" in fields else fields["summary"]
    ids, labels, length, prompt_cut, answer_cut = encoder.encode(row["query"], row["history"], row["answer"])
    assert len(ids) == len(labels) == length and not prompt_cut and not answer_cut
    control = [tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert [i for i in ids if i in (*control, tokenizer.mask_token_id, tokenizer.pad_token_id)] == control
    start = ids.index(tokenizer.bos_token_id) + 1
    assert ids[start - 2] == tokenizer.gmask_token_id and ids[-1] == tokenizer.eos_token_id
    assert labels == [IGNORE_INDEX] * start + ids[start:] and start < length - 1
    assert words(tokenizer.decode(ids[: start - 2])) == normalized_words(
        build_prompt(query, fields.get("history") or ()), tokenizer
    )
    assert words(tokenizer.decode(ids[start:-1])) == normalized_words(answer, tokenizer)


def assert_refused_with_a_reason(error: ValueError, start: str):
    message = str(error)
    assert message.startswith(start) and len(start) + 5 < len(message) < len(start) + 300
    assert len(message.splitlines()) == 1
    message.encode("utf-8")  # raises an error for a lone surrogate, which cannot be printed


@hostile_examples(125)
@given(lines=st.lists(random_lines, min_size=5, max_size=15))
def test_random_line_is_refused_with_a_reason_or_trained_on_as_written(lines, path, encoder):
    for line in lines:
        path.write_bytes(b"\n".join((GOOD_LINE, line, GOOD_LINE)))
        try:
            rows = list(read_rows(str(path)))
        except ValueError as error:
            assert_refused_with_a_reason(error, f"{path}, line 2: ")
            continue
        assert [row["line"] for row in rows] == ([1, 2, 3] if line.strip() else [1, 3])
        if line.strip():
            try:
                assert_trained_on_as_written(line, rows[1], encoder)
            except ValueError as error:
                assert_refused_with_a_reason(error, "field ")


@hostile_examples(100)
@given(elements=st.lists(json_lines | damaged_lines(), min_size=1, max_size=5))
def test_random_array_is_read_as_its_elements_are_as_lines(elements, path, encoder):
    path.write_bytes(b"[" + b",\n".join(elements) + b"]")
    try:
        rows = list(read_rows(str(path)))
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path)) and all(line.startswith("- ") for line in message.splitlines()[1:])
        assert all(len(line) < len(str(path)) + 300 for line in message.splitlines())
        message.encode("utf-8")
        return
    values = json.loads(path.read_bytes())
    assert [row["element"] for row in rows] == list(range(1, len(values) + 1))
    path.write_bytes(b"\n".join(json.dumps(value).encode() for value in values))
    without_place = [[{**row, "line": 0, "element": 0} for row in part] for part in (rows, read_rows(str(path)))]
    assert without_place[0] == without_place[1]


@hostile_examples(200)
@given(row=valid_rows.filter(lambda row: row["instruction"].strip() and row["output"].strip()))
def test_valid_row_is_not_refused(row, path, encoder):
    line = json.dumps(row).encode()
    path.write_bytes(line)
    (read,) = read_rows(str(path))
    assert_trained_on_as_written(line, read, encoder)


def test_no_row_of_a_file_is_lost(tmp_path, encoder):
    # Through the datasets library, which reads and tokenizes the rows in batches.
    rows = [{"instruction": f"类型#裙*编号#{n}", "output": "裙" * (n % 7 + 1)} for n in range(1234)]
    samples = load_samples(str(write_rows(tmp_path / "rows.jsonl", rows)), encoder)
    assert samples["line"][:] == list(range(1, 1235))
    for row, sample in zip(rows, samples, strict=True):
        assert encoder.encode(row["instruction"], [], row["output"])[0] == sample["input_ids"]


# Files of torch.save that contain code.


class Payload:
    """An object whose unpickling creates a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def payload_folder(tmp_path: Path) -> Path:
    """The folder that the payload of a test would create; a first payload shows that unpickling creates one."""
    torch.save({"w": Payload(tmp_path / "trial")}, tmp_path / "trial.bin")
    torch.load(tmp_path / "trial.bin", weights_only=False)
    assert (tmp_path / "trial").exists()
    return tmp_path / "executed"


def add_payload(path: Path, payload_folder: Path):
    """Adds a payload to the content of a torch.save file."""
    content = torch.load(path, weights_only=False) if path.is_file() else {}
    torch.save({"payload": Payload(payload_folder), "content": content}, path)


def test_code_in_a_weight_file_is_not_run(golden_folder, payload_folder):
    shard = golden_folder / "pytorch_model-00002-of-00002.bin"
    add_payload(shard, payload_folder)
    with pytest.raises(ValueError, match=rf"{shard.name} holds more than numbers: loading it would run posix.mkdir"):
        check_checkpoint(str(golden_folder))
    # It is not run without the check either.
    with pytest.raises(pickle.UnpicklingError):
        ChatGLMForConditionalGeneration.from_pretrained(golden_folder)
    assert not payload_folder.exists()


def test_code_in_an_adapter_is_not_run(golden_folder, tmp_path, payload_folder):
    adapter = shutil.copytree(GOLDEN_ADAPTER, tmp_path / "adapter")
    model = ChatGLMForConditionalGeneration.from_pretrained(golden_folder)
    load_adapter(model, str(adapter)).unload()
    add_payload(adapter / "adapter_model.bin", payload_folder)
    with pytest.raises(ValueError, match=r"the adapter's weights in .* are damaged"):
        load_adapter(model, str(adapter))
    assert not payload_folder.exists()


def flags_of(folder: Path, checkpoint: Path, rows: list[dict], *flags: str) -> list[str]:
    """Flags of a run of two steps that saves a checkpoint after each."""
    values = {"output_dir": str(folder / "out"), "max_steps": 2, "save_steps": 1, "report_to": "none"}
    values |= {"per_device_train_batch_size": 4, "optim": "adamw_torch", "remove_unused_columns": False}
    (folder / "args.json").write_text(json.dumps(values))
    data = write_rows(folder / "rows.jsonl", rows)
    paths = {"train_args_json": folder / "args.json", "model_name_or_path": checkpoint, "train_data_path": data}
    return [
        *(str(part) for name, path in paths.items() for part in (f"--{name}", path)),
        "--eval_data_path",
        "none",
        *flags,
    ]


def train(*flags: str):
    """Runs train_qlora.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_qlora.py", *flags])
        train_qlora.main()


@pytest.fixture(scope="module")
def interrupted(tiny_checkpoint, sample_rows, tmp_path_factory) -> Path:
    """The checkpoint after the first of two steps. Do not change it."""
    folder = tmp_path_factory.mktemp("interrupted")
    train(*flags_of(folder, tiny_checkpoint, sample_rows[:8]))
    return folder / "out" / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_code_in_a_checkpoint_is_not_run(
    interrupted, tiny_checkpoint, sample_rows, tmp_path, payload_folder, monkeypatch, name, checked
):
    checkpoint = shutil.copytree(interrupted, tmp_path / "checkpoint-1")
    add_payload(checkpoint / name, payload_folder)
    if not checked:  # without the check, the libraries must not run the code either
        monkeypatch.setattr("qlora.training.checkpoints.checkpoint_problem", lambda folder: None)
    flags = flags_of(tmp_path, tiny_checkpoint, sample_rows[:8], "--resume_from_checkpoint", str(checkpoint))
    with pytest.raises((SystemExit, pickle.UnpicklingError)) as raised:
        train(*flags)
    assert not checked or f"{name} holds more than numbers" in str(raised.value.code)
    assert not payload_folder.exists()


def test_checkpoint_with_code_is_skipped(interrupted, tmp_path, payload_folder, caplog):
    for step in (1, 2):
        shutil.copytree(interrupted, tmp_path / f"checkpoint-{step}")
    add_payload(tmp_path / "checkpoint-2" / "scheduler.pt", payload_folder)
    assert find_checkpoint("last", str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2 is passed over: scheduler.pt holds more than numbers" in caplog.text
    assert not payload_folder.exists()


def test_code_in_training_args_is_not_run(interrupted, tiny_checkpoint, sample_rows, tmp_path, payload_folder):
    # The Trainer writes this file and never reads it.
    checkpoint = shutil.copytree(interrupted, tmp_path / "checkpoint-1")
    add_payload(checkpoint / "training_args.bin", payload_folder)
    train(*flags_of(tmp_path, tiny_checkpoint, sample_rows[:8], "--resume_from_checkpoint", str(checkpoint)))
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and not payload_folder.exists()
