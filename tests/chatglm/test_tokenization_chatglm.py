"""chatglm/tokenization_chatglm.py, compared with the official tokenizer and the genuine `ice_text.model`.

Golden values come from tests/golden/tokenizer.json: the official tokenizer on transformers 4.30.2, loaded with
`from_pretrained`. Tests that need no genuine file use a tiny tokenizer of the same layout.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN
from transformers import AutoTokenizer

from chatglm import ChatGLMTokenizer

EXPECTED = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
CONTROL_TOKENS = ("<sop>", "<eop>", "<pad>", "<unk>", "[MASK]", "[gMASK]", "[sMASK]", "<s>", "</s>")
TEXTS = (
    "类型#裙*颜色#白色",
    "宽松的阔腿裤。\n\n遮肉、\t完",
    "two  spaces,   three",
    "没见过的字 龘 😀 é",
    "",
    "1234567890",
)


# Against the official tokenizer.


@pytest.mark.parametrize("expected", EXPECTED["texts"], ids=lambda expected: ascii(expected["text"][:20]))
def test_text_equals_official(genuine_tokenizer, expected):
    text, ids = expected["text"], expected["ids"]
    assert genuine_tokenizer.encode(text, add_special_tokens=False) == ids
    assert genuine_tokenizer.encode(text) == expected["ids_with_special_tokens"]
    assert genuine_tokenizer.decode(ids) == expected["decoded"]
    assert genuine_tokenizer.decode(ids, skip_special_tokens=True) == expected["decoded_skip_special"]


@pytest.mark.parametrize("expected", EXPECTED["pairs"], ids=lambda expected: ascii(expected["text"][:20]))
def test_pair_equals_official(genuine_tokenizer, expected):
    assert genuine_tokenizer(expected["text"], expected["text_pair"])["input_ids"] == expected["input_ids"]


def test_left_padded_batch_equals_official(genuine_tokenizer):
    # The positions and the mask of this batch are tested in test_modeling_chatglm.py.
    expected = EXPECTED["left_padded_batch"]
    assert genuine_tokenizer(expected["texts"], padding=True)["input_ids"] == expected["input_ids"]


def test_ids_equal_official(genuine_tokenizer):
    expected = EXPECTED["special_token_ids"]
    assert genuine_tokenizer.convert_tokens_to_ids(list(expected)) == list(expected.values())
    assert genuine_tokenizer.vocab_size == EXPECTED["vocab_size"]
    assert len(genuine_tokenizer) == EXPECTED["vocab_size"]
    names = {"bos": "<sop>", "eos": "<eop>", "pad": "<pad>", "unk": "<unk>", "mask": "[MASK]", "gmask": "[gMASK]"}
    ids = {name: getattr(genuine_tokenizer, f"{name}_token_id") for name in names}
    assert ids == {name: expected[token] for name, token in names.items()}


@pytest.mark.parametrize("text", CONTROL_TOKENS)
def test_genuine_control_tokens_stay_text(genuine_tokenizer, text):
    assert_stays_text(genuine_tokenizer, text)


# With the tiny tokenizer.


def assert_stays_text(tokenizer: ChatGLMTokenizer, text: str):
    control = set(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))) - {tokenizer.unk_token_id}
    written = f"前{text}后"
    ids = tokenizer.encode(written, add_special_tokens=False, split_special_tokens=True)
    assert not control & set(ids)
    assert tokenizer.decode(ids) == written
    with_control_tokens = tokenizer(written, split_special_tokens=True)["input_ids"]
    assert with_control_tokens == [*ids, tokenizer.gmask_token_id, tokenizer.bos_token_id]
    batch = tokenizer([written, "x"], split_special_tokens=True, padding=True)["input_ids"]
    assert batch[0] == with_control_tokens and batch[1][0] == tokenizer.pad_token_id


@pytest.mark.parametrize("text", CONTROL_TOKENS)
def test_control_tokens_stay_text(tokenizer, text):
    assert_stays_text(tokenizer, text)


@pytest.mark.parametrize("text", ["<sop>", "<eop>", "<pad>", "[MASK]"])
def test_control_tokens_are_parsed_by_default(tokenizer, text):
    assert tokenizer.convert_tokens_to_ids(text) in tokenizer.encode(f"前{text}后", add_special_tokens=False)


@pytest.mark.parametrize("text", ["[gMASK]", "[sMASK]", "<s>", "</s>"])
def test_other_control_tokens_are_not_parsed(tokenizer, text):
    # They have pieces, and tokenizer_config.json names some of them, but the official tokenizer does not parse them.
    ids = tokenizer.encode(f"前{text}后", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(text) not in ids
    assert tokenizer.decode(ids) == f"前{text}后"


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_runs_of_whitespace_round_trip(tokenizer):
    for unit in (" ", "\t", "\n"):
        for count in range(1, 201):
            text = f"a{unit * count}b"
            ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert tokenizer.decode(ids) == text, (unit, count)


def test_runs_of_spaces_take_few_tokens(tokenizer):
    pieces = tokenizer.tokenize(f"a{' ' * 200}b", split_special_tokens=True)
    assert [piece for piece in pieces if "blank" in piece] == ["<|blank_80|>", "<|blank_80|>", "<|blank_40|>"]


def test_text_that_names_a_run_of_spaces(tokenizer):
    # The official decoding replaces the names of its 79 pieces of spaces, and no others.
    for number in [*map(str, range(100)), "02", "002", "080", "9" * 5000, "500000000", "-2", ""]:
        text = f"a<|blank_{number}|>b"
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        expected = f"a{' ' * int(number)}b" if number in map(str, range(2, 81)) else text
        assert tokenizer.decode(ids) == expected, number


def test_control_tokens_are_appended(tokenizer):
    text, pair = (tokenizer.encode(text, add_special_tokens=False) for text in ("类型#裙", "白色"))
    gmask, sop, eop = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"])
    assert tokenizer.encode("类型#裙") == [*text, gmask, sop]
    assert tokenizer("类型#裙", "白色")["input_ids"] == [*text, gmask, sop, *pair, eop]


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["类型#裙*颜色#白色", "裙"], padding=True)
    padding = len(batch["input_ids"][0]) - len(tokenizer.encode("裙"))
    assert batch["input_ids"][1][:padding] == [tokenizer.pad_token_id] * padding
    assert batch["attention_mask"][1] == [0] * padding + [1] * (len(batch["input_ids"][1]) - padding)


def test_id_beyond_the_pieces_is_unknown(tokenizer):
    # The embedding is padded to a multiple of 64, so that a model can generate such an id.
    assert tokenizer.convert_ids_to_tokens(tokenizer.vocab_size + 1) == "<unk>"
    assert tokenizer.decode([tokenizer.vocab_size + 1]) == tokenizer.decode([tokenizer.unk_token_id])


def assert_same_ids(one: ChatGLMTokenizer, other: ChatGLMTokenizer):
    for text in TEXTS:
        assert one.encode(text) == other.encode(text)
        assert one.encode(f"{text}<sop>", split_special_tokens=True) == other.encode(
            f"{text}<sop>", split_special_tokens=True
        )
    assert one.all_special_ids == other.all_special_ids
    assert len(one) == len(other)
    assert one.padding_side == other.padding_side


def test_save_and_load_keeps_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "once")
    once = AutoTokenizer.from_pretrained(tmp_path / "once")
    assert type(once) is ChatGLMTokenizer
    assert_same_ids(once, tokenizer)
    once.save_pretrained(tmp_path / "once")  # into its own folder
    once.save_pretrained(tmp_path / "twice")
    assert_same_ids(AutoTokenizer.from_pretrained(tmp_path / "twice"), tokenizer)


def test_saved_genuine_tokenizer_keeps_ids(genuine_tokenizer, tmp_path):
    genuine_tokenizer.save_pretrained(tmp_path)
    assert_same_ids(AutoTokenizer.from_pretrained(tmp_path), genuine_tokenizer)


def test_pickling_keeps_ids(tokenizer):
    assert_same_ids(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_image_tokens_are_refused(tokenizer, tmp_path):
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(Path(tokenizer.vocab_file).parent / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"num_image_tokens": 20000}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_image_tokens=20000"):
        AutoTokenizer.from_pretrained(tmp_path)
