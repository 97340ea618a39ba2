"""qlora/inference/answer_text.py: the pieces of a stream are the beginning of the answer, whatever the tokens are."""

import random

import pytest

from chatglm import ChatGLMTokenizer
from chatglm.chat import clean_response
from chatglm2 import ChatGLM3Tokenizer
from chatglm2.chat import clean_response as clean_chatglm3
from chatglm2.tool_calls import parse_call
from qlora.inference.answer_text import AnswerText, held_back


class Letters:
    """A tokenizer whose tokens are short texts, given by their place in a list."""

    open_marks, same_marks, message_token_id = ChatGLMTokenizer.open_marks, ChatGLMTokenizer.same_marks, None
    begins_call, parse_call = ChatGLMTokenizer.begins_call, ChatGLMTokenizer.parse_call
    clean_response = staticmethod(clean_response)

    def __init__(self, pieces: list[str]):
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool) -> list[str]:
        return [self.pieces[i] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def shown_and_final(text: AnswerText, tokens: range) -> tuple[list[str], str]:
    shown = []
    for token in tokens:
        text.add(token)
        shown.append(text.shown())
    return shown, text.final()


def answer(pieces: list[str], *stop: str) -> tuple[list[str], str]:
    return shown_and_final(AnswerText(Letters(pieces), stop), range(len(pieces)))


def test_text_of_tokens_is_that_of_the_tokenizer(tokenizer):
    generator = random.Random(0)
    for _ in range(300):
        ids = generator.choices(range(5, tokenizer.vocab_size), k=8)
        text = AnswerText(tokenizer)
        for token in ids:
            text.add(token)
        assert text.final() == clean_response(tokenizer.decode(ids, skip_special_tokens=True))


def test_what_was_shown_stays():
    generator, alphabet = random.Random(0), [*"裙a ,!?\n[]", "[[训", "练时", "间]]", "[[训练时间]]", "，"]
    for _ in range(2000):
        pieces = generator.choices(alphabet, k=8)
        stops = generator.choices(["裙a", ",", "]]", "\n\n", "a[["], k=generator.randrange(3))
        shown, final = answer(pieces, *stops)
        for shorter, longer in zip(shown, [*shown[1:], final], strict=True):
            assert longer.startswith(shorter)
        whole = "".join(pieces).replace("，", ",")
        ends = [whole.index(stop) for stop in stops if stop in whole]
        assert final == clean_response("".join(pieces)[: min(ends, default=None)])


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["白", ",", "裙", ","], ["白", "白", "白，裙", "白，裙"]),
        (["a", ",", "b"], ["a", "a", "a,b"]),
        (["[[训", "练时间]]", "裙"], ["", "2023年", "2023年裙"]),
        ([" a", " ", " b "], ["a", "a", "a  b"]),
    ],
)
def test_what_may_still_change_is_not_shown(pieces, shown):
    assert answer(pieces)[0] == shown


@pytest.mark.parametrize("stop", ["。白", "b", "，", ","])
def test_stop_string_over_the_border_of_tokens(stop):
    text = AnswerText(Letters(["裙,。", "白abc", "never"]), [stop])
    shown, final = shown_and_final(text, range(3))
    assert text.stopped and "never" not in final
    assert final == {"。白": "裙,。"[:2].replace(",", "，"), "b": "裙，。白a", "，": "裙", ",": "裙"}[stop]
    assert final.startswith(shown[0])


class Messages(Letters):
    """Letters whose first token begins another message, as that of ChatGLM3-6B."""

    message_token_id = 0
    clean_response = staticmethod(clean_chatglm3)
    begins_call, parse_call = ChatGLM3Tokenizer.begins_call, ChatGLM3Tokenizer.parse_call


def test_call_is_not_shown_and_what_is_no_call_is():
    generator, tools = random.Random(0), ["weather"]
    pieces = ["", "\n", "裙", "wea", "ther", "weather\n", "```python\ntool_call(", "x=1", ")\n```", "[[训练", "时间]]"]
    groups, found = [[0], [1, 2], [3, 4, 1], [5, 6, 7, 8], [9, 10]], set()
    for _ in range(3000):
        tokens = [token for group in generator.choices(groups, k=4) for token in group]
        text = AnswerText(Messages(pieces), ["裙裙"], tools)
        shown, final = shown_and_final(text, tokens)
        for shorter, longer in zip(shown, [*shown[1:], final], strict=True):
            assert longer.startswith(shorter)
        messages = [[]]
        for token in tokens:
            messages += [[]] if token == 0 else []
            messages[-1].append(pieces[token])
        *before, last = ["".join(message) for message in messages]
        assert text.call == parse_call(last, tools)
        assert final == clean_chatglm3("".join([*before, last] if text.call is None else before))
        found.add((text.call is not None, bool(final)))
    assert len(found) == 4


def test_held_back_is_the_longest_beginning():
    assert [held_back("xab", text) for text in ("abc", "bc", "c", "xab", "ab")] == [2, 1, 0, 0, 0]
