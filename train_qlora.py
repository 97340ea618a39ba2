"""Fine-tune ChatGLM-6B with QLoRA.

    bash train.sh                                  # chatGLM_6B_QLoRA.json, data/train.jsonl, THUDM/chatglm-6b
    python train_qlora.py --train_args_json my.json --train_data_path my.jsonl --lora_rank 8
    bash train.sh --check                          # everything that can be known before the model is loaded

The JSON holds transformers' TrainingArguments; `python train_qlora.py --help` lists the rest.
"""

import logging
import os
from pathlib import Path

# Memory that is freed in pieces can then be used as a whole, so that a tight plan holds. Read when torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from accelerate import PartialState

from qlora.arguments import FinetuneArguments, parse_command_line
from qlora.data.dataset import numpy_column
from qlora.errors import TrainingStopped, message_instead_of_traceback
from qlora.layers.linear import replace_layers
from qlora.loading import add_lora, load_quantized_model
from qlora.training.curves import draw_losses
from qlora.training.memory_plan import keep_or_recompute, plan_memory
from qlora.training.preflight import Preflight, run_preflight
from qlora.training.preflight_report import describe
from qlora.training.trainer import QLoRATrainer
from qlora.training.training_args import samples_per_step

logger = logging.getLogger("train_qlora")


def main():
    with message_instead_of_traceback():
        run = run_preflight(parse_command_line(FinetuneArguments))
        if run.args.check is not None:
            show(run)
        run.raise_problems()
        if run.args.check is not None:
            return
        trainer = prepare(run)
    with message_instead_of_traceback(TrainingStopped):
        trainer.train(resume_from_checkpoint=run.resume_from)
        trainer.save_model()
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        with message_instead_of_traceback():
            draw_losses({output_dir.name: trainer.state.log_history}, output_dir / "loss.png")
        logger.info("The adapter is in %s", output_dir)


def show(run: Preflight):
    """Prints a checked run, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(describe(run))


def prepare(run: Preflight) -> QLoRATrainer:
    """From a checked run to the first step: model, adapter, memory plan."""
    args, (training_args, compute_dtype, recompute) = run.args, run.setup
    torch.manual_seed(training_args.seed)
    model = load_quantized_model(args.model_name_or_path, compute_dtype)
    model = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    model.print_trainable_parameters()

    if args.plain:
        keep_or_recompute(model, keep=recompute is False)
        max_tokens = None
    else:
        replace_layers(model)
        fixed = args.fixed_plan(recompute, model.config.num_layers)
        lengths = numpy_column(run.train_samples, "length").tolist()
        max_tokens = plan_memory(model, lengths, samples_per_step(training_args), args.memory_budget, fixed)

    return QLoRATrainer(
        model=model,
        args=training_args,
        max_tokens=max_tokens,
        train_dataset=run.train_samples,
        eval_dataset=run.eval_samples,
        processing_class=run.tokenizer,
    )


if __name__ == "__main__":
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s")
    main()
    PartialState().destroy_process_group()
