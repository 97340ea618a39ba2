"""Fast generation: one decoding step, with the choice of the next token, recorded as a CUDA graph and replayed.

At small batches a decoding step waits for kernel launches, and for the host to look at every token, not for the GPU.
Here the graph feeds itself; the host looks now and then whether all rows have ended. Without a GPU the same step runs
without a graph. For greedy decoding and sampling; `model.generate` does beams and the rest.

Shapes: B rows, T prompt tokens, N new tokens.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import StaticCache

from chatglm.modeling_chatglm import ChatGLMAttention, ResidualNorm, prefix_lm_position_ids
from glm_kernels import kernels_supported
from qlora.layers.nf4 import linear
from qlora.layers.residual import residual_norm

# Without cuDNN's, which plans for a second whenever it meets a new shape.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Sampler = Callable[[torch.Tensor], torch.Tensor]


def make_sampler(do_sample: bool, top_p: float = 0.7, temperature: float = 0.95) -> Sampler:
    """Logits [B, V] -> token ids [B, 1]: the likeliest, or one drawn as the official model does by default."""
    if not do_sample:
        return lambda logits: logits.argmax(dim=-1, keepdim=True)
    warpers = (TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p))

    def sample(logits: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(dim=-1), 1)

    return sample


class Decoder:
    """The state of a batch of answers being generated; all of it is changed in cache_position by `step`.

    Args:
        model: the language model, with any adapter already in its layers.
        input_ids, attention_mask: [B, T], prompts padded on the left.
        max_new_tokens: N.
        sampler: picks the next token from the logits.
    """

    def __init__(self, model: PreTrainedModel, input_ids, attention_mask, max_new_tokens: int, sampler: Sampler):
        self.model, self.sampler = model, sampler
        B, T = input_ids.shape
        self.cache = StaticCache(config=model.config, max_cache_len=T + max_new_tokens)
        self.seen = F.pad(attention_mask, (0, max_new_tokens), value=1)
        self.new_tokens = torch.full((B, max_new_tokens), model.config.pad_token_id, device=input_ids.device)
        self.cache_position = torch.zeros(1, dtype=torch.long, device=input_ids.device)
        self.finished = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
        positions = prefix_lm_position_ids(input_ids, attention_mask, model.config)
        logits = self.forward(input_ids, attention_mask, positions)
        self.position_ids = positions[:, :, -1:] + torch.tensor([[0], [1]], device=input_ids.device)
        self.token = torch.empty_like(input_ids[:, :1])
        self.accept(logits)

    def forward(self, input_ids, attention_mask, position_ids) -> torch.Tensor:
        """Logits [B, V] in fp32 after the last token."""
        with sdpa_kernel(ATTENTION_KERNELS):
            outputs = self.model(
                input_ids, attention_mask, position_ids, self.cache, use_cache=True, logits_to_keep=1, return_dict=True
            )
        return outputs.logits[:, -1].float()

    def accept(self, logits: torch.Tensor):
        """Chooses each row's next token and writes it down; a row that has ended gets padding."""
        token = self.sampler(logits).masked_fill(self.finished, self.model.config.pad_token_id)
        self.token.copy_(token)
        self.new_tokens.index_copy_(1, self.cache_position, token)
        self.finished |= token == self.model.config.eos_token_id
        self.cache_position += 1

    def step(self):
        """One more token for every row."""
        logits = self.forward(self.token, self.seen, self.position_ids)
        self.accept(logits)
        self.position_ids[:, 1] += 1

    def graphed_step(self) -> Callable[[], None]:
        """`step` as the replay of a CUDA graph; one step is taken on the way."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # loads what a recording must not load
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    sync_every: int = 16,
) -> Iterator[torch.Tensor]:
    """Generates answers, yielding the new tokens every few steps.

    Args:
        model: the language model, in evaluation mode.
        input_ids, attention_mask: [B, T], long, prompts padded on the left.
        max_new_tokens: most tokens of an answer.
        sampler: picks the next token, see `make_sampler`.
        sync_every: steps between two looks, on the host, at what has been generated.
    Yields:
        [B, up to sync_every], long; padding after a row's end.
    """
    decoder = Decoder(model, input_ids, attention_mask, max_new_tokens, sampler)
    step, done, yielded = decoder.step, 1, 0
    while done < max_new_tokens and not decoder.finished.all():
        if input_ids.is_cuda and done == 1:
            step = decoder.graphed_step()
            done += 1
        for _ in range(min(sync_every, max_new_tokens - done)):
            step()
            done += 1
        yield decoder.new_tokens[:, yielded:done]
        yielded = done
    if yielded < done:
        yield decoder.new_tokens[:, yielded:done]


@torch.no_grad()
def use_inference_kernels(model: torch.nn.Module):
    """Gives the layers forwards without gradients: fewer kernels, no conversion to fp32 and back."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            dtype = layer.base_layer.weight.quant_state.dtype
            up = layer.lora_B[adapter].weight * layer.scaling[adapter]
            layer.forward = functools.partial(add_adapter, layer, layer.lora_A[adapter].weight.to(dtype), up.to(dtype))
        elif isinstance(layer, Linear4bit):
            layer.forward = functools.partial(linear, layer)
        elif isinstance(layer, ResidualNorm) and kernels_supported(layer.weight):
            layer.forward = functools.partial(residual_norm, layer)
        elif isinstance(layer, ChatGLMAttention) and kernels_supported(layer.query_key_value.bias):
            layer.forward = functools.partial(attention, layer)


def attention(layer: ChatGLMAttention, hidden_states, attention_mask, position_embeddings, cache, **kwargs):
    """One token a row goes from projection to output in one kernel; a prompt takes the model's own way."""
    if hidden_states.shape[1] > 1 or not isinstance(cache, StaticCache):
        return ChatGLMAttention.forward(layer, hidden_states, attention_mask, position_embeddings, cache, **kwargs)
    from glm_kernels.decode_attention import decode_attention

    past = cache.layers[layer.layer_idx]
    tables = (table.reshape(-1, layer.head_dim) for table in position_embeddings)
    projected, visible = layer.query_key_value(hidden_states)[:, 0], attention_mask[:, 0, 0]
    output = decode_attention(projected, *tables, past.keys, past.values, visible, past.cumulative_length)
    past.cumulative_length += 1
    return layer.dense(output[:, None])


def add_adapter(layer: LoraLayer, down: torch.Tensor, up: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The base layer's output plus the adapter's, unless adapters are disabled."""
    output = layer.base_layer(hidden_states)
    if not layer.disable_adapters:
        low_rank = F.linear(hidden_states, down)
        output.view(-1, output.shape[-1]).addmm_(low_rank.view(-1, low_rank.shape[-1]), up.T)
    return output
