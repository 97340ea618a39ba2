"""Generation for requests that come and go: a batch of a fixed number of rows, each of which is a slot for an answer.

A slot has its own cache position, adapter, decoding settings and random numbers, so that an answer begins when a slot
is free and ends when it is finished, whatever the other slots do (continuous batching). A step is recorded as a CUDA
graph for a few numbers of slots, since a step of fewer slots takes less time; answers begin in the first free slots.

Shapes: N slots, K of them, S positions in the cache, L layers, G heads of keys and values, D head dimension, V
vocabulary size.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from qlora.inference.decoding import draw_tokens, last_logits, record_step
from qlora.inference.generation import language_model
from qlora.layers.linear import InferenceLoRANF4Linear
from qlora.units import GIB

WORKING_MEMORY = 1.5 * GIB  # bytes that generation needs in addition to the model, the keys and values, and the logits
LOGITS = 6  # copies of a row of logits in fp32 that drawing a token takes
USABLE = 0.97  # share of the free memory; gaps between allocations take the rest
SIZES = (1, 8, 16, 32, 64)  # numbers of slots for which a step is recorded, beside that of all slots
STEPS = 2  # between two synchronizations with the host, as for `stream_answer`


@dataclass
class Task:
    """A prompt and how its answer is generated.

    Args:
        prompt_ids: token ids, which leave room for the answer in a slot.
        max_new_tokens: most tokens of the answer.
        adapter: place in the list of adapters; -1 for the base model.
        temperature: divisor of the logits; 0 for the likeliest token.
        top_p: as for `make_sampler`.
        seed: of the random numbers.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    adapter: int = -1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def random_numbers(self) -> torch.Tensor:
        """[max_new_tokens], from 0 up to 1, one for each new token; all 0 for the likeliest tokens."""
        if self.temperature == 0:
            return torch.zeros(self.max_new_tokens)
        return torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(self.seed))


class SlotLayer(StaticLayer):
    """Keys and values of a layer, [N, G, S, D] each, whose rows have cache positions [N] of their own."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, positions
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Stores the key and value of one new token a row; the kernel of `DecodingAttention` does the same."""
        rows = torch.arange(len(key_states), device=key_states.device)
        self.keys[rows, :, self.cumulative_length] = key_states[:, :, 0]
        self.values[rows, :, self.cumulative_length] = value_states[:, :, 0]
        self.cumulative_length += 1
        return self.keys, self.values


class SlotCache(StaticCache):
    """The cache of the first slots: keys and values [L, N, G, S, D] and cache positions [L, N] of these slots."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor):
        Cache.__init__(self, layers=[SlotLayer(*layer) for layer in zip(keys, values, positions, strict=True)])


class Slots:
    """The answers in generation. A step changes their state in place, as a CUDA graph requires.

    Args:
        model: in evaluation mode, with the layers for inference; of the adapters each task has one.
        count: N.
        top_k: number of the most likely tokens that stay possible, for all tasks; 0 for all.
    """

    @torch.no_grad()
    def __init__(self, model: PeftModel | PreTrainedModel, count: int, top_k: int):
        self.model, self.count, self.top_k = language_model(model), count, top_k
        self.lora_layers = [module for module in model.modules() if isinstance(module, InferenceLoRANF4Linear)]
        config, weight = self.model.config, self.model.get_output_embeddings().weight
        self.capacity = config.max_position_embeddings  # S
        L = config.num_hidden_layers
        shape = (2, L, count, config.num_key_value_heads, self.capacity, config.head_dim)
        keys, values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.positions = torch.zeros(L, count, dtype=torch.long, device=weight.device)  # of the next token
        self.last_position = torch.zeros_like(self.positions[0])  # 0 for a free slot, which stays at 0
        self.position_ids = torch.zeros_like(config.position_ids(self.positions.new_zeros(count, 1)))  # [N, ..., 1]
        self.recent = torch.zeros(count, STEPS, dtype=torch.long, device=weight.device)  # tokens of the last steps
        self.adapter = torch.full((count,), -1, device=weight.device)
        self.temperature, self.top_p = torch.ones(2, count, 1, device=weight.device)
        self.random_numbers = torch.zeros(count, self.capacity, device=weight.device)  # at the position of their token
        self.key_index = torch.arange(self.capacity, device=weight.device)
        sizes = [n for n in SIZES if n < count] + [count]
        self.caches = {n: SlotCache(keys[:, :n], values[:, :n], self.positions[:, :n]) for n in sizes}
        self.steps: dict[int, Callable[[], None]] = {n: functools.partial(self.step, n) for n in sizes}
        if weight.is_cuda:
            pool = torch.cuda.graph_pool_handle()  # nothing in it outlasts a step, so that the graphs can share it
            # All slots are free, where the step that recording takes has no effect.
            self.steps = {n: record_step(step, pool) for n, step in self.steps.items()}

    @torch.no_grad()
    def begin(self, tasks: dict[int, Task]) -> list[int]:
        """Computes prompts in one batch and puts them into free slots.

        Args:
            tasks: slot -> its task.
        Returns:
            The first token of each answer.
        """
        prompts = [task.prompt_ids for task in tasks.values()]
        rows = torch.tensor(list(tasks), device=self.positions.device)  # [K]
        for slot, task in tasks.items():
            self.set_up(slot, task)
        input_ids, attention_mask = left_padded(prompts, self.model.config.pad_token_id, rows.device)
        position_ids = self.model.config.position_ids(input_ids, attention_mask)  # [K, ..., T]
        prompt_cache = DynamicCache(config=self.model.config)
        logits = self.forward(input_ids, attention_mask, position_ids, prompt_cache, self.adapter[rows])
        self.position_ids[rows] = self.model.config.next_position_ids(position_ids[..., -1:])
        for slots, prompt in zip(self.caches[self.count].layers, prompt_cache.layers, strict=True):
            for row, (slot, task) in enumerate(tasks.items()):
                length = len(task.prompt_ids)
                slots.keys[slot, :, :length] = prompt.keys[row, :, -length:]
                slots.values[slot, :, :length] = prompt.values[row, :, -length:]
        tokens = self.draw(logits, rows)
        self.recent[rows, -1:] = tokens
        return tokens[:, 0].tolist()

    def set_up(self, slot: int, task: Task):
        """Writes the settings of a task into its slot."""
        length = len(task.prompt_ids)
        self.positions[:, slot] = length
        self.last_position[slot] = self.capacity - 1
        self.adapter[slot] = task.adapter
        self.temperature[slot], self.top_p[slot] = task.temperature or 1.0, task.top_p
        self.random_numbers[slot, length : length + task.max_new_tokens] = task.random_numbers()

    def end(self, slot: int):
        """Frees a slot, which the next step moves to position 0."""
        self.last_position[slot] = 0

    @torch.no_grad()
    def generate(self, highest_slot: int) -> list[list[int]]:
        """Generates the next `STEPS` tokens of each answer; `highest_slot` is the last one in use."""
        step = self.steps[min(n for n in self.steps if n > highest_slot)]
        for _ in range(STEPS):
            step()
        return self.recent.tolist()

    def step(self, n: int):
        """Generates one token of each of the first `n` answers."""
        visible = self.key_index <= self.positions[0, :n, None]  # [n, S]
        logits = self.forward(
            self.recent[:n, -1:], visible[:, None, None], self.position_ids[:n], self.caches[n], self.adapter[:n]
        )
        # An answer that ended between two synchronizations, at the end of its slot, stays there.
        self.positions[:, :n].clamp_(max=self.last_position[:n])
        self.position_ids[:n] = self.model.config.next_position_ids(self.position_ids[:n])
        tokens = self.draw(logits, slice(n))
        self.recent[:n] = torch.cat((self.recent[:n, 1:], tokens), dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
        adapter: torch.Tensor,
    ) -> torch.Tensor:
        """Logits after the last token, [K, V], fp32, each row with its adapter [K]."""
        for layer in self.lora_layers:
            layer.adapter_of_row = adapter
        return last_logits(self.model, input_ids, attention_mask, position_ids, cache)

    def draw(self, logits: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """The next token of some slots, [K, 1], from their logits [K, V]."""
        random_numbers = self.random_numbers[rows].gather(1, self.positions[0, rows, None])
        return draw_tokens(logits, random_numbers, self.temperature[rows], self.top_p[rows], self.top_k)


def left_padded(
    prompts: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as a batch [K, T], and its attention mask."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad_token_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
    mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
    return ids.to(device), mask.long().to(device)


def affordable_slots(model: PeftModel | PreTrainedModel, most: int) -> int:
    """The number of slots for which there is memory, at most `most`.

    Beside the slots there must be room for the keys and values of prompts while they are computed, as many as of one
    slot, and for the logits.

    Raises:
        ValueError: there is no memory for a single one.
    """
    config, weight = model.config, model.get_output_embeddings().weight
    slot_numbers = 2 * config.num_hidden_layers * config.max_position_embeddings * config.num_key_value_heads
    slot_bytes = slot_numbers * config.head_dim * weight.element_size()
    if not weight.is_cuda:
        return most
    free = torch.cuda.mem_get_info()[0]
    logits_bytes = LOGITS * config.vocab_size * 4
    count = min(most, int((USABLE * free - WORKING_MEMORY - slot_bytes) // (slot_bytes + logits_bytes)))
    if count < 1:
        raise ValueError(
            f"{free / GIB:.1f} GiB of GPU memory are free beside the model; an answer takes twice "
            f"{slot_bytes / GIB:.1f} GiB for its keys and values, "
            f"and {WORKING_MEMORY / GIB:.1f} GiB are needed to work. Stop other programs on this GPU."
        )
    return count
