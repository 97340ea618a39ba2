"""Fine-tune ChatGLM-6B with QLoRA.

    bash train.sh                                  # chatGLM_6B_QLoRA.json, data/train.jsonl, THUDM/chatglm-6b
    python train_qlora.py --train_args_json my.json --train_data_path my.jsonl --lora_rank 8
    bash train.sh --check                          # every check that needs no loaded model
    bash train.sh --dry_run 3                      # three samples as the model will see them; needs no GPU
    python train_qlora.py --demo                   # training and inference of a tiny model, on a CPU

The JSON holds transformers' TrainingArguments; `python train_qlora.py --help` lists the rest.
"""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.arguments import FinetuneArguments
from qlora.command_line import parse_command_line
from qlora.errors import (
    TrainingStopped,
    is_main_process,
    message_instead_of_traceback,
    one_line_on_interrupt,
    set_up_logging,
)
from qlora.startup import quick_imports, read_ahead
from qlora.training.demo import run_demo
from qlora.training.processes import end_with_parents, go_on_without_output

if TYPE_CHECKING:
    from qlora.training.preflight import Preflight
    from qlora.training.trainer import QLoRATrainer

logger = logging.getLogger("train_qlora")


@one_line_on_interrupt()
def main():
    go_on_without_output()
    end_with_parents()
    set_up_logging()
    with message_instead_of_traceback():
        args = parse_command_line(FinetuneArguments)
    if args.demo:
        run_demo(args.demo, sys.argv[1:])
        return
    # Freed memory can then be reused in larger pieces, so that a tight memory plan holds. Read when torch is imported.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    train(args)

    from accelerate import PartialState

    PartialState().destroy_process_group()


def train(args: FinetuneArguments):
    """Checks, loads, trains, saves."""
    if args.check is None and args.dry_run is None:
        read_ahead(args.model_name_or_path)
    # Imported here: the libraries behind them take seconds to import, and a misspelt flag is answered before.
    with quick_imports():
        from qlora.atomic import publish_files
        from qlora.training.checkpoints import check_output_dir, staging_dir
        from qlora.training.curves import draw_losses
        from qlora.training.model_card import PICTURE, data_files, write_model_card
        from qlora.training.preflight import run_preflight
        from qlora.training.preflight_report import describe
        from qlora.training.run_lock import lock_output_dir

    with message_instead_of_traceback():
        preflight = run_preflight(args)
        is_report = args.check is not None or args.dry_run is not None
        if is_report and is_main_process():
            print(describe(preflight))
        preflight.raise_problems()
        if is_report:
            return
    args = preflight.args  # data sets of the Hub have become files
    output_dir = Path(preflight.setup.training_args.output_dir)
    with message_instead_of_traceback(TrainingStopped), lock_output_dir(output_dir):
        with message_instead_of_traceback():
            check_output_dir(output_dir, preflight.resume_from)  # a run may have ended there since the first check
            files = data_files(args, preflight.train_samples, preflight.eval_samples) if is_main_process() else []
            trainer = prepare(preflight)
        trainer.train(resume_from_checkpoint=preflight.resume_from)
        trainer.save_model()
        if trainer.is_world_process_zero():
            logger.info("The adapter is in %s", output_dir)
            with message_instead_of_traceback(), staging_dir(output_dir, owner=True) as staging:
                staging.mkdir()
                draw_losses({output_dir.name: trainer.state.log_history}, staging / PICTURE)
                write_model_card(staging, args, preflight.setup, preflight.lora, files, trainer.state.log_history)
                publish_files(staging, output_dir)
            if trainer.args.push_to_hub:
                trainer.push_to_hub()


def prepare(preflight: "Preflight") -> "QLoRATrainer":
    """From a checked run to the first step: 4-bit model, LoRA adapter, layers, memory plan."""
    import torch

    from qlora.adapter import add_adapter
    from qlora.export.four_bit_copy import save_copy
    from qlora.layers.replacement import replace_layers
    from qlora.loading import load_quantized_model
    from qlora.training.memory_plan import apply_plan, set_activation_checkpointing
    from qlora.training.trainer import QLoRATrainer

    args, (training_args, compute_dtype, recompute, fp8) = preflight.args, preflight.setup
    torch.manual_seed(training_args.seed)
    model = load_quantized_model(args.model_name_or_path, compute_dtype, preflight.config)
    if preflight.copy_source and is_main_process():
        save_copy(model, preflight.tokenizer, args.model_name_or_path, preflight.copy_source)
    model = add_adapter(model, preflight.lora, args.init_adapter)
    model.print_trainable_parameters()

    if args.plain:  # peft's and bitsandbytes' layers
        set_activation_checkpointing(model, enabled=recompute is not False)
    else:
        replace_layers(model, for_training=True, fp8=fp8)
        if table := preflight.plan_table():
            logger.info("Memory plan for %s\n%s", torch.cuda.get_device_name(), table)
        apply_plan(model, preflight.plan)

    return QLoRATrainer(
        model=model,
        args=training_args,
        max_tokens=None if args.plain else preflight.plan.max_tokens,
        run=preflight.run,
        train_dataset=preflight.train_samples,
        eval_dataset=preflight.eval_samples,
        processing_class=preflight.tokenizer,
    )


if __name__ == "__main__":
    main()
