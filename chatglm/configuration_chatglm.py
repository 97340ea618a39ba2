"""Configuration of ChatGLM-6B, read from the official `config.json` without changes to the file."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CHATGLM2_KEYS = ("padded_vocab_size", "multi_query_attention", "ffn_hidden_size", "kv_channels", "rmsnorm")


@strict
class ChatGLMConfig(PreTrainedConfig):
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
                "same name. This project needs the files of THUDM/chatglm-6b (the first ChatGLM)."
            )
        if self.quantization_bit:
            raise ValueError(
                f"config.json has quantization_bit={self.quantization_bit}: these weights are already quantised, in "
                f"the format of THUDM/chatglm-6b-int{self.quantization_bit} for the official code. Use the 16-bit "
                "files of THUDM/chatglm-6b; they are quantised to 4 bits while loading."
            )
        if self.pre_seq_len:
            raise ValueError(
                f"config.json has pre_seq_len={self.pre_seq_len}: P-tuning checkpoints are not supported."
            )
        if not self.position_encoding_2d:
            raise ValueError("config.json has position_encoding_2d=false; ChatGLM-6B uses two-dimensional positions.")
        super().__post_init__(**kwargs)

    @property
    def weights_per_layer(self) -> int:
        """Number of weights in the four matrices of a layer."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.inner_hidden_size

    @property
    def embedding_weights(self) -> int:
        """Number of weights in the embedding, which is also the head."""
        return self.vocab_size * self.hidden_size

    @property
    def multiplied_weights(self) -> int:
        """Number of weights in the matrix products of one token's forward pass: all layers and the head."""
        return self.num_layers * self.weights_per_layer + self.embedding_weights

    def training_flops(self, tokens: int, labels: int) -> int:
        """Floating-point operations of forward and backward pass with constant weights.

        Counts a multiplication and an addition for each weight and token in the forward pass, and the same for the
        gradient of the activations; attention and adapter are left out.

        Args:
            tokens: of all samples.
            labels: tokens with a label; the last MLP and the head compute at the positions before these only.
        """
        last_mlp = 2 * self.hidden_size * self.inner_hidden_size
        of_all_tokens = self.num_layers * self.weights_per_layer - last_mlp
        return 4 * (tokens * of_all_tokens + labels * (last_mlp + self.embedding_weights))


__all__ = ["ChatGLMConfig"]
