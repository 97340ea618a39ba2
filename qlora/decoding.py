"""Fast generation: the forward pass of one token, recorded once as a CUDA graph and replayed for every further token.

At small batches a decoding step waits for kernel launches, not for the GPU. Everything else of `generate` (sampling,
stopping, streaming) stays transformers'.

Shapes: B rows, S places in the cache.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class GraphedStep:
    """One decoding step with a given cache and batch size; the graph itself moves the positions on.

    Args:
        forward: the model's.
        cache: filled with the prompts.
        input_ids: [B, 1], the tokens of the first step.
        position_ids: [B, 2, 1], theirs.
        attention_mask: [B, tokens so far], 0 for padding.
    """

    def __init__(self, forward, cache: StaticCache, input_ids, position_ids, attention_mask):
        self.input_ids, self.position_ids = input_ids.clone(), position_ids.clone()
        attention_mask = F.pad(attention_mask, (0, cache.layers[0].max_cache_len - attention_mask.shape[1]), value=1)
        run = functools.partial(
            forward, self.input_ids, attention_mask, self.position_ids, cache, use_cache=True, return_dict=True
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # loads kernels; the place in the cache that it fills, the first replay fills again
            for layer in cache.layers:
                layer.cumulative_length.sub_(1)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = run().logits
            self.position_ids[:, 1] += 1

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, V] after one more token a row [B, 1]."""
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        return self.logits


@contextlib.contextmanager
def graphed_decoding(model: PreTrainedModel) -> Iterator[dict]:
    """Within it, `model.generate(**options)` with the options it yields replays a CUDA graph for every token.

    For greedy decoding and sampling. Without a GPU nothing changes and there are no options.
    """
    if not torch.cuda.is_available():
        yield {}
        return
    forward, prepare, steps = model.forward, model.prepare_inputs_for_generation, {}

    def prepare_inputs(input_ids, attention_mask=None, past_key_values=None, next_sequence_length=None, **kwargs):
        if next_sequence_length == 1 and id(past_key_values) in steps:
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values}
        inputs = prepare(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            next_sequence_length=next_sequence_length,
            **kwargs,
        )
        return inputs | {"attention_mask": attention_mask}

    def graphed_forward(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if not isinstance(past_key_values, StaticCache) or input_ids.shape[1] != 1:
            return forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)
        if id(past_key_values) not in steps:
            steps.clear()  # a new cache: the old one's graph is of no more use
            step = GraphedStep(forward, past_key_values, input_ids, position_ids, attention_mask)
            steps[id(past_key_values)] = step
        logits = steps[id(past_key_values)](input_ids)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    model.forward, model.prepare_inputs_for_generation = graphed_forward, prepare_inputs
    try:
        yield {"cache_implementation": "static", "disable_compile": True}
    finally:
        del model.forward, model.prepare_inputs_for_generation


def use_inference_kernels(model: PeftModel):
    """Adds the adapter's output in two matrix products in the compute type, instead of converting to fp32 and back."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
            dtype = model.get_base_model().dtype
            layer.forward = functools.partial(add_adapter, layer, down.detach().to(dtype), up.detach().to(dtype))


def add_adapter(layer: LoraLayer, down: torch.Tensor, up: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The base layer's output plus the adapter's, unless adapters are disabled."""
    output = layer.base_layer(hidden_states)
    return output if layer.disable_adapters else output + F.linear(F.linear(hidden_states, down), up)
