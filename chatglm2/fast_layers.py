"""Which modules of ChatGLM2-6B and ChatGLM3-6B have a counterpart that GPU kernels compute."""

from torch import nn


def fast_layer(module: nn.Module, for_training: bool) -> nn.Module | None:
    """The counterpart of a module, see `glm_shared.registration.Architecture`."""
    return None
