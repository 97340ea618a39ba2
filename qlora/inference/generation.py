"""Answers to prompts, in batches or as a stream."""

import functools
from collections.abc import Iterator

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from glm_shared.chat import ChatTokenizer
from qlora.inference.decoding import Sampler, decode


def check_prompt(
    prompt: str, tokenizer: ChatTokenizer, max_length: int, max_new_tokens: int, prompt_text: str = ""
) -> list[int]:
    """Checks that a prompt can be answered, and returns its token ids.

    Args:
        prompt: a text; control tokens written in it stay text.
        tokenizer: of the model.
        max_length: most tokens of a prompt and its answer together.
        max_new_tokens: most tokens of the answer.
        prompt_text: text put before the prompt.
    Raises:
        ValueError: the prompt is blank, or leaves too little room for the answer.
    """
    if not prompt.strip():
        raise ValueError("输入是空的。 The prompt is empty.")
    text = prompt_text + prompt
    chinese, english = f"{len(text):,} 个字符", f"{len(text):,} characters"
    if len(text) <= tokenizer.longest_token * max_length:  # a longer text cannot fit, and would take long to tokenize
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        length = len(ids)
        if length + max_new_tokens <= max_length:
            return ids
        chinese, english = f"{length:,} 个 token", f"{length:,} tokens"
    raise ValueError(
        f"输入（含对话历史）有 {chinese}，加上最多 {max_new_tokens} 个新 token，超过模型的上限 {max_length} 个：请缩短"
        "输入、清空对话，或减小最大长度（max_new_tokens）。 The prompt, with the conversation before it, has "
        f"{english}; with up to {max_new_tokens} new tokens that is over the model's {max_length}: shorten it, clear "
        "the conversation, or lower max_new_tokens."
    )


def compare_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
) -> Iterator[dict[str, str]]:
    """Answers all prompts in their order, batch by batch.

    Args:
        model: a peft model, which answers without and with its adapter; or a model without an adapter.
        tokenizer, prompts, max_new_tokens, sampler, batch_size: as for `generate_texts`.
    Yields:
        `prompt`, with the answers `base` and `adapter`; or, without an adapter, with `answer`.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generate = functools.partial(generate_answers, model, tokenizer, batch, max_new_tokens, sampler, batch_size)
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                base = generate()
            answers = {"base": base, "adapter": generate()}
        else:
            answers = {"answer": generate()}
        for texts in zip(batch, *answers.values(), strict=True):
            yield dict(zip(("prompt", *answers), texts, strict=True))


def generate_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
) -> list[str]:
    """The answers to all prompts, formatted by the tokenizer's `clean_response`; arguments as for `generate_texts`."""
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens, sampler, batch_size)
    return [tokenizer.clean_response(text) for text in texts]


def generate_texts(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    max_prompt_tokens: int | None = None,
) -> list[str]:
    """Answers all prompts, in batches of prompts of similar length.

    Args:
        model: on its device; a peft model with its adapter enabled or disabled, or a model without an adapter.
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
        pieces = list(decode(language_model(model), **batch, max_new_tokens=max_new_tokens, sampler=sampler))
        texts = tokenizer.batch_decode(torch.cat(pieces, dim=1), skip_special_tokens=True)
        for i, text in zip(indices, texts, strict=True):
            answers[i] = text
    return answers


def stream_answer(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompt: str,
    max_new_tokens: int,
    sampler: Sampler,
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
    for piece in decode(language_model(model), **batch, max_new_tokens=max_new_tokens, sampler=sampler, sync_every=2):
        tokens += piece[0].tolist()
        yield tokenizer.clean_response(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")


def language_model(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The language model, with any adapter in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
