"""The text of an answer while its tokens arrive: what can be shown, where a stop string ends it, a call of a tool."""

from collections.abc import Collection, Sequence

from glm_shared.chat import TRAINING_TIME, ChatTokenizer, ToolCall


class AnswerText:
    """Turns the tokens of one answer into text.

    Args:
        tokenizer: of the model.
        stop: texts at which the answer ends; they are no part of it. Characters that the tokenizer takes for the same
            count as the same.
        tools: names of those that it may call, after a text or without one. A call is no part of the text.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), tools: Collection[str] = ()):
        self.tokenizer, self.stop = tokenizer, [text.translate(tokenizer.same_marks) for text in stop]
        self.tools = tools
        self.raw = ""  # as the tokenizer decodes it
        self.message = 0  # where the last message begins, which may be a call
        self.pending: list[str] = []  # the pieces of a character that is not complete
        self.stopped = False

    def add(self, token: int):
        """Adds a token; tokens after a stop string have no effect."""
        if self.stopped:
            return
        if token == self.tokenizer.message_token_id:
            self.message = len(self.raw)
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

    @property
    def call(self) -> ToolCall | None:
        """The call with which the answer ends, as far as it is known."""
        return self.tokenizer.parse_call(self.raw[self.message :], self.tools)

    def shown(self) -> str:
        """The beginning of the text that later tokens do not change."""
        if self.stopped:
            return self.final()
        may_be_call = self.tokenizer.begins_call(self.raw[self.message :], self.tools)
        raw = self.raw[: self.message] if may_be_call else self.raw
        marked = raw.translate(self.tokenizer.same_marks)
        held = max(held_back(marked, text) for text in (TRAINING_TIME, *self.stop))
        settled = raw[: len(raw) - held]
        if settled.endswith(tuple(self.tokenizer.open_marks)):
            settled = settled[:-1]
        return self.tokenizer.clean_response(settled)

    def final(self) -> str:
        """The complete text, as `clean_response` formats it."""
        if self.pending:
            pieces, self.pending = self.pending, []
            self.append(self.tokenizer.convert_tokens_to_string(["a", *pieces])[1:])
        return self.tokenizer.clean_response(self.raw[: self.message] if self.call else self.raw)


def held_back(text: str, awaited: str) -> int:
    """The length of the longest end of a text with which `awaited` may begin."""
    lengths = range(min(len(awaited) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(awaited[:length])), 0)
