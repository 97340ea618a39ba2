"""qlora/inference/generation.py: the order of the answers is that of the prompts, not that of the batches."""

import pytest
import torch
from conftest import add_random_lora

from glm_shared.chat import Prompt
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import generate_texts
from qlora.loading import load_quantized_model


@pytest.fixture
def model(tiny_checkpoint):
    return add_random_lora(load_quantized_model(str(tiny_checkpoint), torch.float32), std=0.3).eval()


def test_answers_are_in_the_order_of_the_prompts(model, tokenizer):
    queries = ["类型#裙*颜色#白色*风格#简约*图案#条纹", "类型#裤", "类型#上衣*颜色#黑色", "裙", "类型#裙*颜色#白色"]
    prompts = [Prompt(query) for query in queries]
    options = {"max_new_tokens": 12, "sampler": make_sampler(do_sample=False)}
    expected = [generate_texts(model, tokenizer, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert len(set(expected)) == len(expected)  # otherwise the test could not detect a wrong order
    for batch_size in (1, 2, 5):
        assert generate_texts(model, tokenizer, prompts, batch_size=batch_size, **options) == expected
