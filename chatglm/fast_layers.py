"""Which modules of ChatGLM-6B have a counterpart that GPU kernels compute."""

from torch import nn

from chatglm.decoding_attention import DecodingAttention
from chatglm.fused_residual import FusedResidualNorm
from chatglm.modeling_chatglm import ChatGLMAttention, ResidualNorm
from glm_kernels import kernels_supported


def fast_layer(module: nn.Module, for_training: bool) -> nn.Module | None:
    """The counterpart of a module, see `glm_shared.registration.Architecture`."""
    if isinstance(module, ResidualNorm) and kernels_supported(module.weight):
        return FusedResidualNorm(module)
    if isinstance(module, ChatGLMAttention) and not for_training and kernels_supported(module.query_key_value.bias):
        return DecodingAttention(module)
    return None
