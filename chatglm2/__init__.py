"""ChatGLM2-6B and ChatGLM3-6B for current transformers: configuration, tokenizers and model, without remote code.

The two have one architecture; their tokenizers differ in the prompts. Importing this package registers the classes, so
that `AutoConfig`, `AutoTokenizer`, `AutoModel` and `AutoModelForCausalLM` read an official folder natively although
its files point to remote code.
"""

from transformers import AutoTokenizer

from chatglm2.configuration_chatglm2 import ChatGLM2Config
from chatglm2.fast_layers import fast_layer
from chatglm2.modeling_chatglm2 import ChatGLM2ForConditionalGeneration, ChatGLM2Model, ChatGLM2PreTrainedModel
from chatglm2.tokenization_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from glm_shared.packed_attention import PackedSequences
from glm_shared.registration import Architecture, register

AutoTokenizer.register(ChatGLM2Config, slow_tokenizer_class=ChatGLM3Tokenizer, exist_ok=True)  # by the class's name
register(Architecture(ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer, fast_layer))

__all__ = [
    "ChatGLM2Config",
    "ChatGLM2ForConditionalGeneration",
    "ChatGLM2Model",
    "ChatGLM2PreTrainedModel",
    "ChatGLM2Tokenizer",
    "ChatGLM3Tokenizer",
    "PackedSequences",
]
