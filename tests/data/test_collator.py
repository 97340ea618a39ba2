"""qlora/data/collator.py: samples concatenated in a row, each with its own positions and labels."""

import pytest
import torch

from chatglm import ChatGLMConfig
from qlora.data.batching import StepBatch
from qlora.data.collator import PaddingFreeCollator

GMASK, SOP, EOP = 507, 508, 509
CONFIG = ChatGLMConfig(
    vocab_size=512, bos_token_id=SOP, eos_token_id=EOP, pad_token_id=3, mask_token_id=506, gmask_token_id=GMASK
)
# (prompt, answer) of each sample; the second has the shortest possible prompt and answer.
PAIRS = [([11, 12, 13], [21, 22]), ([], [23]), ([14, 15, 16, 17, 18], [24, 25, 26, 27]), ([19], [28, 29])]


def sample(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    context, trained_on = [*prompt, GMASK, SOP], [*answer, EOP]
    return {"input_ids": context + trained_on, "labels": [-100] * len(context) + trained_on}


SAMPLES = [sample(*pair) for pair in PAIRS]
SIZES = [len(s["input_ids"]) for s in SAMPLES]


def collate(samples: list[dict]) -> dict:
    return PaddingFreeCollator(CONFIG)(StepBatch.collate(samples).samples)


@pytest.fixture
def batch() -> dict:
    return collate(SAMPLES)


def test_samples_are_concatenated(batch):
    assert batch["input_ids"].tolist() == [[i for s in SAMPLES for i in s["input_ids"]]]


def test_shapes_and_types(batch):
    total, trained_on = sum(SIZES), sum(len(answer) + 1 for _, answer in PAIRS)
    shapes = {"input_ids": (1, total), "position_ids": (1, 2, total)}
    shapes |= {"logits_to_keep": (trained_on,), "shift_labels": (1, trained_on)}
    assert batch.keys() == shapes.keys() | {"packed_sequences"}  # all are copied to the GPU: none is unused there
    assert {name: tuple(batch[name].shape) for name in shapes} == shapes
    assert {batch[name].dtype for name in shapes} == {torch.int64}


def test_layout_has_prompt_and_answer_of_each_sample(batch):
    # The prompt with [gMASK]; the answer with <sop> before it and <eop> after it.
    assert batch["packed_sequences"].lengths == [[len(prompt) + 1, len(answer) + 2] for prompt, answer in PAIRS]


def test_each_sample_has_positions_of_its_own(batch):
    # Source: the rules in "GLM: General Language Model Pretraining with Autoregressive Blank Infilling", section 2.1.
    position, block_position = [], []
    for prompt, answer in PAIRS:
        context, rest = len(prompt) + 1, len(answer) + 2  # with [gMASK]; with <sop> and <eop>
        position += [*range(context), *[context - 1] * rest]
        block_position += [0] * context + [*range(1, rest + 1)]
    assert batch["position_ids"].tolist() == [[position, block_position]]


def test_positions_of_a_sample_do_not_depend_on_the_others(batch):
    start = 0
    for one, size in zip(SAMPLES, SIZES, strict=True):
        single = collate([one])
        rows = slice(start, start + size)
        assert torch.equal(single["position_ids"], batch["position_ids"][:, :, rows])
        start += size


def test_positions_predict_the_labels(batch):
    ids, labels = batch["input_ids"][0], torch.tensor([i for s in SAMPLES for i in s["labels"]])
    positions, targets = batch["logits_to_keep"], batch["shift_labels"][0]
    assert torch.equal(labels[positions + 1], targets)
    assert torch.equal(ids[positions + 1], targets)
    assert (targets != -100).all()
    assert len(targets) == int((labels != -100).sum())
    # The position that predicts a label is in the sample of the label.
    sample_of = torch.arange(len(SAMPLES)).repeat_interleave(torch.tensor(SIZES))
    assert torch.equal(sample_of[positions], sample_of[positions + 1])


def test_sample_without_sop_is_all_prompt():
    batch = collate([{"input_ids": [11, 12, 13], "labels": [-100, -100, -100]}])
    assert batch["position_ids"].tolist() == [[[0, 1, 2], [0, 0, 0]]]
    assert batch["logits_to_keep"].tolist() == []
