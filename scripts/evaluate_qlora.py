"""Score the base model and the adapter on a file of rows: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L.

    python scripts/evaluate_qlora.py                            # greedy, on data/dev.jsonl
    python scripts/evaluate_qlora.py --protocol published       # sampling and cutting as the official evaluation does

Writes predictions.jsonl, metrics.json and summary.html. Interrupted, the same command goes on where it was.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatglm.chat import build_prompt
from qlora.arguments import COMPUTE_DTYPE, check_positive, choose_compute_dtype, parse_command_line
from qlora.data.rows import read_rows
from qlora.errors import message_instead_of_traceback
from qlora.evaluation import predictions as evaluation
from qlora.evaluation.metrics import METRICS, check_metric_libraries, mean_scores, score
from qlora.evaluation.page import MODELS, render_page
from qlora.export.official_folder import write_json
from qlora.inference.decoding import use_inference_kernels
from qlora.loading import adapter_config, load_adapter, load_quantized_model, load_tokenizer


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and by which protocol."""

    adapter_path: str = field(
        default="saved_files/chatGLM_6B_QLoRA_t32", metadata={"help": "Folder of the trained adapter."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model folder; by default the one written in the adapter's config."}
    )
    data_path: str = field(default="data/dev.jsonl", metadata={"help": "Rows to answer, one JSON a line."})
    protocol: str = field(
        default="greedy",
        metadata={
            "help": "greedy: likeliest tokens, nothing cut; published: that of the official P-tuning evaluation.",
            "choices": list(evaluation.PROTOCOLS),
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results; by default evaluation_<protocol> beside the adapter."}
    )
    prompt_text: str = field(default="", metadata={"help": "Text put before every instruction, as in training."})
    max_prompts: int | None = field(default=None, metadata={"help": "Answer only the first so many rows."})
    batch_size: int = field(default=16, metadata={"help": "Prompts answered at once."})
    seed: int = field(default=42, metadata={"help": "Random seed of the sampling."})
    compute_dtype: str | None = field(default=None, metadata=COMPUTE_DTYPE)

    def __post_init__(self):
        problems = check_positive(self, "batch_size", "max_prompts")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def main():
    with message_instead_of_traceback():
        args = parse_command_line(EvaluationArguments)
        check_metric_libraries()
        protocol = evaluation.PROTOCOLS[args.protocol]
        folder = Path(args.output_dir or f"{args.adapter_path}/evaluation_{args.protocol}")
        adapter = adapter_config(args.adapter_path)
        base_path = args.model_name_or_path or adapter.base_model_name_or_path
        compute_dtype = choose_compute_dtype(args.compute_dtype, {})
        tokenizer = load_tokenizer(base_path)
        rows = read_samples(args, tokenizer, protocol.max_reference_tokens)
        settings = settings_of(args, base_path, compute_dtype, rows)
        predictions = evaluation.resume_predictions(folder, settings)
        complete = len(predictions) == len(rows)
        if not complete:
            model = load_adapter(load_quantized_model(base_path, compute_dtype), args.adapter_path).eval()
    if not complete:
        use_inference_kernels(model)
        try:
            answer(model, tokenizer, rows, protocol, args, predictions, folder)
        except torch.OutOfMemoryError as error:
            raise SystemExit(
                f"error: {args.batch_size} prompts at once are too many, lower --batch_size: {error}"
            ) from None
    summarize(folder, settings, predictions)


def read_samples(
    args: EvaluationArguments, tokenizer: PreTrainedTokenizer, max_reference_tokens: int | None
) -> list[dict]:
    """Prompt and reference of every row, as they are used."""
    return [
        {
            "prompt": args.prompt_text + build_prompt(row["query"], row["history"]),
            "reference": evaluation.reference_text(tokenizer, row["answer"], max_reference_tokens),
        }
        for row in list(read_rows(args.data_path))[: args.max_prompts]
    ]


def settings_of(args: EvaluationArguments, base_path: str, compute_dtype: torch.dtype, rows: list[dict]) -> dict:
    """All that the answers depend on; the contents of adapter and rows as fingerprints."""
    adapter = [file.read_bytes() for file in sorted(Path(args.adapter_path).glob("adapter_*"))]
    return {
        "protocol": args.protocol,
        **asdict(evaluation.PROTOCOLS[args.protocol]),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "model_name_or_path": base_path,
        "data_path": args.data_path,
        "adapter_digest": evaluation.digest(*adapter),
        "rows_digest": evaluation.digest(json.dumps(rows).encode()),
    }


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizer,
    rows: list[dict],
    protocol: evaluation.Protocol,
    args: EvaluationArguments,
    predictions: dict[int, dict],
    folder: Path,
):
    """Adds what is missing to the predictions and, batch by batch, to their file."""
    batches = evaluation.answer_rows(model, tokenizer, rows, protocol, args.batch_size, args.seed, predictions)
    with open(folder / evaluation.PREDICTIONS, "a", encoding="utf-8") as file:
        for batch in batches:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in batch))
            file.flush()
            predictions.update({row["index"]: row for row in batch})


def summarize(folder: Path, settings: dict, predictions: dict[int, dict]):
    """Scores every answer, writes the three files, prints the means."""
    for row in predictions.values():
        row["scores"] = {model: score(row[model], row["reference"]) for model in MODELS}
    evaluation.write_predictions(folder, predictions)
    rows = list(predictions.values())
    means = {model: mean_scores(row["scores"][model] for row in rows) for model in MODELS}
    write_json(folder / evaluation.METRICS_FILE, {"settings": settings, "samples": len(rows), **means})
    title = f"{settings['data_path']} · {settings['protocol']}"
    (folder / "summary.html").write_text(render_page(title, settings, means, rows), encoding="utf-8")
    print(f"{f'{len(rows)} samples':<15}" + "".join(f"{name.upper():>10}" for name in METRICS))
    for model, label in MODELS.items():
        print(f"{label:<12}" + "".join(f"{means[model][name]:10.2f}" for name in METRICS))
    print(f"Wrote {folder}/summary.html, metrics.json and predictions.jsonl")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
