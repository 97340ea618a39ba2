"""Rotary positions of one half of each head.

Shapes: B rows, T tokens, H heads of queries, G heads of keys and values, D head dimension.
"""

import torch

from glm_kernels import kernels_supported
from glm_shared.rotary import RotaryEmbedding


class ChatGLM2RotaryEmbedding(RotaryEmbedding):
    """Cosines and sines by which the pairs (0, 1), (2, 3), ... of the first half of a head are rotated."""

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all angles.

        Args:
            position_ids: [B, T], long.
            dtype: of the result; the angles are computed in fp32.
        Returns:
            cos and sin, each [B, T, 1, D / 4].
        """
        angles = (position_ids[..., None].float() * self.inv_freq.float())[:, :, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs of the first half of each head; the second half stays as it is.

    Args:
        states: [B, T, heads, D], queries or keys.
        cos, sin: each [B, T, 1, D / 4].
    Returns:
        [B, T, heads, D].
    """
    rotated, unchanged = states.chunk(2, dim=-1)
    first, second = rotated[..., ::2], rotated[..., 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), unchanged), dim=-1)


def split_and_rotate(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits the fused projection and rotates queries and keys.

    Args:
        projected: [B, T, (H + 2G) * D], all queries, then all keys, then all values. Where a kernel can rotate them
            and no gradients are needed, it is overwritten.
        cos, sin: each [B, T, 1, D / 4].
        heads: H.
        groups: G.
    Returns:
        Rotated queries [B, T, H, D], rotated keys and values, each [B, T, G, D].
    """
    states = projected.unflatten(-1, (heads + 2 * groups, -1))
    query, key, value = states.split((heads, groups, groups), dim=2)
    if kernels_supported(projected) and not torch.is_grad_enabled():
        rotate_in_place(projected, cos, sin, heads, groups)
        return query, key, value
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value


def rotate_in_place(projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, groups: int):
    """Rotates the queries and keys in `projected` [B, T, (H + 2G) * D] by the Triton kernel; no gradient."""
    from glm_kernels import rotary

    cos, sin = (table.flatten(0, 2) for table in (cos, sin))  # [B * T, D / 4]
    rotary.rotate_pairs_in_place(projected.flatten(0, 1), cos, sin, heads, groups)
