"""Whether the optimizer and the learning rate schedule of a run can be made, and take a step."""

import dataclasses
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from qlora.errors import first_line

OPTIMIZER_KEYS = ("optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")


def check_optimizer(source: str, args: TrainingArguments, steps: int):
    """Builds the optimizer and the learning rate schedule for a model of one matrix, and takes two steps.

    Args:
        source: where the values stand, for the message.
        args: the values.
        steps: optimizer steps of the run.
    Raises:
        ValueError: a value or a combination that the optimizer or the schedule refuses, or a package that is missing.
    """
    weight = torch.nn.Parameter(torch.zeros(8, 8, device=args.device))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    nothing_else = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(model, dataclasses.replace(args, output_dir=scratch, push_to_hub=False, **nothing_else))
            ignored = ignored_by_optimizer(args, model)
            if ignored:
                raise ValueError(f"it does not use {', '.join(ignored)}; remove it")
            trainer.create_optimizer_and_scheduler(steps)
            for _ in range(2):
                weight.grad = torch.ones_like(weight)
                trainer.optimizer.step()
                trainer.lr_scheduler.step()
    except (ArithmeticError, AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error).removesuffix(".")
        names = f"optim {args.optim.value} with lr_scheduler_type {args.lr_scheduler_type.value}"
        raise ValueError(f"{source}: {names} cannot be used: {reason}.") from error


def ignored_by_optimizer(args: TrainingArguments, model: torch.nn.Module) -> list[str]:
    """The settings that make no difference to the optimizer, each entry of `optim_args` by itself."""

    def arguments(**changes) -> str:
        return str(Trainer.get_optimizer_cls_and_kwargs(dataclasses.replace(args, **changes), model))

    given = arguments()
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.name in OPTIMIZER_KEYS}
    ignored = [
        name
        for name, default in defaults.items()
        if getattr(args, name) != default and arguments(**{name: default}) == given
    ]
    entries = args.optim_args.split(",") if args.optim_args else []
    for entry in entries:
        others = ",".join(other for other in entries if other != entry)
        if arguments(optim_args=others) == given:
            ignored.append(f"optim_args {entry.strip()}")
    return ignored
