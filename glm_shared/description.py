"""What a model says of itself: the rest of the project takes sizes and structure from here and knows no model by name.

Shapes: B rows, T tokens, C hidden size, V vocabulary size.
"""

from typing import Any

import torch

Shape = tuple[int, ...]


class ModelDescription:
    """Base class of configuration classes, beside transformers' own, from which most names below come.

    A configuration class has or computes the attributes, and defines the methods that raise NotImplementedError.

    Attributes:
        display_name: of the model, for messages, such as "ChatGLM-6B".
        vocab_size: V, rows of the embedding; there may be fewer tokens.
        hidden_size: C.
        intermediate_size: features between the two linear layers of an MLP, after the activation.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of the queries.
        max_position_embeddings: most tokens of a prompt and its answer together.
        tie_word_embeddings: whether embedding and head are one tensor.
        eos_token_id: of the token that ends an answer.
        pad_token_id: of padding.
        layernorm_epsilon: of all norms.
        sizes: names of the attributes that must be 1 or more.
        token_ids: names of the attributes that must be token ids.
    """

    display_name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    layernorm_epsilon: float
    quantization_config: Any  # of weights in 4 bits
    merged_adapter: str  # a hash of the adapter that the weights contain
    sizes: tuple[str, ...]
    token_ids: tuple[str, ...]

    @classmethod
    def describes(cls, values: dict) -> bool:
        """Whether the values of a config.json are those of this architecture."""
        raise NotImplementedError

    @property
    def num_key_value_heads(self) -> int:
        """Heads of the keys and values, each for the same number of heads of the queries."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        raise NotImplementedError

    @property
    def attention_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of the linear layers in an attention: the fused projection, the output."""
        raise NotImplementedError

    @property
    def mlp_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of the linear layers in an MLP: the one before, the one after the activation."""
        raise NotImplementedError

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of all linear layers in a block."""
        return self.attention_shapes | self.mlp_shapes

    def problems(self) -> list[str]:
        """What is wrong with sizes that are positive each by itself, a sentence each."""
        raise NotImplementedError

    def official_values(self) -> dict:
        """The values of an official config.json."""
        raise NotImplementedError

    def position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Positions of complete rows, padded on the left or on the right.

        Args:
            input_ids: [B, T], long.
            attention_mask: [B, T], 0 for padding; None where there is no padding on the left.
        Returns:
            [B, ..., T], long.
        """
        raise NotImplementedError

    def next_position_ids(self, position_ids: torch.Tensor) -> torch.Tensor:
        """The positions [B, ..., 1] of the tokens of an answer that follow tokens at `position_ids` [B, ..., 1]."""
        raise NotImplementedError

    def context_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B], for rows [B, T] the number of first tokens that attend to each other in both directions."""
        raise NotImplementedError

    @property
    def weights_per_layer(self) -> int:
        """Number of weights in the matrices of a block."""
        return count_weights(self.linear_shapes)

    @property
    def head_weights(self) -> int:
        """Number of weights in the head."""
        return self.vocab_size * self.hidden_size

    @property
    def embedding_weights(self) -> int:
        """Number of weights in embedding and head, which may be one tensor."""
        return self.head_weights * (1 if self.tie_word_embeddings else 2)

    @property
    def multiplied_weights(self) -> int:
        """Number of weights in the matrix products of one token's forward pass: all blocks and the head."""
        return self.num_hidden_layers * self.weights_per_layer + self.head_weights

    def training_flops(self, tokens: int, labels: int) -> int:
        """Floating-point operations of forward and backward pass with constant weights.

        Counts a multiplication and an addition for each weight and token in the forward pass, and the same for the
        gradient of the activations; attention and adapter are left out.

        Args:
            tokens: of all samples.
            labels: tokens with a label; the last MLP and the head compute at the positions before these only.
        """
        last_mlp = count_weights(self.mlp_shapes)
        of_all_tokens = self.num_hidden_layers * self.weights_per_layer - last_mlp
        return 4 * (tokens * of_all_tokens + labels * (last_mlp + self.head_weights))


def count_weights(shapes: dict[str, tuple[int, int]]) -> int:
    """The number of weights in matrices of these shapes."""
    return sum(outputs * inputs for outputs, inputs in shapes.values())
