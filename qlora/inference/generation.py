"""Answers to prompts, in batches or as a stream."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from glm_shared.chat import ChatTokenizer, Prompt, ToolPrompt
from qlora.data.fields import check_text
from qlora.inference.decoding import Sampler, decode


def check_prompt(
    prompt: Prompt | ToolPrompt,
    tokenizer: ChatTokenizer,
    max_length: int,
    max_new_tokens: int,
    prompt_text: str = "",
) -> list[int]:
    """Checks that a prompt can be answered, and returns its token ids.

    Args:
        prompt: control tokens written in its texts stay text.
        tokenizer: of the model.
        max_length: most tokens of a prompt and its answer together.
        max_new_tokens: most tokens of the answer.
        prompt_text: text put before the prompt.
    Raises:
        NoTools: the prompt has tools, and the model has none.
        ValueError: the question is blank, a text has half a character, or the prompt leaves too little room for the
            answer.
    """
    if not prompt.query.strip():
        raise ValueError("输入是空的。 The prompt is empty.")
    text = prompt_text + prompt.text(tokenizer)
    try:
        check_text(text)
    except ValueError as error:
        raise ValueError(f"输入里有不完整的字符。 The prompt has {error}.") from error
    count = len(text)
    chinese, english = f"{count:,} 个字符", f"{count:,} characters"
    if count <= tokenizer.longest_token * max_length:  # a longer text cannot fit, and would take long to tokenize
        ids = prompt.ids(tokenizer, prompt_text)
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
    prompts: list[Prompt],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    prompt_text: str = "",
) -> Iterator[dict[str, str]]:
    """Answers all prompts in their order, batch by batch.

    Args:
        model: a peft model, which answers without and with its adapter; or a model without an adapter.
        tokenizer, prompts, max_new_tokens, sampler, batch_size, prompt_text: as for `generate_texts`.
    Yields:
        `prompt`, as `shown_prompt` gives it, with the answers `base` and `adapter`; or, without an adapter, `answer`.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        args = (model, tokenizer, batch, max_new_tokens, sampler, batch_size, prompt_text)
        generate = functools.partial(generate_answers, *args)
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                base = generate()
            answers = {"base": base, "adapter": generate()}
        else:
            answers = {"answer": generate()}
        shown = [shown_prompt(tokenizer, prompt, prompt_text) for prompt in batch]
        for texts in zip(shown, *answers.values(), strict=True):
            yield dict(zip(("prompt", *answers), texts, strict=True))


def shown_prompt(tokenizer: ChatTokenizer, prompt: Prompt, prompt_text: str) -> str:
    """A prompt as a text: a single question as it was asked, others as the model reads them."""
    return prompt_text + (prompt.query if prompt.is_single else prompt.text(tokenizer))


def generate_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: list[Prompt],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    prompt_text: str = "",
) -> list[str]:
    """The answers to all prompts, formatted by the tokenizer's `clean_response`; arguments as for `generate_texts`."""
    texts = generate_texts(model, tokenizer, prompts, max_new_tokens, sampler, batch_size, prompt_text)
    return [tokenizer.clean_response(text) for text in texts]


def generate_texts(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: list[Prompt],
    max_new_tokens: int,
    sampler: Sampler,
    batch_size: int,
    prompt_text: str = "",
    max_prompt_tokens: int | None = None,
) -> list[str]:
    """Answers all prompts, in batches of prompts of similar length.

    Args:
        model: on its device; a peft model with its adapter enabled or disabled, or a model without an adapter.
        tokenizer: of the model.
        prompts: control tokens written in their texts stay text.
        max_new_tokens: most tokens of an answer.
        sampler: see `make_sampler`.
        batch_size: prompts in a batch.
        prompt_text: text put before every prompt.
        max_prompt_tokens: most tokens of a prompt, control tokens included; longer prompts are cut. None for no limit.
    Returns:
        The answers as the tokenizer decodes them, in the order of the prompts.
    """
    ids = [prompt.ids(tokenizer, prompt_text) for prompt in prompts]
    if max_prompt_tokens:
        ids = [tokenizer.cut_prompt_ids(prompt, max_prompt_tokens) for prompt in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(prompts)
    options: Any = {"max_new_tokens": max_new_tokens, "sampler": sampler, "stop_token_ids": tokenizer.stop_token_ids}
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", disable=len(order) <= batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in indices]}, return_tensors="pt").to(model.device)
        pieces = list(decode(language_model(model), **batch, **options))
        texts = tokenizer.batch_decode(torch.cat(pieces, dim=1), skip_special_tokens=True)
        for i, text in zip(indices, texts, strict=True):
            answers[i] = text
    return answers


def stream_answer(
    model: PeftModel | PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompt: Prompt,
    max_new_tokens: int,
    sampler: Sampler,
    prompt_text: str = "",
) -> Iterator[str]:
    """Generates one answer.

    Args:
        model, tokenizer, max_new_tokens, sampler, prompt_text: as for `generate_texts`.
        prompt: control tokens written in its texts stay text.
    Yields:
        The answer generated so far, after every two tokens.
    """
    ids = prompt.ids(tokenizer, prompt_text)
    batch = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(model.device)
    options: Any = {"max_new_tokens": max_new_tokens, "sampler": sampler, "stop_token_ids": tokenizer.stop_token_ids}
    tokens = []
    for piece in decode(language_model(model), **batch, **options, sync_every=2):
        tokens += piece[0].tolist()
        yield tokenizer.clean_response(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")


def language_model(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The language model, with any adapter in its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
