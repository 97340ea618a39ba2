"""Answers to many prompts: batched, padded on the left, longest together."""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizer

from chatglm.chat import clean_response


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    batch_size: int = 8,
    **generation_kwargs,
) -> list[str]:
    """Answers every prompt; control tokens written in a prompt stay text.

    Args:
        model: with or without an adapter, on its device.
        tokenizer: the model's.
        prompts: texts as the user wrote them.
        batch_size: prompts answered at once.
        generation_kwargs: anything `generate` takes.
    Returns:
        The cleaned answers, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", disable=len(order) <= batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in indices], padding=True, split_special_tokens=True, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**batch, **generation_kwargs)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(indices, texts, strict=True):
            answers[i] = clean_response(text)
    return answers
