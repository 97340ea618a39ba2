"""Answers of the base model and of the adapter to every row of a file, kept as they come, so that a rerun goes on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizer

from qlora.export.official_folder import write_json
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import generate_texts

PREDICTIONS, METRICS_FILE = "predictions.jsonl", "metrics.json"


@dataclass(frozen=True)
class Protocol:
    """How answers are made and what they are held against; lengths in tokens, None for no limit.

    Attributes:
        do_sample: sampling with top_p 0.7 and temperature 0.95, else the likeliest token.
        max_prompt_tokens, max_reference_tokens: what they are cut to, `[gMASK]` and `<sop>` included.
        max_new_tokens: longest answer.
    """

    do_sample: bool
    max_prompt_tokens: int | None
    max_reference_tokens: int | None
    max_new_tokens: int


PROTOCOLS = {
    # Source: ptuning/evaluate.sh and ptuning/main.py of ChatGLM-6B: 64 tokens each, 512 for prompt and answer.
    "published": Protocol(do_sample=True, max_prompt_tokens=64, max_reference_tokens=64, max_new_tokens=448),
    "greedy": Protocol(do_sample=False, max_prompt_tokens=None, max_reference_tokens=None, max_new_tokens=512),
}


def reference_text(tokenizer: PreTrainedTokenizer, text: str, max_tokens: int | None) -> str:
    """A reference as the tokenizer gives it back, which is how answers come: punctuation half-width, cut if asked."""
    cut = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    return tokenizer.decode(tokenizer(text, split_special_tokens=True, **cut).input_ids, skip_special_tokens=True)


def digest(*contents: bytes) -> str:
    """A short fingerprint."""
    return hashlib.sha256(b"\n".join(contents)).hexdigest()[:16]


def resume_predictions(folder: Path, settings: dict) -> dict[int, dict]:
    """The predictions that an interrupted run left, by index; what it wrote last may be half a line, and is dropped.

    Raises:
        ValueError: they were made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, settings)
    write_json(folder / METRICS_FILE, {"settings": settings})
    path = folder / PREDICTIONS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    predictions = {row["index"]: row for row in map(json.loads, lines)}
    write_predictions(folder, predictions)
    return predictions


def check_settings(folder: Path, settings: dict):
    """ValueError where a folder holds predictions that were made in another way."""
    path = folder / PREDICTIONS
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        earlier = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = {}
    differ = [name for name in settings if earlier.get(name) != settings[name]]
    if differ:
        changes = ", ".join(
            f"the {name.removesuffix('_digest')} {'is' if name.startswith('adapter') else 'are'} not the same"
            if name.endswith("_digest")
            else f"{name} {earlier.get(name)}, now {settings[name]}"
            for name in differ
        )
        raise ValueError(
            f"{folder} holds predictions made in another way: {changes}. Give another --output_dir, or delete that "
            "folder to start anew."
        )


def write_predictions(folder: Path, predictions: dict[int, dict]):
    """Replaces the file of predictions at once, in the order of the rows."""
    text = "".join(json.dumps(predictions[i], ensure_ascii=False) + "\n" for i in sorted(predictions))
    aside = folder / f"{PREDICTIONS}.new"
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / PREDICTIONS)


def batches_of(rows: list[dict], batch_size: int) -> list[list[int]]:
    """Indices of rows in batches of similar length; the same for every run, so that sampling repeats.

    The longest come first: what does not fit the GPU's memory then fails at once.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizer,
    rows: list[dict],
    protocol: Protocol,
    batch_size: int,
    seed: int,
    done: dict[int, dict],
) -> Iterator[list[dict]]:
    """Answers, without and with the adapter, a batch at a time, whatever is not done yet.

    Args:
        model: a peft model in evaluation mode.
        tokenizer: the model's.
        rows: with `prompt` and `reference`.
        protocol: how to answer.
        batch_size: prompts answered at once.
        seed: of the sampling; each batch draws from its own, so that an interruption changes nothing.
        done: predictions that there are, by index.
    Yields:
        The rows of a batch with `index`, and `base` and `adapter`, the two answers as the tokenizer decodes them.
    """

    def answer(prompts: list[str], seed: int) -> list[str]:
        torch.manual_seed(seed)
        sampler = make_sampler(protocol.do_sample)
        limits = {"max_new_tokens": protocol.max_new_tokens, "max_prompt_tokens": protocol.max_prompt_tokens}
        return generate_texts(model, tokenizer, prompts, sampler=sampler, batch_size=batch_size, **limits)

    with tqdm(total=len(rows), desc="Answering") as progress:
        for number, indices in enumerate(batches_of(rows, batch_size)):
            if not all(i in done for i in indices):
                prompts = [rows[i]["prompt"] for i in indices]
                with model.disable_adapter():
                    base = answer(prompts, seed + number)
                tuned = answer(prompts, seed + number)
                yield [
                    {"index": i, **rows[i], "base": before, "adapter": after}
                    for i, before, after in zip(indices, base, tuned, strict=True)
                ]
            progress.update(len(indices))
