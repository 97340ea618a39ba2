"""Fine-tune ChatGLM-6B with QLoRA.

    bash train.sh                                  # chatGLM_6B_QLoRA.json, data/train.jsonl, THUDM/chatglm-6b
    python train_qlora.py --train_args_json my.json --train_data_path my.jsonl --lora_rank 8

The JSON holds transformers' TrainingArguments; `python train_qlora.py --help` lists the rest.
"""

import logging
import os
from pathlib import Path

# Memory that is freed in pieces can then be used as a whole, so that a tight plan holds. Read when torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from qlora.arguments import FinetuneArguments, parse_command_line, read_training_arguments
from qlora.checkpoint import check_checkpoint
from qlora.curves import draw_losses
from qlora.data import SampleEncoder, check_data_files, load_samples
from qlora.errors import TrainingStopped, message_instead_of_traceback
from qlora.linear import use_training_kernels
from qlora.loading import add_lora, check_gpu_is_there, load_quantized_model, load_tokenizer
from qlora.memory_plan import keep_or_recompute, plan_memory
from qlora.saving import check_output_dir, find_checkpoint
from qlora.trainer import QLoRATrainer

logger = logging.getLogger("train_qlora")


def main():
    with message_instead_of_traceback():
        trainer, checkpoint = prepare()
    with message_instead_of_traceback(TrainingStopped):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        with message_instead_of_traceback():
            draw_losses({output_dir.name: trainer.state.log_history}, output_dir / "loss.png")
        logger.info("The adapter is in %s", output_dir)


def prepare() -> tuple[QLoRATrainer, str | None]:
    """Everything up to the first step: arguments, data, model, adapter."""
    args = parse_command_line(FinetuneArguments)
    training_args, compute_dtype, recompute = read_training_arguments(
        args.train_args_json, args.seed, args.compute_dtype, evaluate=args.eval_data_path is not None
    )
    checkpoint = find_checkpoint(args.resume_from_checkpoint, training_args.output_dir)
    check_output_dir(training_args.output_dir, checkpoint)
    torch.manual_seed(training_args.seed)

    check_data_files(args.train_data_path, args.eval_data_path)
    check_gpu_is_there(check_checkpoint(args.model_name_or_path))

    tokenizer = load_tokenizer(args.model_name_or_path)
    encoder = SampleEncoder(tokenizer, args.prompt_text, args.max_input_length, args.max_output_length)
    with training_args.main_process_first(desc="tokenizing"):
        train_samples = load_samples(args.train_data_path, encoder)
        eval_samples = load_samples(args.eval_data_path, encoder) if args.eval_data_path else None

    model = load_quantized_model(args.model_name_or_path, compute_dtype)
    model = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    model.print_trainable_parameters()

    if args.plain:
        keep_or_recompute(model, keep=recompute is False)
        max_tokens = None
    else:
        use_training_kernels(model)
        fixed = args.fixed_plan(recompute, model.config.num_layers)
        samples_per_step = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        max_tokens = plan_memory(model, train_samples["length"], samples_per_step, args.memory_budget, fixed)

    trainer = QLoRATrainer(
        model=model,
        args=training_args,
        max_tokens=max_tokens,
        train_dataset=train_samples,
        eval_dataset=eval_samples,
        processing_class=tokenizer,
    )
    return trainer, checkpoint


if __name__ == "__main__":
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s")
    main()
