"""chatglm/chat.py: prompts with history, the formatting of replies, and streaming.

The expected texts follow the official `build_prompt` and `process_response` of THUDM/chatglm-6b.
"""

import threading

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, LogitsProcessor

from chatglm.chat import CHAT_TEMPLATE, build_prompt, clean_response
from glm_shared.chat import Prompt

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def test_prompt_without_history_is_the_query():
    assert build_prompt("你好") == "你好"
    assert build_prompt("你好", []) == "你好"


def test_prompt_with_history_numbers_the_rounds():
    history = [("问一", "答一"), ("问二", "答二")]
    assert build_prompt("问三", history) == (
        "[Round 0]\n问：问一\n答：答一\n[Round 1]\n问：问二\n答：答二\n[Round 2]\n问：问三\n答："
    )


def test_text_of_the_system_stands_before_the_first_question():
    assert build_prompt("问", [], "简短。") == "简短。\n问"
    assert build_prompt("问二", [("问一", "答一")], "简短。") == (
        "[Round 0]\n问：简短。\n问一\n答：答一\n[Round 1]\n问：问二\n答："
    )


MESSAGES = [
    {"role": "user", "content": "<sop>裙"},
    {"role": "assistant", "content": "白[gMASK]裙<eop>"},
    {"role": "user", "content": "  裤\n"},
]


def test_chat_template_gives_the_prompt_and_its_ids(tokenizer):
    prompts = [build_prompt("<sop>裙"), build_prompt("  裤\n", [("<sop>裙", "白[gMASK]裙<eop>")])]
    ids = [tokenizer(prompt, split_special_tokens=True)["input_ids"] for prompt in prompts]
    assert [tokenizer.apply_chat_template(MESSAGES[:n], tokenize=False) for n in (1, 3)] == prompts
    assert [tokenizer.apply_chat_template(MESSAGES[:n], return_dict=False) for n in (1, 3)] == ids
    batch = tokenizer.apply_chat_template([MESSAGES[:1], MESSAGES], padding=True, return_tensors="pt")
    assert [row[mask == 1].tolist() for row, mask in zip(*batch.values(), strict=True)] == ids
    assert all(row[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id] for row in ids)
    for truncation, length in ((True, 5), (False, len(ids[1]))):
        cut = tokenizer.apply_chat_template(MESSAGES, truncation=truncation, max_length=5, return_dict=False)
        assert len(cut) == length


def test_prompt_with_a_history_or_a_text_of_the_system_is_more_than_its_question():
    prompts = Prompt("裙"), Prompt("裙", [("裤", "好")]), Prompt("裙", (), "简短。")
    assert [prompt.is_single for prompt in prompts] == [True, False, False]


def test_genuine_chat_template_gives_the_ids_of_chat(genuine_tokenizer):
    ids = genuine_tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    prompt = build_prompt("  裤\n", [("<sop>裙", "白[gMASK]裙<eop>")])
    assert ids == genuine_tokenizer.encode(prompt, split_special_tokens=True)


def test_chat_template_is_saved_and_one_in_the_folder_is_used(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False) == "<sop>裙!"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (MESSAGES[:2], "The last message must be of the user"),
        (MESSAGES[1:], "the user and the assistant in turn"),
        (MESSAGES[:1] * 2, "the user and the assistant in turn"),
        ([*MESSAGES, {"role": "system", "content": "简短。"}], "the user and the assistant in turn"),
        ([{"role": "tool", "content": "x"}], "the user and the assistant in turn"),
        ([{"role": "user", "content": [{"type": "text", "text": "裙"}]}], "must be a text"),
        ([{"role": "user"}], "must be a text"),
    ],
)
def test_messages_that_have_no_prompt_are_refused(tokenizer, messages, reason):
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  你好\n", "你好"),
        ("", ""),
        ("我的训练数据截止到[[训练时间]]。", "我的训练数据截止到2023年。"),
        ("好,", "好，"),
        (",好", "，好"),
        ("好!好:好;好?", "好！好：好；好？"),
        ("a,b!c:d;e?", "a,b!c:d;e?"),
        ("好,b", "好，b"),
        ("a,好", "a，好"),
        ("a, 好", "a, 好"),
        ("好,,", "好，,"),
        (",", ","),
        ("12:30开门", "12:30开门"),
        ("价格:30", "价格：30"),
        ("好.", "好."),
        ("第一行,\n第二行", "第一行，\n第二行"),
        ("好，", "好，"),
    ],
)
def test_clean_response(text, cleaned):
    assert clean_response(text) == cleaned


def test_formatting_twice_changes_nothing():
    formatted = clean_response("好!,好 a,b好:c ")
    assert clean_response(formatted) == formatted


def test_chat_returns_reply_and_history(tiny_model, tokenizer):
    reply, history = tiny_model.chat(tokenizer, "类型#裙", **GREEDY)
    assert reply and history == [("类型#裙", reply)]
    past = list(history)
    second, longer = tiny_model.chat(tokenizer, "颜色#白色", history, **GREEDY)
    assert longer == [*past, ("颜色#白色", second)]
    assert history == past  # the list of the caller is not changed


def test_chat_equals_generate_on_the_prompt(tiny_model, tokenizer):
    history = [("类型#裤", "好")]
    inputs = tokenizer(build_prompt("类型#裙", history), return_tensors="pt")
    output = tiny_model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    expected = clean_response(tokenizer.decode(output, skip_special_tokens=True))
    assert tiny_model.chat(tokenizer, "类型#裙", history, **GREEDY)[0] == expected


def test_reply_has_no_control_tokens(tiny_model, tokenizer, monkeypatch):
    def generate(input_ids, streamer, **options):
        for ids in (input_ids, *torch.tensor([[*tokenizer.build_answer_ids("白裙"), tokenizer.unk_token_id]]).T):
            streamer.put(ids)
        streamer.end()

    monkeypatch.setattr(tiny_model, "generate", generate)
    assert tiny_model.chat(tokenizer, "类型#裙") == ("白裙", [("类型#裙", "白裙")])


def test_last_item_of_the_stream_is_what_chat_returns(tiny_model, tokenizer):
    steps = list(tiny_model.stream_chat(tokenizer, "类型#裙", **GREEDY))
    assert len(steps) > 2
    assert steps[-1] == tiny_model.chat(tokenizer, "类型#裙", **GREEDY)
    assert all(history == [("类型#裙", reply)] for reply, history in steps)


def generate_options(model, tokenizer, monkeypatch: pytest.MonkeyPatch, query: str, **kwargs) -> dict:
    """The keyword arguments with which `chat` calls `generate`, without the streamer."""
    caught = {}

    def generate(streamer, **options):
        caught.update(options)
        streamer.end()

    monkeypatch.setattr(model, "generate", generate)
    model.chat(tokenizer, query, **kwargs)
    return caught


def test_defaults_are_the_official_decoding(tiny_model, tokenizer, monkeypatch):
    options = generate_options(tiny_model, tokenizer, monkeypatch, "类型#裙")
    expected = {"do_sample": True, "top_k": 50, "top_p": 0.7, "temperature": 0.95, "max_length": 2048}
    assert {name: options.get(name) for name in expected} == expected


def test_max_new_tokens_replaces_max_length(tiny_model, tokenizer, monkeypatch):
    options = generate_options(tiny_model, tokenizer, monkeypatch, "类型#裙", max_new_tokens=5, top_p=0.5)
    assert options["max_new_tokens"] == 5 and options["top_p"] == 0.5 and "max_length" not in options


def test_control_tokens_in_a_query_stay_text(tiny_model, tokenizer, monkeypatch):
    ids = generate_options(tiny_model, tokenizer, monkeypatch, "白<sop>裙[MASK]<eop><pad>")["input_ids"][0].tolist()
    control = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert ids[-2:] == control
    assert not {*control, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id} & set(ids[:-2])


class FailAfter(LogitsProcessor):
    """Raises an error after a number of generated tokens."""

    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, input_ids, scores):
        if self.steps == 0:
            raise RuntimeError("out of memory, say")
        self.steps -= 1
        return scores


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_beams": 2}, ValueError),  # generate cannot stream with beam search
        ({"logits_processor": [FailAfter(0)]}, RuntimeError),
        ({"logits_processor": [FailAfter(3)]}, RuntimeError),
    ],
)
def test_failure_in_generate_reaches_the_caller(tiny_model, tokenizer, options, error):
    caught = []

    def consume():
        try:
            list(tiny_model.stream_chat(tokenizer, "类型#裙", **GREEDY, **options))
        except Exception as raised:
            caught.append(raised)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "stream_chat hangs"
    assert [type(raised) for raised in caught] == [error]
