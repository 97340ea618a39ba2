"""The chat interface of ChatGLM-6B: prompts with history, streaming, and the formatting of replies."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizer, TextIteratorStreamer

History = list[tuple[str, str]]
Rounds = Sequence[Sequence[str]]  # (question, answer) pairs: a history, or lists read from JSON

TRAINING_TIME = "[[训练时间]]"  # which the model writes for the date of its training
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CJK = "[\u4e00-\u9fff]"
HALF_WIDTH_BY_CJK = re.compile(f"(?<={CJK})[,!:;?]|[,!:;?](?={CJK})")
# `chat` of the official code sets top_p and temperature; top_k is the default of transformers' `generate`.
OFFICIAL_SAMPLING = {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7}
CHAT_DEFAULTS = {"max_length": 2048, **OFFICIAL_SAMPLING}


def build_prompt(query: str, history: Rounds | None = None) -> str:
    """The prompt in the format that the model was trained on.

    Args:
        query: the present question.
        history: the (question, answer) pairs before it.
    Returns:
        The query itself without a history; with one, numbered rounds that end where the answer to the query begins.
    Source: modeling_chatglm.py of THUDM/chatglm-6b.
    """
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


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
        self, tokenizer: PreTrainedTokenizer, query: str, history: History | None = None, **generation_kwargs
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
        self, tokenizer: PreTrainedTokenizer, query: str, history: History | None = None, **generation_kwargs
    ) -> Iterator[tuple[str, History]]:
        """Generates one reply in a separate thread and yields it while it grows.

        Args:
            tokenizer, query, history, generation_kwargs: as for `chat`.
        Yields:
            The reply generated so far, and a new history with it.
        Raises:
            Exception: the error that `generate` raised.
        """
        inputs = tokenizer(build_prompt(query, history), split_special_tokens=True, return_tensors="pt")
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
