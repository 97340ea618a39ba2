"""chatglm/configuration_chatglm.py: the official file is read, those of similar models are refused."""

import json

import pytest
from transformers import AutoConfig

from chatglm import ChatGLMConfig

# config.json of THUDM/chatglm-6b.
OFFICIAL = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}
SHAPE = {name: value for name, value in OFFICIAL.items() if type(value) in (int, float, bool)}


def read(tmp_path, values: dict) -> ChatGLMConfig:
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return AutoConfig.from_pretrained(tmp_path)


def test_official_file_is_read(tmp_path):
    config = read(tmp_path, OFFICIAL)
    assert type(config) is ChatGLMConfig
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE


def test_defaults_are_the_official_values():
    config = ChatGLMConfig()
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE


def test_names_that_transformers_uses(tmp_path):
    config = read(tmp_path, OFFICIAL)
    assert config.num_hidden_layers == 28
    assert config.intermediate_size == 16384
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings


def test_save_and_load_keeps_values(tmp_path):
    config = ChatGLMConfig(num_layers=3, hidden_size=64, gmask_token_id=507)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


# Keys in the config.json of THUDM/chatglm2-6b that the first ChatGLM does not have.
CHATGLM2 = {"padded_vocab_size": 65024, "multi_query_attention": True, "ffn_hidden_size": 13696, "rmsnorm": True}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        *(({name: value}, name) for name, value in CHATGLM2.items()),
        (CHATGLM2, "ChatGLM2"),
        ({"quantization_bit": 4}, "quantization_bit"),
        ({"quantization_bit": 8}, "quantization_bit"),
        ({"pre_seq_len": 128}, "pre_seq_len"),
        ({"position_encoding_2d": False}, "position_encoding_2d"),
    ],
)
def test_another_architecture_or_variant_is_refused(tmp_path, changes, key):
    with pytest.raises(ValueError, match=key):
        read(tmp_path, OFFICIAL | changes)


@pytest.mark.parametrize("changes", [{"quantization_bit": 0}, {"pre_seq_len": None, "prefix_projection": False}])
def test_keys_of_disabled_variants_are_accepted(tmp_path, changes):
    read(tmp_path, OFFICIAL | changes)


def test_training_flops_are_those_of_the_weights_that_are_multiplied():
    config = ChatGLMConfig()
    weights = config.num_layers * config.weights_per_layer
    last_mlp = 2 * config.hidden_size * config.inner_hidden_size
    assert config.training_flops(tokens=100, labels=100) == 4 * 100 * config.multiplied_weights
    # Without labels neither the head nor the last layer's MLP computes anything.
    assert config.training_flops(tokens=100, labels=0) == 4 * 100 * (weights - last_mlp)
