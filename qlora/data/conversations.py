"""Conversations as other programs write them: OpenAI's `messages` and ShareGPT's `conversations`."""

from collections.abc import Callable
from dataclasses import dataclass, field

from qlora.data.fields import check_spelling, first_field, optional_text, text_field
from qlora.data.strict_json import kind_of
from qlora.data.tool_messages import CALL, RESULTS, ToolConversation, described_tools, has_calls

FIELDS = ("messages", "conversations", "conversation")
ROLE, TEXT = ("role", "from"), ("content", "value")  # the second ones are ShareGPT's
SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"),
}
ROLES = {role: speaker for speaker, roles in SPEAKERS.items() for role in roles}
TOOL_ROLES = ROLES | dict.fromkeys(RESULTS, "observation") | {CALL: "call"}


@dataclass
class Conversation:
    """A conversation in which user and assistant take turns.

    Args:
        system: text of the system; empty without one.
        texts: of user and assistant in turn; the user is first.
        turns: numbers, from 1, of the assistant's texts that are to be trained on.
    """

    system: str = ""
    texts: list[str] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def add(self, message: object):
        """Adds a message; ValueError with the reason for one that cannot follow."""
        message, speaker = check_message(message)
        if speaker == "system":
            self.add_system(optional_text(message, first_field(message, *TEXT, of="message")))
            return
        self.check_turn(speaker)
        check_is_text(message)
        self.texts.append(text_field(message, *TEXT, of="message"))
        if speaker == "assistant" and is_trained(message):
            self.turns.append(len(self.texts) // 2)

    def check_turn(self, speaker: str):
        """ValueError if it is not this speaker's turn."""
        if speaker == self.next_speaker:
            return
        if not self.texts:
            raise ValueError("the assistant speaks first; expected a question of the user")
        missing = f"the {self.next_speaker}'s between them is missing"
        raise ValueError(f"two messages of the {speaker} in a row; {missing}")

    def add_system(self, text: str):
        """Adds a text of the system; ValueError after the first question."""
        if self.texts:
            raise ValueError("a message of the system after the first question; it must stand before it")
        self.system = "\n".join(filter(None, (self.system, text)))

    @property
    def next_speaker(self) -> str:
        """Whose turn it is."""
        return "assistant" if len(self.texts) % 2 else "user"

    @property
    def rounds(self) -> list[list[str]]:
        """The [question, answer] pairs, without a question that has no answer."""
        return [list(pair) for pair in zip(self.texts[::2], self.texts[1::2], strict=False)]


def check_message(message: object, roles: dict[str, str] = ROLES) -> tuple[dict, str]:
    """A message and who speaks, by the names of `roles`; ValueError if it is no object, or has no role among them."""
    if not isinstance(message, dict):
        raise ValueError(f"expected an object with role and content, found {kind_of(message)}")
    role = text_field(message, *ROLE, of="message")
    if role.lower() not in roles:
        raise ValueError(f"unknown role {role!r}; expected system, user or assistant, or human or gpt")
    return message, roles[role.lower()]


def check_is_text(message: dict):
    """ValueError with a hint for what other programs write in the place of a text."""
    value = message.get(first_field(message, *TEXT, of="message"))
    if isinstance(value, list):
        raise ValueError("its content is a list of parts; join their texts to one, other parts cannot be trained on")
    if value is None:
        raise ValueError("its content is null; write a text, or leave the row out")


def is_trained(message: dict) -> bool:
    """Whether the `weight` of an assistant's message, 1 by default, is not 0; ValueError for any other value."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"field 'weight' is {weight!r}; expected 0, not to train on the message, or 1")
    return weight != 0


def find_conversation(row: dict, other_fields: tuple[str, ...]) -> Conversation | ToolConversation | None:
    """The conversation of a row, or None for a row of another kind.

    Args:
        row: a parsed line.
        other_fields: of the other kind.
    Raises:
        ValueError: the conversation cannot be used, or the row is of both kinds.
    """
    given = [name for name in (*FIELDS, *other_fields) if row.get(name)]
    given = given or [name for name in FIELDS if row.get(name) is not None]  # it is empty, and will be refused
    if not given:
        check_spelling(row, *FIELDS)
    if not set(FIELDS) & set(given):
        return None
    if len(given) > 1:
        both = f"both '{given[0]}' and '{given[1]}' are given"
        raise ValueError(f"{both}; a row has one conversation, or one question and its answer")
    check_spelling(row, "system")
    name, system = given[0], optional_text(row, "system")
    if row.get("tools") or has_calls(row[name], ROLE):
        return parse_tool_messages(row[name], name, system, row.get("tools") or [])
    return parse_messages(row[name], name, system)


def parse_messages(messages: object, name: str, system: str) -> Conversation:
    """The conversation of a list of messages, which follow a text of the system; `name` is that of the field."""
    conversation = Conversation(system)
    add_all(messages, name, conversation.add)
    if not conversation.texts:
        raise ValueError(f"field '{name}' has no question")
    return conversation


def add_all(messages: object, name: str, add: Callable[[object], None]):
    """Calls `add` with every message; ValueError if they are no list, or with the number of one that is refused."""
    if not isinstance(messages, list):
        raise ValueError(f"field '{name}' must be a list of messages, found {kind_of(messages)}")
    for number, message in enumerate(messages, 1):
        try:
            add(message)
        except ValueError as error:
            raise ValueError(f"message {number} of '{name}': {error}") from error


def parse_tool_messages(messages: object, name: str, system: str, tools: object) -> ToolConversation:
    """The conversation of messages with tools; arguments as for `parse_messages`, and the descriptions of tools."""
    conversation = ToolConversation(described_tools(tools), system)

    def add(message: object):
        message, speaker = check_message(message, TOOL_ROLES)
        if speaker == "system":
            conversation.add_system(optional_text(message, first_field(message, *TEXT, of="message")))
        elif speaker == "user":
            conversation.add_question(text_field(message, *TEXT, of="message"))
        elif speaker == "assistant":
            conversation.add_answer(message, TEXT, is_trained(message))
        elif speaker == "call":
            conversation.add_call(text_field(message, *TEXT, of="message"), is_trained(message))
        else:
            conversation.add_result(message, TEXT)

    add_all(messages, name, add)
    if not conversation.messages:
        raise ValueError(f"field '{name}' has no question")
    return conversation
