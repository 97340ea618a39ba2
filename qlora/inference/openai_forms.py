"""What OpenAI's clients send to the server and expect from it, for chat completions, completions, models and errors.

Source: the reference of OpenAI's API, and its Python client.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from glm_shared.chat import Prompt, ToolCall, ToolPrompt
from qlora.data.conversations import parse_tool_messages

Text = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: what was found and what to change.
        param: the parameter at fault.
        code: OpenAI's name of the error.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def form(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    include_usage: bool | None = False


class GenerationRequest(BaseModel):
    """The parameters that both kinds of completion have; any other parameter is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Only with the value that changes nothing.
    n: Annotated[int, Field(ge=1, le=1)] | None = 1
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    # These do not bear on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def most_tokens(self) -> int | None:
        """The longest answer that is asked for; None where the request leaves it to the server."""
        return self.max_tokens

    def tool_names(self) -> list[str]:
        """The tools that the answer may call."""
        return []


class TextPart(BaseModel):
    """A part of a message that has several."""

    type: Literal["text"]
    text: str


def check_function(function: dict[str, Any]) -> dict[str, Any]:
    """The description of a function, as it is; ValueError for one that cannot be called."""
    name = function.get("name")
    if not isinstance(name, str) or name.splitlines() != [name.strip()]:
        raise ValueError(f"its name is {name!r}, expected a line of text")
    if function.get("strict"):
        raise ValueError("strict is true, but nothing holds the arguments to the parameters' schema; leave it out")
    return function


class Tool(BaseModel):
    """A function that the model may call. The model sees its description as it was sent."""

    type: Literal["function"]
    function: Annotated[dict[str, Any], AfterValidator(check_function)]


class MessageCall(BaseModel):
    """The call of a tool in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: dict[str, Any]


class Message(BaseModel):
    """A message of a conversation. Other fields, such as a name, do not bear on the answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def check_content(self) -> "Message":
        """The message; ValueError if it says nothing."""
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing, expected a text")
        return self

    def text(self) -> str:
        """The content as one text."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def row(self) -> dict[str, Any]:
        """The message as a row of data has it."""
        calls = [call.model_dump() for call in self.tool_calls or ()]
        return {"role": self.role, "content": self.text(), "tool_calls": calls}


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None  # a permission; the model calls one tool at a time

    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def callable_tools(self) -> list[Tool]:
        """The tools of which the model is told: none where it is to call none."""
        return [] if self.tool_choice == "none" else self.tools or []

    def tool_names(self) -> list[str]:
        return [tool.function["name"] for tool in self.callable_tools()]

    def prompt(self) -> Prompt | ToolPrompt:
        """The conversation up to the answer to generate.

        Raises:
            RequestError: its messages cannot follow each other, or the last question is blank.
        """
        has_calls = any(message.tool_calls or message.role == "tool" for message in self.messages)
        return self.tool_prompt() if has_calls or self.callable_tools() else self.plain_prompt()

    def tool_prompt(self) -> ToolPrompt:
        """The prompt of a conversation with tools, as rows of data have it; errors as for `prompt`."""
        tools = [tool.model_dump() for tool in self.callable_tools()]
        try:
            conversation = parse_tool_messages([message.row() for message in self.messages], "messages", "", tools)
        except ValueError as error:
            raise RequestError(400, f"{error}.", "messages") from None
        if conversation.last_role == "assistant":
            expected = "the last one of the user, or a tool's result"
            raise RequestError(400, f"messages: expected {expected}; found one of the assistant.", "messages")
        self.check_call_ids()
        return ToolPrompt(conversation.with_head)

    def check_call_ids(self):
        """RequestError if the results, one of which follows each call, are those of other calls."""
        calls = [call.id for message in self.messages for call in message.tool_calls or ()]
        results = [message.tool_call_id for message in self.messages if message.role == "tool"]
        if calls != results:
            reason = f"results have the tool_call_id {results}, expected the ids of the calls, {calls}"
            raise RequestError(400, f"messages: {reason}.", "messages")

    def plain_prompt(self) -> Prompt:
        """The prompt of a conversation without tools; errors as for `prompt`."""
        roles = [message.role for message in self.messages]
        texts = [message.text() for message in self.messages]
        start = next((place for place, role in enumerate(roles) if role in ("user", "assistant")), len(roles))
        turns = texts[start:]
        if len(turns) % 2 == 0 or roles[start:] != (["user", "assistant"] * len(turns))[: len(turns)]:
            expected = "texts of the system, if any, then the user and the assistant in turn, the user last"
            raise RequestError(400, f"messages: expected {expected}; found {', '.join(roles) or 'none'}.", "messages")
        if not turns[-1].strip():
            raise RequestError(400, "messages: the last message is blank.", "messages")
        system = "\n".join(text for text in texts[:start] if text.strip())
        return Prompt(turns[-1], list(zip(turns[:-1:2], turns[1::2], strict=True)), system)


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def parse(kind: type[GenerationRequest], body: bytes) -> Any:
    """The body of a request; RequestError for one that is not valid."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        reason = "this server does not support it" if first["type"] == "extra_forbidden" else first["msg"]
        reason = reason.removeprefix("Value error, ")  # which pydantic puts before the messages of this module
        raise RequestError(400, f"{name or 'the body'}: {reason}.", name.split(".")[0] or None) from None


class Completion:
    """The bodies of one response.

    Args:
        is_chat: whether it is a chat completion.
        model: the name that the request gave.
    """

    def __init__(self, is_chat: bool, model: str):
        self.is_chat = is_chat
        self.common = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, call: ToolCall | None, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if call:
            message |= {"content": text or None, "tool_calls": [call_form(call)]}
        content = {"message": message} if self.is_chat else {"text": text}
        return self.body("chat.completion", [choice(content, finish_reason)]) | {"usage": usage}

    def piece(
        self,
        text: str | None,
        finish_reason: str | None = None,
        first: bool = False,
        call: ToolCall | None = None,
    ) -> dict[str, Any]:
        """A chunk of a stream with new text or a call; the last one has the reason instead."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        delta |= {} if text is None else {"content": text}
        delta |= {"tool_calls": [{"index": 0} | call_form(call)]} if call else {}
        content = {"delta": delta} if self.is_chat else {"text": text or ""}
        return self.body("chat.completion.chunk", [choice(content, finish_reason)])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk of a stream that has the numbers of tokens."""
        return self.body("chat.completion.chunk", []) | {"usage": usage}

    def body(self, chat_object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A body without usage."""
        return self.common | {"object": chat_object if self.is_chat else "text_completion", "choices": choices}


def choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    """The only choice of a response."""
    return {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}


def call_form(call: ToolCall) -> dict[str, Any]:
    """A call of a tool, with an id by which its result names it."""
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


def token_counts(prompt: int, answer: int) -> dict[str, int]:
    """The usage of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def model_list(names: list[str], created: int) -> dict[str, Any]:
    """The body of `/v1/models`."""
    models = [{"id": name, "object": "model", "created": created, "owned_by": "chatglm-6b-qlora"} for name in names]
    return {"object": "list", "data": models}
