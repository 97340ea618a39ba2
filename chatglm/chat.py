"""The chat interface of ChatGLM-6B: prompts of conversations, streaming, and the formatting of replies."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import BatchEncoding, PreTrainedTokenizer, TextIteratorStreamer

History = list[tuple[str, str]]
Rounds = Sequence[Sequence[str]]  # (question, answer) pairs: a history, or lists read from JSON

TRAINING_TIME = "[[训练时间]]"  # which the model writes for the date of its training
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CJK = "[\u4e00-\u9fff]"
HALF_WIDTH_BY_CJK = re.compile(f"(?<={CJK})[,!:;?]|[,!:;?](?={CJK})")
# `chat` of the official code sets top_p and temperature; top_k is the default of transformers' `generate`.
OFFICIAL_SAMPLING = {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7}
CHAT_DEFAULTS = {"max_length": 2048, **OFFICIAL_SAMPLING}
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


class Prompt(NamedTuple):
    """A question, the (question, answer) pairs before it, and the text of the system."""

    query: str
    history: Rounds = ()
    system: str = ""


def build_prompt(query: str, history: Rounds | None = None, system: str = "") -> str:
    """The prompt in the format that the model was trained on.

    Args:
        query: the present question.
        history: the (question, answer) pairs before it.
        system: put on a line of its own before the first question, since the model has no role for it.
    Returns:
        The query itself without a history; with one, numbered rounds that end where the answer to the query begins.
    Source: modeling_chatglm.py of THUDM/chatglm-6b.
    """
    rounds = [*(history or ()), (query, "")]
    if system:
        rounds[0] = (f"{system}\n{rounds[0][0]}", rounds[0][1])
    if len(rounds) == 1:
        return rounds[0][0]
    return "\n".join(f"[Round {i}]\n问：{question}\n答：{answer}" for i, (question, answer) in enumerate(rounds))


class ChatTokenizer(PreTrainedTokenizer):
    """A tokenizer that knows the prompts of its model; training, inference and serving have them from here alone.

    A model has a class of its own, with `build_prompt`, `prompt_end` and a chat template that says the same. Control
    tokens that are written in a text stay text.
    """

    prompt_end: int  # number of control tokens that end every prompt, also one that is cut

    def build_prompt(self, query: str, history: Rounds = (), system: str = "") -> str:
        """The prompt of a question as text; `history` has the (question, answer) pairs before it."""
        raise NotImplementedError

    def build_prompt_ids(self, query: str, history: Rounds = (), system: str = "", prompt_text: str = "") -> list[int]:
        """All token ids of a prompt, control tokens included, as `generate` takes them.

        Args:
            query, history, system: as for `build_prompt`.
            prompt_text: put before the whole prompt.
        """
        return self(prompt_text + self.build_prompt(query, history, system), split_special_tokens=True)["input_ids"]

    def build_answer_ids(self, answer: str) -> list[int]:
        """The token ids that follow those of the prompt; the last one ends the answer."""
        return [*self.encode(answer, add_special_tokens=False, split_special_tokens=True), self.eos_token_id]

    def apply_chat_template(
        self,
        conversation,
        *args,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: dict | None = None,
        **kwargs,
    ) -> str | list[int] | list[str] | list[list[int]] | BatchEncoding:
        """As in transformers, but the ids have the control tokens that every prompt has, and no others."""
        text = super().apply_chat_template(conversation, *args, tokenize=False, **kwargs)
        if not tokenize:
            return text
        options = {"padding": padding, "truncation": truncation, "max_length": max_length}
        options |= {"return_tensors": return_tensors, "split_special_tokens": sanitize_control_tokens}
        batch = self(text, **options | (tokenizer_kwargs or {}))
        return batch if return_dict else batch["input_ids"]


def clean_response(text: str) -> str:
    """A reply as it is shown to the user.

    Args:
        text: the decoded tokens.
    Returns:
        The text without surrounding white space, with the date in place of the placeholder for the training date, and
        with full-width punctuation next to Chinese characters.
    Source: modeling_chatglm.py of THUDM/chatglm-6b.
    """
    text = text.strip().replace(TRAINING_TIME, "2023年")
    return HALF_WIDTH_BY_CJK.sub(lambda mark: mark.group().translate(FULL_WIDTH), text)


class ChatMixin:
    """`chat` and `stream_chat` with the official signatures, on top of `generate`."""

    generate: Callable
    device: torch.device

    def chat(
        self, tokenizer: ChatTokenizer, query: str, history: History | None = None, **generation_kwargs
    ) -> tuple[str, History]:
        """Generates one reply.

        Args:
            tokenizer: the model's tokenizer.
            query: the user's message; control tokens written in it stay text.
            history: the (query, reply) pairs of earlier rounds.
            generation_kwargs: arguments of `generate`. The defaults are the official ones: `OFFICIAL_SAMPLING`,
                and at most 2,048 tokens of prompt and reply together; `max_new_tokens` replaces
                this limit.
        Returns:
            The reply, and a new history with this round.
        """
        *_, last = self.stream_chat(tokenizer, query, history, **generation_kwargs)
        return last

    def stream_chat(
        self, tokenizer: ChatTokenizer, query: str, history: History | None = None, **generation_kwargs
    ) -> Iterator[tuple[str, History]]:
        """Generates one reply in a separate thread and yields it while it grows.

        Args:
            tokenizer, query, history, generation_kwargs: as for `chat`.
        Yields:
            The reply generated so far, and a new history with it.
        Raises:
            Exception: the error that `generate` raised.
        """
        inputs = tokenizer.pad({"input_ids": [tokenizer.build_prompt_ids(query, history or ())]}, return_tensors="pt")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = CHAT_DEFAULTS | generation_kwargs
        if "max_new_tokens" in options:
            del options["max_length"]
        failure = []

        def generate():
            try:
                self.generate(**inputs.to(self.device), **options, streamer=streamer)
            except Exception as error:
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=generate)
        worker.start()
        text = ""
        for piece in streamer:
            text += piece
            reply = clean_response(text)
            yield reply, [*(history or []), (query, reply)]
        worker.join()
        if failure:
            raise failure[0]
