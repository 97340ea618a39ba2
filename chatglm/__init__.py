"""ChatGLM-6B for current transformers: configuration, tokenizer and model, without remote code.

Importing this package registers the classes, so that `AutoConfig`, `AutoTokenizer`, `AutoModel` and
`AutoModelForCausalLM` read an official ChatGLM-6B folder natively although its files point to remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel, ChatGLMPreTrainedModel
from chatglm.packed_attention import PackedSequences
from chatglm.tokenization_chatglm import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
# The official auto_map gives the model with its head for AutoModel too.
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
    "ChatGLMTokenizer",
    "PackedSequences",
]
