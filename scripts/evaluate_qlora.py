"""Score the answers of the base model and of the adapter to a file of data rows: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L.
Or see with --general how far training moved the answers to prompts of other kinds.

    python scripts/evaluate_qlora.py                            # greedy, on data/dev.jsonl
    python scripts/evaluate_qlora.py --protocol published       # sampling and length limits of the official evaluation
    python scripts/evaluate_qlora.py --general                  # 60 general prompts: what the model may have forgotten

Writes predictions.jsonl, metrics.json and summary.html. After an interruption the same command continues.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.arguments import COMPUTE_DTYPE_FLAG, DEFAULT_ADAPTER, DownloadArguments, in_repository, not_positive
from qlora.command_line import parse_command_line
from qlora.errors import message_instead_of_traceback, one_line_on_interrupt, set_up_logging
from qlora.evaluation.metrics import METRICS, check_metric_libraries, mean_scores, score
from qlora.evaluation.protocols import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from glm_shared.chat import ChatTokenizer, Prompt
    from qlora.evaluation.general import Task


@dataclass
class EvaluationArguments(DownloadArguments):
    """What to evaluate, on what, and by which protocol."""

    adapter_path: str = field(
        default_factory=lambda: in_repository(DEFAULT_ADAPTER),
        metadata={"help": "Folder of the trained adapter."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model folder; by default the one written in the adapter's config."}
    )
    data_path: str = field(
        default_factory=lambda: in_repository("data/dev.jsonl"),
        metadata={"help": "Rows to answer, one JSON a line; with --general those that show the task's outputs."},
    )
    general: bool = field(
        default=False, metadata={"help": "Answer the prompts of data/general.jsonl, and compare the answers."}
    )
    protocol: str = field(
        default="greedy",
        metadata={
            "help": "greedy: likeliest tokens, nothing cut; published: that of the official P-tuning evaluation.",
            "choices": list(PROTOCOLS),
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the results; by default evaluation_<protocol> or general_<protocol> in the adapter's."
        },
    )
    prompt_text: str = field(default="", metadata={"help": "Text put before every instruction, as in training."})
    max_prompts: int | None = field(default=None, metadata={"help": "Answer only the first so many rows."})
    batch_size: int = field(default=16, metadata={"help": "Prompts answered at once."})
    seed: int = field(default=42, metadata={"help": "Random seed of the sampling."})
    compute_dtype: str | None = field(default=None, metadata=COMPUTE_DTYPE_FLAG)

    def __post_init__(self):
        problems = not_positive(self, "batch_size", "max_prompts")
        if problems:
            raise ValueError("; ".join(problems) + ".")


@one_line_on_interrupt()
def main():
    set_up_logging()
    with message_instead_of_traceback():
        args = parse_command_line(EvaluationArguments)
        if not args.general:
            check_metric_libraries()
    evaluate(args)


def evaluate(args: EvaluationArguments):
    """Generates the missing answers, compares all answers and writes the results."""
    # Imported here, since these imports take seconds: a misspelt flag is reported before.

    from qlora.adapter import base_model_path, load_adapter, read_adapter
    from qlora.checkpoint import check_checkpoint
    from qlora.evaluation.general import GENERAL_PROMPTS, read_task
    from qlora.evaluation.predictions import digest, resume_predictions
    from qlora.hub.fetch import fetch_model
    from qlora.loading import (
        advice_if_out_of_memory,
        check_hardware,
        choose_compute_dtype,
        load_quantized_model,
        load_tokenizer,
    )
    from qlora.training.model_card import add_section

    with message_instead_of_traceback():
        kind = "general" if args.general else "evaluation"
        folder = Path(args.output_dir or f"{args.adapter_path}/{kind}_{args.protocol}")
        adapter = [file.read_bytes() for file in sorted(Path(args.adapter_path).glob("adapter_*"))]
        read_adapter(args.adapter_path)  # a mistake in it is reported before anything is loaded
        base_path = args.model_name_or_path or base_model_path(args.adapter_path)
        fetch_model(base_path, args)
        config, compute_dtype = check_checkpoint(base_path), choose_compute_dtype(args.compute_dtype)
        tokenizer = load_tokenizer(base_path)
        task = read_task(args.data_path) if args.general else None
        prompts, rows = read_general(args, tokenizer) if args.general else read_samples(args, tokenizer)
        settings = {  # everything that the answers depend on
            "protocol": args.protocol,
            **asdict(PROTOCOLS[args.protocol]),
            "seed": args.seed,
            "batch_size": args.batch_size,
            "compute_dtype": str(compute_dtype).removeprefix("torch."),
            "model_name_or_path": base_path,
            "data_path": f"data/{GENERAL_PROMPTS.name}" if args.general else args.data_path,
            "adapter_digest": digest(*adapter),
            "rows_digest": digest(json.dumps(rows).encode()),
        }
        predictions = resume_predictions(folder, settings)
        if len(predictions) < len(rows):
            check_hardware(config, compute_dtype)
            model = load_quantized_model(base_path, compute_dtype, config)
            model = load_adapter(model, args.adapter_path).eval()
    with message_instead_of_traceback(OSError):
        if len(predictions) < len(rows):
            with advice_if_out_of_memory(f"{args.batch_size} prompts at once are too many, lower --batch_size"):
                answer(model, tokenizer, prompts, rows, args, predictions, folder)
        if task:
            section = summarize_general(folder, settings, predictions, tokenizer, args.data_path, task)
        else:
            section = summarize(folder, settings, predictions, tokenizer)
    if folder.resolve().parent == Path(args.adapter_path).resolve():
        with message_instead_of_traceback():
            add_section(Path(args.adapter_path), *section)


def read_general(args: EvaluationArguments, tokenizer: "ChatTokenizer") -> "tuple[list[Prompt], list[dict]]":
    """The general prompts, and for each `category`, `prompt` and, where there is one right answer, `expected`."""
    from glm_shared.chat import Prompt
    from qlora.evaluation.general import read_general_prompts
    from qlora.inference.generation import shown_prompt

    rows = read_general_prompts()[: args.max_prompts]
    prompts = [Prompt(row.pop("instruction")) for row in rows]
    shown = [{"prompt": shown_prompt(tokenizer, prompt, args.prompt_text)} for prompt in prompts]
    return prompts, [row | text for row, text in zip(rows, shown, strict=True)]


def read_samples(args: EvaluationArguments, tokenizer: "ChatTokenizer") -> "tuple[list[Prompt], list[dict]]":
    """The prompt of each row, and the row's `prompt` as a text and `reference`."""
    from glm_shared.chat import Prompt
    from qlora.data.rows import read_rows
    from qlora.evaluation.predictions import reference_text
    from qlora.inference.generation import shown_prompt

    rows = list(read_rows(args.data_path))[: args.max_prompts]
    if any(row["messages"] for row in rows):
        raise ValueError(f"{args.data_path} has conversations with tools; these can be trained on, not asked.")
    prompts = [Prompt(row["query"], row["history"], row["system"]) for row in rows]
    most = PROTOCOLS[args.protocol].max_reference_tokens
    return prompts, [
        {
            "prompt": shown_prompt(tokenizer, prompt, args.prompt_text),
            "reference": reference_text(tokenizer, row["answer"], most),
        }
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def answer(
    model,
    tokenizer: "ChatTokenizer",
    prompts: "list[Prompt]",
    rows: list[dict],
    args: EvaluationArguments,
    predictions: dict[int, dict],
    folder: Path,
):
    """Generates the missing predictions, adds them to `predictions` and appends each batch to their file."""
    import torch

    from qlora.atomic import append_lines
    from qlora.evaluation.predictions import PREDICTIONS, answer_rows
    from qlora.inference.decoding import make_sampler
    from qlora.inference.generation import generate_texts
    from qlora.layers.replacement import replace_layers

    protocol: Protocol = PROTOCOLS[args.protocol]
    limits = {"max_new_tokens": protocol.max_new_tokens, "max_prompt_tokens": protocol.max_prompt_tokens}
    sampler = make_sampler(**tokenizer.sampling | {"do_sample": protocol.do_sample})
    options = {"sampler": sampler, "batch_size": args.batch_size, "prompt_text": args.prompt_text, **limits}
    replace_layers(model, for_training=False)

    def generate(indices: list[int], seed: int) -> list[str]:
        torch.manual_seed(seed)
        return generate_texts(model, tokenizer, [prompts[i] for i in indices], **options)

    for batch in answer_rows(model, generate, rows, args.batch_size, args.seed, predictions):
        append_lines(folder / PREDICTIONS, batch)
        predictions.update({row["index"]: row for row in batch})


def summarize(
    folder: Path, settings: dict, predictions: dict[int, dict], tokenizer: "ChatTokenizer"
) -> tuple[str, str, dict[str, float]]:
    """Scores all answers, writes the three files and prints the mean scores.

    Returns:
        Name, text and scores of a section for the adapter's card.
    """
    from qlora.atomic import atomic_file, write_json
    from qlora.evaluation.page import MODELS, render_page
    from qlora.evaluation.predictions import METRICS_FILE, write_predictions
    from qlora.training.model_card import shown_path

    for row in predictions.values():
        row["scores"] = {model: score(row[model], row["reference"]) for model in MODELS}
    write_predictions(folder, predictions)
    rows = list(predictions.values())
    means = {model: mean_scores(row["scores"][model] for row in rows) for model in MODELS}
    write_json(folder / METRICS_FILE, {"settings": settings, "samples": len(rows), **means})
    title = f"{settings['data_path']} · {settings['protocol']}"
    page = render_page(title, settings, means, rows, tokenizer.clean_response)
    with atomic_file(folder / "summary.html") as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"{f'{len(rows)} samples':<15}" + "".join(f"{name.upper():>10}" for name in METRICS))
    for model, label in MODELS.items():
        print(f"{label:<12}" + "".join(f"{means[model][name]:10.2f}" for name in METRICS))
    print(f"Wrote {folder}/summary.html, metrics.json and predictions.jsonl")
    lines = [["", *(name.upper() for name in METRICS)], ["---", *["---:"] * len(METRICS)]]
    lines += [[label, *(f"{means[model][name]:.2f}" for name in METRICS)] for model, label in MODELS.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    name = f"Evaluation on {shown_path(settings['data_path'])}, {settings['protocol']} protocol"
    return name, f"{len(rows)} samples, scores in percent.\n\n{table}", means["adapter"]


def summarize_general(
    folder: Path,
    settings: dict,
    predictions: dict[int, dict],
    tokenizer: "ChatTokenizer",
    data_path: str,
    task: "Task",
) -> tuple[str, str]:
    """Measures how far the answers moved, writes the three files and prints the table.

    Returns:
        Name and text of a section for the adapter's card.
    """
    from qlora.atomic import atomic_file, write_json
    from qlora.evaluation.general import compare, format_table, summarize_categories
    from qlora.evaluation.page import render_general_page
    from qlora.evaluation.predictions import METRICS_FILE, write_predictions

    for row in predictions.values():
        row["measures"] = compare(row, task)
    write_predictions(folder, predictions)
    rows = [predictions[index] for index in sorted(predictions)]
    table = summarize_categories(rows)
    found = {"data_path": data_path, "threshold": task.threshold}
    write_json(folder / METRICS_FILE, {"settings": settings, "task": found, "categories": table})
    title = f"{settings['data_path']} · {settings['protocol']}"
    page = render_general_page(title, settings | {"task": data_path}, table, rows, tokenizer.clean_response)
    with atomic_file(folder / "summary.html") as partial:
        partial.write_text(page, encoding="utf-8")
    print(format_table(table))
    print(f"Wrote {folder}/summary.html, metrics.json and predictions.jsonl")
    return f"Answers to general prompts, {settings['protocol']} protocol", format_table(table)


if __name__ == "__main__":
    main()
