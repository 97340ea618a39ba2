"""Whether the optimizer and the learning rate schedule of a run can be made, and take a step."""

import dataclasses
import tempfile

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from qlora.errors import first_line

OPTIMIZER_KEYS = ("optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")


def check_optimizer(source: str, args: TrainingArguments, steps: int):
    """Builds the optimizer and the learning rate schedule for a model of one matrix, and takes a step with each.

    That of the schedule is the last one of the run, since one in the warm-up does not show what comes after it.

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
    try:
        with tempfile.TemporaryDirectory() as scratch:
            args_here = dataclasses.replace(args, output_dir=scratch, push_to_hub=False, report_to="none")
            trainer = Trainer(model, args_here, eval_dataset=[])
            ignored = ignored_by_optimizer(args, model)
            if ignored:
                raise ValueError(f"it does not use {', '.join(ignored)}; remove it")
            trainer.create_optimizer_and_scheduler(steps)
            weight.grad = torch.ones_like(weight)
            trainer.optimizer.step()
            if isinstance(trainer.lr_scheduler, LambdaLR):
                trainer.lr_scheduler.last_epoch = steps - 2  # it computes a step from its number alone
                trainer.lr_scheduler.step()
            else:
                trainer.lr_scheduler.step(0.0)  # the loss of an evaluation
    except Exception as error:  # many libraries have optimizers
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
