"""What a data row may hold; a row that cannot be used is reported with file, place and reason."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from glm_shared.chat import Prompt, Rounds
from qlora.data.conversations import Conversation, find_conversation
from qlora.data.fields import check_spelling, check_text, optional_text, text_field
from qlora.data.row_files import read_json_rows, read_lines
from qlora.data.strict_json import kind_of, parse_json
from qlora.data.tool_messages import ToolConversation

ROWS_VERSION = 6  # in the key of cached rows: raise it with every change of what is accepted or what a row becomes
QUESTION, ANSWER = ("instruction", "content"), ("output", "summary")  # the second ones are AdvertiseGen's
OTHER_FIELDS = (*QUESTION, "input", "history", *ANSWER)  # than those of a conversation


@dataclass
class Row:
    """One checked data row.

    Args:
        query: the last question.
        history: the [question, answer] pairs before it.
        answer: to the last question.
        system: what the model is told before the first question; may be empty.
        turns: of a conversation, the numbers, from 1, of the answers that are to be trained on; empty for a row with
            an `output`, which is trained on.
        messages: of a conversation with tools, all of it as JSON, see `qlora.data.tool_messages`; query and answer are
            then its last texts, without what is before them.
    """

    query: str
    history: Rounds
    answer: str
    system: str = ""
    turns: list[int] = field(default_factory=list)
    messages: str = ""


def read_rows(path: str) -> Iterator[dict]:
    """Reads and checks the data rows of a file: one JSON object a line, or an array of objects.

    A row is a conversation, in `messages` or `conversations`; or it has `instruction` (or AdvertiseGen's `content`),
    `output` (or `summary`), and optionally `input`, which is appended to the instruction on a new line, and `history`,
    a list of [question, answer] pairs. Both may have `system`. Empty lines are skipped.

    Args:
        path: of the file, in UTF-8, with or without a byte order mark.
    Yields:
        Dicts of `line`, the number of the line from 1, `element`, the number in the array from 1 (0 without an array),
        and the fields of `Row`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: rows that cannot be trained on, with file, place and reason; or a file without rows.
    """
    empty = True
    for place, row in read_json_rows(path, lambda text: parse_row(parse_json(text))):
        empty = False
        yield {"line": place.line, "element": place.element, **vars(row)}
    if empty:
        raise ValueError(f"{path} has no rows.")


def read_prompts(path: str) -> dict[str, Prompt]:
    """Reads the prompts of a file.

    Args:
        path: of a `.jsonl` or `.json` file of rows, which need no answer here, or of strings, one a line or in an
            array; or of a text file with one prompt a line.
    Returns:
        Where each prompt stands -> the prompt, in the order of the file.
    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    if Path(path).suffix.lower() in (".jsonl", ".json"):
        places = read_json_rows(path, lambda text: parse_prompt(parse_json(text)))
    else:
        places = read_lines(path, lambda text: Prompt(text.strip()))
    prompts = {f"{path}, {place}": prompt for place, prompt in places if prompt.query}
    if not prompts:
        raise ValueError(f"{path} has no prompts.")
    return prompts


def parse_prompt(value: object) -> Prompt:
    """The prompt of a string or of a row; ValueError with the reason for another value.

    A conversation's prompt is that of its last answer or, where the user is last, of the answer to come.
    """
    if isinstance(value, str):
        return Prompt(check_text(value))
    row = check_object(value)
    conversation = find_conversation(row, OTHER_FIELDS)
    if conversation is None:
        return parse_question(row)
    if isinstance(conversation, ToolConversation):
        raise ValueError("a conversation with tools; these can be trained on, not asked")
    last = (len(conversation.texts) - 1) // 2
    return Prompt(conversation.texts[2 * last], conversation.rounds[:last], conversation.system)


def parse_row(value: object) -> Row:
    """The checked row of a parsed line; ValueError with the reason if it cannot be trained on."""
    row = check_object(value)
    conversation = find_conversation(row, OTHER_FIELDS)
    if isinstance(conversation, ToolConversation):
        return tool_row(conversation)
    if conversation is not None:
        return conversation_row(conversation)
    prompt = parse_question(row)
    return Row(prompt.query, prompt.history, text_field(row, *ANSWER), prompt.system)


def conversation_row(conversation: Conversation) -> Row:
    """The row of a conversation; ValueError if it is unfinished, or has nothing to train on."""
    if conversation.next_speaker == "assistant":
        raise ValueError("the conversation ends with a question; its answer is missing")
    if not conversation.turns:
        raise ValueError("no answer to train on: each has the weight 0")
    *history, (query, answer) = conversation.rounds
    return Row(query, history, answer, conversation.system, conversation.turns)


def tool_row(conversation: ToolConversation) -> Row:
    """The row of a conversation with tools; ValueError if it is unfinished, or has nothing to train on."""
    if conversation.last_role != "assistant":
        raise ValueError("the conversation ends with a question or a result; the answer is missing")
    if not conversation.turns:
        raise ValueError("no answer to train on: each has the weight 0")
    query = [message["content"] for message in conversation.messages if message["role"] == "user"][-1]
    last = conversation.messages[-1]
    text = json.dumps(conversation.with_head, ensure_ascii=False)
    return Row(query, [], last["content"] or last["metadata"], conversation.system, conversation.turns, text)


def check_object(value: object) -> dict:
    """The value, which is an object; ValueError for any other."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with instruction and output, found {kind_of(value)}")
    return value


def parse_question(row: dict) -> Prompt:
    """The question of a row, with its `input`, its history and its text of the system; ValueError with the reason."""
    query = text_field(row, *QUESTION)
    check_spelling(row, "input", "history", "system")
    input_text = optional_text(row, "input")
    if input_text:
        query = f"{query}\n{input_text}"
    return Prompt(query, check_history(row.get("history")), optional_text(row, "system"))


def check_history(history: object) -> list[list[str]]:
    """The [question, answer] pairs of a row's history; an empty list for None. ValueError for anything else."""
    if history is None:
        return []
    if not isinstance(history, list) or not all(map(is_round, history)):
        raise ValueError("field 'history' must be a list of [question, answer] pairs of strings")
    for turn in history:
        check_text("".join(turn))
    return history


def is_round(turn: object) -> bool:
    """Whether a value is a [question, answer] pair of strings."""
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
