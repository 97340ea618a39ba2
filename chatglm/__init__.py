"""ChatGLM-6B for current transformers: configuration, tokenizer and model, without remote code.

Importing this package registers the classes, so that `AutoConfig`, `AutoTokenizer`, `AutoModel` and
`AutoModelForCausalLM` read an official ChatGLM-6B folder natively although its files point to remote code.
"""

from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.fast_layers import fast_layer
from chatglm.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel, ChatGLMPreTrainedModel
from chatglm.tokenization_chatglm import ChatGLMTokenizer
from glm_shared.packed_attention import PackedSequences
from glm_shared.registration import Architecture, register

register(Architecture(ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, fast_layer))

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
    "ChatGLMTokenizer",
    "PackedSequences",
]
