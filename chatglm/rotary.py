"""Two-dimensional rotary positions.

Shapes: B rows, T tokens, H heads, D head dimension, C hidden size.
"""

import torch

from glm_kernels import kernels_supported
from glm_shared.rotary import RotaryEmbedding


class ChatGLMRotaryEmbedding(RotaryEmbedding):
    """Cosines and sines for the halves of a head; the first is rotated by `position`, the second by `block_position`.

    Source: that of the base class, applied to each half.
    """

    def inverse_frequencies(self) -> torch.Tensor:
        """[D / 4], fp32, rounded to fp16 values: the published weights were trained with these."""
        return super().inverse_frequencies().half().float()

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all angles.

        Args:
            position_ids: [B, 2, T], long: `position`, `block_position`.
            dtype: of the result; the angles are computed in fp32.
        Returns:
            cos and sin, each [B, T, 1, 2, D / 2].
        """
        angles = position_ids.transpose(1, 2)[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each half of each head by its own angle.

    Args:
        states: [B, T, H, D], queries or keys.
        cos, sin: each [B, T, 1, 2, D / 2].
    Returns:
        [B, T, H, D].
    """
    halves = states.unflatten(-1, (2, -1))
    first, second = halves.chunk(2, dim=-1)
    return (halves * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)


def split_and_rotate(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits the fused projection and rotates queries and keys.

    Args:
        projected: [B, T, 3C], query, key and value of each head side by side. Where a kernel can rotate them and no
            gradients are needed, it is overwritten.
        cos, sin: each [B, T, 1, 2, D / 2].
        head_dim: D.
    Returns:
        Rotated queries, rotated keys, and values, each [B, T, H, D].
    """
    query, key, value = projected.unflatten(-1, (-1, 3 * head_dim)).chunk(3, dim=-1)
    if kernels_supported(projected) and not torch.is_grad_enabled():
        rotate_in_place(projected, cos, sin, head_dim)
        return query, key, value
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value


def rotate_in_place(projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int):
    """Rotates the queries and keys in `projected` [B, T, 3C] by the Triton kernel; no gradient."""
    from glm_kernels import rotary

    cos, sin = (table.reshape(-1, head_dim) for table in (cos, sin))  # [B * T, D]
    rotary.rotate_in_place(projected.flatten(0, 1), cos, sin, head_dim)
