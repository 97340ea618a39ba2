"""chatglm2/configuration_chatglm2.py: official files are read and told apart, other models are refused."""

import json

import pytest
from conftest import ROOT
from transformers import AutoConfig

from chatglm import ChatGLMConfig
from chatglm2 import ChatGLM2Config

# The keys and values that config.json of THUDM/chatglm2-6b and THUDM/chatglm3-6b have in common.
OFFICIAL = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OFFICIAL2 = OFFICIAL | {"_name_or_path": "THUDM/chatglm2-6b", "seq_length": 32768, "transformers_version": "4.27.1"}
OFFICIAL3 = OFFICIAL | {"_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192, "transformers_version": "4.30.2"}


def read(folder, values: dict):
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(("values", "version", "name"), [(OFFICIAL2, 2, "ChatGLM2-6B"), (OFFICIAL3, 3, "ChatGLM3-6B")])
def test_official_file_is_read(tmp_path, values, version, name):
    config = read(tmp_path, values)
    assert type(config) is ChatGLM2Config
    assert (config.chatglm_version, config.display_name) == (version, name)
    names = ("padded_vocab_size", "hidden_size", "num_layers", "kv_channels", "seq_length", "eos_token_id")
    assert {name: getattr(config, name) for name in names} == {name: values[name] for name in names}


@pytest.mark.parametrize("version", [2, 3])
def test_genuine_file_is_read(version):
    folder = ROOT / "THUDM" / f"chatglm{version}-6b"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no genuine config.json in {folder}")
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ChatGLM2Config and config.chatglm_version == version
    genuine = json.loads((folder / "config.json").read_text())
    del genuine["transformers_version"], genuine["torch_dtype"]  # written for the dtype of the weights
    assert config.official_values() == genuine


def test_names_that_transformers_uses(tmp_path):
    config = read(tmp_path, OFFICIAL2)
    assert (config.vocab_size, config.num_hidden_layers, config.intermediate_size) == (65024, 28, 13696)
    assert (config.max_position_embeddings, config.num_key_value_heads, config.head_dim) == (32768, 2, 128)


def test_sizes_are_those_of_the_official_weights():
    # Source: the index of THUDM/chatglm3-6b, total_size 12487168064 bytes of fp16, of which 64 are inv_freq; norms and
    # the bias of the projection are no matrices.
    config = ChatGLM2Config()
    vectors = config.num_layers * (2 * config.hidden_size + 4608) + config.hidden_size
    matrices = config.num_hidden_layers * config.weights_per_layer + config.embedding_weights
    assert 2 * (matrices + vectors) + 64 == 12487168064
    assert config.multiplied_weights == matrices - config.head_weights


def test_saved_configuration_is_read_again(tmp_path):
    config = read(tmp_path, OFFICIAL3)
    config.save_pretrained(tmp_path / "saved")
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert again.chatglm_version == 3 and again.official_values() == config.official_values()


@pytest.mark.parametrize(
    ("values", "version"),
    [
        ({"_name_or_path": "somewhere/ChatGLM3-6B-32k"}, 3),
        ({"_name_or_path": "THUDM/codegeex2-6b"}, 2),
        ({"_name_or_path": "/data/my-model"}, None),
        ({"_name_or_path": "/data/my-model", "chatglm_version": 3}, 3),
    ],
)
def test_version(tmp_path, values, version):
    assert read(tmp_path, OFFICIAL | values).chatglm_version == version


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"quantization_bit": 4}, "quantization_bit=4: these weights are already quantized"),
        ({"pre_seq_len": 128}, "P-tuning"),
        ({"rope_ratio": 50}, "rope_ratio=50"),
        ({"padded_vocab_size": 151552, "eos_token_id": [151329, 151336, 151338]}, "describes GLM-4"),
        ({"_name_or_path": "THUDM/glm-4-9b-chat"}, "describes GLM-4"),
        ({"multi_query_attention": False}, "multi_query_attention=False: it is neither"),
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"rmsnorm": False}, "rmsnorm=False"),
    ],
)
def test_other_variant_is_refused(tmp_path, values, reason):
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, OFFICIAL2 | values)


def test_each_model_has_its_configuration(tmp_path):
    first = {"model_type": "chatglm", "inner_hidden_size": 16384, "position_encoding_2d": True, "vocab_size": 130528}
    assert type(read(tmp_path, first)) is ChatGLMConfig
    assert type(read(tmp_path, OFFICIAL2)) is ChatGLM2Config
