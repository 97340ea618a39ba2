"""What the compare page computes: answers with and without the adapter side by side, and a conversation.

`web_page` builds the page with gradio, which this module does not import.
"""

import contextlib
import dataclasses
import html
import itertools
import threading
from collections.abc import Iterator

import torch
from peft import PeftModel

from glm_shared.chat import ChatTokenizer, Prompt
from qlora.arguments import InferenceArguments
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import check_prompt, stream_answer

# Fields of InferenceArguments on the page.
SETTINGS = ("do_sample", "top_k", "top_p", "temperature", "max_new_tokens", "seed")
BEFORE, AFTER, VISITOR = "微调前 Before", "微调后 After", "你 You"
YIELDS_PER_UPDATE = 4  # of `stream_answer`, every two tokens; sending each takes longer than generating the tokens

PageRounds = list[tuple[str, str, bool]]  # message, reply, and whether it was generated with the adapter


class Answerer:
    """Answers the prompts of all visitors with one model.

    Enabling or disabling the adapter changes the model itself, so that a lock lets one visitor use it at a time.
    """

    def __init__(self, model: PeftModel, tokenizer: ChatTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()  # the web server may resume a generator on another thread

    def stream(self, prompt: Prompt, tuned: tuple[bool, ...], args: InferenceArguments) -> Iterator[list[str]]:
        """Generates several answers to one prompt side by side: a few tokens of each answer, then of the next.

        Args:
            prompt: control tokens written in its texts stay text.
            tuned: for each answer, whether it is generated with the adapter.
            args: the decoding settings, the seed, and the text put before the prompt.
        Yields:
            The answers generated so far.
        Raises:
            ValueError: the prompt is empty, or too long for the model.
        """
        self.check_prompt(prompt, args)
        sampler = make_sampler(**args.sampling())
        options = (self.model, self.tokenizer, prompt, args.max_new_tokens, sampler, args.prompt_text)
        streams = [stream_answer(*options) for _ in tuned]
        answers = [""] * len(tuned)
        with self.lock:
            torch.manual_seed(args.seed)
        while True:
            with self.lock:  # released before the yield, after which a generator may never be resumed
                newest = [self.advance(*pair) for pair in zip(streams, tuned, strict=True)]
            if newest == [None] * len(tuned):
                return
            answers = [answer if newer is None else newer for answer, newer in zip(answers, newest, strict=True)]
            yield answers

    def advance(self, stream: Iterator[str], tuned: bool) -> str | None:
        """The answer after a few more tokens; None if it had ended."""
        text = None
        # A CUDA graph is recorded in the first call, with or without the adapter, and replayed in the later ones.
        with contextlib.nullcontext() if tuned else self.model.disable_adapter():
            for newest in itertools.islice(stream, YIELDS_PER_UPDATE):
                text = newest
        return text

    def check_prompt(self, prompt: Prompt, args: InferenceArguments):
        """ValueError for a prompt that cannot be answered; see `generation.check_prompt`."""
        limit = self.model.config.max_position_embeddings
        check_prompt(prompt, self.tokenizer, limit, args.max_new_tokens, args.prompt_text)


class Page:
    """The event handlers of the page."""

    def __init__(self, answerer: Answerer, args: InferenceArguments):
        self.answerer, self.args = answerer, args

    def compare(self, prompt: str, *settings) -> Iterator[list[str]]:
        """Yields the answers without and with the adapter; `settings` are the values of `SETTINGS`."""
        yield from self.answerer.stream(Prompt(prompt), (False, True), with_settings(self.args, settings))

    def chat(self, message: str, rounds: PageRounds, tuned: bool, *settings) -> Iterator[tuple[str, PageRounds, str]]:
        """Continues a conversation.

        Args:
            message: of the user.
            rounds: those before it.
            tuned: whether the reply is generated with the adapter.
            settings: the values of `SETTINGS`.
        Yields:
            The empty text of the message box, the rounds with the reply so far, and these as HTML.
        """
        args = with_settings(self.args, settings)
        prompt = Prompt(message, [(question, reply) for question, reply, _ in rounds])
        for (reply,) in self.answerer.stream(prompt, (tuned,), args):
            longer = [*rounds, (message, reply, tuned)]
            yield "", longer, conversation_html(longer)


def conversation_html(rounds: PageRounds) -> str:
    """A conversation as HTML that shows every text as it is, whatever HTML or Markdown it may look like."""
    bubbles = []
    for message, reply, tuned in rounds:
        bubbles += [("visitor", VISITOR, message), ("model", AFTER if tuned else BEFORE, reply)]
    return "".join(
        f'<div class="bubble {kind}"><small>{name}</small><div class="text">{html.escape(text)}</div></div>'
        for kind, name, text in bubbles
    )


def with_settings(args: InferenceArguments, settings: tuple) -> InferenceArguments:
    """The arguments with the page's settings; ValueError for a setting that is empty or out of range."""
    if None in settings:
        raise ValueError("有一项设置是空的。 A setting is empty.")
    values = dict(zip(SETTINGS, settings, strict=True))
    # Browsers send 1.0 as 1.
    values = {name: type(getattr(args, name))(value) for name, value in values.items()}
    try:
        return dataclasses.replace(args, **values)
    except ValueError as error:
        reason = str(error).replace("--", "")
        raise ValueError(f"解码设置超出范围。 A decoding setting is out of range: {reason}") from error
