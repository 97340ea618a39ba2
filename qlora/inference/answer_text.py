"""The text of an answer while its tokens arrive: what can be shown already, and where a stop string ends it."""

from collections.abc import Sequence

from glm_shared.chat import TRAINING_TIME, ChatTokenizer


class AnswerText:
    """Turns the tokens of one answer into text.

    Args:
        tokenizer: of the model.
        stop: texts at which the answer ends; they are no part of it. Characters that the tokenizer takes for the same
            count as the same.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [text.translate(tokenizer.same_marks) for text in stop]
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
        tail = self.raw[searched:].translate(self.tokenizer.same_marks)
        ends = [searched + tail.index(stop) for stop in self.stop if stop in tail]
        if ends:
            self.raw, self.stopped = self.raw[: min(ends)], True

    def shown(self) -> str:
        """The beginning of the answer that later tokens do not change."""
        if self.stopped:
            return self.final()
        raw = self.raw.translate(self.tokenizer.same_marks)
        held = max(held_back(raw, text) for text in (TRAINING_TIME, *self.stop))
        settled = self.raw[: len(self.raw) - held]
        if settled.endswith(tuple(self.tokenizer.open_marks)):
            settled = settled[:-1]
        return self.tokenizer.clean_response(settled)

    def final(self) -> str:
        """The complete answer, as `clean_response` formats it."""
        if self.pending:
            pieces, self.pending = self.pending, []
            self.append(self.tokenizer.convert_tokens_to_string(["a", *pieces])[1:])
        return self.tokenizer.clean_response(self.raw)


def held_back(text: str, awaited: str) -> int:
    """The length of the longest end of a text with which `awaited` may begin."""
    lengths = range(min(len(awaited) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(awaited[:length])), 0)
