"""qlora/inference/batcher.py and slots.py: which requests run together, and their tokens."""

import asyncio
import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import add_random_lora
from peft import PeftModel

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, fast_layers
from qlora.inference import batcher as batcher_module
from qlora.inference.batcher import Answer, Batcher
from qlora.inference.decoding import decode, draw_tokens, make_sampler
from qlora.inference.slots import STEPS, Slots, Task, affordable_slots, left_padded
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model
from qlora.units import GIB

EOS = 2


class Counting:
    """Slots whose answers are the lengths of their prompts, over and over."""

    capacity = 20

    def __init__(self, count: int):
        self.count, self.begun, self.lengths = count, [], {}

    def begin(self, tasks: dict[int, Task]) -> list[int]:
        self.begun.append({slot: len(task.prompt_ids) for slot, task in tasks.items()})
        self.lengths |= self.begun[-1]
        return list(self.begun[-1].values())

    def generate(self, highest_slot: int) -> list[list[int]]:
        assert self.lengths and highest_slot == max(self.lengths)
        return [[self.lengths.get(slot, 0)] * 2 for slot in range(self.count)]

    def end(self, slot: int):
        del self.lengths[slot]


async def tokens_of(answer: Answer) -> list[int]:
    return [token async for piece in answer.tokens([EOS]) for token in piece]


def run(
    tasks: list[Task], count: int, cancelled: tuple[int, ...] = ()
) -> tuple[list[list[int]], list[dict[int, int]]]:
    """The tokens of each task, and what was begun together: slot -> length of the prompt."""

    async def main():
        slots = Counting(count)
        batcher = Batcher(slots, [EOS])
        answers = [Answer(task) for task in tasks]
        for place, answer in enumerate(answers):
            answer.cancelled = place in cancelled
            assert batcher.submit(answer)
        batcher.thread.start()
        kept = [answer for place, answer in enumerate(answers) if place not in cancelled]
        found = [await tokens_of(answer) for answer in kept]
        batcher.stop()
        batcher.thread.join()
        assert not slots.lengths  # every slot is free again
        return found, slots.begun

    return asyncio.run(asyncio.wait_for(main(), 10))


def test_answer_begins_when_a_slot_is_free():
    tasks = [Task([0] * length, most) for length, most in ((3, 1), (4, 9), (5, 4), (6, 2))]
    found, begun = run(tasks, count=2)
    assert found == [[3], [4] * 9, [5] * 4, [6] * 2]
    assert begun == [{0: 3, 1: 4}, {0: 5}, {0: 6}]


def test_prompts_computed_together_have_no_more_tokens_than_the_longest():
    tasks = [Task([0] * length, 50) for length in (3, 4, 9, 20, 3, 10)]
    _, begun = run(tasks, count=6)
    assert begun == [{0: 3, 1: 4}, {2: 9}, {3: 20}, {4: 3, 5: 10}]


def test_answer_ends_with_its_token():
    assert run([Task([0] * EOS, 9)], count=1)[0] == [[EOS]]


def test_cancelled_request_is_not_begun():
    found, begun = run([Task([0] * length, 3) for length in (3, 4, 5)], count=1, cancelled=(1,))
    assert found == [[3] * 3, [5] * 3] and begun == [{0: 3}, {0: 5}]


def test_queue_has_room_for_so_many(monkeypatch):
    monkeypatch.setattr(batcher_module, "MOST_WAITING", 2)

    async def main() -> list[bool]:
        batcher = Batcher(Counting(1), [EOS])
        return [batcher.submit(Answer(Task([0], 1))) for _ in range(3)]

    assert asyncio.run(main()) == [True, True, False]


@pytest.fixture
def model(varied_checkpoint) -> PeftModel:
    model = load_quantized_model(str(varied_checkpoint), torch.float32)
    return add_random_lora(model, ["query_key_value", "dense"], std=0.3).eval()


def tokens_alone(model: PeftModel, task: Task) -> list[int]:
    """The greedy tokens of a task, with peft's layers and without slots."""
    ids, mask = left_padded([task.prompt_ids], 3, torch.device("cpu"))
    with contextlib.nullcontext() if task.adapter == 0 else model.disable_adapter():
        pieces = list(decode(model.get_base_model(), ids, mask, task.max_new_tokens, make_sampler(False)))
    return torch.cat(pieces, dim=1)[0].tolist()


@pytest.mark.parametrize("kernel", [False, True])
def test_tokens_in_slots_are_those_of_each_alone(model, monkeypatch, kernel):
    """With the kernel of attention, too, in Triton's interpreter."""
    end, most = [model.config.gmask_token_id, model.config.bos_token_id], 5
    tasks = [Task([*range(10, 10 + n), *end], most, adapter=adapter) for n, adapter in ((3, 0), (7, -1), (2, 0))]
    expected = [tokens_alone(model, task) for task in tasks]
    assert all(len(set(tokens)) > 1 for tokens in expected)
    if kernel:
        pytest.importorskip("triton")
        biases = {id(layer.attention.query_key_value.bias) for layer in model.get_base_model().transformer.layers}
        monkeypatch.setattr(fast_layers, "kernels_supported", lambda tensor: id(tensor) in biases)
    replace_layers(model, for_training=False)
    monkeypatch.setattr(model.config, "max_sequence_length", 16)

    slots = Slots(model, count=2, top_k=0)
    found = [slots.begin({0: tasks[0]}) + slots.generate(highest_slot=0)[0]]  # alone, in the first slot
    found.append(slots.begin({1: tasks[1]}))
    rows = slots.generate(highest_slot=1)  # both
    found = [tokens + row for tokens, row in zip(found, rows, strict=True)]
    slots.end(0)
    found.append(slots.begin({0: tasks[2]}))  # in the slot that the first one left
    for _ in range(2):
        rows = slots.generate(highest_slot=1)
        found[1], found[2] = found[1] + rows[1], found[2] + rows[0]
    assert [tokens[:most] for tokens in found] == expected
    slots.end(0)
    slots.end(1)
    found = [[token] for token in slots.begin({1: tasks[0], 0: tasks[1]})]  # in one batch, the first one padded
    rows = slots.generate(highest_slot=1)
    assert [found[0] + rows[1], found[1] + rows[0]] == [tokens[:3] for tokens in expected[:2]]


def test_drawn_tokens_go_by_the_settings_of_their_task(tiny_model: ChatGLMForConditionalGeneration):
    end = [tiny_model.config.gmask_token_id, tiny_model.config.bos_token_id]
    task = Task([5, 6, 7, *end], 5, temperature=3.0, top_p=0.8, seed=7)
    assert not torch.equal(task.random_numbers(), dataclasses.replace(task, seed=8).random_numbers())
    numbers, settings = iter(task.random_numbers()), (torch.tensor([[3.0]]), torch.tensor([[0.8]]))
    ids, mask = left_padded([task.prompt_ids], 3, torch.device("cpu"))
    pieces = decode(
        tiny_model, ids, mask, 5, lambda logits: draw_tokens(logits, next(numbers)[None, None], *settings, 9)
    )
    expected = torch.cat(list(pieces), dim=1)[0].tolist()
    assert expected != torch.cat(list(decode(tiny_model, ids, mask, 5, make_sampler(False))), dim=1)[0].tolist()
    slots = Slots(tiny_model, count=2, top_k=9)
    slots.begin({0: Task([8, *end], 5)})
    assert slots.temperature.min() > 0  # no division by the 0 of the likeliest token
    found = slots.begin({1: task})
    for _ in range(2):
        found += slots.generate(highest_slot=1)[1]
    assert found == expected


def test_step_is_the_smallest_that_has_all_answers(tiny_model: ChatGLMForConditionalGeneration):
    slots, steps = Slots(tiny_model, count=20, top_k=0), []
    assert [n for n in slots.steps if len(slots.caches[n].layers[0].keys) == n] == [1, 8, 16, 20]
    slots.steps = {n: functools.partial(steps.append, n) for n in slots.steps}
    for highest_slot in (0, 1, 7, 8, 15, 16, 19):
        slots.generate(highest_slot)
    assert steps[::STEPS] == [1, 8, 8, 16, 16, 20, 20]


def test_slot_whose_end_is_reached_stays_there_until_it_is_free(
    tiny_model: ChatGLMForConditionalGeneration, monkeypatch
):
    monkeypatch.setattr(tiny_model.config, "max_sequence_length", 8)
    slots = Slots(tiny_model, count=2, top_k=0)
    slots.begin({1: Task([5, 6, 130, tiny_model.config.bos_token_id], 4)})
    for _ in range(4):
        slots.generate(highest_slot=1)
    assert slots.positions[:, 1].tolist() == [7, 7] and slots.positions[:, 0].tolist() == [0, 0]
    slots.end(1)
    slots.generate(highest_slot=1)
    assert not slots.positions.any()


# Drawing of tokens, each row with settings of its own.


@pytest.mark.parametrize("top_k", [0, 5])
def test_drawn_tokens_have_the_frequencies_of_the_sampler(top_k):
    torch.manual_seed(0)
    logits, draws = torch.randn(1, 60) * 2, 20_000
    settings = [(1.0, 1.0), (0.5, 0.9), (1.5, 0.3)]
    random_numbers = torch.rand(draws, 1)
    for temperature, top_p in settings:
        sampler = make_sampler(True, temperature=temperature, top_k=top_k, top_p=top_p)
        expected = torch.bincount(sampler(logits.expand(draws, -1))[:, 0], minlength=60) / draws
        columns = torch.tensor([[temperature], [top_p]]).repeat(1, draws)[..., None]
        found = torch.bincount(
            draw_tokens(logits.expand(draws, -1), random_numbers, *columns, top_k)[:, 0], minlength=60
        )
        assert (found / draws - expected).abs().max() < 0.02
        assert not found[expected == 0].sum() > 5


def test_extreme_random_numbers_and_settings():
    logits = torch.tensor([[1.0, 3.0, 2.0, float("-inf")]]).repeat(4, 1)
    random_numbers = torch.tensor([[0.0], [1 - 2**-24], [1 - 2**-24], [1 - 2**-24]])
    temperature, top_p = torch.tensor([[2.0], [2.0], [2.0], [0.01]]), torch.tensor([[1.0], [1.0], [1e-9], [1.0]])
    assert draw_tokens(logits, random_numbers, temperature, top_p, 0)[:, 0].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("free", "most", "layers", "expected"),
    [(75, 256, 28, 80), (75, 16, 28, 16), (3.7, 8, 28, 1), (3, 256, 1, 40)],
)
def test_slots_leave_memory_for_prompts_and_logits(monkeypatch, free, most, layers, expected):
    weight, config = SimpleNamespace(is_cuda=True, element_size=lambda: 2), ChatGLMConfig(num_layers=layers)
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: SimpleNamespace(weight=weight))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 80 * GIB))
    count = affordable_slots(model, most)
    assert count == expected
    # Keys and values of 2,048 tokens in bf16, for the slots and for prompts; six copies of the logits in fp32.
    needed = (count + 1) * 2 * layers * 2048 * 4096 * 2 + count * 6 * 130528 * 4 + 1.5 * GIB
    assert needed < free * GIB


def test_too_little_memory_for_one_slot_is_refused(monkeypatch):
    weight = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    model = SimpleNamespace(config=ChatGLMConfig(), get_output_embeddings=lambda: SimpleNamespace(weight=weight))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 8 * GIB))
    with pytest.raises(
        ValueError, match=r"3\.0 GiB of GPU memory are free beside the model; an answer takes twice 0\.9 GiB"
    ):
        affordable_slots(model, 8)
