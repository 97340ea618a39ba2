"""What `--check` prints: a table of the run, a histogram of the sample lengths, and the text of the first samples.

`--dry_run` prints what is about the data.
"""

import itertools
import os
import sys

import numpy as np
import torch

from glm_shared.chat import ChatTokenizer
from qlora.data.dataset import IGNORE_INDEX, numpy_column, summary
from qlora.data.row_files import Place
from qlora.training.model_card import library_versions
from qlora.training.preflight import Preflight
from qlora.units import GIB

LONGEST_BAR, BARS = 40, 8  # of the histogram: characters of a bar, and lines
PARTS = {  # (is trained on, is a control token) -> (name, color)
    (False, False): ("prompt", "\033[34m"),  # blue
    (False, True): ("control", "\033[2m"),  # dim
    (True, False): ("answer", "\033[32m"),  # green
    (True, True): ("end", "\033[32m"),
}
END_OF_COLOR = "\033[0m"


def describe(preflight: Preflight) -> str:
    """The report on a run, as lines of text.

    Args:
        preflight: the results of the checks; `args.check` or `args.dry_run` is the number of samples to show.
    """
    args = preflight.args
    rows = data_table(preflight) if args.dry_run is not None else [*run_table(preflight), *data_table(preflight)]
    lines = [f"{name:<11} {indented(value)}" for name, value in rows if value]
    if preflight.train_samples and preflight.tokenizer:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
        count = min(args.check or args.dry_run or 0, len(preflight.train_samples))
        first = preflight.train_samples.select(range(count))
        lines += [show_sample(sample, preflight.tokenizer, color) for sample in first]
    if not preflight.problems:
        lines.append("OK")
    return "\n".join(lines)


def indented(text: str) -> str:
    """A text whose further lines are indented to the second column."""
    return text.replace("\n", "\n" + " " * 12)


def run_table(preflight: Preflight) -> list[tuple[str, str | None]]:
    """Names and values of what is known of machine, model and run; a value is None if it is not known."""
    args, config, counts, disk = preflight.args, preflight.config, preflight.counts, preflight.disk
    plan = preflight.plan_table()
    weights = f"{config.multiplied_weights / 1e6:,.1f} million weights" if config else ""
    return [
        ("versions", f"{library_versions()}, CUDA {torch.version.cuda}"),
        ("GPU", describe_gpu(preflight)),
        ("model", f"{args.model_name_or_path}, {weights}, architecture of {config.display_name}" if config else None),
        ("adapter", describe_adapter(preflight)),
        ("arithmetic", preflight.setup and preflight.setup.arithmetic),
        ("resumes", preflight.resume_from and f"from {preflight.resume_from}"),
        ("steps", counts and f"{counts.steps:,}, evaluations {counts.evaluations:,}, checkpoints {counts.saves:,}"),
        ("disk", disk and f"at most {disk.needed / 1e6:,.1f} MB for output_dir, of {disk.free / 1e6:,.0f} MB free"),
        ("memory", plan and plan.strip().replace("\n  ", "\n")),
    ]


def data_table(preflight: Preflight) -> list[tuple[str, str | None]]:
    """Names and values of what is known of the data; a value is None if it is not known."""
    train, evaluation = preflight.train_samples, preflight.eval_samples
    return [
        ("training", train and summary(train)),
        ("evaluation", evaluation and summary(evaluation)),
        ("lengths", train and histogram(numpy_column(train, "length"))),
    ]


def describe_adapter(preflight: Preflight) -> str | None:
    """One line: rank, target layers, number of parameters, and where the values come from if they are not new."""
    lora, init_adapter = preflight.lora, preflight.args.init_adapter
    if not (lora and preflight.trainable):
        return None
    origin = f", with the values of {init_adapter}" if init_adapter else ""
    return f"rank {lora.rank} on {', '.join(lora.target_modules)}, {preflight.trainable:,} parameters{origin}"


def describe_gpu(preflight: Preflight) -> str:
    """One line: name, compute capability and free memory of the GPU, and whether bitsandbytes works on it."""
    if not torch.cuda.is_available():
        return "none"
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    works = "works" if preflight.bitsandbytes_works else "does not work"
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return f"{torch.cuda.get_device_name()}, compute capability {capability}, {memory}, bitsandbytes {works}"


def histogram(lengths: np.ndarray) -> str:
    """One line for each range of lengths (in tokens): the range, the number of samples, and a bar."""
    bars = min(BARS, int(np.ptp(lengths)) + 1)
    edges = np.linspace(lengths.min(), lengths.max() + 1, bars + 1).round().astype(int)
    counts, _ = np.histogram(lengths, edges)
    return "\n".join(
        f"{first:>5} to {last - 1:>5} tokens {count:>9,} {'█' * round(LONGEST_BAR * count / counts.max())}".rstrip()
        for first, last, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )


def show_sample(sample: dict, tokenizer: ChatTokenizer, color: bool) -> str:
    """A sample as text, one line for each part: prompt, control tokens, answer, end.

    Args:
        sample: with `input_ids`, `labels`, `line`, `element`, `turn`, and possibly `file`.
        tokenizer: of the model.
        color: whether ANSI codes color the parts.
    """
    control = {*tokenizer.control_token_ids}
    ids, trained = sample["input_ids"], [label != IGNORE_INDEX for label in sample["labels"]]
    of_file = f"{sample['file']}, " if "file" in sample else ""
    place = str(Place(sample["line"], sample["element"], sample["turn"]))
    lines = [f"{place + ' ':<11} {of_file}{len(ids)} tokens, {sum(trained)} of them trained on"]
    kinds = [(is_trained, token_id in control) for is_trained, token_id in zip(trained, ids, strict=True)]
    for kind, tokens in itertools.groupby(zip(kinds, ids, strict=True), lambda token: token[0]):
        name, ansi = PARTS[kind]
        part = [token_id for _, token_id in tokens]
        text = "".join(tokenizer.convert_ids_to_tokens(part)) if kind[1] else tokenizer.decode(part)
        lines.append(f"  {name:<9} {ansi if color else ''}{indented(text)}{END_OF_COLOR if color else ''}")
    return "\n".join(lines)
