"""Which modules of ChatGLM2-6B and ChatGLM3-6B have a counterpart that GPU kernels compute."""

from torch import nn

from chatglm2.fused_norm import FusedRMSNorm, FusedSublayerNorm
from chatglm2.modeling_chatglm2 import ChatGLM2Attention, RMSNorm, SublayerNorm
from glm_kernels import kernels_supported
from glm_shared.decoding_attention import DecodingStepMixin


class DecodingAttention(DecodingStepMixin, ChatGLM2Attention):
    """A `ChatGLM2Attention` whose decoding step is one kernel; takes over the layers of another."""

    by_head = False


def fast_layer(module: nn.Module, for_training: bool) -> nn.Module | None:
    """The counterpart of a module, see `glm_shared.registration.Architecture`."""
    if isinstance(module, RMSNorm) and kernels_supported(module.weight):
        return FusedSublayerNorm(module) if isinstance(module, SublayerNorm) else FusedRMSNorm(module)
    if isinstance(module, ChatGLM2Attention) and not for_training and kernels_supported(module.query_key_value.bias):
        return DecodingAttention(module)
    return None
