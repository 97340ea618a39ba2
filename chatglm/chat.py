"""The conversations of ChatGLM-6B: prompts, and the formatting of replies."""

import re

from glm_shared.chat import Rounds, with_training_time

MARKS = ",!:;?"
FULL_WIDTH_MARKS = "，！：；？"
FULL_WIDTH = str.maketrans(MARKS, FULL_WIDTH_MARKS)
CJK = "[\u4e00-\u9fff]"
HALF_WIDTH_BY_CJK = re.compile(f"(?<={CJK})[,!:;?]|[,!:;?](?={CJK})")
# `chat` of the official code sets top_p and temperature; top_k is the default of transformers' `generate`.
OFFICIAL_SAMPLING = {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7}
# `build_prompt` as a Jinja template. A prompt has one form only: `add_generation_prompt` makes no difference.
CHAT_TEMPLATE = r"""
{%- set found = namespace(head='', turns=0) -%}
{%- set alone = messages | rejectattr('role', 'in', ['system', 'developer']) | list | length == 1 -%}
{%- for message in messages -%}
    {%- set speaker = 'assistant' if found.turns % 2 else 'user' -%}
    {%- if message.content is not string -%}
        {{- raise_exception('The content of a message must be a text.') -}}
    {%- elif message.role in ['system', 'developer'] and not found.turns -%}
        {%- set found.head = found.head + (message.content + '\n' if message.content | trim else '') -%}
    {%- elif message.role != speaker -%}
        {{- raise_exception('Expected texts of the system, if any, then the user and the assistant in turn.') -}}
    {%- elif alone -%}
        {{- found.head + message.content -}}
    {%- elif speaker == 'user' -%}
        {{- ('\n' if found.turns else '') ~ '[Round ' ~ found.turns // 2 ~ ']\n问：' -}}
        {{- found.head ~ message.content ~ '\n答：' -}}
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


def build_prompt(query: str, history: Rounds = (), system: str = "") -> str:
    """The prompt in the format that the model was trained on.

    Args:
        query: the present question.
        history: the (question, answer) pairs before it.
        system: put on a line of its own before the first question, since the model has no role for it.
    Returns:
        The query itself without a history; with one, numbered rounds that end where the answer to the query begins.
    Source: modeling_chatglm.py of THUDM/chatglm-6b.
    """
    rounds = [*history, (query, "")]
    if system:
        rounds[0] = (f"{system}\n{rounds[0][0]}", rounds[0][1])
    if len(rounds) == 1:
        return rounds[0][0]
    return "\n".join(f"[Round {i}]\n问：{question}\n答：{answer}" for i, (question, answer) in enumerate(rounds))


def clean_response(text: str) -> str:
    """A reply as it is shown to the user.

    Args:
        text: the decoded tokens.
    Returns:
        The text without surrounding white space, with the date in place of the placeholder for the training date, and
        with full-width punctuation next to Chinese characters.
    Source: modeling_chatglm.py of THUDM/chatglm-6b.
    """
    text = with_training_time(text.strip())
    return HALF_WIDTH_BY_CJK.sub(lambda mark: mark.group().translate(FULL_WIDTH), text)
