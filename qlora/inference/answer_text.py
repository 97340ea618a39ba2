"""The text of an answer while its tokens arrive: what can be shown already, and where a stop string ends it."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizer

from chatglm.chat import FULL_WIDTH, TRAINING_TIME, clean_response

HALF_WIDTH = {full: half for half, full in FULL_WIDTH.items()}
OPEN_MARK = re.compile("[,!:;?]$")  # becomes full-width, or not, by the next character


class AnswerText:
    """Turns the tokens of one answer into text.

    Args:
        tokenizer: of the model.
        stop: texts at which the answer ends; they are no part of it. Full-width and half-width punctuation count as
            the same, since the tokenizer makes half-width marks of both.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [text.translate(HALF_WIDTH) for text in stop]
        self.raw = ""  # as the tokenizer decodes it
        self.pending: list[str] = []  # the pieces of a character that is not complete
        self.stopped = False

    def add(self, token: int):
        """Adds a token; tokens after a stop string have no effect."""
        if self.stopped:
            return
        self.pending += self.tokenizer.convert_ids_to_tokens([token], skip_special_tokens=True)
        # SentencePiece drops the space before the first piece, here the "a", and not those before the others.
        text = self.tokenizer.convert_tokens_to_string(["a", *self.pending])[1:]
        if not text.endswith("\ufffd"):
            self.pending = []
            self.append(text)

    def append(self, text: str):
        """Adds text, up to the first stop string."""
        searched = max(0, len(self.raw) - max(map(len, self.stop), default=0))
        self.raw += text
        tail = self.raw[searched:].translate(HALF_WIDTH)
        ends = [searched + tail.index(stop) for stop in self.stop if stop in tail]
        if ends:
            self.raw, self.stopped = self.raw[: min(ends)], True

    def shown(self) -> str:
        """The beginning of the answer that later tokens do not change."""
        if self.stopped:
            return self.final()
        held = max(held_back(self.raw.translate(HALF_WIDTH), text) for text in (TRAINING_TIME, *self.stop))
        return clean_response(OPEN_MARK.sub("", self.raw[: len(self.raw) - held]))

    def final(self) -> str:
        """The complete answer, as `clean_response` formats it."""
        if self.pending:
            pieces, self.pending = self.pending, []
            self.append(self.tokenizer.convert_tokens_to_string(["a", *pieces])[1:])
        return clean_response(self.raw)


def held_back(text: str, awaited: str) -> int:
    """The length of the longest end of a text with which `awaited` may begin."""
    lengths = range(min(len(awaited) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(awaited[:length])), 0)
