"""Tools in the API, by OpenAI's own client against a server with a tiny ChatGLM3-6B.

So small a model cannot call a tool: the tokens of its answers are given, in the place of those that are drawn from its
logits. Everything else, from the request to the batch and back, is as always.
"""

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from api_server import client_of, openai, running
from conftest import GOLDEN, ROOT, random_chatglm2, write_rows

from chatglm2 import ChatGLM3Tokenizer
from qlora.arguments import InferenceArguments
from qlora.data.dataset import SampleEncoder, load_samples
from qlora.inference.openai_forms import ChatRequest
from qlora.inference.server import build_app, make_completer
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model

QUESTION = {"role": "user", "content": "北京多少度？<|observation|>"}
ARGUMENTS = {"city": "北京", "from": [1, None]}
NATIVE = {"role": "assistant", "content": "", "metadata": "weather", "arguments": ARGUMENTS}
THOUGHT, ANSWER = {"role": "assistant", "content": "查一下。"}, {"role": "assistant", "content": "22 度。"}
FUNCTION = {"description": "天气", "name": "weather", "parameters": {"type": "object", "required": ["city"]}}
TOOLS = [{"type": "function", "function": FUNCTION}]


class Script:
    """What the model says next, whatever its logits are, and what it was asked last."""

    def __init__(self, slots, end: int):
        self.answers, self.tokens, self.end, self.prompt_ids = [], iter(()), end, []
        self.begin, slots.begin, slots.draw = slots.begin, self.begin_answer, self.draw

    def begin_answer(self, tasks: dict) -> list[int]:
        self.prompt_ids, self.tokens = tasks[0].prompt_ids, iter(self.answers.pop(0))
        return self.begin(tasks)

    def draw(self, logits: torch.Tensor, rows: object) -> torch.Tensor:
        return torch.full((len(logits), 1), next(self.tokens, self.end))


@pytest.fixture(scope="module")
def served(third, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A client of a running server, the tokenizer, and what the model says."""
    folder = random_chatglm2(tmp_path_factory.mktemp("chatglm3") / "tiny", third, 3, seq_length=1024)
    model = load_quantized_model(str(folder), torch.float32).eval()
    replace_layers(model, for_training=False)
    args = InferenceArguments(serve=True, adapter_path=["none"], batch_size=1, max_new_tokens=400)
    completer = make_completer(model, third, args)
    script = Script(completer.batcher.slots, third.eos_token_id)
    with running(build_app(completer, None)) as address, client_of(address) as client:
        yield SimpleNamespace(client=client, address=address, script=script, tokenizer=third, completer=completer)


def ask(served: SimpleNamespace, *messages: dict, says: list[int] = (), **options):
    """The response to a conversation; `says` are the tokens of the answer."""
    served.script.answers = [says]
    given = {"model": "base", "messages": messages or [QUESTION], "tools": TOOLS} | options
    given = {name: value for name, value in given.items() if value is not None}
    return served.client.chat.completions.create(**given)


def trained(tokenizer: ChatGLM3Tokenizer, *messages: dict) -> list[int]:
    """The tokens of an answer as a row teaches them."""
    return tokenizer.turn_ids(messages)


def text(tokenizer: ChatGLM3Tokenizer, text: str) -> list[int]:
    """The tokens of an answer without its end."""
    return tokenizer.text_ids(text)


# Conversations.


def test_call_its_result_and_the_answer(served, rows_file):
    conversation = [QUESTION]
    first = ask(served, *conversation, says=trained(served.tokenizer, THOUGHT, NATIVE)).choices[0]
    asked = [served.script.prompt_ids]
    assert first.finish_reason == "tool_calls" and first.message.content == THOUGHT["content"]
    (call,) = first.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", ARGUMENTS)
    conversation += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "22<|assistant|>"}]
    second = ask(served, *conversation, says=trained(served.tokenizer, ANSWER)).choices[0]
    asked.append(served.script.prompt_ids)
    assert (second.finish_reason, second.message.content) == ("stop", ANSWER["content"])
    assert second.message.tool_calls is None

    # A row with the same conversation is trained on the same prompts.
    messages = [QUESTION, first.message.model_dump(), conversation[-1], second.message.model_dump()]
    write_rows(rows_file, [{"messages": messages, "tools": TOOLS}])
    samples = load_samples(str(rows_file), SampleEncoder(served.tokenizer, "", 1000, 1000))
    for sample, prompt_ids, answer in zip(samples, asked, [(THOUGHT, NATIVE), (ANSWER,)], strict=True):
        assert sample["input_ids"] == prompt_ids + trained(served.tokenizer, *answer)


@pytest.mark.parametrize("page", ["serving.md", "serving_zh.md"])
def test_example_of_the_documentation(served, page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "tools=tools" in block]
    served.script.answers = [trained(served.tokenizer, message) for message in (NATIVE, ANSWER)]
    exec(code.replace("127.0.0.1:7860", served.address), {})
    assert capsys.readouterr().out == f"{ANSWER['content']}\n"
    assert not served.script.answers


def test_call_alone_has_no_content(served):
    says = trained(served.tokenizer, NATIVE)
    answers = [ask(served, says=says) for _ in range(2)]
    assert all(answer.choices[0].message.content is None for answer in answers)
    assert len({answer.choices[0].message.tool_calls[0].id for answer in answers}) == 2
    assert answers[0].usage.completion_tokens == len(says)


@pytest.mark.parametrize("spoken", [(), (THOUGHT,)], ids=["call", "text and call"])
def test_streamed_call(served, spoken):
    stream = ask(served, says=trained(served.tokenizer, *spoken, NATIVE), stream=True)
    *chunks, called, end = [chunk.choices[0] for chunk in stream]
    assert (end.finish_reason, end.delta.content, end.delta.tool_calls) == ("tool_calls", None, None)
    (call,) = called.delta.tool_calls
    assert call.index == 0 and call.id and call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == ARGUMENTS
    assert chunks[0].delta.role == "assistant" and not any(chunk.delta.tool_calls for chunk in chunks)
    pieces = [chunk.delta.content for chunk in chunks]
    assert "".join(filter(None, pieces)) == "".join(message["content"] for message in spoken)
    assert spoken or pieces == [None]


def test_call_that_its_last_token_completes_is_one_at_the_longest_answer(served):
    says = trained(served.tokenizer, NATIVE)[:-1]
    assert ask(served, says=says, max_tokens=len(says)).choices[0].finish_reason == "tool_calls"
    choice = ask(served, says=says, max_tokens=len(says) - 1).choices[0]
    assert choice.finish_reason == "length" and choice.message.content.startswith("weather\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        "weather\n ```python\ntool_call(city=open('x'))\n```",
        "weather\n 晴。",
        "weathers\n ```python\ntool_call(city='x')\n```",
        "weather",
    ],
)
def test_answer_that_is_no_call_stays_text(served, answer, stream):
    response = ask(served, says=text(served.tokenizer, answer), stream=stream)
    if stream:
        *chunks, end = [chunk.choices[0] for chunk in response]
        found, reason = "".join(chunk.delta.content or "" for chunk in chunks), end.finish_reason
    else:
        found, reason = response.choices[0].message.content, response.choices[0].finish_reason
    assert (found, reason) == (answer, "stop")


def test_text_is_streamed_as_it_comes(served):
    says = trained(served.tokenizer, {"role": "assistant", "content": "晴，二十二度，有一点风。"})
    pieces = [chunk.choices[0].delta.content for chunk in ask(served, says=says, stream=True)]
    assert "".join(filter(None, pieces)) == "晴，二十二度，有一点风。" and len(pieces) > 5


@pytest.mark.parametrize("options", [{"tool_choice": "none"}, {"tools": None}])
def test_model_that_is_told_of_no_tools_calls_none(served, options):
    choice = ask(served, says=trained(served.tokenizer, NATIVE), **options).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content.startswith("weather\n")
    assert served.script.prompt_ids == served.tokenizer.conversation_ids([QUESTION])


def test_calls_stay_in_a_conversation_whose_tools_are_gone(served):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "22"}]}
    head = {"role": "developer", "content": "简短。"}
    ask(served, head, QUESTION, {"role": "assistant", "tool_calls": [call]}, result, tools=None, tool_choice="auto")
    messages = [{"role": "system", "content": "简短。"}, QUESTION, NATIVE, {"role": "tool", "content": "22"}]
    assert served.script.prompt_ids == served.tokenizer.conversation_ids(messages)


def test_text_before_the_prompt(served, monkeypatch):
    monkeypatch.setattr(served.completer.args, "prompt_text", "前缀")
    ask(served, parallel_tool_calls=True)
    messages = [{"role": "system", "content": "", "tools": [FUNCTION]}, QUESTION]
    assert served.script.prompt_ids == served.tokenizer.conversation_ids(messages, "前缀")


def test_prompts_equal_official():
    folder = ROOT / "THUDM" / "chatglm3-6b"
    if not (folder / "tokenizer.model").is_file():
        pytest.skip(f"no genuine tokenizer.model in {folder}")
    tokenizer = ChatGLM3Tokenizer.from_pretrained(folder)
    cases = json.loads((GOLDEN / "chatglm2" / "tok_cases.json").read_text(encoding="utf-8"))["v3_chat"]
    cases = [case for case in cases if case["role"] == "observation"]
    assert cases
    for case in cases:
        (head, question, call), result = case["history"], {"role": "tool", "content": case["query"]}
        assert call["metadata"] == "get_weather" and "tool_call(city='北京')" in call["content"]
        called = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
        messages = [question, {"role": "assistant", "tool_calls": [called]}, result | {"tool_call_id": "1"}]
        tools = [{"type": "function", "function": tool} for tool in head["tools"]]
        prompt = ChatRequest(model="base", messages=messages, tools=tools).prompt()
        assert prompt.ids(tokenizer) == case["input_ids"]


# What is refused.


def called(*ids: str) -> dict:
    calls = [{"id": i, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


RESULT = {"role": "tool", "tool_call_id": "1", "content": ""}


def function(**changes: object) -> dict:
    return {"tools": [{"type": "function", "function": FUNCTION | changes}]}


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "Input should be 'function'"),
        (function(name="a\nb"), "tools", r"tools.0.function: its name is 'a\nb', expected a line of text."),
        (function(name=None), "tools", "its name is None"),
        (function(strict=True), "tools", "tools.0.function: strict is true"),
        ({"tool_choice": "required"}, "tool_choice", "Input should be 'auto' or 'none'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "Input should be 'auto' or 'none'"),
        ({"messages": [QUESTION, called("1"), RESULT, THOUGHT]}, "messages", "found one of the assistant"),
        ({"messages": [QUESTION, called("1")]}, "messages", "found one of the assistant"),
        ({"messages": [QUESTION, called("1", "2"), RESULT]}, "messages", "message 2 of 'messages': 2 calls in one"),
        ({"messages": [QUESTION, called("2"), RESULT]}, "messages", "['1'], expected the ids of the calls, ['2']"),
        ({"messages": [QUESTION, RESULT]}, "messages", "message 2 of 'messages': the result of a tool that was not"),
        ({"messages": [QUESTION | {"content": None}]}, "messages", "messages.0: content is missing"),
        ({"messages": [QUESTION | {"content": " "}]}, "messages", "field 'content' is empty"),
        ({"messages": [QUESTION | {"content": "裙" * 100_000}]}, "messages", "over the model's 1024"),
    ],
)
def test_invalid_requests_are_refused(served, change, param, reason):
    given = {"messages": [QUESTION]} | change
    with pytest.raises(openai.BadRequestError) as raised:
        ask(served, *given.pop("messages"), **given)
    assert raised.value.param == param and reason in raised.value.body["message"]


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_models_without_tools_say_which_has_them(served, tokenizer, monkeypatch, tools):
    monkeypatch.setattr(served.completer, "tokenizer", tokenizer)
    with pytest.raises(openai.BadRequestError, match="this model has no prompts; ChatGLM3-6B has them") as raised:
        ask(served, QUESTION, called("1"), RESULT, tools=tools)
    assert (raised.value.param, raised.value.code) == ("tools", None)
