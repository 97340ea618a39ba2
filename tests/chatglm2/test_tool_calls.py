"""chatglm2/tool_calls.py: which texts are calls of tools. None of them is run."""

import json
import keyword
import time

import pytest
from conftest import GOLDEN, hostile_examples
from hypothesis import given
from hypothesis import strategies as st

from chatglm2.tool_calls import begins_call, build_call, parse_call

CASES = json.loads((GOLDEN / "chatglm2" / "tok_cases.json").read_text(encoding="utf-8"))
TOOLS = ["weather", "天气 预报"]
TEXTS = st.text(st.sampled_from("'\"\\#=x \n"))  # what a call has beside its texts
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*keyword.kwlist, "city", "_", "__x", "tool_call", "城市"])


def message(code: str, name: str = "weather") -> str:
    return f"{name}\n ```python\n{code}\n```"


def arguments_of(code: str) -> dict | None:
    call = parse_call(message(code), TOOLS)
    return call and json.loads(call.arguments)


def test_calls_are_those_of_the_official_code():
    cases = [case for case in CASES["v3_process_response"] if "parameters" in case["content"]]
    assert cases
    for case in cases:
        expected = case["content"]
        call = parse_call(case["text"].split("<|assistant|>")[-1], [expected["name"]])
        assert (call.name, json.loads(call.arguments)) == (expected["name"], expected["parameters"])


@hostile_examples(60)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_is_trained_is_read(arguments):
    call = parse_call(f"天气 预报\n{build_call(arguments)}", TOOLS)
    assert call.name == "天气 预报" and json.loads(call.arguments) == arguments


def test_spaces_around_the_name_are_no_part_of_it():
    assert parse_call(message("tool_call()", " weather "), TOOLS).name == "weather"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("tool_call()", {}),
        ('tool_call(city = "北京",\n  days=-1.5)', {"city": "北京", "days": -1.5}),
        ("tool_call(x='a=b)', y=('c', 1))", {"x": "a=b)", "y": ["c", 1]}),
        ("tool_call(x='''it's\nb=c''', y=\"\"\"\"d=\"\"\")", {"x": "it's\nb=c", "y": '"d='}),
        ("tool_call(x=1, # it's\n  y='a b=c')", {"x": 1, "y": "a b=c"}),
    ],
)
def test_other_ways_to_write_a_call(code, arguments):
    assert arguments_of(code) == arguments


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "tool_call(x=open('/etc/passwd'))",
        "tool_call(x=city)",
        "tool_call('x')",
        "tool_call(**{'x': 1})",
        "tool_call(x=1, x=2)",
        "tool_call(x=1",
        "tool_call(x=')",
        "tool_call(x=1)(y=2)",
        "tool_call(x=1).run(y=2)",
        "tool_call(x=1)\ntool_call(y=2)",
        "tool_call(x=1) + tool_call(y=2)",
        "tool_call(x=1e999)",
        "tool_call(x={1, 2})",
        "tool_call(x=b'1')",
        "tool_call(x='\\ud800')",
        "tool_call(x=1\0)",
        f"tool_call(x={'9' * 5000})",
        f"tool_call(x={'-' * 5000}1)",
        f"tool_call(x={'-' * 20000}1)",
        f"tool_call(x={'[' * 300}{']' * 300})",
    ],
    ids=lambda code: code[:20],
)
def test_what_is_no_call_with_literal_arguments(code):
    assert arguments_of(code) is None


@pytest.mark.parametrize(
    "text",
    [
        message("tool_call(x=1)", name="other"),
        message("tool_call(x=1)", name=""),
        message("tool_call(x=1)").removesuffix("```"),
        message("tool_call(x=1)") + "。",
        "weather\ntool_call(x=1)",
        "weather",
        "",
    ],
)
def test_what_is_no_call_of_a_tool(text):
    assert parse_call(text, TOOLS) is None


@pytest.mark.parametrize("code", ["tool_call(x='" + "\\'" * 30000 + ")", f"tool_call({'x' * 60000})"], ids=["'", "x"])
def test_long_answer_is_read_at_once(code):
    start = time.process_time()
    assert arguments_of(code) is None
    assert time.process_time() - start < 1  # a search from each character on would take several seconds


def test_beginning_of_a_call_is_known_from_its_first_character():
    text = " 天气 预报 \n ```python"
    assert all(begins_call(text[:end], TOOLS) for end in range(len(text) + 1))
    for other in ("\n", "\n天气", "天x", "w\n", "weather1", "weathers\n"):
        assert not begins_call(other, TOOLS)
    assert not begins_call("", []) and not begins_call("天气", [])
