"""Generation with one decoding step, sampling included, recorded as a CUDA graph and replayed.

At small batches a decoding step waits for kernel launches, and for the host to read every token, not for the GPU. The
graph writes the next token where its next replay reads it; the host synchronizes every few steps, to see whether all
answers have ended. Without a GPU the same step runs without a graph. For greedy decoding and sampling only;
`model.generate` has beam search and the rest.

Shapes: B prompts, T prompt tokens, N new tokens, V vocabulary size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, StaticCache

# Without cuDNN's, which takes a second to plan for each new shape.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Sampler = Callable[[torch.Tensor], torch.Tensor]  # logits [B, V] -> token ids [B, 1]


def make_sampler(do_sample: bool, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampler:
    """A sampler: the most likely token, or one drawn as `generate` draws it.

    Args:
        do_sample: whether to draw.
        temperature: divisor of the logits, so far above 0 that these stay finite.
        top_k: number of the most likely tokens that stay possible; 0 for all.
        top_p: of these, the smallest set of the most likely tokens with this probability stays possible.
    """
    if not do_sample:
        return lambda logits: logits.argmax(dim=-1, keepdim=True)
    # In the order of `generate`, on which the result depends.
    top_k_warper = [TopKLogitsWarper(top_k)] if top_k else []
    warpers = [TemperatureLogitsWarper(temperature), *top_k_warper, TopPLogitsWarper(top_p)]

    def sample(logits: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(dim=-1), 1)

    return sample


def draw_tokens(
    logits: torch.Tensor, random_numbers: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Draws a token for each row as `make_sampler` does, with settings and a random number of the row's own.

    Args:
        logits: [B, V].
        random_numbers: [B, 1], from 0 up to 1: where to read the cumulative distribution over the tokens, which begins
            with the likeliest one. 0 gives this token.
        temperature, top_p: [B, 1].
        top_k: the same for all rows; 0 for all tokens.
    Returns:
        [B, 1], long.
    """
    V = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k or V, V))  # in descending order
    probabilities = (logits / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    kept = cumulative - probabilities < top_p
    kept[:, 0] = True
    total = (probabilities * kept).sum(dim=-1, keepdim=True)
    index = (kept & (cumulative <= random_numbers * total)).sum(dim=-1, keepdim=True)
    return tokens.gather(1, index.minimum(kept.sum(dim=-1, keepdim=True) - 1))


class Decoder:
    """The state of a batch of answers in generation; `step` changes all of it in place, as a CUDA graph requires.

    Args:
        model: the language model, with any adapter in its layers.
        input_ids, attention_mask: [B, T], long, prompts padded on the left.
        max_new_tokens: N.
        sampler: see `make_sampler`.
        stop_token_ids: the tokens that end an answer; None for the one of the configuration.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        sampler: Sampler,
        stop_token_ids: Sequence[int] | None = None,
    ):
        self.model, self.sampler = model, sampler
        self.stop_ids = torch.tensor(stop_token_ids or [model.config.eos_token_id], device=input_ids.device)
        B, T = input_ids.shape
        self.cache = StaticCache(config=model.config, max_cache_len=T + max_new_tokens)
        self.attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)  # [B, T + N]
        self.new_tokens = torch.full((B, max_new_tokens), model.config.pad_token_id, device=input_ids.device)
        self.cache_position = torch.zeros(1, dtype=torch.long, device=input_ids.device)  # of the next token in [B, N]
        self.finished = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
        positions = model.config.position_ids(input_ids, attention_mask)  # [B, ..., T]
        logits = last_logits(model, input_ids, attention_mask, positions, self.cache)
        self.position_ids = model.config.next_position_ids(positions[..., -1:])  # [B, ..., 1]
        self.token = torch.empty_like(input_ids[:, :1])
        self.accept(logits)

    def accept(self, logits: torch.Tensor):
        """Samples and stores the next token of each answer; an answer that has ended gets padding."""
        token = self.sampler(logits).masked_fill(self.finished, self.model.config.pad_token_id)
        self.token.copy_(token)
        self.new_tokens.index_copy_(1, self.cache_position, token)
        self.finished |= (token == self.stop_ids).any(dim=1, keepdim=True)
        self.cache_position += 1

    def step(self):
        """Generates one token of every answer."""
        logits = last_logits(self.model, self.token, self.attention_mask, self.position_ids, self.cache)
        self.accept(logits)
        self.position_ids.copy_(self.model.config.next_position_ids(self.position_ids))


def last_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
) -> torch.Tensor:
    """Logits after the last token of each row, [B, V], fp32; arguments as for the model's `forward`."""
    with sdpa_kernel(SDPA_BACKENDS):
        outputs = model(
            input_ids, attention_mask, position_ids, cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
    return outputs.logits[:, -1].float()


def record_step(step: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """A step as the replay of a CUDA graph; takes one step itself.

    Args:
        step: what to record.
        pool: a `torch.cuda.graph_pool_handle`, the memory that graphs share; None for memory of its own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and loads kernels, which must not happen while a graph is recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    sync_every: int = 16,
    stop_token_ids: Sequence[int] | None = None,
) -> Iterator[torch.Tensor]:
    """Generates answers, yielding the new tokens every few steps.

    Args:
        model: the language model, in evaluation mode.
        input_ids, attention_mask: [B, T], long, prompts padded on the left.
        max_new_tokens: most tokens of an answer.
        sampler: see `make_sampler`.
        sync_every: steps between two synchronizations with the host.
        stop_token_ids: the tokens that end an answer; None for the one of the configuration.
    Yields:
        [B, up to sync_every], long; padding after an answer's end.
    """
    decoder = Decoder(model, input_ids, attention_mask, max_new_tokens, sampler, stop_token_ids)
    step, done, yielded = decoder.step, 1, 0
    while done < max_new_tokens and not decoder.finished.all():
        if input_ids.is_cuda and done == 1:
            step = record_step(decoder.step)
            done += 1
        for _ in range(min(sync_every, max_new_tokens - done)):
            step()
            done += 1
        yield decoder.new_tokens[:, yielded:done]
        yielded = done
    if yielded < done:
        yield decoder.new_tokens[:, yielded:done]
