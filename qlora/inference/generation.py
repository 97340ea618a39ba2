"""Answers to prompts, in batches or as a stream."""

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
    """The answers to all prompts, formatted by `clean_response`; arguments as for `generate_texts`."""
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
    """Answers all prompts, in batches of prompts of similar length.

    Args:
        model: a peft model on its device, with its adapter enabled or disabled.
        tokenizer: of the model.
        prompts: texts; control tokens written in them stay text.
        max_new_tokens: most tokens of an answer.
        sampler: see `make_sampler`.
        batch_size: prompts in a batch.
        max_prompt_tokens: most tokens of a prompt, `[gMASK]` and `<sop>` included; longer prompts are cut. None for no
            limit.
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
    """Generates one answer.

    Args:
        model, tokenizer, max_new_tokens, sampler: as for `generate_texts`.
        prompt: a text; control tokens written in it stay text.
    Yields:
        The answer generated so far, after every two tokens.
    """
    batch = tokenizer(prompt, split_special_tokens=True, return_tensors="pt").to(model.device)
    tokens = []
    for piece in decode(model.get_base_model(), **batch, max_new_tokens=max_new_tokens, sampler=sampler, sync_every=2):
        tokens += piece[0].tolist()
        yield clean_response(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")
