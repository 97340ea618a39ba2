"""Conversations: what a tokenizer says of the prompts and replies of its model, and the official chat interface."""

import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, PreTrainedTokenizer, TextIteratorStreamer

History = list[tuple[str, str]]
Rounds = Sequence[Sequence[str]]  # (question, answer) pairs: a history, or lists read from JSON

TRAINING_TIME = "[[训练时间]]"  # which the models write for the date of their training


def with_training_time(text: str) -> str:
    """The text with the date in place of the placeholder for it."""
    return text.replace(TRAINING_TIME, "2023年")


class Prompt(NamedTuple):
    """A question, the (question, answer) pairs before it, and the text of the system."""

    query: str
    history: Rounds = ()
    system: str = ""

    @property
    def is_single(self) -> bool:
        """Whether there is nothing but the question."""
        return not (self.history or self.system)

    def text(self, tokenizer: "ChatTokenizer") -> str:
        """The prompt as it reads."""
        return tokenizer.build_prompt(*self)

    def ids(self, tokenizer: "ChatTokenizer", prompt_text: str = "") -> list[int]:
        """All token ids of the prompt, with `prompt_text` before it."""
        return tokenizer.build_prompt_ids(*self, prompt_text)


class ToolPrompt(NamedTuple):
    """A conversation with tools up to the answer: messages as `ChatTokenizer.conversation_ids` takes them."""

    messages: Sequence[dict]

    @property
    def query(self) -> str:
        """The last question of the user."""
        return [message["content"] for message in self.messages if message["role"] == "user"][-1]

    def text(self, tokenizer: "ChatTokenizer") -> str:
        """As for `Prompt`; NoTools if the model has none."""
        return tokenizer.conversation_text(self.messages)

    def ids(self, tokenizer: "ChatTokenizer", prompt_text: str = "") -> list[int]:
        """As for `Prompt`; NoTools if the model has none."""
        return tokenizer.conversation_ids(self.messages, prompt_text)


class ToolCall(NamedTuple):
    """The call of a tool: its name, and its arguments, an object in JSON."""

    name: str
    arguments: str


class NoTools(ValueError):
    """The model has no prompts for a conversation with tools."""

    def __init__(self):
        super().__init__("the conversation has tools, for which this model has no prompts; ChatGLM3-6B has them")


class ChatTokenizer(PreTrainedTokenizer):
    """A tokenizer that knows the prompts of its model; training, inference and serving have them from here alone.

    A model has a class of its own, with `build_prompt`, `clean_response`, the attributes, and a chat template that
    says the same. Control tokens that are written in a text stay text.

    Attributes:
        prompt_end: number of control tokens that end every prompt, also one that is cut.
        longest_token: characters of the longest token.
        sampling: arguments of `generate` with which the official `chat` draws.
        chat_length: most tokens of prompt and reply together in the official `chat`.
        open_marks: punctuation at the end of a reply that `clean_response` may still change by what follows.
        vocab_file: path of the SentencePiece file.
        ggml_type: number by which chatglm.cpp knows tokenizer and prompts.
        same_marks: table of `str.translate` to characters that the tokenizer takes for the same.
        message_token_id: the token with which another message begins in an answer; None where there is no such token.
    """

    prompt_end: int
    longest_token: int
    sampling: dict[str, Any]
    chat_length: int
    vocab_file: str
    ggml_type: int
    open_marks = ""
    same_marks: Mapping[int, str] = {}
    message_token_id: int | None = None

    @property
    def control_token_ids(self) -> list[int]:
        """The tokens in a sample that stand for no text."""
        raise NotImplementedError

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return [self.eos_token_id]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the SentencePiece model into a folder; returns its path there."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def clean_response(self, text: str) -> str:
        """A reply as it is shown to the user, from the text of its tokens."""
        raise NotImplementedError

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

    def conversation_ids(self, messages: Sequence[dict], prompt_text: str = "") -> list[int]:
        """All ids of the prompt of an answer to messages, among which may be tools' results.

        Args:
            messages: dicts of `role`, `content` and what else the model's messages have.
            prompt_text: put before the first message's text.
        Raises:
            NoTools: the model's prompts have no tools.
        """
        raise NoTools

    def conversation_text(self, messages: Sequence[dict]) -> str:
        """The same prompt as it reads; NoTools as there."""
        raise NoTools

    def turn_ids(self, messages: Sequence[dict]) -> list[int]:
        """The ids that follow those of `conversation_ids`: messages of the assistant in a row, and what ends them."""
        raise NotImplementedError

    def begins_call(self, text: str, tools: Collection[str]) -> bool:
        """Whether a message that begins with this text of its tokens may be a call of one of these tools."""
        return False

    def parse_call(self, text: str, tools: Collection[str]) -> ToolCall | None:
        """The call of one of these tools, from the text of a message's tokens; None if it is none."""
        return None

    def cut_prompt_ids(self, ids: list[int], most: int) -> list[int]:
        """The ids of a prompt, of which at most so many are left; the control tokens at its end stay."""
        return ids if len(ids) <= most else ids[: most - self.prompt_end] + ids[len(ids) - self.prompt_end :]

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
            generation_kwargs: arguments of `generate`. The defaults are the official ones: the tokenizer's `sampling`
                and `chat_length`; `max_new_tokens` replaces the latter.
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
            ValueError: the history has messages, as that of ChatGLM3-6B's official code.
            Exception: the error that `generate` raised.
        """
        if any(isinstance(turn, dict) for turn in history or ()):
            raise ValueError(
                "history has messages, expected (question, answer) pairs: for messages, call generate with the result "
                "of tokenizer.apply_chat_template(messages)."
            )
        inputs = tokenizer.pad({"input_ids": [tokenizer.build_prompt_ids(query, history or ())]}, return_tensors="pt")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        defaults = {"max_length": tokenizer.chat_length, "eos_token_id": tokenizer.stop_token_ids}
        options = defaults | tokenizer.sampling | generation_kwargs
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
            reply = tokenizer.clean_response(text)
            yield reply, [*(history or []), (query, reply)]
        worker.join()
        if failure:
            raise failure[0]
