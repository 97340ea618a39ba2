"""How ChatGLM3-6B calls a tool: a line with the tool's name, and below it a call in Python, `tool_call(city='Paris')`."""


def build_call(arguments: dict) -> str:
    """The text of a call, below the name of the tool.

    Source: `format_function_call` in preprocess_utils.py in finetune_demo/ of THUDM/ChatGLM3.
    """
    return f"```python\ntool_call({', '.join(f'{name}={value!r}' for name, value in arguments.items())})\n```"
