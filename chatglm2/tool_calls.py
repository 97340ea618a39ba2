"""How ChatGLM3-6B calls a tool: a line with the tool's name, and below it a call of the Python function `tool_call`.

Calls are written as the official code does. They are read without being run.
"""

import ast
import json
import re
from collections.abc import Collection

from glm_shared.chat import ToolCall

BLOCK = re.compile(r"```python\s*(tool_call\(.*\))\s*```", re.DOTALL)
# Strings, to their end or that of the text, and comments; or else names of arguments, in the second group.
STRING_OR_NAME = re.compile(r"""('''|\"\"\"|'|")(?:\\.|(?!\1)[^\\])*(?:\1|\Z)|#[^\n]*|\b(\w+)\b(?=\s*=)""", re.DOTALL)
# What `ast` and `json` raise for a text that is no call, or whose arguments JSON cannot express.
NO_CALL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)


def build_call(arguments: dict) -> str:
    """The text of a call, below the name of the tool.

    Source: `format_function_call` in preprocess_utils.py in finetune_demo/ of THUDM/ChatGLM3.
    """
    return f"```python\ntool_call({', '.join(f'{name}={value!r}' for name, value in arguments.items())})\n```"


def begins_call(text: str, tools: Collection[str]) -> bool:
    """Whether the text of a message, as far as it is known, has the name of one of these tools in its first line."""
    line, end, _ = text.partition("\n")
    return line.strip() in tools if end else any(name.startswith(line.strip()) for name in tools)


def parse_call(text: str, tools: Collection[str]) -> ToolCall | None:
    """The call of one of these tools that the text of a message is; None for any other text."""
    name, _, content = text.partition("\n")
    block = BLOCK.fullmatch(content.strip())
    if block is None or name.strip() not in tools:
        return None
    try:
        arguments = json.dumps(literal_arguments(block[1]), ensure_ascii=False, allow_nan=False)
        arguments.encode()
    except NO_CALL:
        return None
    return ToolCall(name.strip(), arguments)


def literal_arguments(code: str) -> dict:
    """The arguments of a call in Python, which must have names and be literals; NO_CALL for any other code."""
    call = ast.parse(with_free_names(code), mode="eval").body
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise ValueError("no call with named arguments alone")
    arguments = {(keyword.arg or "").removeprefix("_"): ast.literal_eval(keyword.value) for keyword in call.keywords}
    if "" in arguments or len(arguments) < len(call.keywords):
        raise ValueError("an argument without a name, or a name that stands twice")
    return arguments


def with_free_names(code: str) -> str:
    """The code with "_" before every argument's name, so that it may be a word of Python, such as `from`."""
    return STRING_OR_NAME.sub(lambda found: f"_{found[2]}" if found[2] else found[0], code)
