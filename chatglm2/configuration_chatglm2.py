"""Configuration of ChatGLM2-6B and ChatGLM3-6B, read from the official `config.json` without changes to the file.

Shapes: B rows, T tokens.
"""

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from glm_shared.description import ModelDescription

VERSIONS = (2, 3)
TOKENIZER_CLASSES = {"ChatGLM2Tokenizer": 2, "ChatGLM3Tokenizer": 3}  # as this project saves them
GLM4_VOCABULARY = 151552  # padded_vocab_size of THUDM/glm-4-9b, which has the same keys
GLM4_EOS = 151329
# What the code here does not have an alternative for: key -> its value in the official files.
FIXED = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}
# Keys of an official file whose values make no difference here.
WITHOUT_EFFECT = {
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
}
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


def told_version(values: dict) -> int | None:
    """Which ChatGLM a config.json or tokenizer_config.json says it belongs to: 2, 3, or None if it does not say.

    The two have the same keys. Official files give the name of the model; those that this project writes have
    `chatglm_version`, or the class of the tokenizer. Later official files of the third have its roles in a chat
    template or a list of tokens.
    """
    if values.get("chatglm_version") in VERSIONS:
        return values["chatglm_version"]
    if values.get("tokenizer_class") in TOKENIZER_CLASSES:
        return TOKENIZER_CLASSES[values["tokenizer_class"]]
    name = str(values.get("_name_or_path") or values.get("name_or_path") or "").lower()
    if "chatglm3" in name:
        return 3
    if "chatglm2" in name or "codegeex2" in name:
        return 2
    tokens = [values.get("chat_template"), values.get("added_tokens_decoder"), values.get("additional_special_tokens")]
    return 3 if "<|assistant|>" in str(tokens) or "<|observation|>" in str(tokens) else None


@strict
class ChatGLM2Config(ModelDescription, PreTrainedConfig):
    """Sizes and token ids of a ChatGLM2-6B or ChatGLM3-6B model; the defaults are the values of ChatGLM2-6B.

    Args:
        padded_vocab_size: rows of the embedding, more than there are tokens.
        multi_query_group_num: heads of keys and values.
        kv_channels: features of a head.
        seq_length: most tokens of a prompt and its answer together.
        chatglm_version: 2 or 3, which have the same architecture and other prompts; None where it is not known.
    Raises:
        ValueError: the values describe GLM-4, or a variant that is not supported: int4 or int8 weights, P-tuning,
            positions that are stretched by `rope_ratio`, or another architecture.
    Source: `config.json` of THUDM/chatglm2-6b and THUDM/chatglm3-6b.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "vocab_size": "padded_vocab_size",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_group_num: int = 2
    ffn_hidden_size: int = 13696
    layernorm_epsilon: float = 1e-5
    seq_length: int = 32768
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    chatglm_version: int | None = None
    rope_ratio: float | int = 1
    quantization_bit: int = 0
    pre_seq_len: int | None = None

    def __post_init__(self, **kwargs):
        self.check_supported(kwargs)
        self.chatglm_version = self.chatglm_version or told_version(kwargs)
        for name in (*FIXED, *WITHOUT_EFFECT, "_name_or_path", "vocab_size"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def check_supported(self, others: dict):
        """ValueError for values that describe another model; `others` are the keys that are no fields."""
        if self.padded_vocab_size == GLM4_VOCABULARY or self.eos_token_id == GLM4_EOS or "glm-4" in str(others):
            raise ValueError(
                "config.json describes GLM-4, which has another tokenizer. This project has ChatGLM-6B, ChatGLM2-6B "
                "and ChatGLM3-6B."
            )
        if self.quantization_bit:
            raise ValueError(
                f"config.json has quantization_bit={self.quantization_bit}: these weights are already quantized. "
                "Use the 16-bit files of THUDM/chatglm2-6b or chatglm3-6b; they are quantized to 4 bits while loading."
            )
        if self.pre_seq_len:
            raise ValueError(
                f"config.json has pre_seq_len={self.pre_seq_len}: P-tuning checkpoints are not supported."
            )
        if self.rope_ratio != 1:
            raise ValueError(
                f"config.json has rope_ratio={self.rope_ratio}: the long-context variants of ChatGLM2-6B and "
                "ChatGLM3-6B, which stretch the positions in two different ways, are not supported. Use the files of "
                "THUDM/chatglm2-6b or THUDM/chatglm3-6b."
            )
        different = {key: others[key] for key, value in FIXED.items() if others.get(key, value) != value}
        if different:
            found = ", ".join(f"{key}={value}" for key, value in different.items())
            raise ValueError(f"config.json has {found}: it is neither a ChatGLM2-6B nor a ChatGLM3-6B.")

    sizes = (
        *("padded_vocab_size", "hidden_size", "num_layers", "num_attention_heads", "kv_channels"),
        *("multi_query_group_num", "ffn_hidden_size", "seq_length"),
    )
    token_ids = ("pad_token_id", "eos_token_id")

    @property
    def display_name(self) -> str:  # type: ignore[override]
        return f"ChatGLM{self.chatglm_version}-6B" if self.chatglm_version else "ChatGLM2-6B or ChatGLM3-6B"

    @classmethod
    def describes(cls, values: dict) -> bool:
        """Whether the values of a config.json have keys of this architecture, and none of the first ChatGLM."""
        own, first = ("padded_vocab_size", "multi_query_attention"), ("inner_hidden_size", "position_encoding_2d")
        return any(key in values for key in own) and not any(key in values for key in first)

    @property
    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        C, heads = self.hidden_size, self.num_attention_heads * self.kv_channels
        projected = heads + 2 * self.multi_query_group_num * self.kv_channels
        return {"query_key_value": (projected, C), "dense": (C, heads)}

    @property
    def mlp_shapes(self) -> dict[str, tuple[int, int]]:
        C, inner = self.hidden_size, self.ffn_hidden_size
        return {"dense_h_to_4h": (2 * inner, C), "dense_4h_to_h": (C, inner)}

    def problems(self) -> list[str]:
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        found = []
        if heads % groups:
            found.append(f"num_attention_heads is {heads}, expected a multiple of {groups} multi_query_group_num")
        if self.kv_channels % 4:
            found.append(f"kv_channels is {self.kv_channels}, expected a multiple of 4")
        return found

    def official_values(self) -> dict:
        names = (*self.sizes, "layernorm_epsilon", "use_cache", "tie_word_embeddings", "eos_token_id", "pad_token_id")
        # By the name of the official files they are told apart.
        name = {"_name_or_path": f"THUDM/chatglm{self.chatglm_version}-6b"} if self.chatglm_version else {}
        head = name | {"model_type": self.model_type, "architectures": ["ChatGLMModel"]}
        values = FIXED | WITHOUT_EFFECT | {name: getattr(self, name) for name in names}
        extra = {"merged_adapter": merged} if (merged := getattr(self, "merged_adapter", None)) else {}
        return head | {"auto_map": AUTO_MAP} | dict(sorted(values.items())) | extra

    def position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """0, 1, 2, ... from the first token that is no padding; [B, T] -> [B, T], long."""
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if attention_mask is None:
            return index
        return (index - (attention_mask != 0).int().argmax(dim=1, keepdim=True)).clamp(min=0)

    def next_position_ids(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[B, 1] -> [B, 1]."""
        return position_ids + 1

    def context_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B] zeros: all attention is causal."""
        return torch.zeros_like(input_ids[:, 0])


__all__ = ["ChatGLM2Config"]
