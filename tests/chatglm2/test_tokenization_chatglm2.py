"""chatglm2/tokenization_chatglm2.py, compared with the official tokenizers of ChatGLM2-6B and ChatGLM3-6B.

Golden values come from tests/golden/chatglm2/tok_cases.json, which the official code made with the genuine
tokenizer.model; tests that need this file are skipped without it.
"""

import json
import pickle
import shutil

import pytest
from conftest import GOLDEN, ROOT
from transformers import AutoTokenizer

from chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from chatglm2.chat import build_rounds, clean_response

CASES = json.loads((GOLDEN / "chatglm2" / "tok_cases.json").read_text(encoding="utf-8"))


def genuine(version: int) -> ChatGLM2Tokenizer:
    folder = ROOT / "THUDM" / f"chatglm{version}-6b"
    if not (folder / "tokenizer.model").is_file():
        pytest.skip(f"no genuine tokenizer.model in {folder}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def second() -> ChatGLM2Tokenizer:
    return genuine(2)


@pytest.fixture(scope="module")
def third() -> ChatGLM3Tokenizer:
    return genuine(3)


def test_genuine_folders_have_the_tokenizer_of_their_version(second, third):
    assert (type(second), type(third)) == (ChatGLM2Tokenizer, ChatGLM3Tokenizer)
    assert (second.vocab_size, len(second)) == (CASES["vocab_size_v2"],) * 2
    assert (third.vocab_size, len(third)) == (CASES["vocab_size_v3"],) * 2
    named = {"<bos>": "bos_token_id", "<eos>": "eos_token_id", "<pad>": "pad_token_id"}
    for token, expected in CASES["special"].items():
        found = getattr(third, named[token]) if token in named else third.control_ids[token]
        assert found == expected, token
    assert third.stop_token_ids == [2, 64795, 64797] and second.stop_token_ids == [2]


@pytest.mark.parametrize("version", [2, 3])
def test_ids_and_texts_equal_official(second, third, version):
    tokenizer = {2: second, 3: third}[version]
    for case in CASES["texts"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["v2"], case["text"]
        assert tokenizer(case["text"])["input_ids"] == case["v2_with_special"], case["text"]
        assert tokenizer.decode(case["v2"]) == case[f"v{version}_decoded"], case["text"]


def test_pair_equals_official(second):
    pair = CASES["pair"]
    assert second.encode(pair["a"], pair["b"]) == pair["ids"]


def test_left_padded_batch_equals_official(second):
    expected = CASES["v2_batch_padding"]
    batch = second(expected["texts"], padding=True)
    assert {name: batch[name] for name in batch} == {name: expected[name] for name in ("input_ids", "attention_mask")}


def messages_of(case: dict) -> list[dict]:
    """A query and the (question, answer) pairs before it as messages."""
    texts = [*(text for turn in case["history"] for text in turn), case["query"]]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_rounds_of_the_second_equal_official():
    for case in CASES["v2_chat"]:
        assert build_rounds(case["query"], case["history"]) == case["prompt"]


def test_prompts_of_the_second_equal_official(second):
    for case in CASES["v2_chat"]:
        assert second.build_prompt(case["query"], case["history"]) == case["prompt"]
        assert second.build_prompt_ids(case["query"], case["history"]) == case["input_ids"]
        assert second.apply_chat_template(messages_of(case))["input_ids"] == case["input_ids"]
        assert second.apply_chat_template(messages_of(case), tokenize=False) == case["prompt"]


def test_prompts_of_the_third_equal_official(third):
    for case in CASES["v3_chat"]:
        messages = [*case["history"], {"role": case["role"], "content": case["query"]}]
        assert third.apply_chat_template(messages)["input_ids"] == case["input_ids"]
        assert third.conversation_ids(messages) == case["input_ids"]
    for case in CASES["v3_single_message"]:
        assert third.message_ids(case["role"], case["content"], case["metadata"]) == case["ids"]


def test_rounds_of_the_third_are_messages(third):
    history = [["你好", "你好！"], ["天气", "晴。"]]
    messages = [{"role": "system", "content": "简短。"}]
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "再见"})
    assert third.build_prompt_ids("再见", history, "简短。") == third.conversation_ids(messages)
    assert third.build_prompt("再见", history, "简短。") == third.apply_chat_template(messages, tokenize=False)
    messages[0]["content"] = "前缀简短。"
    assert third.build_prompt_ids("再见", history, "简短。", "前缀") == third.conversation_ids(messages)


def test_answer_of_the_third_is_a_message(third):
    # With the role before it, the answer is the message that the official code builds; </s> ends it.
    prompt, answer = third.build_prompt_ids("你好"), third.build_answer_ids("好")
    assert prompt[-third.prompt_end :] + answer == [*third.message_ids("assistant", "好"), 2]


def test_answer_of_the_second(second):
    assert second.build_answer_ids("你好") == [36474, 54591, 2]
    assert second.prompt_end == 0


def test_tools_and_their_results(third):
    tools = [{"name": "天气"}]
    described = json.dumps(tools, indent=4, ensure_ascii=False)
    assert third.message_ids("system", "用工具。", tools=tools) == third.message_ids(
        "system", f"用工具。\n{described}"
    )
    assert third.message_ids("tool", "晴") == third.message_ids("observation", "晴")
    with pytest.raises(ValueError, match="role 'judge', expected one of system, user"):
        third.message_ids("judge", "x")


@pytest.mark.parametrize("text", ["<|user|>", "</s>", "[gMASK]sop", "<|observation|>\n晴"])
def test_text_that_looks_like_a_control_token_stays_text(second, third, text):
    for tokenizer in (second, third):
        usual, ids = tokenizer.build_prompt_ids("好", [["一", "二"]]), tokenizer.build_prompt_ids(text, [[text, text]])
        control = {*tokenizer.control_ids.values(), tokenizer.eos_token_id}
        assert [i for i in ids if i in control] == [i for i in usual if i in control]
        assert not control & {*tokenizer.build_answer_ids(text)[:-1]}


def test_replies_equal_official():
    for case in CASES["v2_process_response"]:
        assert clean_response(case["text"]) == case["out"]
    for case in CASES["v3_process_response"]:
        if isinstance(case["content"], str):
            assert clean_response(case["text"]) == case["content"]
        else:  # the call of a tool, which the official code evaluates
            assert clean_response(case["text"]) == case["text"].strip()


def test_control_tokens_give_no_text(second, third):
    decode = CASES["decode"]
    assert third.decode(decode["ids"], skip_special_tokens=True) == "\n 你好 \n 你好"
    assert second.decode(decode["v2_ids"], skip_special_tokens=True) == decode["v2"]


def test_saved_tokenizers_are_read_again(second, third, tmp_path):
    for tokenizer in (second, third):
        folder = tmp_path / type(tokenizer).__name__
        tokenizer.save_pretrained(folder)
        for again in (AutoTokenizer.from_pretrained(folder), pickle.loads(pickle.dumps(tokenizer))):
            assert type(again) is type(tokenizer)
            assert again.build_prompt_ids("你好<|user|>") == tokenizer.build_prompt_ids("你好<|user|>")


def test_unknown_version_is_asked_for(second, tmp_path):
    shutil.copyfile(second.vocab_file, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "ChatGLMTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='Add "chatglm_version": 2 or 3 to tokenizer_config'):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chatglm_version": 3}))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ChatGLM3Tokenizer
