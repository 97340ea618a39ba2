"""Conversations in which the assistant calls tools, as OpenAI, ShareGPT, and ChatGLM3-6B's own programs write them.

A message becomes a dict of `role` (system, user, assistant or observation) and `content`. That of the system may have
`tools`, their descriptions; that of the assistant, if it is a call, `metadata`, the name of the tool, and `arguments`,
where these are not written in `content`. Messages of the assistant in a row, such as a thought and a call, are one
answer.
"""

import itertools
import json
from dataclasses import dataclass, field

from qlora.data.fields import check_text, first_field, optional_text, string, text_field

RESULTS = ("observation", "tool", "function")  # roles of a tool's result
CALL = "function_call"  # the role of a call in ShareGPT's form, with its name and arguments as JSON


@dataclass
class ToolConversation:
    """A conversation with tools.

    Args:
        tools: descriptions of the tools.
        system: text of the system; empty without one.
        messages: of the user, the assistant and the tools, in order.
        untrained: places of messages that are not to be trained on.
    """

    tools: list[dict] = field(default_factory=list)
    system: str = ""
    messages: list[dict] = field(default_factory=list)
    untrained: set[int] = field(default_factory=set)

    def add_system(self, text: str):
        """Adds a text of the system; ValueError after the first question."""
        if self.messages:
            raise ValueError("a message of the system after the first question; it must stand before it")
        self.system = "\n".join(filter(None, (self.system, text)))

    def add_question(self, text: str):
        """Adds a message of the user; ValueError where it is not the user's turn."""
        if self.last_role == "user":
            raise ValueError("two messages of the user in a row; the assistant's between them is missing")
        self.check_no_open_call()
        self.messages.append({"role": "user", "content": text})

    def add_answer(self, message: dict, keys: tuple[str, ...], is_trained: bool):
        """Adds a message of the assistant: a text, a call, or both; `keys` are the names of the text's field."""
        if message.get("tool_calls"):
            text, call = optional_text(message, "content"), openai_call(message["tool_calls"])
            self.add_of_assistant([{"role": "assistant", "content": text}] * bool(text) + [call], is_trained)
            return
        added = {"role": "assistant", "content": text_field(message, *keys, of="message")}
        added |= {"metadata": message["metadata"]} if is_call(message) else {}
        self.add_of_assistant([added], is_trained)

    def add_call(self, text: str, is_trained: bool):
        """Adds a call in ShareGPT's form."""
        self.add_of_assistant([call_of(parsed(text, "of the call"))], is_trained)

    def add_of_assistant(self, messages: list[dict], is_trained: bool):
        """Adds messages; ValueError where it is not the assistant's turn."""
        if not self.messages:
            raise ValueError("the assistant speaks first; expected a question of the user")
        self.check_no_open_call()
        self.untrained |= set() if is_trained else {len(self.messages) + n for n in range(len(messages))}
        self.messages += messages

    def add_result(self, message: dict, keys: tuple[str, ...]):
        """Adds a tool's result; one in the form of ChatGLM3-6B's fine-tuning comes with its call."""
        if "parameters" in message:
            self.add_of_assistant([call_of(message | {"arguments": message["parameters"]})], is_trained=True)
            result = message.get("observation")
            result = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        else:
            result = string(message[first_field(message, *keys, of="message")], keys[0])
        if not self.has_open_call:
            raise ValueError("the result of a tool that was not called")
        self.messages.append({"role": "observation", "content": check_text(result)})

    @property
    def last_role(self) -> str:
        """Who spoke last; empty at the beginning."""
        return self.messages[-1]["role"] if self.messages else ""

    @property
    def has_open_call(self) -> bool:
        """Whether the last message is a call."""
        return bool(self.messages and self.messages[-1].get("metadata"))

    def check_no_open_call(self):
        """ValueError if the last message is a call, which only its result can follow."""
        if self.has_open_call:
            raise ValueError("a message after a call; expected the tool's result")

    @property
    def with_head(self) -> list[dict]:
        """The messages after that of the system, if there is one."""
        head = {"role": "system", "content": self.system} | ({"tools": self.tools} if self.tools else {})
        return [head, *self.messages] if self.system or self.tools else self.messages

    @property
    def turns(self) -> list[int]:
        """The numbers, from 1, of the answers that are to be trained on."""
        answers = enumerate(answers_of(self.messages), 1)
        return [number for number, answer in answers if not self.untrained.intersection(answer)]


def openai_call(calls: object) -> dict:
    """The message of an assistant's `tool_calls`; ValueError for several calls."""
    if not (isinstance(calls, list) and all(isinstance(item, dict) for item in calls)):
        raise ValueError("field 'tool_calls' must be a list of objects")
    if len(calls) != 1:
        raise ValueError(f"{len(calls)} calls in one message; ChatGLM3-6B calls one tool at a time")
    return call_of(calls[0].get("function"))


def call_of(function: object) -> dict:
    """The message of a call of a function with `name` and `arguments`, an object or the JSON of one.

    Raises:
        ValueError: it is no such function, or an argument has no name that a call can have.
    """
    if not isinstance(function, dict):
        raise ValueError("a call has no object with name and arguments")
    name, arguments = text_field(function, "name", of="call"), parsed(function.get("arguments"), "of arguments")
    if not (isinstance(arguments, dict) and all(key.isidentifier() for key in arguments)):
        raise ValueError(f"arguments of {name} must be an object whose names are letters, digits and _")
    check_text(json.dumps(arguments, ensure_ascii=False))
    return {"role": "assistant", "content": "", "metadata": name, "arguments": arguments}


def parsed(value: object, of: str) -> object:
    """The value of a text in JSON, and any other value as it is; ValueError for a text that is not JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"the text {of} is not JSON") from error


def is_call(message: dict) -> bool:
    """Whether a message has the name of a tool, as in ChatGLM3-6B's `chat`; other programs keep objects there."""
    return isinstance(message.get("metadata"), str) and bool(message["metadata"].strip())


def has_calls(messages: object, role: tuple[str, ...]) -> bool:
    """Whether one of the messages calls a tool, or is the result of a call; `role` are the names of that field."""
    found = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    roles = {str(message.get(name)).lower() for message in found for name in role}
    return bool(roles & {*RESULTS, CALL}) or any(message.get("tool_calls") or is_call(message) for message in found)


def described_tools(tools: object) -> list[dict]:
    """The descriptions of tools, a list or the JSON of one; those of OpenAI without the object around them.

    Raises:
        ValueError: they are anything else.
    """
    tools = parsed(tools, "of tools")
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("field 'tools' must be a list of objects")
    check_text(json.dumps(tools, ensure_ascii=False))
    return [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]


def answers_of(messages: list[dict]) -> list[range]:
    """The places of each answer in messages: one message of the assistant, or several in a row."""
    answers, place = [], 0
    for is_answer, group in itertools.groupby(message["role"] == "assistant" for message in messages):
        start, place = place, place + len([*group])
        answers += [range(start, place)] * is_answer
    return answers
