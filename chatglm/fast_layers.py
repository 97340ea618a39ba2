"""Which modules of ChatGLM-6B have a counterpart that GPU kernels compute."""

from torch import nn

from chatglm.fused_residual import FusedResidualNorm
from chatglm.modeling_chatglm import ChatGLMAttention, ResidualNorm
from glm_kernels import kernels_supported
from glm_shared.decoding_attention import DecodingStepMixin


class DecodingAttention(DecodingStepMixin, ChatGLMAttention):
    """A `ChatGLMAttention` whose decoding step is one kernel; takes over the layers of another."""

    by_head = True


def fast_layer(module: nn.Module, for_training: bool) -> nn.Module | None:
    """The counterpart of a module, see `glm_shared.registration.Architecture`."""
    if isinstance(module, ResidualNorm) and kernels_supported(module.weight):
        return FusedResidualNorm(module)
    if isinstance(module, ChatGLMAttention) and not for_training and kernels_supported(module.query_key_value.bias):
        return DecodingAttention(module)
    return None
