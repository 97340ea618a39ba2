"""The chat interface of ChatGLM-6B: prompt with history, streaming, and the clean-up of replies."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizer, TextIteratorStreamer

History = list[tuple[str, str]]
Rounds = Sequence[Sequence[str]]  # a history, or the same as JSON has it: (question, answer) pairs

FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CJK = "[\u4e00-\u9fff]"
HALF_WIDTH_BY_CJK = re.compile(f"(?<={CJK})[,!:;?]|[,!:;?](?={CJK})")
CHAT_DEFAULTS = {"max_length": 2048, "do_sample": True, "top_p": 0.7, "temperature": 0.95}


def build_prompt(query: str, history: Rounds | None = None) -> str:
    """The text the model was trained to answer: the query alone, or numbered rounds that end in the open answer."""
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def clean_response(text: str) -> str:
    """Strips a reply, fills in the training date, and makes punctuation next to Chinese full-width."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    return HALF_WIDTH_BY_CJK.sub(lambda mark: mark.group().translate(FULL_WIDTH), text)


class ChatMixin:
    """`chat` and `stream_chat` with the official signatures, on top of `generate`."""

    generate: Callable
    device: torch.device

    def chat(
        self, tokenizer: PreTrainedTokenizer, query: str, history: History | None = None, **generation_kwargs
    ) -> tuple[str, History]:
        """One reply.

        Args:
            tokenizer: the model's tokenizer.
            query: what the user says now.
            history: past (query, reply) pairs.
            generation_kwargs: anything `generate` takes; the official defaults are sampling with top_p 0.7 and
                temperature 0.95, at most 2,048 tokens with the prompt.
        Returns:
            The reply and the history with this round.
        """
        *_, last = self.stream_chat(tokenizer, query, history, **generation_kwargs)
        return last

    def stream_chat(
        self, tokenizer: PreTrainedTokenizer, query: str, history: History | None = None, **generation_kwargs
    ) -> Iterator[tuple[str, History]]:
        """Yields the reply so far and the history with it, as tokens arrive. Arguments as for `chat`."""
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
