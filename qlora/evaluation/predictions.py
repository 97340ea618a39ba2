"""Answers of the base model and of the adapter to every row of a file, stored one batch at a time.

An interrupted evaluation continues where it stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizer

from qlora.atomic import write_json

PREDICTIONS, METRICS_FILE = "predictions.jsonl", "metrics.json"


def reference_text(tokenizer: PreTrainedTokenizer, text: str, max_tokens: int | None) -> str:
    """A reference after encoding and decoding, as answers are: with half-width punctuation, cut to `max_tokens`."""
    cut = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    return tokenizer.decode(tokenizer(text, split_special_tokens=True, **cut).input_ids, skip_special_tokens=True)


def digest(*contents: bytes) -> str:
    """A short fingerprint."""
    return hashlib.sha256(b"\n".join(contents)).hexdigest()[:16]


def resume_predictions(folder: Path, settings: dict) -> dict[int, dict]:
    """The predictions of an interrupted run, by index; an incomplete last line is dropped.

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
    """ValueError where a folder holds predictions that were made with other settings."""
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
    """Replaces the file of predictions, sorted by the order of the rows."""
    text = "".join(json.dumps(predictions[i], ensure_ascii=False) + "\n" for i in sorted(predictions))
    staged = folder / f"{PREDICTIONS}.new"
    staged.write_text(text, encoding="utf-8")
    staged.replace(folder / PREDICTIONS)


def batches_of(rows: list[dict], batch_size: int) -> list[list[int]]:
    """Indices of rows in batches of similar length; the same for every run, so that sampling is reproducible.

    The longest come first, so that a batch too large for the GPU's memory fails at the start.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_rows(
    model: PeftModel,
    answer: Callable[[list[str], int], list[str]],
    rows: list[dict],
    batch_size: int,
    seed: int,
    done: dict[int, dict],
) -> Iterator[list[dict]]:
    """Answers, without and with the adapter, the rows that have no prediction yet, a batch at a time.

    Args:
        model: a peft model in evaluation mode.
        answer: prompts, seed -> the model's answers as the tokenizer decodes them.
        rows: with `prompt` and `reference`.
        batch_size: prompts answered at once.
        seed: of the sampling; each batch has its own, so that an interruption does not change the answers.
        done: the predictions that exist, by index.
    Yields:
        The rows of a batch with `index`, and `base` and `adapter`, the two answers.
    """
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
