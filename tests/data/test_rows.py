"""qlora/data/rows.py: rows that are accepted, and rows that are refused, with the reason."""

import json

import pytest
from conftest import GOOD, GOOD_LINE, ROOT, to_json, write_lines, write_rows

from glm_shared.chat import Prompt
from qlora.data.dataset import load_samples
from qlora.data.row_files import LONGEST_LINE, MOST_LISTED
from qlora.data.rows import read_prompts, read_rows


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
        ({"id": 7, "category": "裙", "system": "", "inputs": [], "input": ""}, "类型#裙", []),
    ],
)
def test_row_is_read(rows_file, fields, query, history):
    assert rows_of(write_lines(rows_file, to_json(**fields))) == [(query, history, "白色的裙。")]


def test_field_names_of_advertisegen_are_read(rows_file):
    line = json.dumps({"content": "类型#裤", "summary": "好看的裤。"}).encode()
    assert rows_of(write_lines(rows_file, line)) == [("类型#裤", [], "好看的裤。")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n  \t\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_mark(rows_file, start, end):
    path = write_lines(rows_file, start + GOOD_LINE, GOOD_LINE, to_json(output="三"), end=end)
    assert [answer for _, _, answer in rows_of(path)] == ["白色的裙。", "白色的裙。", "三"]


def test_last_line_needs_no_line_end(rows_file):
    rows_file.write_bytes(GOOD_LINE + b"\n" + GOOD_LINE)
    assert len(rows_of(str(rows_file))) == 2


def test_shipped_rows_are_accepted():
    for name in ("train.jsonl", "dev.jsonl"):
        assert len(rows_of(str(ROOT / "data" / name))) > 0


# Rows that are refused.

BROKEN_ROWS = {
    "bad JSON": (b'{"instruction": "a", "output": ', "not valid JSON"),
    "single quotes": (b"{'instruction': 'a', 'output': 'b'}", "not valid JSON"),
    "two rows on a line": (GOOD_LINE + GOOD_LINE, "not valid JSON"),
    "list": (b'["a", "b"]', "expected an object with instruction and output, found a list"),
    "string": (b'"a"', "expected an object with instruction and output, found a text"),
    "number": (b"1", "expected an object with instruction and output, found a number"),
    "null": (b"null", "expected an object with instruction and output, found null"),
    "no instruction": (b'{"output": "b"}', "field 'instruction' is missing; the row has 'output'"),
    "no output": (b'{"instruction": "a"}', "field 'output' is missing; the row has 'instruction'"),
    "no fields": (b"{}", "field 'instruction' is missing; the row has no fields"),
    "empty instruction": (to_json(instruction=""), "field 'instruction' is empty"),
    "empty output": (to_json(output=""), "field 'output' is empty"),
    "blank output": (to_json(output=" \n\t\u3000"), "field 'output' is empty"),
    "empty summary": (b'{"content": "a", "summary": ""}', "field 'summary' is empty"),
    "number as output": (to_json(output=3.5), "field 'output' must be a string, found a number"),
    "null as output": (to_json(output=None), "field 'output' must be a string, found null"),
    "NaN as output": (b'{"instruction": "a", "output": NaN}', "not valid JSON (NaN is no JSON number)"),
    "infinite field": (to_json(score=1)[:-2] + b"-Infinity}", "not valid JSON (-Infinity is no JSON number)"),
    "field twice": (GOOD_LINE[:-1] + b', "output": "c"}', "'output' stands twice in one object"),
    "field twice inside": (to_json(x=[{"a": 1}]).replace(b'"a": 1', b'"a": 1, "a": 2'), "'a' stands twice"),
    "many digits": (b'{"instruction": "a", "output": ' + b"1" * 5000 + b"}", "digits"),
    "long unknown field": (b'{"' + b"a" * 10_000 + b'": 1}', "field 'instruction' is missing; the row has 'aaa"),
    "longer than any row": (to_json(output="a" * LONGEST_LINE), "longer than 16,777,216 bytes"),
    "byte order mark inside the file": (b"\xef\xbb\xbf" + GOOD_LINE, "not valid JSON"),
    "lines of an old Mac": (GOOD_LINE + b"\r" + GOOD_LINE, "not valid JSON"),
    "instruction without tokens": (to_json(instruction="\u200b"), "the question has nothing but characters"),
    "output without tokens": (to_json(output="\ufeff\u200b"), "the answer has nothing but characters"),
    "misspelt input": (to_json(inptu="a"), "unknown field 'inptu' (did you mean 'input'?)"),
    "input in capitals": (to_json(Input="a"), "unknown field 'Input' (did you mean 'input'?)"),
    "misspelt output": (b'{"instruction": "a", "ouput": "b"}', "unknown field 'ouput' (did you mean 'output'?)"),
    "instruction in capitals": (b'{"Instruction": "a"}', "unknown field 'Instruction' (did you mean 'instruction'?)"),
    "misspelt history": (to_json(histroy=[]), "unknown field 'histroy' (did you mean 'history'?)"),
    "misspelt system": (to_json(systen=""), "unknown field 'systen' (did you mean 'system'?)"),
    "number as system": (to_json(system=1), "field 'system' must be a string, found a number"),
    "list as output": (to_json(output=["b"]), "field 'output' must be a string, found a list"),
    "object as instruction": (
        to_json(instruction={"a": "b"}),
        "field 'instruction' must be a string, found an object",
    ),
    "number as input": (to_json(input=1), "field 'input' must be a string, found a number"),
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
def test_broken_row_is_refused_with_file_line_and_reason(rows_file, encoder, line, reason):
    path = write_lines(rows_file, GOOD_LINE, b"", line, GOOD_LINE)
    with pytest.raises(ValueError) as raised:
        load_samples(path, encoder)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: ") and reason in message
    assert len(message.splitlines()) == 1 and len(message) < 300 + len(path)


def test_missing_file_is_named(rows_file, encoder):
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl"):
        load_samples(str(rows_file), encoder)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"[]", b" [\n] \n"])
def test_file_without_rows_is_refused(rows_file, encoder, content):
    rows_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl.* no rows"):
        load_samples(str(rows_file), encoder)


# Arrays.


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \t\r\n"])
def test_rows_of_an_array_are_those_of_lines(rows_file, indent, start):
    rows = [GOOD | {"output": text, "score": 1.5} for text in ("一", "二\n[,]", "三")]
    rows_file.write_text(start + json.dumps(rows, indent=indent) + "\n", encoding="utf-8")
    assert rows_of(str(rows_file)) == [(row["instruction"], [], row["output"]) for row in rows]
    assert [row["element"] for row in read_rows(str(rows_file))] == [1, 2, 3]


def test_lines_of_an_array_are_counted(rows_file):
    write_lines(rows_file, b"", b"[", GOOD_LINE + b",", b"", GOOD_LINE + b"," + GOOD_LINE, b"]")
    assert [(row["line"], row["element"]) for row in read_rows(str(rows_file))] == [(3, 1), (5, 2), (5, 3)]


@pytest.mark.parametrize("name", [name for name in BROKEN_ROWS if name != "longer than any row"], ids=ascii)
def test_broken_element_is_refused_with_place_and_reason(rows_file, encoder, name):
    line, reason = BROKEN_ROWS[name]
    path = write_lines(rows_file, b"[", GOOD_LINE + b",", line + b",", GOOD_LINE, b"]")
    with pytest.raises(ValueError) as raised:
        load_samples(path, encoder)
    message = str(raised.value)
    place = "line 3" if "UTF-8" in message else "element 2 (line 3)"
    assert message.startswith(f"{path}, {place}: ") and reason in message, message
    assert len(message.splitlines()) == 1 and len(message) < 300 + len(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "element 1 (line 1): not valid JSON (Expecting value at column 2)"),
        (b"[\n" + GOOD_LINE, "element 1 (line 2): not valid JSON (Expecting ',' delimiter at column "),
        (b"[\n" + GOOD_LINE + b"\n" + GOOD_LINE, "element 1 (line 3): not valid JSON (Expecting ',' delimiter"),
        (b"[\n" + GOOD_LINE + b",\n ]", "element 2 (line 3): not valid JSON (Expecting value at column 2)"),
        (b"[\n" + GOOD_LINE + b"\n]\n" + GOOD_LINE, "line 4: not valid JSON (Extra data at column 1)"),
        (b"[]]", "line 1: not valid JSON (Extra data at column 3)"),
        (b"[\n" + b"[" * 100_000, "element 1 (line 2): nested too deeply"),
        (b"[1]", "element 1 (line 1): expected an object with instruction and output, found a number"),
    ],
)
def test_broken_array_is_refused_with_place_and_reason(rows_file, content, message):
    rows_file.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        list(read_rows(str(rows_file)))
    assert str(raised.value).startswith(f"{rows_file}, {message}")


# Several rows that are refused.


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("count", [2, MOST_LISTED, MOST_LISTED + 1, 1500])
def test_first_bad_rows_are_listed(rows_file, encoder, count, array):
    lines = [GOOD_LINE, *[b"{}", GOOD_LINE] * count]
    path = write_lines(rows_file, b"[" + b",\n".join(lines) + b"]") if array else write_lines(rows_file, *lines)
    with pytest.raises(ValueError) as raised:
        load_samples(path, encoder)
    first, *listed = str(raised.value).splitlines()
    assert first == f"{path} has {count:,} rows that cannot be used:"
    reason = "field 'instruction' is missing; the row has no fields."
    places = [f"element {n} (line {n})" if array else f"line {n}" for n in range(2, 2 * count + 1, 2)]
    assert listed[:MOST_LISTED] == [f"- {place}: {reason}" for place in places[:MOST_LISTED]]
    assert listed[MOST_LISTED:] == ([f"- and {count - MOST_LISTED:,} more."] if count > MOST_LISTED else [])


def test_bad_prompts_are_listed(rows_file):
    with pytest.raises(ValueError, match=r"has 2 rows that cannot be used:\n- line 1: .*\n- line 3: .*"):
        read_prompts(write_lines(rows_file, b"1", GOOD_LINE, b"2"))


# Prompts.


def test_prompts_of_a_text(tmp_path):
    path = write_lines(
        tmp_path / "prompts.txt", b"\xef\xbb\xbf" + "类型#裙".encode(), b"", " 类型#裤 ".encode(), end=b"\r\n"
    )
    assert read_prompts(path) == {f"{path}, line 1": Prompt("类型#裙"), f"{path}, line 3": Prompt("类型#裤")}


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json"])
def test_prompts_are_rows_without_answers_or_strings(tmp_path, name):
    rows = [{"instruction": "甲", "input": "乙"}, {"content": "丙", "history": [["问", "答"]]}, GOOD, " 丁\n"]
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8-sig")
    else:
        write_rows(path, rows)
    prompts = [Prompt("甲\n乙", []), Prompt("丙", [["问", "答"]]), Prompt(GOOD["instruction"], []), Prompt(" 丁\n")]
    found = read_prompts(str(path))
    assert list(found.values()) == prompts
    last = "element 4 (line 19)" if path.suffix == ".json" else "line 4"
    assert list(found)[-1] == f"{path}, {last}"


@pytest.mark.parametrize(("name", "text"), [("prompts.txt", b""), ("prompts.jsonl", b""), ("prompts.json", b"[]")])
def test_prompt_file_without_prompts_is_refused(tmp_path, name, text):
    with pytest.raises(ValueError, match=r"prompts\.\w+ has no prompts"):
        read_prompts(write_lines(tmp_path / name, text, b"  "))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"[", b'"a",', b'{"output": "b"}]'], r", element 2 \(line 3\): field 'instruction' is missing"),
        ([b"[3]"], r", element 1 \(line 1\): expected an object"),
        ([b"[", b"", b'"a" "b"]'], r", element 1 \(line 3\): not valid JSON .* column 5\)"),
        ([b"{", b'"instruction": "a"}'], " has 2 rows that cannot be used:\n- line 1: not valid JSON"),
        ([b"[" * 100_000], r", element 1 \(line 1\): nested too deeply"),
    ],
)
def test_broken_array_of_prompts_is_refused_with_its_place(tmp_path, lines, message):
    with pytest.raises(ValueError, match=rf"prompts\.json{message}"):
        read_prompts(write_lines(tmp_path / "prompts.json", *lines))


def test_line_of_full_width_spaces_is_no_prompt(tmp_path):
    path = write_lines(tmp_path / "prompts.txt", "\u3000".encode(), "类型#裙".encode())
    assert list(read_prompts(path).values()) == [Prompt("类型#裙")]


def test_broken_prompt_row_is_refused(rows_file):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: field 'instruction' is missing"):
        read_prompts(write_lines(rows_file, GOOD_LINE, b'{"output": "b"}'))
