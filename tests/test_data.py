"""qlora/data.py: what a row may look like, what is refused and how, and what a sample becomes."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from datasets import Dataset

from chatglm import ChatGLMTokenizer
from chatglm.chat import build_prompt
from qlora.data import LONGEST_LINE, SampleEncoder, column, load_samples, mix_samples, read_prompts, read_rows

GOOD = {"instruction": "类型#裙", "output": "白色的裙。"}
GOOD_LINE = json.dumps(GOOD).encode()
CONTROL_TEXT = "前<sop>[gMASK]<eop>[MASK]<pad><unk>后"


def to_json(**fields) -> bytes:
    return json.dumps(GOOD | fields, ensure_ascii=False).encode()


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> str:
    path.write_bytes(end.join((*lines, b"")))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture
def encoder(tokenizer: ChatGLMTokenizer) -> SampleEncoder:
    return SampleEncoder(tokenizer, "", 512, 512)


def rows_of(path: str) -> list[tuple]:
    return [(row["query"], row["history"], row["answer"]) for row in read_rows(path)]


# Rows that are accepted.


@pytest.mark.parametrize(
    ("fields", "query", "history"),
    [
        ({}, "类型#裙", []),
        ({"input": "颜色#白色"}, "类型#裙\n颜色#白色", []),
        ({"input": ""}, "类型#裙", []),
        ({"input": "  "}, "类型#裙", []),
        ({"input": None, "history": None}, "类型#裙", []),
        ({"history": []}, "类型#裙", []),
        ({"history": [["问", "答"], ["再问", ""]]}, "类型#裙", [["问", "答"], ["再问", ""]]),
        ({"anything": {"else": [1, None]}}, "类型#裙", []),
    ],
)
def test_row_is_read(data, fields, query, history):
    assert rows_of(write(data, to_json(**fields))) == [(query, history, "白色的裙。")]


def test_names_of_the_original_download_are_read(data):
    line = json.dumps({"content": "类型#裤", "summary": "好看的裤。"}).encode()
    assert rows_of(write(data, line)) == [("类型#裤", [], "好看的裤。")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n  \t\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_mark(data, start, end):
    path = write(data, start + GOOD_LINE, GOOD_LINE, to_json(output="三"), end=end)
    assert [answer for _, _, answer in rows_of(path)] == ["白色的裙。", "白色的裙。", "三"]


def test_last_line_may_lack_its_end(data):
    data.write_bytes(GOOD_LINE + b"\n" + GOOD_LINE)
    assert len(rows_of(str(data))) == 2


def test_shipped_rows_are_accepted():
    for name in ("train.jsonl", "dev.jsonl"):
        assert len(rows_of(str(ROOT / "data" / name))) > 0


# Rows that are refused.

BROKEN_ROWS = {
    "bad JSON": (b'{"instruction": "a", "output": ', "not valid JSON"),
    "single quotes": (b"{'instruction': 'a', 'output': 'b'}", "not valid JSON"),
    "two rows on a line": (GOOD_LINE + GOOD_LINE, "not valid JSON"),
    "list": (b'["a", "b"]', "expected an object with instruction and output, found a list"),
    "string": (b'"a"', "expected an object with instruction and output, found a str"),
    "number": (b"1", "expected an object with instruction and output, found a int"),
    "null": (b"null", "expected an object with instruction and output, found a NoneType"),
    "no instruction": (b'{"output": "b"}', "field 'instruction' is missing; the row has 'output'"),
    "no output": (b'{"instruction": "a"}', "field 'output' is missing; the row has 'instruction'"),
    "no fields": (b"{}", "field 'instruction' is missing; the row has no fields"),
    "empty instruction": (to_json(instruction=""), "field 'instruction' is empty"),
    "empty output": (to_json(output=""), "field 'output' is empty"),
    "blank output": (to_json(output=" \n\t\u3000"), "field 'output' is empty"),
    "empty summary": (b'{"content": "a", "summary": ""}', "field 'summary' is empty"),
    "number as output": (to_json(output=3.5), "field 'output' must be a string, found a float"),
    "null as output": (to_json(output=None), "field 'output' must be a string, found a NoneType"),
    "NaN as output": (b'{"instruction": "a", "output": NaN}', "not valid JSON (NaN is no JSON number)"),
    "infinite field": (to_json(score=1)[:-2] + b"-Infinity}", "not valid JSON (-Infinity is no JSON number)"),
    "field twice": (GOOD_LINE[:-1] + b', "output": "c"}', "'output' stands twice in one object"),
    "field twice inside": (to_json(x=[{"a": 1}]).replace(b'"a": 1', b'"a": 1, "a": 2'), "'a' stands twice"),
    "many digits": (b'{"instruction": "a", "output": ' + b"1" * 5000 + b"}", "digits"),
    "long unknown field": (b'{"' + b"a" * 10_000 + b'": 1}', "field 'instruction' is missing; the row has 'aaa"),
    "longer than any row": (to_json(output="a" * LONGEST_LINE), "longer than 16,777,216 bytes"),
    "byte order mark inside the file": (b"\xef\xbb\xbf" + GOOD_LINE, "not valid JSON"),
    "lines of an old Mac": (GOOD_LINE + b"\r" + GOOD_LINE, "not valid JSON"),
    "instruction without tokens": (to_json(instruction="\u200b"), "field 'instruction' has nothing but characters"),
    "output without tokens": (to_json(output="\ufeff\u200b"), "field 'output' has nothing but characters"),
    "list as output": (to_json(output=["b"]), "field 'output' must be a string, found a list"),
    "object as instruction": (to_json(instruction={"a": "b"}), "field 'instruction' must be a string, found a dict"),
    "number as input": (to_json(input=1), "field 'input' must be a string, found a int"),
    "bad UTF-8": (b'{"instruction": "\xff", "output": "b"}', "not valid UTF-8 (byte 18 of the line)"),
    "GBK": ('{"instruction": "类型", "output": "b"}'.encode("gbk"), "not valid UTF-8"),
    "UTF-16": (GOOD_LINE.decode().encode("utf-16"), "not valid UTF-8"),
    "half a surrogate pair": (b'{"instruction": "\\ud83d", "output": "b"}', ""),
    "half a surrogate pair in the history": (to_json(history=[["问", "\\ud83d"]]).replace(b"\\\\", b"\\"), ""),
    "deep list": (b"[" * 100_000, "nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "nested too deeply"),
    **{
        f"history {history!r}": (
            to_json(history=history),
            "field 'history' must be a list of [question, answer] pairs",
        )
        for history in (
            "问答",
            {"问": "答"},
            [["问"]],
            [["问", "答", "问"]],
            [["问", 1]],
            [None],
            ["问答"],
            [{"问": "答"}],
        )
    },
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_ROWS.values(), ids=map(ascii, BROKEN_ROWS))
def test_broken_row_is_refused_with_file_line_and_reason(data, encoder, line, reason):
    path = write(data, GOOD_LINE, b"", line, GOOD_LINE)
    with pytest.raises(ValueError) as raised:
        load_samples(path, encoder)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: ") and reason in message
    assert len(message.splitlines()) == 1 and len(message) < 300 + len(path)


def test_missing_file_is_named(data, encoder):
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl"):
        load_samples(str(data), encoder)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_file_without_rows_is_refused(data, encoder, content):
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl.* no rows"):
        load_samples(str(data), encoder)


def test_history_may_first_come_late_in_a_file(data, encoder):
    # The datasets library writes 1,000 rows at a time and would take the type of a column from the first of them.
    path = write(data, *[GOOD_LINE] * 1001, to_json(history=[["问", "答"]]))
    assert len(load_samples(path, encoder)) == 1002


# Samples.


def test_sample_is_prompt_and_answer_with_labels_on_the_answer(data, encoder, tokenizer):
    sample = load_samples(write(data, GOOD_LINE), encoder)[0]
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in GOOD.values())
    learned = [*answer, tokenizer.eos_token_id]
    context = [*prompt, tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert sample["input_ids"] == context + learned
    assert sample["labels"] == [-100] * len(context) + learned


def test_prompt_text_comes_before_the_prompt(data, tokenizer):
    encoder = SampleEncoder(tokenizer, "写广告：", 512, 512)
    sample = load_samples(write(data, to_json(history=[["问", "答"]])), encoder)[0]
    prompt = tokenizer.encode("写广告：" + build_prompt(GOOD["instruction"], [("问", "答")]), add_special_tokens=False)
    assert sample["input_ids"][: len(prompt) + 1] == [*prompt, tokenizer.gmask_token_id]


def test_training_prompt_is_the_prompt_of_generation(data, encoder, tokenizer):
    ids = load_samples(write(data, GOOD_LINE), encoder)[0]["input_ids"]
    asked = tokenizer(GOOD["instruction"], split_special_tokens=True)["input_ids"]
    assert ids[: len(asked)] == asked


def test_control_tokens_in_a_row_stay_text(data, encoder, tokenizer):
    row = to_json(instruction=CONTROL_TEXT, output=CONTROL_TEXT, history=[[CONTROL_TEXT, CONTROL_TEXT]])
    ids = load_samples(write(data, row), encoder)[0]["input_ids"]
    for token, count in {"[gMASK]": 1, "<sop>": 1, "<eop>": 1, "[MASK]": 0, "<pad>": 0}.items():
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == count, token
    assert ids[-1] == tokenizer.eos_token_id
    answer = ids[ids.index(tokenizer.bos_token_id) + 1 : -1]
    assert tokenizer.decode(answer) == CONTROL_TEXT


def lengths(sample: dict, tokenizer: ChatGLMTokenizer) -> tuple[int, int]:
    """Tokens of prompt with [gMASK] and <sop>, and of answer with <eop>."""
    prompt = sample["input_ids"].index(tokenizer.bos_token_id) + 1
    assert sample["labels"][:prompt] == [-100] * prompt
    assert sample["labels"][prompt:] == sample["input_ids"][prompt:]
    assert sample["input_ids"][prompt - 2] == tokenizer.gmask_token_id
    assert sample["input_ids"][-1] == tokenizer.eos_token_id
    return prompt, len(sample["input_ids"]) - prompt


def test_lengths_are_cut_to_the_limits_and_counted(data, tokenizer, caplog):
    path = write(data, GOOD_LINE, to_json(instruction="裙" * 50), to_json(output="白" * 50), GOOD_LINE)
    plain = len(tokenizer.encode(GOOD["instruction"])), len(tokenizer.encode(GOOD["output"])) - 1
    limits = max(plain) + 5, max(plain) + 3
    with caplog.at_level(logging.INFO):
        samples = load_samples(path, SampleEncoder(tokenizer, "", *limits))
    found = [lengths(sample, tokenizer) for sample in samples]
    assert found == [plain, (limits[0], plain[1]), (plain[0], limits[1]), plain]
    assert "1 prompts, 1 answers" in caplog.text and "4 samples" in caplog.text
    tokens = sum(map(sum, found))
    assert f"{tokens} tokens" in caplog.text


def test_limits_just_large_enough_cut_nothing(data, tokenizer, caplog):
    limits = len(tokenizer.encode(GOOD["instruction"])), len(tokenizer.encode(GOOD["output"])) - 1
    with caplog.at_level(logging.INFO):
        samples = load_samples(write(data, GOOD_LINE), SampleEncoder(tokenizer, "", *limits))
    assert lengths(samples[0], tokenizer) == limits
    assert "0 prompts, 0 answers" in caplog.text


def test_oldest_rounds_go_first(data, tokenizer, caplog):
    history = [["问一", "答一"], ["问二", "答二"], ["问三", "答三"]]
    for kept in (3, 2, 1, 0):
        prompt = build_prompt(GOOD["instruction"], [tuple(turn) for turn in history[3 - kept :]])
        ids = tokenizer.encode(prompt)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            samples = load_samples(write(data, to_json(history=history)), SampleEncoder(tokenizer, "", len(ids), 512))
        assert samples[0]["input_ids"][: len(ids)] == ids
        assert f"{int(kept < 3)} prompts" in caplog.text


def test_oldest_of_many_rounds_go_quickly(data, tokenizer, encoded_texts):
    # Rounds that are dropped one by one would be tokenised 20,000 times.
    history = [[f"问{n}", "答"] for n in range(20_000)]
    samples = load_samples(write(data, to_json(history=history)), SampleEncoder(tokenizer, "", 512, 512))
    assert len(encoded_texts) < 30
    kept = tokenizer.decode(samples[0]["input_ids"][:510]).count("[Round") - 1
    prompts = [build_prompt(GOOD["instruction"], history[len(history) - n :]) for n in (kept, kept + 1)]
    lengths_of_both = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert lengths_of_both[0] <= 512 < lengths_of_both[1]


def test_row_of_a_megabyte_is_read_whole_and_cut_by_tokens(data, tokenizer):
    # Its beginning is a single word to the tokenizer, so that cutting the text beforehand would change the ids.
    text = "a" * 100_000 + "裙" * 300_000
    samples = load_samples(
        write(data, to_json(instruction=text, output=text)), SampleEncoder(tokenizer, "", 512, 1536)
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
        write(tmp_path / f"{name}.jsonl", *[to_json(output=name + str(n)) for n in range(count)])
        for name, count in (("a", 10), ("b", 4))
    ]
    return [load_samples(path, encoder) for path in paths]


def texts_of(samples: Dataset, tokenizer: ChatGLMTokenizer) -> Counter:
    return Counter(tokenizer.decode([i for i in labels if i != -100]) for labels in samples["labels"])


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (10, 4)), ((0.5, 1), (5, 4)), ((1, 2), (10, 8)), ((0.25, 2.5), (2, 10))]
)
def test_weight_says_how_often_the_rows_of_a_file_stand(parts, tokenizer, weights, counts):
    mixed = texts_of(mix_samples(list(zip("ab", parts, weights, strict=True)), 0), tokenizer)
    for name, part, weight, count in zip("ab", parts, weights, counts, strict=True):
        found = {text: times for text, times in mixed.items() if text.startswith(name)}
        assert sum(found.values()) == count
        assert set(found.values()) <= {int(weight), -int(-weight // 1)}  # no row much oftener than another
        assert len(found) == min(len(part), count)


def test_part_of_a_file_follows_the_seed(parts, tokenizer):
    first, again, other = (texts_of(mix_samples([("a", parts[0], 0.5)], seed), tokenizer) for seed in (0, 0, 1))
    assert first == again != other


def test_weight_that_leaves_no_row_is_refused(parts):
    with pytest.raises(ValueError, match=r"--train_data_path b\.jsonl:0\.1: so small a weight leaves none"):
        mix_samples([("a.jsonl", parts[0], 1), ("b.jsonl", parts[1], 0.1)], 0)


def test_column_of_a_mixture(parts):
    mixed = mix_samples([("a", parts[0], 0.5), ("b", parts[1], 2)], 0)
    assert column(mixed, "length").tolist() == [len(ids) for ids in mixed["input_ids"]]


# The cache.


@pytest.fixture
def encoded_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised, in order."""
    texts = []
    encode = SampleEncoder.text_ids
    monkeypatch.setattr(SampleEncoder, "text_ids", lambda self, text: texts.append(text) or encode(self, text))
    return texts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def fresh_encoder(tokenizer: ChatGLMTokenizer, *limits: int) -> SampleEncoder:
    """As another process would make it: from the files."""
    loaded = ChatGLMTokenizer.from_pretrained(Path(tokenizer.vocab_file).parent)
    return SampleEncoder(loaded, "", *(limits or (512, 512)))


def test_second_load_reads_the_cache(data, tokenizer, encoded_texts):
    path = write(data, GOOD_LINE, GOOD_LINE)
    first = load_samples(path, fresh_encoder(tokenizer))
    assert len(encoded_texts) == 4
    encoded_texts.clear()
    second = load_samples(path, fresh_encoder(tokenizer))
    assert encoded_texts == []
    assert second.to_list() == first.to_list()


def test_a_changed_file_is_read_again(data, tokenizer, encoded_texts):
    load_samples(write(data, GOOD_LINE), fresh_encoder(tokenizer))
    stat = data.stat()
    encoded_texts.clear()
    longer = load_samples(write(data, GOOD_LINE, GOOD_LINE), fresh_encoder(tokenizer))
    assert len(longer) == 2 and len(encoded_texts) == 4
    # The same size, another time of change.
    encoded_texts.clear()
    write(data, GOOD_LINE.replace(b"#", b"*"))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert data.stat().st_size == stat.st_size
    load_samples(str(data), fresh_encoder(tokenizer))
    assert "类型*裙" in encoded_texts


def test_other_limits_are_not_taken_from_the_cache(data, tokenizer):
    path = write(data, to_json(output="白" * 50))
    whole, cut = (load_samples(path, fresh_encoder(tokenizer, 512, limit)) for limit in (512, 10))
    assert len(whole[0]["input_ids"]) > len(cut[0]["input_ids"])


def test_failed_load_leaves_nothing_in_the_cache(data, encoder):
    with pytest.raises(ValueError, match="line 2"):
        load_samples(write(data, GOOD_LINE, b"{"), encoder)
    with pytest.raises(ValueError, match="line 2"):
        load_samples(str(data), encoder)
    assert len(load_samples(write(data, GOOD_LINE), encoder)) == 1


# Prompts.


def test_prompts_of_a_text(tmp_path):
    path = write(
        tmp_path / "prompts.txt", b"\xef\xbb\xbf" + "类型#裙".encode(), b"", " 类型#裤 ".encode(), end=b"\r\n"
    )
    assert read_prompts(path) == ["类型#裙", "类型#裤"]


def test_prompts_of_rows_need_no_answer(data):
    rows = [{"instruction": "甲", "input": "乙"}, {"content": "丙", "history": [["问", "答"]]}, GOOD]
    assert read_prompts(str(write_rows(data, rows))) == [
        "甲\n乙",
        build_prompt("丙", [("问", "答")]),
        GOOD["instruction"],
    ]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompt_file_without_prompts_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"prompts\.\w+ has no prompts"):
        read_prompts(write(tmp_path / name, b"", b"  "))


def test_line_of_wide_blanks_is_no_prompt(tmp_path):
    assert read_prompts(write(tmp_path / "prompts.txt", "\u3000".encode(), "类型#裙".encode())) == ["类型#裙"]


def test_broken_prompt_row_is_refused(data):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: field 'instruction' is missing"):
        read_prompts(write(data, GOOD_LINE, b'{"output": "b"}'))


# Genuine rows.


def test_genuine_rows_have_the_measured_lengths(genuine_tokenizer):
    # Counted beforehand with the official tokenizer: mean 103.5, longest 217 with [gMASK], <sop> and <eop>.
    path = ROOT / "../shared/adgen/train_5000.jsonl"
    if not path.is_file():
        pytest.skip("no genuine ADGEN rows in ../shared/adgen")
    samples = load_samples(str(path), SampleEncoder(genuine_tokenizer, "", 512, 1536))
    sizes = [len(ids) for ids in samples["input_ids"]]
    assert len(sizes) == 5000 and max(sizes) == 217
    assert sum(sizes) / len(sizes) == pytest.approx(103.5, abs=0.05)
