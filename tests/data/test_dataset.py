"""qlora/data/dataset.py: tokenized samples, mixtures of files, and the cache."""

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOOD, GOOD_LINE, largest_file, to_json, write_lines
from datasets import Dataset

from chatglm import ChatGLMTokenizer
from chatglm.chat import build_prompt
from qlora.data.dataset import SampleEncoder, load_samples, mix_samples, numpy_column

CONTROL_TEXT = "前<sop>[gMASK]<eop>[MASK]<pad><unk>后"


def test_first_history_may_be_late_in_a_file(rows_file, encoder):
    # Without ROW_FEATURES the datasets library would infer the type of the column from the first rows that it writes.
    path = write_lines(rows_file, *[GOOD_LINE] * 1001, to_json(history=[["问", "答"]]))
    assert len(load_samples(path, encoder)) == 1002


# Samples.


def test_sample_is_prompt_and_answer_with_labels_on_the_answer(rows_file, encoder, tokenizer):
    sample = load_samples(write_lines(rows_file, GOOD_LINE), encoder)[0]
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in GOOD.values())
    trained_on = [*answer, tokenizer.eos_token_id]
    context = [*prompt, tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert sample["input_ids"] == context + trained_on
    assert sample["labels"] == [-100] * len(context) + trained_on


def test_prompt_text_comes_before_the_prompt(rows_file, tokenizer):
    encoder = SampleEncoder(tokenizer, "写广告：", 512, 512)
    sample = load_samples(write_lines(rows_file, to_json(history=[["问", "答"]])), encoder)[0]
    prompt = tokenizer.encode("写广告：" + build_prompt(GOOD["instruction"], [("问", "答")]), add_special_tokens=False)
    assert sample["input_ids"][: len(prompt) + 1] == [*prompt, tokenizer.gmask_token_id]


def test_training_prompt_is_the_prompt_of_generation(rows_file, encoder, tokenizer):
    ids = load_samples(write_lines(rows_file, GOOD_LINE), encoder)[0]["input_ids"]
    generation_ids = tokenizer(GOOD["instruction"], split_special_tokens=True)["input_ids"]
    assert ids[: len(generation_ids)] == generation_ids


def test_control_tokens_in_a_row_stay_text(rows_file, encoder, tokenizer):
    row = to_json(instruction=CONTROL_TEXT, output=CONTROL_TEXT, history=[[CONTROL_TEXT, CONTROL_TEXT]])
    ids = load_samples(write_lines(rows_file, row), encoder)[0]["input_ids"]
    for token, count in {"[gMASK]": 1, "<sop>": 1, "<eop>": 1, "[MASK]": 0, "<pad>": 0}.items():
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == count, token
    assert ids[-1] == tokenizer.eos_token_id
    answer = ids[ids.index(tokenizer.bos_token_id) + 1 : -1]
    assert tokenizer.decode(answer) == CONTROL_TEXT


def lengths(sample: dict, tokenizer: ChatGLMTokenizer) -> tuple[int, int]:
    """Numbers of tokens: of the prompt with [gMASK] and <sop>, and of the answer with <eop>."""
    prompt = sample["input_ids"].index(tokenizer.bos_token_id) + 1
    assert sample["labels"][:prompt] == [-100] * prompt
    assert sample["labels"][prompt:] == sample["input_ids"][prompt:]
    assert sample["input_ids"][prompt - 2] == tokenizer.gmask_token_id
    assert sample["input_ids"][-1] == tokenizer.eos_token_id
    return prompt, len(sample["input_ids"]) - prompt


def test_lengths_are_cut_to_the_limits_and_counted(rows_file, tokenizer, caplog):
    path = write_lines(rows_file, GOOD_LINE, to_json(instruction="裙" * 50), to_json(output="白" * 50), GOOD_LINE)
    plain = len(tokenizer.encode(GOOD["instruction"])), len(tokenizer.encode(GOOD["output"])) - 1
    limits = max(plain) + 5, max(plain) + 3
    with caplog.at_level(logging.INFO):
        samples = load_samples(path, SampleEncoder(tokenizer, "", *limits))
    found = [lengths(sample, tokenizer) for sample in samples]
    assert found == [plain, (limits[0], plain[1]), (plain[0], limits[1]), plain]
    assert "1 prompts, 1 answers" in caplog.text and "4 samples" in caplog.text
    tokens = sum(map(sum, found))
    assert f"{tokens} tokens" in caplog.text


def test_sample_as_long_as_the_limits_is_not_cut(rows_file, tokenizer, caplog):
    limits = len(tokenizer.encode(GOOD["instruction"])), len(tokenizer.encode(GOOD["output"])) - 1
    with caplog.at_level(logging.INFO):
        samples = load_samples(write_lines(rows_file, GOOD_LINE), SampleEncoder(tokenizer, "", *limits))
    assert lengths(samples[0], tokenizer) == limits
    assert "0 prompts, 0 answers" in caplog.text


def test_oldest_rounds_are_dropped_first(rows_file, tokenizer, caplog):
    history = [["问一", "答一"], ["问二", "答二"], ["问三", "答三"]]
    for num_rounds in (3, 2, 1, 0):
        prompt = build_prompt(GOOD["instruction"], [tuple(turn) for turn in history[3 - num_rounds :]])
        ids = tokenizer.encode(prompt)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            encoder = SampleEncoder(tokenizer, "", len(ids), 512)
            samples = load_samples(write_lines(rows_file, to_json(history=history)), encoder)
        assert samples[0]["input_ids"][: len(ids)] == ids
        assert f"{int(num_rounds < 3)} prompts" in caplog.text


def test_few_texts_are_tokenized_to_drop_many_rounds(rows_file, tokenizer, encoded_texts):
    # If the rounds were dropped one by one, the prompt would be tokenized 20,000 times.
    history = [[f"问{n}", "答"] for n in range(20_000)]
    samples = load_samples(write_lines(rows_file, to_json(history=history)), SampleEncoder(tokenizer, "", 512, 512))
    assert len(encoded_texts) < 30 and max(map(len, encoded_texts)) < 30 * 512
    num_rounds = tokenizer.decode(samples[0]["input_ids"][:510]).count("[Round") - 1
    prompts = [build_prompt(GOOD["instruction"], history[len(history) - n :]) for n in (num_rounds, num_rounds + 1)]
    lengths_of_both = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert lengths_of_both[0] <= 512 < lengths_of_both[1]


def test_row_of_a_megabyte_is_read_completely_and_cut_by_tokens(rows_file, tokenizer):
    # The first 100,000 characters are one word for SentencePiece, so that cutting the text would change the ids.
    text = "a" * 100_000 + "裙" * 300_000
    samples = load_samples(
        write_lines(rows_file, to_json(instruction=text, output=text)), SampleEncoder(tokenizer, "", 512, 1536)
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert samples[0]["input_ids"][:510] == ids[:510]
    assert samples[0]["labels"][512:] == [*ids[:1535], tokenizer.eos_token_id]
    assert samples[0]["prompt_cut"] and samples[0]["answer_cut"]


# Several files.


@pytest.fixture
def parts(tmp_path: Path, encoder: SampleEncoder) -> list[Dataset]:
    """Two data sets of 10 and 4 samples."""
    paths = [
        write_lines(tmp_path / f"{name}.jsonl", *[to_json(output=name + str(n)) for n in range(count)])
        for name, count in (("a", 10), ("b", 4))
    ]
    return [load_samples(path, encoder) for path in paths]


def texts_of(samples: Dataset, tokenizer: ChatGLMTokenizer) -> Counter:
    return Counter(tokenizer.decode([i for i in labels if i != -100]) for labels in samples["labels"])


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (10, 4)), ((0.5, 1), (5, 4)), ((1, 2), (10, 8)), ((0.25, 2.5), (2, 10))]
)
def test_weight_multiplies_the_rows_of_a_file(parts, tokenizer, weights, counts):
    mixed = texts_of(mix_samples(list(zip("ab", parts, weights, strict=True)), 0), tokenizer)
    for name, part, weight, count in zip("ab", parts, weights, counts, strict=True):
        found = {text: times for text, times in mixed.items() if text.startswith(name)}
        assert sum(found.values()) == count
        assert set(found.values()) <= {int(weight), -int(-weight // 1)}  # counts of rows differ by at most 1
        assert len(found) == min(len(part), count)


def test_part_of_a_file_follows_the_seed(parts, tokenizer):
    first, again, other = (texts_of(mix_samples([("a", parts[0], 0.5)], seed), tokenizer) for seed in (0, 0, 1))
    assert first == again != other


def test_weight_that_leaves_no_row_is_refused(parts):
    with pytest.raises(ValueError, match=r"--train_data_path b\.jsonl:0\.1: so small a weight leaves none"):
        mix_samples([("a.jsonl", parts[0], 1), ("b.jsonl", parts[1], 0.1)], 0)


def test_column_of_a_mixture(parts):
    mixed = mix_samples([("a", parts[0], 0.5), ("b", parts[1], 2)], 0)
    assert numpy_column(mixed, "length").tolist() == [len(ids) for ids in mixed["input_ids"]]


# The cache.


@pytest.fixture
def encoded_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenized, in order."""
    texts = []
    tokenize = ChatGLMTokenizer.tokenize
    monkeypatch.setattr(
        ChatGLMTokenizer,
        "tokenize",
        lambda self, text, **options: texts.append(text) or tokenize(self, text, **options),
    )
    return texts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def fresh_encoder(tokenizer: ChatGLMTokenizer, *limits: int) -> SampleEncoder:
    """An encoder with a tokenizer loaded from its files, as in another process."""
    loaded = ChatGLMTokenizer.from_pretrained(Path(tokenizer.vocab_file).parent)
    return SampleEncoder(loaded, "", *(limits or (512, 512)))


def test_second_load_reads_the_cache(rows_file, tokenizer, encoded_texts):
    path = write_lines(rows_file, GOOD_LINE, GOOD_LINE)
    first = load_samples(path, fresh_encoder(tokenizer))
    assert len(encoded_texts) == 4
    encoded_texts.clear()
    second = load_samples(path, fresh_encoder(tokenizer))
    assert encoded_texts == []
    assert second.to_list() == first.to_list()


def test_a_changed_file_is_read_again(rows_file, tokenizer, encoded_texts):
    load_samples(write_lines(rows_file, GOOD_LINE), fresh_encoder(tokenizer))
    stat = rows_file.stat()
    encoded_texts.clear()
    longer = load_samples(write_lines(rows_file, GOOD_LINE, GOOD_LINE), fresh_encoder(tokenizer))
    assert len(longer) == 2 and len(encoded_texts) == 4
    # The same size and the same modification time.
    stat = rows_file.stat()
    encoded_texts.clear()
    write_lines(rows_file, *[GOOD_LINE.replace(b"#", b"*")] * 2)
    os.utime(rows_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (rows_file.stat().st_size, rows_file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    load_samples(str(rows_file), fresh_encoder(tokenizer))
    assert "类型*裙" in encoded_texts


def damage(keep: float, zeros: float = 0, start: float = 0) -> Callable[[bytes], bytes]:
    """A function that keeps this part of a file, with zeros in this part of it, from this part on or at the end."""

    def damaged(content: bytes) -> bytes:
        kept, size = bytearray(content[: int(len(content) * keep)]), int(len(content) * zeros)
        first = int(len(content) * start) or len(kept) - size
        kept[first : first + size] = bytes(size)
        return bytes(kept)

    return damaged


@pytest.mark.parametrize(
    "damaged",
    [damage(0), damage(0.5), damage(1, 1), damage(1, 0.3), damage(1, 0.02, 0.5), damage(1, 0.02, 0.7)],
    ids=["empty", "half", "all zeros", "zeros at the end", "zeros inside", "zeros further on"],
)
@pytest.mark.parametrize("name", ["generator-train.arrow", "cache-*.arrow", "dataset_info.json"])
def test_damaged_cache_is_built_anew(rows_file, encoder, own_cache, caplog, name, damaged):
    path = write_lines(rows_file, *[to_json(output=f"裙{n}") for n in range(350)])
    expected = load_samples(path, encoder).to_list()
    (file,) = own_cache.rglob(name)
    file.write_bytes(damaged(file.read_bytes()))
    caplog.clear()
    assert load_samples(path, encoder).to_list() == expected
    if caplog.messages or name != "generator-train.arrow":  # zeros in the text of tokenized rows do no harm
        (message,) = caplog.messages
        assert str(own_cache) in message and "is damaged" in message and "built anew" in message
    caplog.clear()
    assert load_samples(path, encoder).to_list() == expected and not caplog.messages


def test_rows_that_a_damaged_cache_has_lost_are_read_again_for_another_encoder(rows_file, tokenizer, own_cache):
    path = write_lines(rows_file, *[GOOD_LINE] * 350)
    load_samples(path, fresh_encoder(tokenizer))
    (file,) = own_cache.rglob("generator-train.arrow")
    file.write_bytes(damage(1, 0.3)(file.read_bytes()))
    assert len(load_samples(path, fresh_encoder(tokenizer, 100, 100))) == 350


@pytest.mark.parametrize("size", [5_000, 60_000], ids=["rows", "samples"])
def test_full_disk_of_the_cache_is_named_and_nothing_is_left_there(rows_file, encoder, own_cache, size):
    path = write_lines(rows_file, *[GOOD_LINE] * 500)
    with largest_file(size), pytest.raises(ValueError) as raised:
        load_samples(path, encoder)
    assert re.fullmatch(
        rf"the cache .* in {own_cache} cannot be written to: a file there must not be so large\. Make room there, or "
        r"name a folder .* HF_DATASETS_CACHE\.",
        str(raised.value),
    )
    assert not [file for file in own_cache.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(load_samples(path, encoder)) == 500


def test_cache_folder_that_cannot_be_made_is_named(rows_file, encoder, own_cache):
    own_cache.write_text("a file")
    with pytest.raises(ValueError, match=rf"the cache .* in {own_cache} cannot be written to: Not a directory\."):
        load_samples(write_lines(rows_file, GOOD_LINE), encoder)


def test_rows_without_tokens_are_listed_by_worker_processes_as_by_one(rows_file, encoder, own_cache, monkeypatch):
    path = write_lines(rows_file, GOOD_LINE, *[to_json(output="\u200b"), GOOD_LINE] * 12)
    messages = []
    for rows_per_process in (1000, 10):
        monkeypatch.setattr("qlora.data.dataset.ROWS_PER_PROCESS", rows_per_process)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        with pytest.raises(ValueError) as raised:
            load_samples(path, encoder)
        messages.append(str(raised.value))
        shutil.rmtree(own_cache)
    first, *listed = messages[0].splitlines()
    assert messages[0] == messages[1] and first == f"{path} has 12 rows that cannot be used:"
    reason = "the answer has nothing but characters that the tokenizer drops."
    assert listed == [*(f"- line {line}: {reason}" for line in range(2, 22, 2)), "- and 2 more."]


def test_cache_is_not_used_for_other_limits(rows_file, tokenizer):
    path = write_lines(rows_file, to_json(output="白" * 50))
    complete, cut = (load_samples(path, fresh_encoder(tokenizer, 512, limit)) for limit in (512, 10))
    assert len(complete[0]["input_ids"]) > len(cut[0]["input_ids"])


def test_failed_load_leaves_nothing_in_the_cache(rows_file, encoder):
    with pytest.raises(ValueError, match="line 2"):
        load_samples(write_lines(rows_file, GOOD_LINE, b"{"), encoder)
    with pytest.raises(ValueError, match="line 2"):
        load_samples(str(rows_file), encoder)
    assert len(load_samples(write_lines(rows_file, GOOD_LINE), encoder)) == 1


# Genuine rows.


def test_genuine_rows_have_the_measured_lengths(genuine_tokenizer, genuine_rows):
    # As the official tokenizer counts: mean 103.5, longest 217 tokens, with [gMASK], <sop> and <eop>.
    samples = load_samples(str(genuine_rows), SampleEncoder(genuine_tokenizer, "", 512, 1536))
    sizes = [len(ids) for ids in samples["input_ids"]]
    assert len(sizes) == 5000 and max(sizes) == 217
    assert sum(sizes) / len(sizes) == pytest.approx(103.5, abs=0.05)
