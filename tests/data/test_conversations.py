"""qlora/data/conversations.py: conversations that are accepted or refused, their prompts and their samples."""

import json

import hypothesis.strategies as st
import pytest
import torch
from conftest import hostile_examples, write_rows
from datasets import Dataset
from hypothesis import given

from glm_shared.chat import ChatMixin, Prompt
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator
from qlora.data.conversations import FIELDS, SPEAKERS
from qlora.data.dataset import SampleEncoder, load_samples
from qlora.data.rows import parse_prompt, parse_row, read_prompts, read_rows
from qlora.training.preflight_report import show_sample

TEXTS = ["那里冷吗？", "很冷。", "夏天呢？", "凉爽。", "<sop>好[gMASK]", "不客气。<eop>"]
ROUNDS = [list(pair) for pair in zip(TEXTS[::2], TEXTS[1::2], strict=True)]


def messages(texts: list[str] = TEXTS, roles: tuple[str, str] = ("user", "assistant"), keys=("role", "content")):
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "简短回答。"}


def read(rows_file, *rows: dict) -> list[dict]:
    return list(read_rows(str(write_rows(rows_file, list(rows)))))


def samples_of(rows_file, rows: list[dict], encoder: SampleEncoder) -> Dataset:
    return load_samples(str(write_rows(rows_file, rows)), encoder)


# Rows that are accepted.


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"messages": messages()}, ""),
        ({"messages": [SYSTEM, *messages()]}, "简短回答。"),
        ({"messages": [SYSTEM, {"role": "developer", "content": "客气。"}, *messages()]}, "简短回答。\n客气。"),
        ({"messages": [SYSTEM | {"content": None}, *messages()]}, ""),
        ({"system": "客气。", "messages": [SYSTEM, *messages()]}, "客气。\n简短回答。"),
        ({"system": " ", "conversations": messages(roles=("human", "gpt"), keys=("from", "value"))}, ""),
        ({"conversations": [{"from": "system", "value": "客气。"}, *messages()]}, "客气。"),
        ({"conversation": messages(roles=("User", "Assistant")), "instruction": None, "output": "", "id": 7}, ""),
    ],
)
def test_conversation_is_read(rows_file, row, system):
    (found,) = read(rows_file, row)
    assert found == {
        "line": 1,
        "element": 0,
        "query": TEXTS[4],
        "history": ROUNDS[:2],
        "answer": TEXTS[5],
        "system": system,
        "turns": [1, 2, 3],
        "messages": "",
    }


@pytest.mark.parametrize("role", SPEAKERS["user"])
@pytest.mark.parametrize("other", SPEAKERS["assistant"])
def test_names_of_roles(rows_file, role, other):
    (found,) = read(rows_file, {"conversations": messages(roles=(role, other), keys=("from", "value"))})
    assert [*found["history"], [found["query"], found["answer"]]] == ROUNDS


@pytest.mark.parametrize("empty", [None, []])
def test_empty_conversation_beside_a_question_counts_as_none(rows_file, empty):
    (found,) = read(rows_file, {"messages": empty, "instruction": "问", "output": "答"})
    assert (found["query"], found["answer"], found["turns"]) == ("问", "答", [])


def test_answer_of_weight_0_is_not_trained_on(rows_file):
    weighted = messages()
    for message, weight in zip(weighted[1::2], (1, 0, None), strict=True):
        message["weight"] = weight
    (found,) = read(rows_file, {"messages": weighted})
    assert found["turns"] == [1, 3] and found["history"] == ROUNDS[:2]


def test_rows_with_an_output_may_have_a_text_of_the_system(rows_file):
    (found,) = read(rows_file, {"instruction": "问", "history": ROUNDS, "output": "答", "system": "简短回答。"})
    assert (found["system"], found["history"], found["turns"]) == ("简短回答。", ROUNDS, [])


# Rows that are refused.

USER, ASSISTANT = messages()[:2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "judge", "content": "x"}]}, "message 1 of 'messages': unknown role 'judge'; expecte"),
        ({"messages": [USER, USER]}, "message 2 of 'messages': two messages of the user in a row"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "message 3 of 'messages': two messages of the assistant in a"),
        ({"messages": [ASSISTANT, USER]}, "message 1 of 'messages': the assistant speaks first"),
        ({"messages": [SYSTEM, ASSISTANT]}, "message 2 of 'messages': the assistant speaks first"),
        ({"messages": [USER, SYSTEM]}, "message 2 of 'messages': a message of the system after the first question"),
        ({"messages": [USER, ASSISTANT, USER]}, "the conversation ends with a question; its answer is missing"),
        ({"messages": [USER | {"content": " \n"}]}, "message 1 of 'messages': field 'content' is empty"),
        (
            {"messages": [USER, ASSISTANT | {"content": None}]},
            "message 2 of 'messages': its content is null",
        ),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "its content is a list of parts; join their texts"),
        ({"messages": [{"from": "human"}]}, "message 1 of 'messages': field 'content' is missing; the message has"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "unknown field 'contents' (did you mean 'content'?)"),
        ({"messages": [], "instruction": "x"}, "field 'output' is missing; the row has 'messages', 'instruction'"),
        ({"messages": [{"content": "x"}]}, "message 1 of 'messages': field 'role' is missing; the message has 'con"),
        ({"messages": [{"role": 1, "content": "x"}]}, "message 1 of 'messages': field 'role' must be a string"),
        ({"messages": ["x"]}, "message 1 of 'messages': expected an object with role and content, found a text"),
        ({"messages": "x"}, "field 'messages' must be a list of messages, found a text"),
        ({"messages": {}}, "field 'messages' must be a list of messages, found an object"),
        ({"conversations": []}, "field 'conversations' has no question"),
        ({"messages": [{"role": "system", "text": "x"}]}, "message 1 of 'messages': field 'content' is missing"),
        ({"messages": [SYSTEM]}, "field 'messages' has no question"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "no answer to train on: each has the weight 0"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "field 'weight' is 0.5; expected 0"),
        ({"messages": messages(), "instruction": "x"}, "both 'messages' and 'instruction' are given; a row has"),
        ({"messages": messages(), "conversations": messages()}, "both 'messages' and 'conversations'"),
        ({"messages": messages(), "history": ROUNDS}, "both 'messages' and 'history'"),
        ({"messages": messages(), "sytem": "x"}, "unknown field 'sytem' (did you mean 'system'?)"),
        ({"messages": messages(), "system": 1}, "field 'system' must be a string, found a number"),
        ({"mesages": messages()}, "unknown field 'mesages' (did you mean 'messages'?)"),
        ({"messages": [USER | {"content": "\ud83d"}, ASSISTANT]}, "message 1 of 'messages': a lone surrogate"),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_broken_conversation_is_refused_with_file_place_and_reason(rows_file, row, reason, array):
    lines = [json.dumps(value) for value in ({"messages": messages()}, row)]
    rows_file.write_text(f"[{lines[0]},\n{lines[1]}]" if array else "\n".join(lines))
    with pytest.raises(ValueError) as raised:
        list(read_rows(str(rows_file)))
    place = "element 2 (line 2)" if array else "line 2"
    assert str(raised.value).startswith(f"{rows_file}, {place}: ") and reason in str(raised.value)


json_values = st.none() | st.sampled_from([0, 1, 0.5, "", "x\ny", "user", "gpt", [], {}, [{}]])
keys = st.sampled_from(["role", "from", "content", "value", "weight", "x"])
random_messages = st.lists(st.dictionaries(keys, json_values) | json_values, max_size=4)


@hostile_examples(40)
@given(row=st.dictionaries(st.sampled_from([*FIELDS, "system", "x"]), random_messages | json_values, min_size=1))
def test_random_conversation_is_read_or_refused_in_one_line(row):
    for parse in (parse_row, parse_prompt):
        try:
            parse(row)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1


# Prompts.


def test_prompt_of_a_conversation_is_that_of_its_last_answer(rows_file):
    write_rows(rows_file, [{"messages": [SYSTEM, *messages(TEXTS[:length])]} for length in (1, 2, 5, 6)])
    first, last = Prompt(TEXTS[0], [], SYSTEM["content"]), Prompt(TEXTS[4], ROUNDS[:2], SYSTEM["content"])
    assert list(read_prompts(str(rows_file)).values()) == [first, first, last, last]


class Recorder(ChatMixin):
    """`chat` without a model: keeps the ids that it gives to `generate`."""

    device = torch.device("cpu")

    def generate(self, input_ids, streamer, **options):
        self.ids = input_ids[0].tolist()
        streamer.end()


texts = st.text(st.sampled_from("问答裙 ,\n\t{}%<n>a\u3000") | st.characters(exclude_categories=["Cs"]), max_size=8)
pieces = st.sampled_from(["<sop>", "<eop>", "[gMASK]", "<pad>", "{{ x }}", "[Round 0]\n问：", "<|blank_2|>", "  "])
spoken = st.tuples(texts, pieces, texts).map("".join).filter(str.strip)
blank = st.sampled_from(["", "\n ", "\u3000"])


@hostile_examples(40)
@given(rounds=st.lists(st.tuples(spoken, spoken), max_size=3), query=spoken, system=spoken | blank)
def test_prompt_of_a_random_conversation_is_that_of_chat(rounds, query, system, tokenizer):
    spoken_texts = [text for pair in rounds for text in pair] + [query]
    conversation = [SYSTEM | {"content": system}, *messages(spoken_texts)]
    prompt = parse_prompt({"messages": conversation})
    system = system if system.strip() else ""
    assert prompt == (query, [list(pair) for pair in rounds], system)
    ids = tokenizer.build_prompt_ids(*prompt)
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == tokenizer.build_prompt(*prompt)
    assert tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"] == ids
    head = f"{system}\n" if system else ""  # stands before the first question
    first, *others = [*rounds, (query, "")]
    *past, (last, _) = [(head + first[0], first[1]), *others]
    chat = Recorder()
    chat.chat(tokenizer, last, past)
    assert chat.ids == ids
    control = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert [i for i in ids if i in (*control, tokenizer.eos_token_id, tokenizer.pad_token_id)] == control


# Samples.


def test_samples_of_a_conversation_are_those_of_separate_rows(rows_file, encoder, tmp_path):
    names = ("input_ids", "labels", "length", "prompt_cut", "answer_cut")
    separate = [
        {"instruction": question, "output": answer, "history": ROUNDS[:n], "system": SYSTEM["content"]}
        for n, (question, answer) in enumerate(ROUNDS)
    ]
    expected = samples_of(tmp_path / "separate.jsonl", separate, encoder).select_columns(names).to_list()
    found = samples_of(rows_file, [{"messages": [SYSTEM, *messages()]}], encoder)
    assert found.select_columns(names).to_list() == expected
    assert (found["line"][:], found["turn"][:]) == ([1] * 3, [1, 2, 3])


def test_packed_turns_have_the_loss_of_separate_rows(rows_file, encoder, tiny_model):
    found = samples_of(rows_file, [{"messages": messages()}], encoder)
    samples, collate = StepBatch.collate(list(found)).samples, PaddingFreeCollator(tiny_model.config)
    count = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    with torch.no_grad():
        packed = tiny_model(**collate(samples), num_items_in_batch=count).loss
        alone = [
            tiny_model(
                input_ids=torch.tensor([encoder.encode(question, ROUNDS[:n], answer)[0]]),
                labels=torch.tensor([encoder.encode(question, ROUNDS[:n], answer)[1]]),
                num_items_in_batch=count,
            ).loss
            for n, (question, answer) in enumerate(ROUNDS)
        ]
    torch.testing.assert_close(packed, sum(alone), atol=1e-5, rtol=0)


def test_only_the_last_answer_is_trained_on(rows_file, tokenizer):
    rows = [
        {"messages": messages()},
        {"instruction": "问", "history": ROUNDS, "output": "答"},
        {"messages": messages()[:2]},
    ]
    for train_on, turns in (("all", [1, 2, 3, 0, 1]), ("last", [3, 0, 1])):
        samples = samples_of(rows_file, rows, SampleEncoder(tokenizer, "", 512, 512, train_on))
        assert samples["turn"][:] == turns
        assert (
            load_samples(str(rows_file), SampleEncoder(tokenizer, "", 512, 512, train_on)).to_list()
            == samples.to_list()
        )


def test_samples_missing_in_the_cache_are_made_anew(rows_file, encoder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected = samples_of(rows_file, [{"messages": messages()}] * 3, encoder).to_list()
    assert len(expected) == 9
    (file,) = (tmp_path / "cache").rglob("cache-*.arrow")
    Dataset.from_file(str(file)).select(range(8)).flatten_indices(cache_file_name=str(file) + ".new")
    file.with_name(file.name + ".new").replace(file)
    assert load_samples(str(rows_file), encoder).to_list() == expected
    assert "is damaged" in caplog.text


def test_turn_without_tokens_is_named(rows_file, encoder):
    rows = [{"messages": messages()}, {"messages": messages([*TEXTS[:3], "\u200b", *TEXTS[4:]])}]
    with pytest.raises(
        ValueError, match=r"line 2, turn 2: the answer has nothing but characters that the tokenizer dr"
    ):
        samples_of(rows_file, rows, encoder)


def test_text_of_the_system_stays_when_rounds_are_dropped(rows_file, tokenizer):
    row = {"messages": [SYSTEM, *messages()]}
    whole, short = (tokenizer.build_prompt_ids(TEXTS[4], ROUNDS[n:2], SYSTEM["content"]) for n in (0, 1))
    for limit, expected in ((len(whole), whole), (len(whole) - 1, short), (len(short), short)):
        last = samples_of(rows_file, [row], SampleEncoder(tokenizer, "", limit, 512, "last"))[0]
        assert last["input_ids"][: len(expected)] == expected and last["prompt_cut"] is (limit < len(whole))


def test_turn_is_shown_and_reported(rows_file, encoder, tokenizer):
    sample = samples_of(rows_file, [{"messages": messages()}], encoder)[1]
    shown = show_sample(sample, tokenizer, color=False)
    assert shown.startswith(f"line 1, turn 2  {sample['length']} tokens, ")
    (row,) = StepBatch.collate([sample]).source_rows
    assert str(row) == "1 (turn 2)"
