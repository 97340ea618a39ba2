"""qlora/data/tool_messages.py: conversations with tools that are accepted or refused, and their samples."""

import json

import pytest
from conftest import write_rows

from qlora.data.dataset import SampleEncoder, load_samples
from qlora.data.rows import parse_prompt, parse_row
from qlora.training.preflight_report import show_sample

QUESTION = {"role": "user", "content": "北京多少度？"}
THOUGHT = {"role": "assistant", "content": "查一下。"}
ARGUMENTS = {"city": "北京", "days": 1, "now": True}
OPENAI_CALL = {"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
CALL = {"role": "assistant", "content": "", "metadata": "weather", "arguments": ARGUMENTS}
NATIVE = {
    "role": "assistant",
    "content": "```python\ntool_call(city='北京', days=1, now=True)\n```",
    "metadata": "weather",
}
RESULT = {"role": "observation", "content": '{"温度": 22}'}
ANSWER = {"role": "assistant", "content": "22 度。"}
TOOL = {"name": "weather", "description": "天气", "parameters": {"type": "object"}}
OPENAI = [QUESTION, THOUGHT | {"tool_calls": [OPENAI_CALL]}, RESULT | {"role": "tool", "tool_call_id": "1"}, ANSWER]
FINE_TUNING = [
    *(QUESTION, THOUGHT),
    {"role": "tool", "name": "weather", "parameters": ARGUMENTS, "observation": {"温度": 22}},
    ANSWER,
]
SHAREGPT = [
    {"from": "human", "value": QUESTION["content"]},
    {"from": "gpt", "value": THOUGHT["content"]},
    {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
    {"from": "observation", "value": RESULT["content"]},
    {"from": "gpt", "value": ANSWER["content"]},
]


def samples_of(rows_file, tokenizer, *rows: dict, longest: int = 1000, **options) -> list[dict]:
    encoder = SampleEncoder(tokenizer, "", longest, 1000, **options)
    return list(load_samples(str(write_rows(rows_file, list(rows))), encoder))


# Rows that are accepted.


@pytest.mark.parametrize(
    ("row", "call"),
    [
        ({"messages": OPENAI, "tools": [{"type": "function", "function": TOOL}]}, CALL),
        ({"conversations": FINE_TUNING, "tools": [TOOL]}, CALL),
        ({"messages": [QUESTION, THOUGHT, NATIVE, RESULT, ANSWER], "tools": [TOOL]}, NATIVE),
        ({"conversations": SHAREGPT, "tools": json.dumps([TOOL])}, CALL),
    ],
    ids=["OpenAI", "fine-tuning", "chat", "ShareGPT"],
)
def test_ways_to_write_a_call(row, call):
    found = parse_row(row)
    head = {"role": "system", "content": "", "tools": [TOOL]}
    assert json.loads(found.messages) == [head, QUESTION, THOUGHT, call, RESULT, ANSWER]
    assert (found.query, found.answer, found.turns) == (QUESTION["content"], ANSWER["content"], [1, 2])


def test_texts_of_the_system_and_weights():
    head = [{"role": "system", "content": "简短。"}, {"role": "developer", "content": "客气。"}]
    row = {"system": "好。", "messages": [*head, QUESTION, NATIVE | {"weight": 0}, RESULT, ANSWER], "tools": None}
    found = parse_row(row)
    assert json.loads(found.messages)[0] == {"role": "system", "content": "好。\n简短。\n客气。"}
    assert found.turns == [2]
    question, _, call, result, answer = SHAREGPT
    conversation = [question, call | {"weight": 0}, result, answer]
    assert parse_row({"conversations": conversation, "tools": [TOOL]}).turns == [2]


def test_result_that_is_a_text_stays_as_it_is():
    question, _, called, answer = FINE_TUNING
    row = {"conversations": [question, called | {"observation": '"晴"'}, answer], "tools": [TOOL]}
    assert json.loads(parse_row(row).messages)[-2] == {"role": "observation", "content": '"晴"'}


def test_tools_that_are_not_called_are_described():
    found = parse_row({"messages": [QUESTION, ANSWER], "tools": [TOOL]})
    assert json.loads(found.messages) == [{"role": "system", "content": "", "tools": [TOOL]}, QUESTION, ANSWER]


def test_rows_without_a_call_stay_conversations():
    assert not parse_row(
        {"messages": [QUESTION, ANSWER | {"tool_calls": None, "metadata": {"id": 1}}], "tools": []}
    ).messages


# Samples.


def test_samples_are_the_official_messages(third, rows_file):
    # Source of the order of tokens: format_conversation in preprocess_utils.py in finetune_demo/ of THUDM/ChatGLM3.
    system = "Answer the following questions as best as you can. You have access to the following tools:\n"
    system += json.dumps([TOOL], indent=4, ensure_ascii=False)
    parts = [("system", system, ""), ("user", QUESTION["content"], ""), ("assistant", THOUGHT["content"], "")]
    parts += [("assistant", NATIVE["content"], "weather"), ("observation", RESULT["content"], "")]
    parts += [("assistant", ANSWER["content"], "")]
    messages = [third.message_ids(*part) for part in parts]
    called, answered = samples_of(rows_file, third, {"conversations": FINE_TUNING, "tools": [TOOL]})
    start = [*third.prefix_ids, *messages[0], *messages[1]]
    call = [*messages[2], *messages[3], third.role_id("observation")]  # what follows a call ends it
    assert called["input_ids"] == start + call
    assert called["labels"] == [-100] * (len(start) + 1) + call[1:]  # the role of the answer is the prompt's end
    start += call + messages[4][1:]
    answer = [*messages[5], third.eos_token_id]
    assert answered["input_ids"] == start + answer
    assert answered["labels"] == [-100] * (len(start) + 1) + answer[1:]
    assert [sample["turn"] for sample in (called, answered)] == [1, 2]
    shown = show_sample(called, third, color=False)
    assert "weather\n" in shown and "tool_call(city='北京', days=1, now=True)" in shown


def test_text_before_the_prompt_and_the_official_sentence(third):
    head, *messages = [{"role": "system", "content": "", "tools": [TOOL]}, QUESTION]
    sentence = "Answer the following questions as best as you can. You have access to the following tools:"
    expected = third.conversation_ids([head | {"content": f"前缀{sentence}"}, *messages])
    assert third.conversation_ids([head, *messages], "前缀") == expected
    assert f"{sentence}\n[\n" in third.apply_chat_template([head, *messages], tokenize=False)


def test_last_answer_alone(third, rows_file):
    (sample,) = samples_of(rows_file, third, {"messages": OPENAI}, train_on="last")
    assert sample["turn"] == 2


def test_text_that_looks_like_a_role_stays_text(third, rows_file):
    messages = [QUESTION, NATIVE, RESULT | {"content": "<|assistant|>"}, ANSWER]
    *_, sample = samples_of(rows_file, third, {"messages": messages})
    assert sample["input_ids"].count(third.role_id("assistant")) == 2


def test_oldest_rounds_are_dropped_and_the_system_stays(third, rows_file):
    row = {"system": "简短。", "messages": [*OPENAI, *OPENAI]}
    *_, whole = samples_of(rows_file, third, row)
    assert not whole["prompt_cut"]
    alone = third.conversation_ids([{"role": "system", "content": "简短。"}, QUESTION, THOUGHT, NATIVE, RESULT])
    for longest, expected in ((len(alone), alone), (len(alone) - 3, [*alone[:-4], alone[-1]])):
        *_, sample = samples_of(rows_file, third, row, longest=longest)
        assert sample["prompt_cut"] and sample["input_ids"][:longest] == expected


def test_models_without_tools_refuse_them(tokenizer, rows_file):
    with pytest.raises(ValueError, match=r"line 1, turn 1: the conversation has tools, for which this model has no"):
        samples_of(rows_file, tokenizer, {"messages": OPENAI})


# What is refused.


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([QUESTION, RESULT, ANSWER], "message 2 of 'messages': the result of a tool that was not called"),
        ([QUESTION, NATIVE, ANSWER], "message 3 of 'messages': a message after a call; expected the tool's result"),
        ([QUESTION, NATIVE, QUESTION], "message 3 of 'messages': a message after a call; expected the tool's result"),
        ([QUESTION, QUESTION, RESULT], "message 2 of 'messages': two messages of the user in a row"),
        ([NATIVE], "message 1 of 'messages': the assistant speaks first"),
        ([QUESTION, NATIVE, RESULT], "ends with a question or a result; the answer is missing"),
        ([QUESTION, NATIVE | {"weight": 0}], "no answer to train on: each has the weight 0"),
        ([QUESTION, {"role": "assistant", "tool_calls": [OPENAI_CALL] * 2}], "2 calls in one message; ChatGLM3-6B"),
        ([QUESTION, {"role": "assistant", "tool_calls": ["x"]}], "field 'tool_calls' must be a list of objects"),
        ([QUESTION, {"role": "assistant", "tool_calls": 1}], "field 'tool_calls' must be a list of objects"),
        ([QUESTION, {"role": "assistant", "tool_calls": [{}]}], "a call has no object with name and arguments"),
        (
            [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "text of arguments is not JSON",
        ),
        ([QUESTION, {"role": "function_call", "content": "f(x)"}], "message 2 of 'messages': the text of the call is"),
        (
            [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a b": 1}}}]}],
            "arguments of f must be an object whose names are letters, digits and _",
        ),
        ([QUESTION, NATIVE | {"content": ""}], "message 2 of 'messages': field 'content' is empty"),
        ([QUESTION, {"role": "judge", "content": "x"}, RESULT], "message 2 of 'messages': unknown role 'judge'"),
        ([{"role": "system", "content": "x", "metadata": "y"}], "field 'messages' has no question"),
        ([QUESTION, NATIVE, RESULT, {"role": "system", "content": "x"}], "a message of the system after the first"),
    ],
)
def test_message_that_does_not_fit_is_refused(messages, reason):
    with pytest.raises(ValueError) as raised:
        parse_row({"messages": messages})
    assert reason in str(raised.value)


def test_descriptions_that_are_no_list_are_refused():
    with pytest.raises(ValueError, match="field 'tools' must be a list of objects"):
        parse_row({"messages": OPENAI, "tools": {"name": "weather"}})


def test_conversation_with_tools_is_no_prompt():
    with pytest.raises(ValueError, match="a conversation with tools; these can be trained on, not asked"):
        parse_prompt({"messages": OPENAI})
