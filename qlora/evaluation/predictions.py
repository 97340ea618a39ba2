"""Predictions: answers without and with the adapter to all data rows of a file, stored batch by batch.

An interrupted evaluation continues with the first batch that is not stored.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizer

from qlora.atomic import atomic_file, json_lines, write_json

PREDICTIONS, METRICS_FILE = "predictions.jsonl", "metrics.json"


def reference_text(tokenizer: PreTrainedTokenizer, text: str, max_tokens: int | None) -> str:
    """A reference after encoding and decoding, with the same half-width punctuation as the answers.

    Args:
        tokenizer: of the model.
        text: of the reference; control tokens written in it stay text.
        max_tokens: it is cut to so many tokens, control tokens included; None for no limit.
    """
    cut = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    return tokenizer.decode(tokenizer(text, split_special_tokens=True, **cut).input_ids, skip_special_tokens=True)


def digest(*contents: bytes) -> str:
    """The first 16 hexadecimal digits of a SHA-256 hash."""
    return hashlib.sha256(b"\n".join(contents)).hexdigest()[:16]


def resume_predictions(folder: Path, settings: dict) -> dict[int, dict]:
    """Reads the predictions of an interrupted evaluation, and writes the settings; a cut last line is dropped.

    Args:
        folder: of the results; it is created if it is missing.
        settings: everything that the answers depend on, name -> value.
    Returns:
        Index of the data row -> prediction.
    Raises:
        ValueError: the folder has predictions that were made with other settings.
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
    """ValueError if a folder has predictions that were made with other settings."""
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
    """Replaces the file of predictions, in the order of the data rows."""
    with atomic_file(folder / PREDICTIONS) as partial:
        partial.write_text(json_lines(predictions[i] for i in sorted(predictions)), encoding="utf-8")


def batches_of(rows: list[dict], batch_size: int) -> list[list[int]]:
    """The indices of rows, in batches of prompts of similar length.

    The batches depend on the rows only, so that sampling is reproducible. The longest prompts come first, so that a
    batch that is too large for the GPU's memory fails at the start.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]), reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_rows(
    model: PeftModel,
    answer: Callable[[list[int], int], list[str]],
    rows: list[dict],
    batch_size: int,
    seed: int,
    done: dict[int, dict],
) -> Iterator[list[dict]]:
    """Generates answers without and with the adapter, for each batch that has rows without a prediction.

    Args:
        model: a peft model in evaluation mode.
        answer: (indices of rows, seed) -> the model's answers as the tokenizer decodes them.
        rows: with `prompt` and `reference`.
        batch_size: prompts in a batch.
        seed: of the sampling. The n-th batch has seed + n, so that an interruption does not change the answers.
        done: the existing predictions, by index.
    Yields:
        The predictions of a batch: its rows with `index`, `base` and `adapter`, the answers without and with it.
    """
    with tqdm(total=len(rows), desc="Answering") as progress:
        for number, indices in enumerate(batches_of(rows, batch_size)):
            if not all(i in done for i in indices):
                with model.disable_adapter():
                    base = answer(indices, seed + number)
                tuned = answer(indices, seed + number)
                yield [
                    {"index": i, **rows[i], "base": before, "adapter": after}
                    for i, before, after in zip(indices, base, tuned, strict=True)
                ]
            progress.update(len(indices))
