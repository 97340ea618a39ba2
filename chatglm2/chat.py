"""The conversations of ChatGLM2-6B and ChatGLM3-6B: prompts as text and as chat templates, and replies."""

from glm_shared.chat import Rounds, with_training_time

# `chat` of the official code sets top_p and temperature; top_k is the default of transformers' `generate`.
OFFICIAL_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.8}
CHAT_LENGTH = 8192
ROLES = ("system", "user", "assistant", "observation")
# Source: preprocess_utils.py in finetune_demo/ of THUDM/ChatGLM3.
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
ROUNDS_TEMPLATE = r"""
{%- set found = namespace(head='', turns=0) -%}
{%- for message in messages -%}
    {%- set speaker = 'assistant' if found.turns % 2 else 'user' -%}
    {%- if message.content is not string -%}
        {{- raise_exception('The content of a message must be a text.') -}}
    {%- elif message.role in ['system', 'developer'] and not found.turns -%}
        {%- set found.head = found.head + (message.content + '\n' if message.content | trim else '') -%}
    {%- elif message.role != speaker -%}
        {{- raise_exception('Expected texts of the system, if any, then the user and the assistant in turn.') -}}
    {%- elif speaker == 'user' -%}
        {{- ('\n\n' if found.turns else '') ~ '[Round ' ~ (found.turns // 2 + 1) ~ ']\n\n问：' -}}
        {{- found.head ~ message.content ~ '\n\n答：' -}}
        {%- set found.head = '' -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
    {%- if message.role == speaker -%}
        {%- set found.turns = found.turns + 1 -%}
    {%- endif -%}
{%- endfor -%}
{%- if found.turns % 2 == 0 -%}
    {{- raise_exception('The last message must be of the user: this is the prompt of its answer.') -}}
{%- endif -%}
"""
ROLES_TEMPLATE = r"""
{%- for message in messages -%}
    {%- set role = {'developer': 'system', 'tool': 'observation'}.get(message.role, message.role) -%}
    {%- if message.content is not string -%}
        {{- raise_exception('The content of a message must be a text.') -}}
    {%- elif role not in ['system', 'user', 'assistant', 'observation'] -%}
        {{- raise_exception('A message is of the system, the user, the assistant or an observation.') -}}
    {%- endif -%}
    {{- '<|' ~ role ~ '|>' ~ (message.metadata or '') ~ '\n' -}}
    {%- if role == 'system' and message.tools -%}
        {{- (message.content or 'TOOLS_PROMPT') ~ '\n' ~ message.tools | tojson(indent=4) -}}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>' -}}
""".replace("TOOLS_PROMPT", TOOLS_PROMPT)


def build_rounds(query: str, history: Rounds = (), system: str = "") -> str:
    """The prompt of ChatGLM2-6B: rounds, numbered from 1, that end where the answer to the query begins.

    Args:
        query: the present question.
        history: the (question, answer) pairs before it.
        system: put on a line of its own before the first question, since the model has no role for it.
    Source: tokenization_chatglm.py of THUDM/chatglm2-6b.
    """
    rounds = [*history, (query, "")]
    if system:
        rounds[0] = (f"{system}\n{rounds[0][0]}", rounds[0][1])
    numbered = enumerate(rounds, 1)
    return "\n\n".join(f"[Round {i}]\n\n问：{question}\n\n答：{answer}" for i, (question, answer) in numbered)


def build_messages(query: str, history: Rounds = (), system: str = "") -> list[dict[str, str]]:
    """The messages of ChatGLM3-6B, dicts of `role` and `content`; arguments as for `build_rounds`."""
    turns = [(role, text) for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)]
    turns = [("system", system)] * bool(system) + turns + [("user", query)]
    return [{"role": role, "content": text} for role, text in turns]


def clean_response(text: str) -> str:
    """A reply as it is shown to the user: without surrounding white space, with the date.

    A message of ChatGLM3-6B begins with a line that is empty or, for a call, has the name of the tool, which is shown.

    Source: modeling_chatglm.py of THUDM/chatglm2-6b and THUDM/chatglm3-6b.
    """
    return with_training_time(text.strip())
