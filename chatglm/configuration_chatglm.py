"""Configuration of ChatGLM-6B, read from the official `config.json` without changes to the file.

Shapes: B rows, T tokens.
"""

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from glm_shared.description import ModelDescription

CHATGLM2_KEYS = ("padded_vocab_size", "multi_query_attention", "ffn_hidden_size", "kv_channels", "rmsnorm")
# Keys of the configuration that the official file does not have.
NOT_OFFICIAL = ("dtype", "transformers_version", "initializer_range", "tie_word_embeddings", "quantization_config")


def first_index(matches: torch.Tensor) -> torch.Tensor:
    """Index of the first True of each row [B, T] -> [B, 1]; T for a row that has none."""
    found = matches.any(dim=1, keepdim=True)
    return torch.where(found, matches.int().argmax(dim=1, keepdim=True), matches.shape[1])


@strict
class ChatGLMConfig(ModelDescription, PreTrainedConfig):
    """Sizes and token ids of a ChatGLM-6B model; the defaults are the values of the published checkpoint.

    Raises:
        ValueError: the values describe ChatGLM2 or later, which has the same `model_type` and another architecture, or
            an unsupported variant: int4 or int8 weights, P-tuning, one-dimensional positions.
    Source: `config.json` of THUDM/chatglm-6b.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 3
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    position_encoding_2d: bool = True
    quantization_bit: int = 0
    pre_seq_len: int | None = None

    def __post_init__(self, **kwargs):
        found = [key for key in CHATGLM2_KEYS if key in kwargs]
        if found:
            raise ValueError(
                f"config.json has {', '.join(found)}: it describes ChatGLM2 or later, another architecture under the "
                "same name. Its other keys are of the first ChatGLM, or the models are not known: `import glm_models`."
            )
        if self.quantization_bit:
            raise ValueError(
                f"config.json has quantization_bit={self.quantization_bit}: these weights are already quantized, in "
                f"the format of THUDM/chatglm-6b-int{self.quantization_bit} for the official code. Use the 16-bit "
                "files of THUDM/chatglm-6b; they are quantized to 4 bits while loading."
            )
        if self.pre_seq_len:
            raise ValueError(
                f"config.json has pre_seq_len={self.pre_seq_len}: P-tuning checkpoints are not supported."
            )
        if not self.position_encoding_2d:
            raise ValueError("config.json has position_encoding_2d=false; ChatGLM-6B uses two-dimensional positions.")
        super().__post_init__(**kwargs)

    display_name = "ChatGLM-6B"
    sizes = (
        *("vocab_size", "hidden_size", "num_layers", "num_attention_heads"),
        *("inner_hidden_size", "max_sequence_length"),
    )
    token_ids = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id")

    @classmethod
    def describes(cls, values: dict) -> bool:
        """Whether the values of a config.json have no key of ChatGLM2 or later."""
        return not any(key in values for key in CHATGLM2_KEYS)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // max(1, self.num_attention_heads)  # of a wrong config.json: 0

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        C = self.hidden_size
        return {"query_key_value": (3 * C, C), "dense": (C, C)}

    @property
    def mlp_shapes(self) -> dict[str, tuple[int, int]]:
        C, inner = self.hidden_size, self.inner_hidden_size
        return {"dense_h_to_4h": (inner, C), "dense_4h_to_h": (C, inner)}

    def problems(self) -> list[str]:
        heads = self.num_attention_heads
        if self.hidden_size % (4 * heads):
            return [f"hidden_size is {self.hidden_size}, expected a multiple of 4 x {heads} num_attention_heads"]
        return []

    def official_values(self) -> dict:
        values = {key: value for key, value in self.to_diff_dict().items() if key not in NOT_OFFICIAL}
        auto_map = {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        }
        return {"auto_map": auto_map} | values | {"architectures": ["ChatGLMModel"]}

    def position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Two-dimensional positions, for rows of one sample each, padded on the left or on the right.

        Before the first `<sop>`: `position` is 0, 1, 2, ... and `block_position` is 0. From `<sop>` on: `position` is
        that of the first `[gMASK]`, or else of the first `[MASK]`, or else of the last token before `<sop>`, and
        `block_position` is 1, 2, 3, ...

        Args:
            input_ids: [B, T], long.
            attention_mask: [B, T], 0 for padding; None where there is no padding on the left.
        Returns:
            [B, 2, T], long: `position`, `block_position`.
        Source: "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", section 2.1.
        """
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        start = 0 if attention_mask is None else first_index(attention_mask != 0)
        context_end = first_index(input_ids == self.bos_token_id)  # type: ignore[arg-type]
        gmask, mask = first_index(input_ids == self.gmask_token_id), first_index(input_ids == self.mask_token_id)
        blank = torch.where(gmask < input_ids.shape[1], gmask, mask).minimum(context_end - 1)
        in_context = index < context_end
        position = (torch.where(in_context, index, blank) - start).clamp(min=0)
        block_position = torch.where(in_context, 0, index - context_end + 1)
        return torch.stack((position, block_position), dim=1)

    def next_position_ids(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[B, 2, 1] -> [B, 2, 1]: in an answer only `block_position` counts on."""
        return torch.stack((position_ids[:, 0], position_ids[:, 1] + 1), dim=1)

    def context_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B], the tokens of each row [B, T] before its first `<sop>`."""
        return first_index(input_ids == self.bos_token_id)[:, 0]  # type: ignore[arg-type]


__all__ = ["ChatGLMConfig"]
