"""Answers to prompts: many at once, or one as it is being written."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizer

from chatglm.chat import clean_response
from qlora.inference.decoding import Sampler, decode


def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
) -> list[str]:
    """The answers to all prompts, cleaned for people to read; see `generate_texts`."""
    return [
        clean_response(text) for text in generate_texts(model, tokenizer, prompts, max_new_tokens, sampler, batch_size)
    ]


def generate_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    max_prompt_tokens: int | None = None,
) -> list[str]:
    """Answers every prompt, in batches of prompts of similar length; control tokens written in a prompt stay text.

    Args:
        model: a peft model on its device; its adapter is used unless it is disabled.
        tokenizer: the model's.
        prompts: texts as the user wrote them.
        max_new_tokens: longest answer in tokens.
        sampler: see `make_sampler`.
        batch_size: prompts answered at once.
        max_prompt_tokens: longest prompt, `[gMASK]` and `<sop>` included; the rest is cut. None for no limit.
    Returns:
        The answers as the tokenizer decodes them, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", disable=len(order) <= batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in indices],
            padding=True,
            truncation=max_prompt_tokens is not None,
            max_length=max_prompt_tokens,
            split_special_tokens=True,
            return_tensors="pt",
        ).to(model.device)
        pieces = list(decode(model.get_base_model(), **batch, max_new_tokens=max_new_tokens, sampler=sampler))
        texts = tokenizer.batch_decode(torch.cat(pieces, dim=1), skip_special_tokens=True)
        for i, text in zip(indices, texts, strict=True):
            answers[i] = text
    return answers


def stream_answer(
    model: PeftModel, tokenizer: PreTrainedTokenizer, prompt: str, max_new_tokens: int, sampler: Sampler
) -> Iterator[str]:
    """Yields the answer so far, again and again, as it grows."""
    batch = tokenizer(prompt, split_special_tokens=True, return_tensors="pt").to(model.device)
    tokens = []
    for piece in decode(model.get_base_model(), **batch, max_new_tokens=max_new_tokens, sampler=sampler, sync_every=2):
        tokens += piece[0].tolist()
        yield clean_response(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")
