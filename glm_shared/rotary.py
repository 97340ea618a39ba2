"""The frequencies of rotary positions."""

import torch
from torch import nn

from glm_shared.description import ModelDescription


class RotaryEmbedding(nn.Module):
    """Base class of the modules that compute cosines and sines for positions; half of a head has D / 4 frequencies.

    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: ModelDescription):
        super().__init__()
        self.rotary_dim = config.head_dim // 2
        self.register_buffer("inv_freq", self.inverse_frequencies(), persistent=False)

    def inverse_frequencies(self) -> torch.Tensor:
        """[D / 4], fp32."""
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        return 1.0 / 10000**exponent
