"""The compare page without its looks: answers before and after that grow together, and a conversation.

`web_page` draws it with gradio; nothing here needs that.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import socket
import threading
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizer

from chatglm.chat import History, build_prompt
from qlora.arguments import InferenceArguments
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import stream_answer

PASSWORD_VARIABLE = "QLORA_PASSWORD"  # a flag could be read in the list of processes
SETTINGS = (
    "do_sample",
    "top_k",
    "top_p",
    "temperature",
    "max_new_tokens",
    "seed",
)  # fields of InferenceArguments on the page
LOOKS_PER_UPDATE = 4  # a stream is looked at every two tokens; sending each look would cost more than the tokens


class Answerer:
    """One model for all visitors. Whether its adapter counts is a switch on the model, so they take turns."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()  # a web server resumes a generator on whichever thread is free

    def stream(self, prompt: str, tuned: tuple[bool, ...], args: InferenceArguments) -> Iterator[list[str]]:
        """Answers one prompt several times at once, a few tokens of each answer in turn.

        Args:
            prompt: as the user wrote it; control tokens in it stay text.
            tuned: for each answer, whether the adapter counts.
            args: how to decode.
        Yields:
            The answers so far.
        Raises:
            ValueError: an empty prompt, or one too long for the model.
        """
        self.check_prompt(prompt, args)
        prompt = args.prompt_text + prompt
        sampler = make_sampler(args.do_sample, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        streams = [stream_answer(self.model, self.tokenizer, prompt, args.max_new_tokens, sampler) for _ in tuned]
        answers = [""] * len(tuned)
        with self.lock:
            torch.manual_seed(args.seed)
        while True:
            with self.lock:  # released before the yield, at which a visitor may leave for good
                longer = [self.advance(*pair) for pair in zip(streams, tuned, strict=True)]
            if longer == [None] * len(tuned):
                return
            answers = [old if new is None else new for old, new in zip(answers, longer, strict=True)]
            yield answers

    def advance(self, stream: Iterator[str], tuned: bool) -> str | None:
        """The answer after a few more tokens; None where it had ended."""
        text = None
        # A CUDA graph keeps the switch as it was when it was recorded, which is in the first call.
        with contextlib.nullcontext() if tuned else self.model.disable_adapter():
            for longer in itertools.islice(stream, LOOKS_PER_UPDATE):
                text = longer
        return text

    def check_prompt(self, prompt: str, args: InferenceArguments):
        """ValueError for a prompt with nothing in it, or with no room for an answer."""
        if not prompt.strip():
            raise ValueError("请先输入内容。 Type a prompt first.")
        limit = self.model.config.max_sequence_length
        length = len(self.tokenizer(args.prompt_text + prompt, split_special_tokens=True)["input_ids"])
        if length + args.max_new_tokens > limit:
            raise ValueError(
                f"输入（含对话历史）有 {length} 个 token，加上最多 {args.max_new_tokens} 个新 token，超过模型的上限 "
                f"{limit}：请缩短输入、清空对话，或减小最大长度。 The prompt, with the conversation before it, has "
                f"{length} tokens; with up to {args.max_new_tokens} new ones that is over the model's {limit}: "
                "shorten it, clear the conversation, or lower Max tokens."
            )


class Page:
    """What the buttons do."""

    def __init__(self, answerer: Answerer, args: InferenceArguments):
        self.answerer, self.args = answerer, args

    def compare(self, prompt: str, *settings) -> Iterator[list[str]]:
        """Yields the answers before and after; `settings` are the values of `SETTINGS`."""
        yield from self.answerer.stream(prompt, (False, True), with_settings(self.args, settings))

    def chat(self, message: str, history: History, tuned: bool, *settings) -> Iterator[tuple[str, History, list]]:
        """Yields an emptied message box, the history with the reply so far, and the same as messages."""
        args = with_settings(self.args, settings)
        self.answerer.check_prompt(message, args)  # with a history the prompt is never empty
        for (reply,) in self.answerer.stream(build_prompt(message, history), (tuned,), args):
            rounds = [*history, (message, reply)]
            yield "", rounds, messages(rounds)


def messages(history: History) -> list[dict[str, str]]:
    """Rounds as a list of messages with their roles."""
    pairs = [zip(("user", "assistant"), texts, strict=True) for texts in history]
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


def with_settings(args: InferenceArguments, settings: tuple) -> InferenceArguments:
    """The arguments with the page's settings; ValueError for a value that cannot be."""
    if None in settings:
        raise ValueError("有一项设置是空的。 A setting is empty.")
    values = dict(zip(SETTINGS, settings, strict=True))
    # A browser sends 1.0 as 1.
    return dataclasses.replace(args, **{name: type(getattr(args, name))(value) for name, value in values.items()})


def check_web(args: InferenceArguments):
    """What can be known before the model is loaded.

    Raises:
        ValueError: gradio is missing or too old, or the password is empty.
        OSError: the address or port cannot be had.
    """
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("--web needs gradio, which is not installed: pip install gradio") from None
    if int(version.split(".")[0]) < 6:
        raise ValueError(f"--web needs gradio 6 or newer, found {version}: pip install --upgrade gradio")
    if os.environ.get(PASSWORD_VARIABLE) == "":
        raise ValueError(f"{PASSWORD_VARIABLE} is empty: set it to a password, or unset it for a page without one.")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does, to follow another soon
            probe.bind((args.host, args.port))
    except OSError as error:
        raise OSError(
            f"the page cannot listen on {args.host}, port {args.port} ({error.strerror}). Choose another --port, or "
            "an address of this machine as --host."
        ) from error
